"""Lint's findings for other programs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.repository.lint.check import LintResult
from pipeline.repository.lint.formats import format_github, format_sarif
from pipeline.repository.lint.text import Finding
from tests.conftest import REPOSITORY
from tools.mutations import write_model


@pytest.fixture
def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LintResult:
    """A result with an error in a line, a warning of a whole file, and a note."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "models" / "a b,c" / "config.pbtxt"
    listed = (
        Finding("config-text", "error", config, "100% wrong:\nno such field", "spell it", 3),
        Finding("files", "warning", Path("/elsewhere/model.onnx"), "may be changed by anyone"),
        Finding("release", "note", config, "loads from 23.09 on", line=1),
    )
    return LintResult(tmp_path / "models", ("a b,c",), listed)


def test_github_shows_each_finding_at_its_line_and_no_text_begins_another_command(
    findings: LintResult,
) -> None:
    assert format_github(findings).split("\n") == [
        "::error file=models/a b%2Cc/config.pbtxt,line=3,title=config-text"
        "::100%25 wrong:%0Ano such field (spell it)",
        "::warning file=/elsewhere/model.onnx,title=files::may be changed by anyone",
        "::notice file=models/a b%2Cc/config.pbtxt,line=1,title=release::loads from 23.09 on",
    ]


def test_sarif_has_a_result_a_finding_with_its_rule_level_and_place(findings: LintResult) -> None:
    record = json.loads(format_sarif(findings))
    assert record["version"] == "2.1.0"
    (run,) = record["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [
        *("config-text", "files", "release"),
    ]
    assert [(one["ruleId"], one["level"]) for one in run["results"]] == [
        *(("config-text", "error"), ("files", "warning"), ("release", "note")),
    ]
    (place,) = run["results"][0]["locations"]
    assert place["physicalLocation"] == {
        "artifactLocation": {"uri": "models/a%20b%2Cc/config.pbtxt"},
        "region": {"startLine": 3},
    }
    assert run["results"][0]["message"]["text"].endswith("no such field. Fix: spell it")
    assert "region" not in run["results"][1]["locations"][0]["physicalLocation"]


@pytest.mark.parametrize("output_format", ["text", "github", "sarif", "json"])
def test_an_error_exits_with_3_in_every_format(tmp_path: Path, output_format: str) -> None:
    write_model(tmp_path / "net")
    config = tmp_path / "net" / "config.pbtxt"
    config.write_text(re.sub("max_batch_size", "max_bach_size", config.read_text()))
    result = CliRunner().invoke(main, ["lint", str(tmp_path), "--format", output_format])
    assert result.exit_code == 3
    assert "max_bach_size" in result.stdout
    if output_format in ("sarif", "json"):
        json.loads(result.stdout)  # and nothing else
    config.write_text(config.read_text().replace("max_bach_size", "max_batch_size"))
    result = CliRunner().invoke(main, ["lint", str(tmp_path), "--format", output_format])
    assert result.exit_code == 0


def test_the_hook_for_other_repositories_runs_a_command_that_exists() -> None:
    (hook,) = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text())
    program, command = hook["entry"].split()
    assert program == "pipeline"
    assert command in main.commands
    assert re.search(hook["files"], "models/net/config.pbtxt")
