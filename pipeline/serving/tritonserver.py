"""The tritonserver that can run here: how to find and start it, and why it failed, by its log."""

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths, format_make
from pipeline.core.text import Lines
from pipeline.repository import ort_values
from pipeline.serving.settings import ServeConfig

IMAGE = "nvcr.io/nvidia/tritonserver:26.05-py3"
BACKENDS = Path(__file__).parent / "backend"
REQUIREMENTS = BACKENDS / "requirements.txt"
RESTRICTED = "model-repository,shared-memory,trace,logging"
KEY_HEADER = "triton-admin-key"
# Quantiles of the last minute's latencies, each with the allowed error of its rank.
SUMMARIES = ("summary_latencies=true", "summary_quantiles=0.5:0.05,0.99:0.001")
DOCKER_SECONDS = 5.0  # within which Docker's engine must answer
EXIT_SECONDS = 1  # wait for open connections, after all accepted requests were answered
# A path that the wheel's server can use. Its python backend starts a model through a shell, without
# quotes (stub_launcher.cc: bash -c " exec STUB MODEL ..."), the Python in it reads file names as
# ASCII, and PATH and LD_LIBRARY_PATH are split at colons and semicolons.
_PLAIN = re.compile(r"[A-Za-z0-9_./@+=~-]+")


@dataclass(frozen=True)
class ServerRuntime:
    """A way to run tritonserver."""

    kind: str  # path, wheel or docker
    program: tuple[str, ...]
    environment: dict[str, str]  # variables added to ours
    python: Path | None = None  # of the server's environment, if we provide the backend

    def __str__(self) -> str:
        return {
            "path": "tritonserver on the PATH, native backend",
            "wheel": "tritonserver of the wheel, our python-based backend",
            "docker": f"docker, {IMAGE}",
        }[self.kind]


def require_linux() -> None:
    """Raise PipelineError where no server can be started or watched."""
    if sys.platform != "linux":
        raise PipelineError(
            f"serving needs Linux, this is {platform.system()}: all commands up to 'package' work "
            f"here, and {IMAGE} can serve the model repository"
        )


def find_runtime(paths: Paths, kind: str) -> ServerRuntime:
    """Return the runtime of this kind; for "auto", the first that this machine has.

    Raises PipelineError with what is missing and how to fix it.
    """
    require_linux()
    finders = {"path": _find_on_path, "wheel": _find_wheel, "docker": _find_docker}
    missing = []
    for name in finders if kind == "auto" else [kind]:
        runtime = finders[name](paths)
        if isinstance(runtime, ServerRuntime):
            return runtime
        missing.append(f"  {name}: {runtime}")
    fix = f"All commands up to 'package' work here; {IMAGE} can serve the model repository"
    raise PipelineError(Lines("tritonserver cannot run here:", *missing, fix))


def _find_on_path(paths: Paths) -> ServerRuntime | str:
    program = shutil.which("tritonserver")
    if not program:
        return "tritonserver is not on the PATH"
    backends = Path(program).resolve().parent.parent / "backends"
    if not (backends / "onnxruntime").is_dir():
        return f"{program} has no onnxruntime backend in {backends}"
    return ServerRuntime("path", (program,), {})


def fits_wheel() -> bool:
    """Return whether the wheel's tritonserver runs on this kind of machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _find_wheel(paths: Paths) -> ServerRuntime | str:
    if not fits_wheel():
        return f"the wheel is for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    environment = paths.triton_environment
    python = environment / "bin" / "python"
    servers = sorted(environment.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    if not environment.exists():
        pip = [str(python), "-m", "pip", "install", "--no-deps", "-r", str(REQUIREMENTS)]
        venv = shlex.join(["python3", "-m", "venv", str(environment)])
        steps = f"'{format_rebuild(paths)}' (or {venv} && {shlex.join(pip)})"
        return f"{environment} does not exist: run {steps}"
    if not python.exists() or not servers:
        lacks = "pytriton" if python.exists() else "bin/python"
        return f"{environment} lacks {lacks}: build it again with '{format_rebuild(paths)}'"
    site = servers[0].parent.parent
    # With numpy 2 the wheel's Triton returns incorrect numbers, yet with HTTP 200. Python 3.13 has
    # no older numpy; see requirements.txt for why it is safe there.
    numpy = next((p.stem.removeprefix("numpy-") for p in site.glob("numpy-*.dist-info")), "1.")
    if site.parent.name in ("python3.11", "python3.12") and not numpy.startswith("1."):
        fix = f"build it again with '{format_rebuild(paths)}'"
        raise PipelineError(f"{environment} has numpy {numpy} and needs numpy 1: {fix}")
    # The stub is linked against libpython; it must be that of the environment's own Python.
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    folder = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    libraries = os.pathsep.join([folder, str(site.absolute() / "nvidia_pytriton.libs")])
    program = (str(servers[0].absolute() / "bin" / "tritonserver"),)
    return ServerRuntime("wheel", program, {"LD_LIBRARY_PATH": libraries}, python.absolute())


def format_rebuild(paths: Paths) -> str:
    """Return the shell command that builds the server's environment; an old one is removed."""
    environment, build = paths.triton_environment, format_make(".venv-triton")
    is_there = os.path.lexists(environment)  # make does not check one that it has built
    return f"rm -rf {shlex.quote(str(environment))} && {build}" if is_there else build


def _find_docker(paths: Paths) -> ServerRuntime | str:
    program = shutil.which("docker")
    if not program:
        return "docker is not on the PATH"
    command = [program, "info", "--format", "{{.ServerVersion}}"]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        done = subprocess.run(command, capture_output=True, check=True, timeout=DOCKER_SECONDS)
        if done.stdout.strip():
            return ServerRuntime("docker", (program, "run"), {})
    return f"{program} gets no answer from Docker's engine: start the engine"


def scratch_parent() -> Path:
    """Return where a server's temporary folder goes: TMPDIR, or /tmp if TMPDIR is not plain."""
    folder = Path(tempfile.gettempdir())
    return folder if _PLAIN.fullmatch(str(folder)) else Path("/tmp")


def link_plain_paths(
    runtime: ServerRuntime, repository: Path, scratch: Path
) -> tuple[ServerRuntime, Path]:
    """Return the runtime and the repository with plain paths, by links in `scratch` if needed.

    Only the wheel's server needs plain paths.
    """
    repository = repository.resolve()
    if runtime.python is None:
        return runtime, repository
    old = runtime.python.parent.parent
    new = _link_if_needed(old, scratch / "environment")
    runtime = replace(
        runtime,
        program=tuple(text.replace(str(old), str(new)) for text in runtime.program),
        environment={k: v.replace(str(old), str(new)) for k, v in runtime.environment.items()},
        python=new / runtime.python.relative_to(old),
    )
    return runtime, _link_if_needed(repository, scratch / "repository")


def _link_if_needed(path: Path, link: Path) -> Path:
    """Return `path` if it is plain; else create `link` to it and return that."""
    if _PLAIN.fullmatch(str(path)):
        return path
    link.symlink_to(path)
    return link


def copy_backends(runtime: ServerRuntime, folder: Path) -> None:
    """Copy the python backend, the stub for its Python and our onnxruntime into `folder`."""
    server = Path(runtime.program[0]).parent.parent
    version = server.parent.parent.parent.name.removeprefix("python")
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        fix = "remove it, and build it with Python 3.11 to 3.13"
        raise PipelineError(f"the server's environment has no stub for Python {version}: {fix}")
    shutil.copytree(server / "backends" / "python", folder / "python")
    shutil.copy2(stub, folder / "python" / stub.name)
    shutil.copytree(BACKENDS / "onnxruntime", folder / "onnxruntime")
    shutil.copy2(ort_values.__file__, folder / "onnxruntime")  # the rules that lint has as well


def build_command(
    runtime: ServerRuntime,
    repository: Path,
    config: ServeConfig,
    server_id: str,
    admin_key: str,
    backends: Path,
) -> list[str]:
    """Return the command line that starts this runtime on `repository`, an absolute path."""
    is_inside = runtime.kind == "docker"
    host = "0.0.0.0" if is_inside else config.host  # inside the container; -p below limits it
    arguments = [
        f"--model-repository={'/models' if is_inside else repository}",
        "--model-control-mode=explicit",
        f"--id={server_id}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        *(f"--metrics-config={setting}" for setting in SUMMARIES),
        f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={admin_key}",
        f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={admin_key}",
    ]
    for service, port in config.ports.items():
        arguments += [f"--{service}-address={host}", f"--{service}-port={port}"]
    if config.profile:
        arguments.append(f"--model-config-name={config.profile}")
    if runtime.kind == "wheel":
        arguments += [
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={server_id}",
        ]
    if not is_inside:
        return [*runtime.program, *arguments]
    published = [f"-p={config.host}:{port}:{port}" for port in config.ports.values()]
    source = f"source={repository}"
    if re.search('[,"]', source):  # --mount is parsed as a line of CSV, and -v is split at colons
        source = '"{}"'.format(source.replace('"', '""'))
    mount = f"--mount=type=bind,{source},target=/models,readonly"
    name = f"--name={server_id}"
    return [*runtime.program, "--rm", name, mount, *published, IMAGE, "tritonserver", *arguments]


def find_taken_ports(config: ServeConfig) -> list[tuple[str, int, OSError]]:
    """Return each port that cannot be bound: its service, its number, and the error."""
    taken = []
    for service, port in config.ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
            except OSError as error:
                taken.append((service, port, error))
    return taken


def build_environment(runtime: ServerRuntime) -> dict[str, str]:
    """Return our environment variables plus the runtime's, without those that affect Python.

    The stub uses only the packages of the first python3 on the PATH.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    if runtime.python:
        inherited["PATH"] = f"{runtime.python.parent}{os.pathsep}{inherited.get('PATH', '')}"
    return {**inherited, **runtime.environment}


_ERROR = re.compile(r"^E\d{4} \S+ +\d+ [\w.]+:\d+\] (.*)$", re.MULTILINE)
# Lines that only repeat that something failed, without a reason.
_VAGUE = ("failed to load all models", "CudaDriverHelper has not been initialized")


def find_cause(log: str) -> str:
    """Return, in one line, the error in tritonserver's log that explains the other errors."""
    if crash := re.search(r"^Signal \((\d+)\) received", log, re.MULTILINE):
        number = int(crash[1])
        is_known = number in signal.valid_signals()
        name = signal.Signals(number).name if is_known else f"signal {number}"
        what = re.search(r"what\(\):\s*(.*)", log)
        return f"the server crashes ({name}{', ' + what[1] if what else ''})"
    if parsing := re.findall(r"Error parsing text-format inference\.ModelConfig: (.*)", log):
        return str(parsing[-1])
    errors: list[str] = [match.strip().strip('"') for match in _ERROR.findall(log)]
    telling = [error for error in errors if not error.startswith(_VAGUE)]
    # This line names model, version and reason; earlier errors are part of that reason.
    verdicts = [error for error in telling if error.startswith("failed to load '")]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # Docker's own reason; its later lines only refer to its help.
    refusals = [line for line in lines if "Cannot connect to the Docker daemon" in line]
    return [*verdicts, *telling, *refusals, *lines[-1:], "its log is empty"][0]
