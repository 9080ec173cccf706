"""The check that someone with a GPU runs and signs: until then a GPU is called not verified.

python -m tools.gpu_check RESULT --signed-off-by 'your name'
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.export.export import export_run
from pipeline.training.checkpoint import Summary
from pipeline.training.device import choose_placement
from pipeline.training.recipes import RECIPES, TrainConfig
from pipeline.training.run import train_run
from pipeline.validation.export import validate_export
from tools.edge import print_now, run_tool
from tools.provenance import write_figure
from tools.readme import render_pages

LEAST_ACCURACY = 0.985  # of the quick recipe on MNIST's test split
NAME = "gpu-check"  # of the runs and of the export


def gpu_check(
    paths: Paths,
    signed_off_by: str,
    result: Path,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the gpu tests, a short training twice, an export and its validation; write the result.

    Raises PipelineError without a name or a GPU, and CheckFailedError when a test fails or is
    skipped, or when a training does not reach LEAST_ACCURACY.
    """
    if not signed_off_by.strip():
        raise PipelineError("the check needs your name: make gpu-check SIGNED='your name'")
    placement = choose_placement("cuda")
    report(f"running the tests that need {placement}")
    tests = run_gpu_tests()
    report("training twice: plain, and compiled")
    exported = check_export(paths, *train_twice(paths, "cuda", report), report)
    signed = {"command": "make gpu-check", "signed_off_by": signed_off_by.strip()}
    check = {**signed, **machine(), "tests": tests, **exported}
    write_figure("gpu", result, check)
    return check


def run_gpu_tests() -> int:
    """Run the tests marked gpu; return their number, or raise CheckFailedError unless all pass."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={result}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stdout[-3000:].splitlines()
            raise CheckFailedError(Lines("the tests marked gpu failed:", *lines))
        return count_passed(result)


def count_passed(result: Path) -> int:
    """Return the number of tests in a JUnit file; raise CheckFailedError unless all passed."""
    suites = list(ElementTree.parse(result).iter("testsuite"))
    keys = ("tests", "failures", "errors", "skipped")
    counts = {key: sum(int(suite.get(key, "0")) for suite in suites) for key in keys}
    if not counts["tests"] or sum(counts.values()) > counts["tests"]:
        raise CheckFailedError(f"not every test marked gpu ran and passed: {counts}")
    return counts["tests"]


def train_twice(
    paths: Paths, device: str, report: Callable[[str], None], config: TrainConfig | None = None
) -> tuple[Summary, Summary]:
    """Train the quick recipe on `device`, plain and compiled; return both summaries.

    Raises CheckFailedError when a test accuracy is below LEAST_ACCURACY.
    """
    config = replace(config or TrainConfig("quick", RECIPES["quick"]), device=device)
    paths = replace(paths, run=NAME)
    compiled = train_run(paths, replace(config, compiled=True), report=report)
    plain = train_run(paths, config, report=report)  # last, since it is exported
    for summary in (compiled, plain):
        if summary.test_accuracy < LEAST_ACCURACY:
            accuracy = f"{summary.test_accuracy:.2%}, less than {LEAST_ACCURACY:.1%}"
            raise CheckFailedError(f"the accuracy on {summary.device} is {accuracy}")
    return plain, compiled


def check_export(
    paths: Paths, plain: Summary, compiled: Summary, report: Callable[[str], None]
) -> dict[str, Any]:
    """Export and validate the trained network with ONNX Runtime; return the fields to record."""
    of_check = replace(paths, run=NAME, name=NAME)
    export_run(of_check, report=report)
    is_cuda = plain.device.startswith("cuda")
    # The validation on the CPU is kept; ONNX Runtime on the GPU has to pass it as well.
    on_gpu = validate_export(of_check, provider="cuda", report=report) if is_cuda else None
    on_cpu = validate_export(of_check, report=report)
    capability = torch.cuda.get_device_capability() if is_cuda else ()
    return {
        "device": plain.device,  # as device.py describes it, with precision and TF32
        "capability": ".".join(map(str, capability)),
        "torch": plain.torch,
        "cuda": torch.version.cuda,
        "test_accuracy": plain.test_accuracy,
        "train_seconds": plain.train_seconds,
        "compiled_test_accuracy": compiled.test_accuracy,  # the same through torch.compile
        "compiled_train_seconds": compiled.train_seconds,  # compilation included
        # ONNX Runtime's errors against the reference: on the CPU, and on CUDA without TF32.
        "max_error": on_cpu.verdicts[0].max_error,
        "max_error_on_gpu": on_gpu.verdicts[0].max_error if on_gpu else None,
        "weights_sha256": plain.weights_sha256,
    }


def main(arguments: list[str]) -> None:
    """Run the check, keep the result, and render it into the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--signed-off-by", required=True, help="your name")
    given = parser.parse_args(arguments)
    check = gpu_check(Paths(), given.signed_off_by, given.result, print_now)
    files = [given.result, *render_pages()]
    print(f"{check['device']}: {check['tests']} tests, {check['test_accuracy']:.2%}")
    print(f"wrote {given.result}")
    print(f"next: {shlex.join(['git', 'commit', *map(str, files)])}")


if __name__ == "__main__":
    run_tool(main)
