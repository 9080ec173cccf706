"""Measure again and again: the same must be the same, and what was made worse must be found.

prove_compare.py RESULT TIMES

Each measurement is a process of its own; PROVE_WITH in the environment is a command that starts it
(nice -n -5, say, or a lock).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline import tritonserver
from pipeline.cli import main as pipeline
from pipeline.files import sha256, write_json
from pipeline.machine import machine
from pipeline.paths import Paths
from pipeline.provenance import sources_digest
from pipeline.report import render_readme

SHARE = 0.2  # of what the backend takes, that it sleeps as well
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
    """The command line, with a backend that takes a fifth longer."""
    with tempfile.TemporaryDirectory() as folder:
        backends = Path(folder) / "backend"
        shutil.copytree(tritonserver.BACKENDS, backends)
        with (backends / "onnxruntime" / "model.py").open("a") as source:
            source.write(SLOW)
        tritonserver.BACKENDS = backends
        pipeline(arguments)


def measured(root: Path, *options: str, how: tuple[str, ...] = ("-m", "pipeline")) -> Record:
    """What a benchmark in a process of its own prints, and its exit status."""
    prefix = shlex.split(os.environ.get("PROVE_WITH", ""))
    command = [*prefix, sys.executable, *how, "--json", "--root", str(root), "benchmark", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (0, 3), done.returncode
    return {**json.loads(done.stdout), "exit": done.returncode}


def kept(record: Record, file: Path) -> Path:
    """The record in a file, for the next one to be held against."""
    file.write_text(json.dumps(record))
    return file


def worse(record: Record) -> list[Record]:
    """The rows that got worse."""
    changes = [change for one in record["compared"] for change in one["changes"]]
    return [change for change in changes if change["verdict"] == "worse"]


def seen(record: Record) -> list[float]:
    """The change that each comparison could have seen."""
    return [one["seen"] for one in record["compared"]]


def damaged(root: Path) -> None:
    """Weaken a class in the weights of a project's run, as if it had been trained so; export it."""
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
    """A project with the run and the export, and with links to data and environments."""
    for part in ("runs/handwriting", "exported/handwriting"):
        shutil.copytree(project / part, root / part)
    (root / "data").symlink_to((project / "data").resolve())
    return root


def slowdown(folder: Path) -> Record:
    """A backend that takes a fifth longer, found or not."""
    before = kept(measured(Path(), "--what", "serve"), folder / "before.json")
    how = (str(Path(__file__)), "slowed")
    after = measured(Path(), "--what", "serve", "--compare", str(before), how=how)
    found = worse(after)
    print(after["exit"], seen(after), *found, sep="\n", flush=True)
    return {"exit": after["exit"], "worse": found, "seen": seen(after)}


def loss(folder: Path) -> Record:
    """Weights that are worse, found or not."""
    root = copy_of(Path(), folder / "project")
    before = kept(measured(root, "--what", "infer", "--short"), folder / "right.json")
    damaged(root)
    after = measured(root, "--what", "infer", "--short", "--compare", str(before))
    found = [change for change in worse(after) if change["what"] == "accuracy"]
    print(after["exit"], *found, sep="\n", flush=True)
    return {"exit": after["exit"], "worse": found}


def same(folder: Path, times: int) -> list[Record]:
    """The same measured so often, each held against the one before."""
    before = kept(measured(Path(), "--what", "all", "--short"), folder / "0.json")
    found = []
    for turn in range(1, times + 1):
        after = measured(Path(), "--what", "all", "--short", "--compare", str(before))
        before = kept(after, folder / f"{turn}.json")
        found.append({"exit": after["exit"], "worse": worse(after), "seen": seen(after)})
        print(turn, found[-1], flush=True)
    return found


def main(result: Path, times: int) -> None:
    """Plant a slowdown and a loss, measure the same so often, and write what was found."""
    with tempfile.TemporaryDirectory(prefix="handwriting-compare-") as folder:
        slow, wrong = slowdown(Path(folder)), loss(Path(folder))
        alike = same(Path(folder), times)
    record = {
        "command": "make prove-compare",
        "sources_sha256": sources_digest("compare"),
        **machine(),
        "share": SHARE,
        "slowdown": slow,
        "loss": wrong,
        "same": alike,
    }
    assert slow["exit"] == wrong["exit"] == 3
    assert slow["worse"]
    assert all(change["row"].startswith("handwriting") for change in slow["worse"])
    assert wrong["worse"]
    assert [one["exit"] for one in alike] == [0] * times
    write_json(result, record)
    render_readme(Path("README.md"), Path("exported/figures"))
    print(f"wrote {result}")


if __name__ == "__main__":
    if sys.argv[1] == "slowed":
        slowed(sys.argv[2:])
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
