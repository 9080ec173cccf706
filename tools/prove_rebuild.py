"""Rebuild releases in fresh processes, also with older processors' instructions; compare the bytes.

python -m tools.prove_rebuild RESULT QUICK STANDARD

QUICK and STANDARD are how often a release of that recipe is rebuilt.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.machine import machine
from tools.edge import print_now, run_tool
from tools.prove_processors import LIMITS
from tools.readme import keep_result

# Threads of the rebuilding processes, in turn: each must take those of the release, which is one.
THREADS = ("1", "2")
# The rebuilds under a limit, which `make prove-processors` shows to change the weights.
LIMITED = ("", "ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2")
NOT_EQUAL = CheckFailedError.exit_code


def run_pipeline(root: Path, variables: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Run a command in a process of its own; return the record that it prints."""
    inherited = {key: value for key, value in os.environ.items() if key not in LIMITS}
    command = [sys.executable, "-m", "pipeline", "--root", str(root), "--json", "-q", *arguments]
    done = subprocess.run(
        command, env={**inherited, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, NOT_EQUAL) or not done.stdout:
        raise PipelineError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    record = json.loads(done.stdout)
    assert isinstance(record, dict)
    return record


def make_release(root: Path, recipe: str, *options: str) -> Path:
    """Train a recipe with one thread and export it; return the export's folder."""
    one = {"OMP_NUM_THREADS": "1"}
    run_pipeline(root, one, "train", "--run", recipe, "--recipe", recipe, *options)
    run_pipeline(root, one, "export", "--run", recipe, "--name", recipe)
    return root / "exported" / recipe


def rebuild(root: Path, release: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Rebuild a release in a process of its own; return what counts of its record."""
    record = run_pipeline(root, variables, "rebuild", str(release))
    keys = ("equal", "differences", "seconds")
    return {**{key: record[key] for key in keys}, "files": list(record["files"].values())}


def prove(
    root: Path,
    counts: Mapping[str, int],
    options: tuple[str, ...] = (),
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Rebuild a release of each recipe as often as `counts` says, the first one under limits too.

    `root` is a project's folder with the data set; `options` are of each training.
    """
    rows: list[dict[str, Any]] = []
    limited: list[dict[str, Any]] = []
    for recipe, count in counts.items():
        release, row = make_release(root, recipe, *options), []
        for index in range(count):
            threads = {"OMP_NUM_THREADS": THREADS[index % len(THREADS)]}
            row.append(rebuild(root, release, threads))
            report(f"{recipe} {threads}: {row[-1]}")
        equal = sum(each["equal"] for each in row)
        rows.append({"recipe": recipe, "rebuilds": count, "equal": equal, "results": row})
        for limit in () if limited else LIMITED:
            name, _, value = limit.partition("=")
            result = rebuild(root, release, {name: value} if limit else {})
            limited.append({"limit": limit, **result})
            report(f"{recipe} {limit}: {result}")
    return {"rows": rows, "limited": limited}


def main(arguments: list[str]) -> None:
    """Measure on the real MNIST in a temporary folder, and keep the result."""
    counts = dict(zip(("quick", "standard"), map(int, arguments[1:3]), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        (Path(folder) / "data" / "mnist").symlink_to(Path("data/mnist").resolve())
        record = prove(Path(folder), counts, report=print_now)
    keep_result("rebuild", Path(arguments[0]), "make prove-rebuild", {**machine(), **record})


if __name__ == "__main__":
    run_tool(main)
