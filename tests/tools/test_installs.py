"""The tools that install: the lowest versions, and an installation without extras."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import CheckFailedError
from tests.conftest import REPOSITORY
from tools import prove_install, prove_lowest
from tools.lowest import lowest


def test_the_lowest_versions_are_those_of_every_requirement() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    versions = lowest(text)
    assert versions["torch"]
    assert versions["ray"] == "2.52"
    assert versions["aiohttp"] == "3.11"
    assert "pytest" not in versions
    assert len(versions) > 20
    printed = subprocess.run(
        [sys.executable, "-m", "tools.lowest"], capture_output=True, text=True, cwd=REPOSITORY
    ).stdout.splitlines()
    assert "aiohttp==3.11" in printed
    assert not [line for line in printed if line.startswith("torch==")]


@pytest.mark.parametrize(
    ("allowed", "ran", "is_lowest"),
    [
        ("2.9", "2.9.0+cpu", True),
        ("2.9", "2.9", True),
        ("24", "24.0", True),
        ("2.9", "2.13.0+cpu", False),
        ("3.15.1", "3.15.4", False),
        ("1.2", "1.20", False),
    ],
)
def test_a_version_that_is_not_the_lowest_is_told(allowed: str, ran: str, is_lowest: bool) -> None:
    assert prove_lowest.is_lowest({"lowest": allowed, "ran": ran}) == is_lowest


def test_tests_that_fail_with_the_lowest_versions_fail_the_proof(tmp_path: Path) -> None:
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (environment / "python").chmod(0o755)
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    result = tmp_path / "lowest.json"
    with pytest.raises(CheckFailedError, match="raise a lower bound"):
        prove_lowest.main([str(result), str(environment.parent), str(tmp_path / "test_it.py")])
    assert not result.exists()


def test_a_command_that_ends_otherwise_fails_the_proof_of_the_installation() -> None:
    python = [sys.executable]
    prove_install.use(python, ["--version"], 0, "pipeline, version")
    with pytest.raises(CheckFailedError, match=r"'pipeline --version' exits with 0, not 5"):
        prove_install.use(python, ["--version"], 5)
    with pytest.raises(CheckFailedError, match="no such words"):
        prove_install.use(python, ["--version"], 0, "no such words")


def test_a_package_that_cannot_be_installed_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckFailedError, match="nothing-of-ours"):
        prove_install.pip([sys.executable], "install", "--dry-run", "nothing-of-ours")
