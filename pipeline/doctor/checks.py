"""Checks of this machine for the main job: libraries, server, data, disk, memory, ports."""

import importlib.metadata
import itertools
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from onnx import TensorProto, helper

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.paths import Paths, format_make
from pipeline.data.catalog import DEFAULT_DATASET
from pipeline.data.splits import verify
from pipeline.doctor import packages
from pipeline.doctor.packages import Check, Examination, Problem, Result, format_error, run_check
from pipeline.repository.running import find_server
from pipeline.serving import tritonserver
from pipeline.serving.scratch import try_models
from pipeline.serving.settings import ServeConfig

GLIBC = (2, 35)  # that the server in the wheel needs
DISK_BYTES = 1 << 30  # for data, runs and exports, with room to spare
SHARED_BYTES = 64 << 20  # of /dev/shm, for the server and its stubs
_USE_DOCKER = f"serve with Docker and {tritonserver.IMAGE}, or on {{}}"
REMOUNT = "mount -o remount,size=1G /dev/shm  # of a container: --shm-size=1g"


def examine(paths: Paths, config: ServeConfig = ServeConfig()) -> Examination:
    """Check everything that the main job needs; run the slow checks in parallel."""
    # A model that doubles its input.
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doctor", [x], [y])
    double = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with (
        tempfile.TemporaryDirectory(prefix="handwriting-doctor-") as scratch,
        ThreadPoolExecutor() as pool,
    ):
        model = Path(scratch) / "models" / "doctor" / "1" / "model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(double.SerializeToString())
        checks = list_checks(paths, model, config).items()
        jobs = [pool.submit(run_check, what, *check) for what, check in checks]
        quick = packages.run_quick_checks()
        torch, *others = [job.result() for job in jobs]
    gpu = run_check("GPU", packages.rebuild(), lambda: packages.check_gpus(torch))
    return Examination((*quick, *torch, *gpu, *itertools.chain(*others)))


def list_checks(
    paths: Paths, model: Path, config: ServeConfig
) -> dict[str, tuple[str, Callable[[], Result]]]:
    """Return each slow check with the fix if it raises, by what is checked; `model` is a test."""
    if tritonserver.fits_wheel():
        install_server = tritonserver.format_rebuild(paths)
    else:
        has_docker = sys.platform == "linux" and shutil.which("docker") is not None
        no_docker = _USE_DOCKER.format("Linux on x86-64")
        install_server = "start Docker's engine" if has_docker else no_docker
    permit = f"chmod u+rwx {paths.root.absolute()}"
    return {
        "torch": (packages.rebuild(), packages.check_torch),
        "ONNX Runtime": (packages.rebuild(), lambda: packages.check_providers(model)),
        "tritonserver": (install_server, lambda: _check_server(paths, model)),
        "data": ("pipeline data fetch", lambda: _check_data(paths)),
        "folders": (permit, lambda: _check_folders(paths)),
        "disk": (permit, lambda: _check_disk(paths)),
        "shared memory": (REMOUNT, _check_shared_memory),
        "ports": ("pipeline serve --port auto", lambda: _check_ports(paths, config)),
    }


def _check_server(paths: Paths, model: Path) -> list[Check]:
    """Check the server's environment; start a temporary server that loads a model and answers."""
    runtime = tritonserver.find_runtime(paths, "auto")
    if runtime.kind == "docker":
        return [Check("ok", "tritonserver", f"{runtime}, whose engine answers; not started")]
    checks = []
    if runtime.kind == "wheel":
        sites = map(str, paths.triton_environment.glob("lib/python3.*/site-packages"))
        copies = importlib.metadata.distributions(name="numpy", path=list(sites))
        there = ", ".join(copy.version for copy in copies) or "missing"
        here = importlib.metadata.version("numpy")
        checks = run_check("glibc", _USE_DOCKER.format("a newer system"), _check_glibc)
        checks.append(Check("ok", "numpy", f"{here} here, {there} in the server's environment"))
    trial = partial(_try_server, runtime, paths, model)
    return [*checks, *run_check("tritonserver", tritonserver.format_rebuild(paths), trial)]


def _try_server(runtime: tritonserver.ServerRuntime, paths: Paths, model: Path) -> str:
    (model.parent.parent / "config.pbtxt").write_text(_CONFIG, "utf-8")
    (trial,) = try_models(model.parents[2], ["doctor"], paths)
    if trial.outcome != "loads":
        raise PipelineError(f"{runtime}: a test model has outcome {trial.outcome!r}: {trial.cause}")
    return f"{runtime}: started, loaded a model, answered"


_CONFIG = """\
name: "doctor"
backend: "onnxruntime"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: 2 }
instance_group { count: 1 kind: KIND_CPU }
"""


def _check_glibc() -> Result:
    name, version = platform.libc_ver()
    least = ".".join(map(str, GLIBC))
    if name != "glibc":
        return []
    if tuple(map(int, version.split(".")[:2])) < GLIBC:
        raise PipelineError(f"{version}, but the server needs {least}")
    return f"{version} ({least} is needed)"


def _check_data(paths: Paths) -> str:
    folder = paths.data(DEFAULT_DATASET)
    verify(DEFAULT_DATASET, folder)
    return f"{folder}: every file matches its SHA-256"


def _check_folders(paths: Paths) -> Result:
    """Check that files can be created where the main job creates them."""
    problems = []
    for folder in (paths.data(DEFAULT_DATASET), paths.root / "runs", paths.root / "exported"):
        existing = _find_existing(folder)
        if problem := _find_write_problem(existing):
            fix = f"chmod u+rwx {existing}"
            problems.append(Check("problem", "folders", f"{existing}: {problem}", fix))
    return problems or f"data, runs and exported in {paths.root.absolute()}"


def _find_existing(folder: Path) -> Path:
    """Return the folder, or its closest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _find_write_problem(folder: Path) -> str:
    """Return why no file can be created in the folder; "" if one can."""
    if not folder.is_dir():
        return "it is a file, but a folder is needed"
    if not folder.stat().st_mode & 0o200:
        return "it is read-only"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"files cannot be created there ({error.strerror})"


def _check_disk(paths: Paths) -> str:
    free = shutil.disk_usage(_find_existing(paths.root)).free
    space = f"{free / (1 << 30):.1f} GiB are free"
    if free < DISK_BYTES:
        raise Problem(f"{space}, but 1 GiB is needed", format_make("clean"))
    return space


def _check_shared_memory() -> Result:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return []  # not Linux, so the server in the wheel cannot run either
    free = shutil.disk_usage(folder).free
    space = f"{free >> 20} MiB are free in {folder}"
    if problem := _find_write_problem(folder):
        raise PipelineError(f"{folder}: {problem}")
    if free < SHARED_BYTES:
        raise PipelineError(f"{space}, but the server needs {SHARED_BYTES >> 20}")
    return space


def _check_ports(paths: Paths, config: ServeConfig) -> str:
    try:
        server = find_server(paths)
    except CorruptError as error:
        fix = f"rm {paths.server}  # after you have stopped the server yourself"
        raise Problem(format_error(error), fix) from error
    if server:
        return f"our server has its own (pid {server.pid})"
    taken = tritonserver.find_taken_ports(config)
    if taken:
        problems = (f"{port} ({name}): {os.strerror(e.errno or 0)}" for name, port, e in taken)
        raise PipelineError("; ".join(problems))
    return f"{', '.join(map(str, config.ports.values()))} are free"
