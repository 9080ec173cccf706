"""Measure repeatedly: comparisons find no change in the same code, and find planted regressions.

prove_compare.py RESULT TIMES

Each measurement is a separate process; PROVE_WITH in the environment is a command that starts it
(for example nice -n -5, or a lock). Results are kept in exported/compare/ until the sources change,
and a run that was interrupted resumes from them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.cli.main import main as pipeline
from pipeline.core.files import read_json, sha256, write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.serving import tritonserver
from tools.provenance import hash_sources, write_figure
from tools.readme import render_pages

SHARE = 0.2  # the slowed backend sleeps for this share of its time in addition
ATTEMPTS = 3  # to measure the slowdown while the machine's own speed is constant
MEND = "remove it"
SLOW = f"""
import time

_execute = TritonPythonModel.execute


def _slowly(self, requests):
    start = time.perf_counter()
    answers = _execute(self, requests)
    time.sleep({SHARE} * (time.perf_counter() - start))
    return answers


TritonPythonModel.execute = _slowly
"""
Record = dict[str, Any]


def slowed(arguments: list[str]) -> None:
    """Run the command line with a backend that takes a fifth longer."""
    with tempfile.TemporaryDirectory() as folder:
        backends = Path(folder) / "backend"
        shutil.copytree(tritonserver.BACKENDS, backends)
        with (backends / "onnxruntime" / "model.py").open("a") as source:
            source.write(SLOW)
        tritonserver.BACKENDS = backends
        pipeline(arguments)


def measured(root: Path, *options: str, how: tuple[str, ...] = ("-m", "pipeline")) -> Record:
    """Run a benchmark in a separate process; return its record and its exit status."""
    prefix = shlex.split(os.environ.get("PROVE_WITH", ""))
    command = [*prefix, sys.executable, *how, "--json", "--root", str(root), "benchmark", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (0, 3), done.returncode
    return {**json.loads(done.stdout), "exit": done.returncode}


def kept(record: Record, file: Path) -> Path:
    """Write the record to a file, for comparison with the next measurement; return the file."""
    file.write_text(json.dumps(record))
    return file


def worse(record: Record) -> list[Record]:
    """Return the rows that got worse."""
    changes = [change for measurement in record["compared"] for change in measurement["changes"]]
    return [change for change in changes if change["verdict"] == "worse"]


def seen(record: Record) -> list[float]:
    """Return the smallest change that each comparison could detect."""
    return [measurement["seen"] for measurement in record["compared"]]


def damaged(root: Path) -> None:
    """Weaken a class in the weights of a project's run, as if trained that way; export it."""
    paths = Paths(root)
    with safe_open(paths.weights, "numpy") as file:
        weights = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
        record = file.metadata()
    weights["classifier.bias"][8] -= 3.0
    save_file(weights, paths.weights, record)
    summary = json.loads(paths.summary.read_text())
    paths.summary.write_text(json.dumps({**summary, "weights_sha256": sha256(paths.weights)}))
    for command in ("export", "validate"):
        subprocess.run(
            [sys.executable, "-m", "pipeline", "-q", "--root", str(root), command], check=True
        )


def copy_of(project: Path, root: Path) -> Path:
    """Copy a project's run and export to `root`, with a link to its data; return `root`."""
    for part in ("runs/handwriting", "exported/handwriting"):
        shutil.copytree(project / part, root / part)
    (root / "data").symlink_to((project / "data").resolve())
    return root


def slowdown(folder: Path) -> Record:
    """Measure a backend that takes a fifth longer; return the result of the comparison.

    If the no-op model became slower as well, the machine's speed changed: measure again.
    """
    how = (str(Path(__file__)), "slowed")
    for attempt in range(1, ATTEMPTS + 1):
        before = kept(measured(Path(), "--what", "serve"), folder / f"before-{attempt}.json")
        after = measured(Path(), "--what", "serve", "--compare", str(before), how=how)
        results = worse(after)
        print(attempt, after["exit"], seen(after), *results, sep="\n", flush=True)
        if all(change["row"].startswith("handwriting") for change in results):
            break
    return {"exit": after["exit"], "worse": results, "seen": seen(after), "attempts": attempt}


def loss(folder: Path) -> Record:
    """Measure damaged weights; return the result of the comparison."""
    root = copy_of(Path(), folder / "project")
    before = kept(measured(root, "--what", "infer", "--short"), folder / "right.json")
    damaged(root)
    after = measured(root, "--what", "infer", "--short", "--compare", str(before))
    results = [change for change in worse(after) if change["what"] == "accuracy"]
    print(after["exit"], *results, sep="\n", flush=True)
    return {"exit": after["exit"], "worse": results}


def same(folder: Path, times: int, results: list[Record]) -> Iterator[list[Record]]:
    """Measure the same code until there are `times` results; yield them after each.

    Each measurement is compared with the measurement before.
    """
    before = kept(measured(Path(), "--what", "all", "--short"), folder / "0.json")
    for turn in range(len(results) + 1, times + 1):
        after = measured(Path(), "--what", "all", "--short", "--compare", str(before))
        before = kept(after, folder / f"{turn}.json")
        results.append({"exit": after["exit"], "worse": worse(after), "seen": seen(after)})
        print(turn, results[-1], flush=True)
        yield results


def prove(parts: Path, folder: Path, times: int) -> Record:
    """Measure the parts that have no result yet; return all results."""
    for name, find in (("slowdown", slowdown), ("loss", loss)):
        if not (parts / f"{name}.json").exists():
            write_json(parts / f"{name}.json", find(folder))
    alike = parts / "same.json"
    results = read_json(alike, MEND)["found"] if alike.exists() else []
    if len(results) < times:
        for so_far in same(folder, times, results):
            write_json(alike, {"found": so_far})
    slow, wrong, alike_record = (
        read_json(parts / f"{name}.json", MEND) for name in ("slowdown", "loss", "same")
    )
    return {"slowdown": slow, "loss": wrong, "same": alike_record["found"]}


def main(result: Path, times: int) -> None:
    """Plant a slowdown and a loss, measure the same code `times` times, and write the result."""
    parts = Path("exported") / "compare" / hash_sources("compare")[:12]
    with tempfile.TemporaryDirectory(prefix="handwriting-compare-") as folder:
        results = prove(parts, Path(folder), times)
    record = {
        "command": "make prove-compare",
        **machine(),
        "share": SHARE,
        **results,
    }
    slow, wrong = results["slowdown"], results["loss"]
    assert slow["exit"] == wrong["exit"] == 3, results
    assert slow["worse"], results
    assert all(change["row"].startswith("handwriting") for change in slow["worse"]), results
    assert wrong["worse"], results
    assert [measurement["exit"] for measurement in results["same"]] == [0] * times, results
    write_figure("compare", result, record)
    render_pages()
    print(f"wrote {result}")


if __name__ == "__main__":
    if sys.argv[1] == "slowed":
        slowed(sys.argv[2:])
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
