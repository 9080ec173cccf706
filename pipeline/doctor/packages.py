"""Checks of the installed packages: versions, and whether each library starts in a process."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import PipelineError
from pipeline.core.paths import CHECKOUT, format_make
from pipeline.core.text import Lines, format_count

DISTRIBUTION = "handwriting-pipeline"
PYTHONS = ((3, 11), (3, 14))  # oldest and newest for which the packages are built
UNINSTALL = f"{sys.executable} -m pip uninstall --yes"
INSTALL_FOR_GPUS = f"{sys.executable} -m pip install onnxruntime-gpu"  # runs without a GPU as well
INSTALL_ALL = f"{sys.executable} -m pip install '{DISTRIBUTION}[train]'"
TIMEOUT = 60.0  # far longer than any library takes to start

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """The result of one check. A problem stops the main job here; a warning does not."""

    level: Level
    what: str
    found: str
    fix: str = ""  # the command that fixes it


class Problem(PipelineError):
    """A problem with its own fix, instead of the one that all problems of its check have."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


Result = str | list[Check]  # what a check found if all is well, or several results


@dataclass(frozen=True)
class Examination:
    """The results of all checks."""

    checks: tuple[Check, ...]

    def count(self, level: Level) -> int:
        return sum(check.level == level for check in self.checks)

    def record(self) -> dict[str, Any]:
        """Return the result as values that JSON can store."""
        counts = {"problems": self.count("problem"), "warnings": self.count("warning")}
        return {**counts, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        width = max(len(check.what) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.level:<8} {check.what:<{width}}  {check.found}")
            if check.fix:
                lines.append(f"{'':<8} {'':<{width}}  fix: {check.fix}")
        return Lines(*lines)


def rebuild(setting: str = "") -> str:
    """Return the command that builds the project's environment, with a make `setting` if given.

    It removes the environment first if this process runs in it.
    """
    if not setting and not (CHECKOUT / "Makefile").exists():
        return INSTALL_ALL
    command = format_make(f".venv {setting}".strip())
    is_ours = Path(sys.prefix).resolve() == (CHECKOUT / ".venv").resolve()
    return f"rm -rf {shlex.quote(os.path.relpath(sys.prefix))} && {command}" if is_ours else command


def require_no_problem(examination: Examination) -> None:
    """Raise PipelineError if there is a problem, because the main job would fail."""
    if count := examination.count("problem"):
        problems = format_count(count, "problem")
        raise PipelineError(f"{problems}: training, exporting or serving would fail. Run the fixes")


def run_check(what: str, fix: str, check: Callable[[], Result]) -> list[Check]:
    """Run a check; if it raises, return that as a problem, so that the other checks still run."""
    try:
        result = check()
    except Exception as error:  # a damaged machine can cause any error
        return [Check("problem", what, format_error(error), getattr(error, "fix", fix))]
    return [Check("ok", what, result)] if isinstance(result, str) else result


def format_error(error: Exception) -> str:
    """Return an error's message in one line, with its type unless it is a PipelineError."""
    message = " ".join(str(error).split())
    return message if isinstance(error, PipelineError) else f"{type(error).__name__}: {message}"


def examine_packages(error: Exception) -> Examination:
    """Return the checks that still run when a library that doctor needs does not start."""
    check = Check("problem", "pipeline", f"does not start: {format_error(error)}", rebuild())
    return Examination((*run_quick_checks(), check))


def is_client_only() -> bool:
    """Return whether it was installed without extras: nothing that trains or exports."""
    return not any(map(importlib.util.find_spec, ("torch", "onnxruntime")))


def run_quick_checks() -> list[Check]:
    """Run the checks of packages that need no separate process."""
    checks = {"Python": check_python, "packages": check_packages, "ONNX Runtime": check_runtimes}
    return [result for what in checks for result in run_check(what, rebuild(), checks[what])]


def check_python() -> str:
    """Check that the packages are built for this version of Python."""
    version = platform.python_version()
    first, last = (".".join(map(str, numbers)) for numbers in PYTHONS)
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        fix = rebuild("PYTHON=python3.13")  # the newest that the server has wheels for
        raise Problem(f"{version}, but {first} to {last} is needed", fix)
    return f"{version} in {sys.prefix}"


def check_packages() -> str:
    """Check that the packages that this one requires are installed, in the required versions.

    Where it was installed without extras, those of its extra train are not required.
    """
    from packaging.requirements import Requirement  # slow to import

    extra = "" if is_client_only() else "train"
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise PipelineError(f"{DISTRIBUTION} is not installed") from error
    problems = []
    for requirement in map(Requirement, required):
        name, needed = requirement.name, requirement.specifier
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue  # not for this machine
        names = (name, name.removesuffix("-gpu"))  # either ONNX Runtime will do
        copies = (importlib.metadata.distributions(name=n) for n in names)
        version = next((copy.version for copy in itertools.chain(*copies)), "")
        if not version:
            problems.append(f"{name} is missing")
        elif not needed.contains(version, prereleases=True):
            problems.append(f"{name} {version}, but {needed} is needed")
    if problems:
        light = f"{sys.executable} -m pip install {DISTRIBUTION}"
        raise Problem("; ".join(problems), rebuild() if extra else light)
    if extra:
        return "as required by pyproject.toml"
    return (
        "the client's: 'pipeline query', 'pipeline lint', 'pipeline validate URL' and Client work; "
        f"what trains, exports and serves comes with {INSTALL_ALL}"
    )


def check_runtimes() -> Result:
    """Check that at most one ONNX Runtime is installed: two overwrite each other's files."""
    distributions = importlib.metadata.distributions()
    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in distributions}
    names -= {"onnxruntime-extensions", "onnxruntime-genai"}
    runtimes = sorted(name for name in names if re.fullmatch(r"onnxruntime(-\w+)?", name))
    if len(runtimes) > 1:
        both = f"{' and '.join(runtimes)} are both installed and overwrite each other"
        raise Problem(both, f"{UNINSTALL} {' '.join(runtimes)} && {INSTALL_FOR_GPUS}")
    return f"from {runtimes[0]}" if runtimes else []


def _probe(*arguments: str) -> dict[str, Any]:
    """Run a probe in a process; return its facts, or raise PipelineError with the reason."""
    command = [sys.executable, "-m", "pipeline.doctor.probes", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise PipelineError(f"does not start within {TIMEOUT:g} s") from error
    if done.returncode:
        lines = done.stderr.split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "")
        raise PipelineError(f"does not start: {reason.strip() or f'exit code {done.returncode}'}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def check_torch() -> str:
    """Check that torch starts and computes; return its build and its GPUs."""
    facts = _probe("torch")
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    return f"{facts['version']}, {build}; {', '.join(facts['gpus']) or 'trains on the CPU'}"


def check_gpus(of_torch: Iterable[Check]) -> Result:
    """Check the GPUs that the driver reports; warn if torch uses none of them."""
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return "none"
    program = shutil.which("nvidia-smi")
    command = [str(program), "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if program else None
    names = "; ".join(done.stdout.split("\n")).strip("; ") if done else ""
    gpus = names or f"{len(devices)}, not described by the driver"
    if any("trains on the CPU" in check.found for check in of_torch):
        fix = rebuild("TORCH_INDEX=URL") + "  # of torch's builds for your CUDA"
        return [Check("warning", "GPU", f"{gpus}; torch does not use it", fix)]
    return gpus


def check_providers(model: Path) -> list[Check]:
    """Check which providers of ONNX Runtime can run `model`, which must double its input."""
    facts = _probe("onnxruntime", str(model))
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    checks = []
    if has_gpu and "cuda" not in facts["providers"]:
        fix = f"{UNINSTALL} onnxruntime && {INSTALL_FOR_GPUS}"
        checks.append(Check("warning", "ONNX Runtime on cuda", "is not in this build", fix))
    for name, failure in facts["providers"].items():
        what = f"ONNX Runtime on {name}"
        if not failure:
            checks.append(Check("ok", what, f"{facts['version']} computes"))
        elif name == "cpu":
            checks.append(Check("problem", what, failure, rebuild()))
        elif has_gpu:
            fix = "install the CUDA and cuDNN that it names, or do without --provider"
            checks.append(Check("warning", what, failure, fix))
        else:
            checks.append(Check("ok", what, "in the build, but there is no GPU"))
    return checks
