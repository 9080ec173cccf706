"""Checks of the installed packages: versions, and whether each library starts in a process."""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from pipeline.core.errors import PipelineError
from pipeline.core.text import Lines

DISTRIBUTION = "handwriting-pipeline"
PYTHONS = ((3, 11), (3, 13))  # oldest and newest for which the packages are built
PROBE_SECONDS = 60.0

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """The result of one check. A problem stops the main job here; a warning does not."""

    level: Level
    what: str
    found: str
    fix: str = ""  # the command that fixes it


@dataclass(frozen=True)
class Examined:
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
    command = f"make .venv {setting}".strip()
    if Path(sys.prefix).resolve() == Path(".venv").resolve():
        return f"rm -rf .venv && {command}"
    return f"{command}  # in the project's folder, then use .venv/bin/pipeline"


def require_sound(examined: Examined) -> None:
    """Raise PipelineError if there is a problem, because the main job would fail."""
    if count := examined.count("problem"):
        raise PipelineError(
            f"{count} problem{'s' * (count > 1)}: the main job would fail here; each line above "
            "that says 'fix' has the command for it"
        )


def looked(what: str, fix: str, look: Callable[[], list[Check]]) -> list[Check]:
    """Run a check; if it raises, return that as a problem, so that the other checks still run."""
    try:
        return look()
    except Exception as error:  # a damaged machine can cause any error
        return [Check("problem", what, in_a_line(error), fix)]


def in_a_line(error: Exception) -> str:
    """Return an error's message in one line, with its type unless it is a PipelineError."""
    said = " ".join(str(error).split())
    return said if isinstance(error, PipelineError) else f"{type(error).__name__}: {said}"


def alone(error: Exception) -> Examined:
    """Return the checks that still run when a library that doctor needs does not start."""
    check = Check("problem", "pipeline", f"does not start: {in_a_line(error)}", rebuild())
    return Examined((*quick(), check))


def quick() -> list[Check]:
    """Run the checks of packages that need no separate process."""
    return [
        *looked("Python", rebuild(), python),
        *looked("packages", rebuild(), packages),
        *looked("ONNX Runtime", rebuild(), runtimes),
    ]


def python() -> list[Check]:
    """Check that the packages are built for this version of Python."""
    version = platform.python_version()
    first, last = (".".join(map(str, one)) for one in PYTHONS)
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        fix = rebuild(f"PYTHON=python{last}")
        return [Check("problem", "Python", f"{version}, and {first} to {last} is needed", fix)]
    return [Check("ok", "Python", f"{version} in {sys.prefix}")]


def packages() -> list[Check]:
    """Check that the packages that this one requires are installed, in the required versions."""
    try:
        asked = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("problem", "packages", f"{DISTRIBUTION} is not installed", rebuild())]
    wrong = [said for line in asked if (said := _unmet(Requirement(line)))]
    if wrong:
        return [Check("problem", "packages", "; ".join(wrong), rebuild())]
    return [Check("ok", "packages", "as pyproject.toml asks for")]


def _unmet(requirement: Requirement) -> str:
    """Return why a requirement is not met; "" if it is met or does not apply to this machine."""
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return ""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    fits = requirement.specifier.contains(version, prereleases=True)
    return "" if fits else f"{requirement.name} {version}, and {requirement.specifier} is needed"


def runtimes() -> list[Check]:
    """Check that at most one ONNX Runtime is installed: two overwrite each other's files."""
    names = {
        str(one.metadata["Name"]).lower().replace("_", "-")
        for one in importlib.metadata.distributions()
        if one.metadata["Name"]
    }
    found = sorted(name for name in names if re.fullmatch(r"onnxruntime(-\w+)?", name))
    found = [name for name in found if name not in ("onnxruntime-extensions", "onnxruntime-genai")]
    if len(found) > 1:
        both = " and ".join(found)
        fix = f"{sys.executable} -m pip uninstall --yes {' '.join(found)} && {rebuild()}"
        said = f"{both} are both installed and overwrite each other's files"
        return [Check("problem", "ONNX Runtime", said, fix)]
    return [Check("ok", "ONNX Runtime", f"from {', '.join(found)}")] if found else []


def _probe(*arguments: str) -> dict[str, Any] | str:
    """Run a probe in a process; return its facts, or one line that says why it failed."""
    command = [sys.executable, "-m", "pipeline.doctor.probes", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it does not start in {PROBE_SECONDS:g} s"
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ends with {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def torch() -> list[Check]:
    """Check that torch starts and computes; report its build and its GPUs."""
    facts = _probe("torch")
    if isinstance(facts, str):
        return [Check("problem", "torch", f"does not start: {facts}", rebuild())]
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    gpus = ", ".join(facts["gpus"]) or "trains on the CPU"
    return [Check("ok", "torch", f"{facts['version']}, {build}; {gpus}")]


def gpu(of_torch: Iterable[Check]) -> list[Check]:
    """Check the GPUs that the driver reports; warn if torch uses none of them."""
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return [Check("ok", "GPU", "none")]
    program = shutil.which("nvidia-smi")
    command = [str(program), "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if program else None
    said = "; ".join(done.stdout.split("\n")).strip("; ") if done else ""
    found = said or f"{len(devices)}, of which the driver says nothing"
    if any("trains on the CPU" in check.found for check in of_torch):
        fix = rebuild("TORCH_INDEX=URL") + "  # of torch's builds for your CUDA"
        return [Check("warning", "GPU", f"{found}; torch does not use it", fix)]
    return [Check("ok", "GPU", found)]


def runtime(model: Path) -> list[Check]:
    """Check which providers of ONNX Runtime can run `model`, which must double its input."""
    facts = _probe("onnxruntime", str(model))
    if isinstance(facts, str):
        return [Check("problem", "ONNX Runtime", f"does not start: {facts}", rebuild())]
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    checks = []
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
            checks.append(Check("ok", what, "in the build, and there is no GPU"))
    return checks
