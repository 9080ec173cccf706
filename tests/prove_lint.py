"""Mutate a model repository in every way that we know, and hold lint against a real Triton.

    python tests/prove_lint.py exported/figures/lint.json

Exits with 1 where lint, static and live together, misses what Triton refuses, or refuses what
loads and is right.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mutations import CASES, LOADS, ON_A_SERVER, UNTRIED, Case, build, static_fault

from pipeline.files import write_json
from pipeline.lint import lint_model
from pipeline.lint_live import Trial, try_models
from pipeline.lint_text import Finding
from pipeline.machine import machine
from pipeline.paths import Paths

COMMAND = "make prove-lint"


def row(case: Case, findings: list[Finding], trial: Trial, repository: Path) -> dict[str, Any]:
    """One line of the table. A case is as expected when lint and the server are."""
    errors = [f for f in findings if f.level == "error"]
    told = [f for f in findings if f.rule == case.rule] or errors or findings
    fault = static_fault(case, findings)
    if trial.outcome not in ON_A_SERVER[case.expected]:
        fault += f" the server: {trial.outcome}"
    cause = trial.cause or (told[0].message if told else "")
    return {
        "case": case.name,
        "expected": case.expected,
        "why": case.why,
        "static": ("error: " if errors else "warning: ") + told[0].rule if told else "nothing",
        "line": told[0].line if told else None,
        "live": trial.outcome,
        "cause": cause.replace(f"{repository}/", "")[:300],
        "source": case.source or (told[0].source if told else None) or trial.source,
        "fault": fault,
    }


def table() -> list[dict[str, Any]]:
    """All cases, in a repository of their own."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        build(repository)
        static = {case.name: list(lint_model(repository / case.name)) for case in CASES}
        trials = try_models(repository, [case.name for case in CASES], Paths())
        return [
            row(case, static[case.name], trial, repository)
            for case, trial in zip(CASES, trials, strict=True)
        ]


def main() -> None:
    os.umask(0o022)
    rows = table()
    for one in rows:
        mark = "WRONG" if one["fault"] else "right"
        print(
            f"{mark}  {one['case']:36} {one['expected']:16} {one['static']:24} "
            f"{one['live']:11} {one['fault'] or one['cause']}"
        )
    right = {LOADS, UNTRIED}
    record = {
        "command": COMMAND,
        "mutations": sum(one["expected"] not in right for one in rows),
        "sound": sum(one["expected"] in right for one in rows),
        "faults": sum(bool(one["fault"]) for one in rows),
        "cases": rows,
    }
    write_json(Path(sys.argv[1]), {**machine(), **record})
    print(f"{record['mutations']} mutations, {record['sound']} sound variations, ", end="")
    print(f"{record['faults']} not as expected")
    sys.exit(1 if record["faults"] else 0)


if __name__ == "__main__":
    main()
