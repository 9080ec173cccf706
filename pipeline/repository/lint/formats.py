"""The findings of lint as other programs read them: GitHub's annotations and SARIF."""

import json
import os
from pathlib import Path
from urllib.parse import quote

from pipeline.core.text import Lines
from pipeline.repository.lint.check import LintResult

SARIF = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def format_github(linted: LintResult) -> Lines:
    """Return a workflow command for each finding: GitHub shows it at its line of a pull request.

    Source: "Workflow commands for GitHub Actions", setting a notice, warning or error message.
    """
    lines = []
    for finding in linted.findings:
        level = "notice" if finding.level == "note" else finding.level
        fields = {"file": _locate(finding.file), "line": finding.line, "title": finding.rule}
        text = f"{finding.message} ({finding.fix})" if finding.fix else finding.message
        stated = [f"{key}={_escape(str(value), ':,')}" for key, value in fields.items() if value]
        lines.append(f"::{level} {','.join(stated)}::{_escape(text)}")
    return Lines(*lines)


def format_sarif(linted: LintResult) -> str:
    """Return the findings as SARIF 2.1.0, for GitHub's code scanning and other readers."""
    results = []
    for finding in linted.findings:
        place: dict[str, object] = {"artifactLocation": {"uri": quote(_locate(finding.file))}}
        if finding.line:
            place["region"] = {"startLine": finding.line}
        text = f"{finding.message}. Fix: {finding.fix}" if finding.fix else finding.message
        results.append(
            {
                "ruleId": finding.rule,
                "level": finding.level,
                "message": {"text": text},
                "locations": [{"physicalLocation": place}],
            }
        )
    rules = [{"id": rule} for rule in sorted({finding.rule for finding in linted.findings})]
    run = {"tool": {"driver": {"name": "pipeline lint", "rules": rules}}, "results": results}
    return json.dumps({"$schema": SARIF, "version": "2.1.0", "runs": [run]})


def _locate(file: Path) -> str:
    """Return a file's path for a report: relative to the current folder if it is below it."""
    path = Path(os.path.abspath(file))
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _escape(text: str, more: str = "") -> str:
    """Percent-encode what would end a workflow command's line, or one of its fields."""
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in text)


FORMATS = {"github": format_github, "sarif": format_sarif}
