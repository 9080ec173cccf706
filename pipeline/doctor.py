"""What this machine has and lacks for the main job: train, export, prove, package, serve."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onnx import TensorProto, helper

from pipeline import installed, lint_live, tritonserver
from pipeline.config import ServeConfig
from pipeline.data import verify
from pipeline.datasets import DEFAULT_DATASET
from pipeline.errors import PipelineError
from pipeline.installed import Check, Examined
from pipeline.paths import Paths
from pipeline.running import serving

GLIBC = (2, 35)  # of the server in the wheel
DISK_BYTES = 1 << 30  # for data, runs and exports, generously
SHARED_BYTES = 64 << 20  # of /dev/shm, for the server and its stubs
DOCKER_SECONDS = 5.0
REBUILD_SERVER = "rm -rf .venv-triton && make .venv-triton"


def examine(paths: Paths, config: ServeConfig = ServeConfig()) -> Examined:
    """Look at everything that the main job needs, side by side where it takes time."""
    with (
        tempfile.TemporaryDirectory(prefix="handwriting-doctor-") as scratch,
        ThreadPoolExecutor() as pool,
    ):
        model = Path(scratch) / "models" / "doctor" / "1" / "model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(_doubling())
        slow: list[Callable[[], list[Check]]] = [
            installed.torch,
            lambda: installed.runtime(model),
            lambda: _server(paths, model),
            lambda: _data(paths),
        ]
        begun = [pool.submit(look) for look in slow]
        quick = [*installed.python(), *installed.packages(), *installed.runtimes()]
        around = [*_folders(paths), *_disk(paths), *_shared_memory(), *_ports(paths, config)]
        torch, runtime, server, data = (job.result() for job in begun)
    return Examined((*quick, *torch, *installed.gpu(torch), *runtime, *server, *data, *around))


def _server(paths: Paths, model: Path) -> list[Check]:
    """The server's environment, and a server that was started, loaded a model, and answered."""
    what = "tritonserver"
    try:
        runtime = tritonserver.find(paths, "auto")
    except PipelineError as error:
        message = " ".join(str(error).split())
        mend = REBUILD_SERVER if "numpy" in message else "make .venv-triton"
        return [Check("problem", what, message, mend)]
    checks = [*_glibc(runtime), *_server_numpy(paths, runtime)]
    if runtime.kind == "docker":
        return _docker(runtime)
    (model.parent.parent / "config.pbtxt").write_text(_CONFIG)
    try:
        (trial,) = lint_live.try_models(model.parents[2], ["doctor"], paths)
    except PipelineError as error:
        return [*checks, Check("problem", what, str(error), REBUILD_SERVER)]
    if trial.outcome != "loads":
        said = f"{runtime}: a small model {trial.outcome}: {trial.cause}"
        return [*checks, Check("problem", what, said, REBUILD_SERVER)]
    return [*checks, Check("ok", what, f"{runtime}: started, loaded a model, answered")]


def _docker(runtime: tritonserver.Runtime) -> list[Check]:
    """Whether Docker's engine answers; the image, which is large, is not brought for a check."""
    command = [runtime.program[0], "info", "--format", "{{.ServerVersion}}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DOCKER_SECONDS
        )
        said = done.stdout.strip() if done.returncode == 0 else ""
    except subprocess.TimeoutExpired:
        said = ""
    if not said:
        found = "docker is here and its engine does not answer; no server's environment either"
        return [Check("problem", "tritonserver", found, "make .venv-triton")]
    return [Check("ok", "tritonserver", f"{runtime}, engine {said}; not started")]


def _doubling() -> bytes:
    """A model that doubles what it gets."""
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


def _glibc(runtime: tritonserver.Runtime) -> list[Check]:
    name, version = platform.libc_ver()
    if runtime.kind != "wheel" or name != "glibc":
        return []
    least = ".".join(map(str, GLIBC))
    if tuple(map(int, version.split(".")[:2])) < GLIBC:
        mend = f"serve with Docker and {tritonserver.IMAGE}, or on a newer system"
        return [Check("problem", "glibc", f"{version}, and the server needs {least}", mend)]
    return [Check("ok", "glibc", f"{version} ({least} is needed)")]


def _server_numpy(paths: Paths, runtime: tritonserver.Runtime) -> list[Check]:
    if runtime.kind != "wheel":
        return []
    found = sorted(paths.triton_environment.glob("lib/python3.*/site-packages/numpy-*.dist-info"))
    ours = importlib.metadata.version("numpy")
    theirs = found[0].name.split("-")[1].removesuffix(".dist") if found else "missing"
    return [Check("ok", "numpy", f"{ours} here, {theirs} in the server's environment")]


def _data(paths: Paths) -> list[Check]:
    folder, mend = paths.data(DEFAULT_DATASET), "pipeline data fetch"
    try:
        verify(DEFAULT_DATASET, folder)
    except (PipelineError, OSError) as error:
        return [Check("problem", "data", " ".join(str(error).split()), mend)]
    return [Check("ok", "data", f"{folder}: every file matches its SHA-256")]


def _folders(paths: Paths) -> list[Check]:
    """Whether files can be made where the main job makes them."""
    wrong = []
    for folder in (paths.data(DEFAULT_DATASET), paths.root / "runs", paths.root / "exported"):
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        if said := _unwritable(there):
            wrong.append(Check("problem", "folders", f"{there}: {said}", f"chmod u+rwx {there}"))
    return wrong or [Check("ok", "folders", f"data, runs and exported in {paths.root.absolute()}")]


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
    free = shutil.disk_usage(paths.root.absolute()).free
    said = f"{free / (1 << 30):.1f} GiB are free"
    if free < DISK_BYTES:
        return [Check("problem", "disk", f"{said}, and 1 GiB is needed", "make clean")]
    return [Check("ok", "disk", said)]


def _shared_memory() -> list[Check]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return []  # not Linux: no server of the wheel either
    free = shutil.disk_usage(folder).free
    said = f"{free >> 20} MiB are free in {folder}"
    mend = f"mount -o remount,size=1G {folder}  # of a container: --shm-size=1g"
    if refusal := _unwritable(folder):
        return [Check("problem", "shared memory", f"{folder}: {refusal}", mend)]
    if free < SHARED_BYTES:
        said += f", and the server needs {SHARED_BYTES >> 20}"
        return [Check("problem", "shared memory", said, mend)]
    return [Check("ok", "shared memory", said)]


def _ports(paths: Paths, config: ServeConfig) -> list[Check]:
    if server := serving(paths):
        return [Check("ok", "ports", f"our server has its own (pid {server.pid})")]
    taken = []
    for service, port in tritonserver.ports(config).items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
            except OSError as error:
                taken.append(f"{port} ({service}): {os.strerror(error.errno or 0)}")
    if taken:
        return [Check("problem", "ports", "; ".join(taken), "pipeline serve --port auto")]
    numbers = ", ".join(map(str, tritonserver.ports(config).values()))
    return [Check("ok", "ports", f"{numbers} are free")]
