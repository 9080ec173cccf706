"""Checks of this machine for the main job: libraries, server, data, disk, memory, ports."""

import importlib.metadata
import itertools
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onnx import TensorProto, helper

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.paths import Paths
from pipeline.data.catalog import DEFAULT_DATASET
from pipeline.data.splits import verify
from pipeline.doctor import packages
from pipeline.doctor.packages import Check, Examined, in_a_line, looked
from pipeline.repository.running import find_server
from pipeline.serving import scratch as lint_live
from pipeline.serving import tritonserver
from pipeline.serving.settings import ServeConfig

GLIBC = (2, 35)  # that the server in the wheel needs
DISK_BYTES = 1 << 30  # for data, runs and exports, with room to spare
SHARED_BYTES = 64 << 20  # of /dev/shm, for the server and its stubs
REBUILD_SERVER = "rm -rf .venv-triton && make .venv-triton"
FETCH = "pipeline data fetch"
ANY_PORT = "pipeline serve --port auto"
REMOUNT = "mount -o remount,size=1G /dev/shm  # of a container: --shm-size=1g"

# What is checked, the fix if the check raises, and the check.
Look = tuple[str, str, Callable[[], list[Check]]]


def examine(paths: Paths, config: ServeConfig = ServeConfig()) -> Examined:
    """Check everything that the main job needs; run the slow checks in parallel."""
    with (
        tempfile.TemporaryDirectory(prefix="handwriting-doctor-") as scratch,
        ThreadPoolExecutor() as pool,
    ):
        model = Path(scratch) / "models" / "doctor" / "1" / "model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(_doubling())
        reach = f"chmod u+rwx {paths.root.absolute()}"
        looks: list[Look] = [
            ("torch", packages.rebuild(), packages.torch),
            ("ONNX Runtime", packages.rebuild(), lambda: packages.runtime(model)),
            ("tritonserver", _server_mend(paths), lambda: _server(paths, model)),
            ("data", FETCH, lambda: _data(paths)),
            ("folders", reach, lambda: _folders(paths)),
            ("disk", reach, lambda: _disk(paths)),
            ("shared memory", REMOUNT, _shared_memory),
            ("ports", ANY_PORT, lambda: _ports(paths, config)),
        ]
        begun = [pool.submit(looked, *look) for look in looks]
        quick = packages.quick()
        torch, *others = [job.result() for job in begun]
    gpu = looked("GPU", packages.rebuild(), lambda: packages.gpu(torch))
    return Examined((*quick, *torch, *gpu, *itertools.chain(*others)))


def _server(paths: Paths, model: Path) -> list[Check]:
    """Check the server's environment; start a temporary server that loads a model and answers."""
    what = "tritonserver"
    try:
        runtime = tritonserver.find_runtime(paths, "auto")
    except PipelineError as error:
        return [Check("problem", what, in_a_line(error), _server_mend(paths))]
    checks = _glibc(runtime)
    if runtime.kind == "wheel":
        found = sorted(
            paths.triton_environment.glob("lib/python3.*/site-packages/numpy-*.dist-info")
        )
        theirs = found[0].name.split("-")[1].removesuffix(".dist") if found else "missing"
        ours = importlib.metadata.version("numpy")
        checks.append(Check("ok", "numpy", f"{ours} here, {theirs} in the server's environment"))
    if runtime.kind == "docker":
        return [*checks, Check("ok", what, f"{runtime}, whose engine answers; not started")]
    (model.parent.parent / "config.pbtxt").write_text(_CONFIG)
    try:
        (trial,) = lint_live.try_models(model.parents[2], ["doctor"], paths)
    except PipelineError as error:
        return [*checks, Check("problem", what, str(error), REBUILD_SERVER)]
    if trial.outcome != "loads":
        said = f"{runtime}: a small model {trial.outcome}: {trial.cause}"
        return [*checks, Check("problem", what, said, REBUILD_SERVER)]
    return [*checks, Check("ok", what, f"{runtime}: started, loaded a model, answered")]


def _server_mend(paths: Paths) -> str:
    """Return the command or advice that installs a server here.

    An existing environment is removed first, because make does not check one that it has built.
    """
    if not tritonserver.fits_wheel():
        if shutil.which("docker"):
            return "start Docker's engine"
        return f"serve with Docker and {tritonserver.IMAGE}, or on Linux on x86-64"
    is_there = os.path.lexists(paths.triton_environment)
    return REBUILD_SERVER if is_there else "make .venv-triton"


def _doubling() -> bytes:
    """Return an ONNX model, as bytes, that doubles its input."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doctor", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


_CONFIG = """\
name: "doctor"
backend: "onnxruntime"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: 2 }
instance_group { count: 1 kind: KIND_CPU }
"""


def _glibc(runtime: tritonserver.ServerRuntime) -> list[Check]:
    name, version = platform.libc_ver()
    if runtime.kind != "wheel" or name != "glibc":
        return []
    least = ".".join(map(str, GLIBC))
    if tuple(map(int, version.split(".")[:2])) < GLIBC:
        fix = f"serve with Docker and {tritonserver.IMAGE}, or on a newer system"
        return [Check("problem", "glibc", f"{version}, and the server needs {least}", fix)]
    return [Check("ok", "glibc", f"{version} ({least} is needed)")]


def _data(paths: Paths) -> list[Check]:
    folder = paths.data(DEFAULT_DATASET)
    try:
        verify(DEFAULT_DATASET, folder)
    except (PipelineError, OSError) as error:
        return [Check("problem", "data", " ".join(str(error).split()), FETCH)]
    return [Check("ok", "data", f"{folder}: every file matches its SHA-256")]


def _folders(paths: Paths) -> list[Check]:
    """Check that files can be created where the main job creates them."""
    wrong = []
    for folder in (paths.data(DEFAULT_DATASET), paths.root / "runs", paths.root / "exported"):
        there = _nearest(folder)
        if said := _unwritable(there):
            wrong.append(Check("problem", "folders", f"{there}: {said}", f"chmod u+rwx {there}"))
    return wrong or [Check("ok", "folders", f"data, runs and exported in {paths.root.absolute()}")]


def _nearest(folder: Path) -> Path:
    """Return the folder, or its closest parent that exists."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())


def _unwritable(folder: Path) -> str:
    if not folder.is_dir():
        return "a file lies where a folder belongs"
    if not folder.stat().st_mode & 0o200:
        return "it is read-only"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"no file can be made there ({error.strerror})"


def _disk(paths: Paths) -> list[Check]:
    free = shutil.disk_usage(_nearest(paths.root)).free
    said = f"{free / (1 << 30):.1f} GiB are free"
    if free < DISK_BYTES:
        return [Check("problem", "disk", f"{said}, and 1 GiB is needed", "make clean")]
    return [Check("ok", "disk", said)]


def _shared_memory() -> list[Check]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return []  # not Linux, so the server in the wheel cannot run either
    free = shutil.disk_usage(folder).free
    said = f"{free >> 20} MiB are free in {folder}"
    if refusal := _unwritable(folder):
        return [Check("problem", "shared memory", f"{folder}: {refusal}", REMOUNT)]
    if free < SHARED_BYTES:
        said += f", and the server needs {SHARED_BYTES >> 20}"
        return [Check("problem", "shared memory", said, REMOUNT)]
    return [Check("ok", "shared memory", said)]


def _ports(paths: Paths, config: ServeConfig) -> list[Check]:
    try:
        server = find_server(paths)
    except CorruptError as error:
        fix = f"rm {paths.server}  # once you have stopped what you started"
        return [Check("problem", "ports", in_a_line(error), fix)]
    if server:
        return [Check("ok", "ports", f"our server has its own (pid {server.pid})")]
    taken = [
        f"{port} ({service}): {os.strerror(error.errno or 0)}"
        for service, port, error in tritonserver.find_taken_ports(config)
    ]
    if taken:
        return [Check("problem", "ports", "; ".join(taken), ANY_PORT)]
    numbers = ", ".join(map(str, tritonserver.ports(config).values()))
    return [Check("ok", "ports", f"{numbers} are free")]
