"""Run the fast tests with the lowest versions of pyproject.toml, for `make test-lowest`."""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.core.errors import CheckFailedError
from pipeline.core.machine import machine
from tools.edge import run_tool
from tools.lowest import lowest
from tools.provenance import write_figure
from tools.readme import render_pages

FAST = ("-n", "2", "-m", "not server and not slow")
VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({d.metadata["Name"].lower().replace("_", "-"): d.version
                  for d in metadata.distributions()}))
"""


def compare(allowed: dict[str, str], installed: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the lowest and the installed version of each package that is in both."""
    names = sorted(allowed.keys() & installed.keys())
    return {name: {"lowest": allowed[name], "ran": installed[name]} for name in names}


def is_lowest(row: dict[str, str]) -> bool:
    """Return whether the version that ran is the lowest one, 2.9 for 2.9.0+cpu."""
    wanted, ran = (row[key].partition("+")[0].split(".") for key in ("lowest", "ran"))
    return [*wanted, *"000"][:3] == [*ran, *"000"][:3] or ran[: len(wanted)] == wanted


def count_tests(report: Path) -> dict[str, int]:
    """Return the numbers of pytest's JUnit report: tests, failures, errors, skipped."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    keys = ("tests", "failures", "errors", "skipped")
    return {key: sum(int(suite.get(key, "0")) for suite in suites) for key in keys}


def main(arguments: list[str]) -> None:
    """Run the tests, and keep the result if all pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("tests", nargs="*")
    given = parser.parse_args(arguments)
    python = str((given.environment / "bin" / "python").absolute())
    done = subprocess.run([python, "-c", VERSIONS], capture_output=True, check=True)
    versions = compare(lowest(Path("pyproject.toml").read_text("utf-8")), json.loads(done.stdout))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", f"--junitxml={report}", *(given.tests or FAST)]
        if subprocess.run(command, check=False).returncode:
            raise CheckFailedError("tests fail with the lowest versions: raise a lower bound")
        counts = count_tests(report)
    record: dict[str, Any] = {"command": "make test-lowest", **machine(), **counts}
    record |= {"versions": versions}
    record["higher"] = [name for name, row in versions.items() if not is_lowest(row)]
    write_figure("lowest", given.result, record)
    render_pages()


if __name__ == "__main__":
    run_tool(main)
