"""Train the same short run as on other processors, by torch's and oneDNN's limits; compare bytes.

python -m tools.prove_processors RESULT
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.machine import machine
from tools.edge import print_now, run_tool
from tools.readme import keep_result

# Each variable limits the vector instructions that one library uses, to those of older processors.
LIMITS = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2", "avx512"),
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2", "AVX512_CORE"),
}
TRAIN = ("train", "--recipe", "quick", "--seed", "7", "--device", "cpu")
EPOCHS = 0.125
REPEATS = 2
# Prints what the two libraries use: oneDNN itself names its own at its first convolution.
PROBE = """
import torch
torch.nn.functional.conv2d(torch.ones(8, 16, 28, 28), torch.ones(16, 16, 3, 3))
print("torch:", torch.backends.cpu.get_cpu_capability())
"""


@dataclass(frozen=True)
class Row:
    """What trainings under one limit gave."""

    limit: str  # VARIABLE=value; empty: none
    torch: str  # the instructions that torch's own kernels used
    onednn: str  # those that oneDNN used
    weights_sha256: tuple[str, ...]  # of each repetition
    test_accuracy: float  # fraction of images, of the first


def run_python(limits: dict[str, str], *arguments: str) -> str:
    """Run Python in a process under limits; return its standard output."""
    inherited = {key: value for key, value in os.environ.items() if key not in LIMITS}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env={**inherited, **limits}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PipelineError(
            f"{limits} ended with exit code {done.returncode}: {done.stderr[-500:]}"
        )
    return done.stdout


def train(root: Path, limits: dict[str, str], epochs: float) -> dict[str, Any]:
    """Train in a process under limits, in the project at `root`; return the run's summary."""
    options = ("--root", str(root), "--json", "-q", "--epochs", str(epochs))
    summary = json.loads(run_python(limits, "-m", "pipeline", *TRAIN, *options))
    assert isinstance(summary, dict)
    return summary


def measure(root: Path, limits: dict[str, str], epochs: float, repeats: int) -> Row:
    """Train `repeats` times under limits in the project at `root`, which has the data set."""
    used = run_python({**limits, "ONEDNN_VERBOSE": "1"}, "-c", PROBE)
    onednn, torch = re.search(r"isa:(.*)", used), re.search(r"torch: (.*)", used)
    summaries = [train(root, limits, epochs) for _ in range(repeats)]
    return Row(
        limit=" ".join(f"{name}={value}" for name, value in limits.items()),
        torch=torch[1] if torch else "unknown",
        onednn=onednn[1] if onednn else "unknown",
        weights_sha256=tuple(summary["weights_sha256"] for summary in summaries),
        test_accuracy=summaries[0]["test_accuracy"],
    )


def prove(
    root: Path,
    epochs: float = EPOCHS,
    repeats: int = REPEATS,
    report: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """Measure without a limit, then under each of the limits; return a row for each."""
    rows: list[Row] = []
    every = [{name: level} for name, levels in LIMITS.items() for level in levels]
    for limits in ({}, *every):
        rows.append(measure(root, limits, epochs, repeats))
        report(f"{rows[-1]}")
    return rows


def main(arguments: list[str]) -> None:
    """Measure on the real MNIST in a temporary folder, and keep the result."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        (Path(folder) / "data" / "mnist").symlink_to(Path("data/mnist").resolve())
        rows = prove(Path(folder), report=print_now)
    digests = {digest for row in rows for digest in row.weights_sha256}
    record = {
        **machine(),
        "epochs": EPOCHS,
        "trainings": sum(len(row.weights_sha256) for row in rows),
        "repeats_equal": sum(len(set(row.weights_sha256)) == 1 for row in rows),
        "distinct": len(digests),
        "rows": [asdict(row) for row in rows],
    }
    keep_result("processors", Path(arguments[0]), "make prove-processors", record)


if __name__ == "__main__":
    run_tool(main)
