"""Serve the packaged repository in NVIDIA's image, and hold its native backend to the golden set.

Run by `make prove-native`, where Docker is. `--runtime path` does the same with a tritonserver on
the PATH, inside the image say; `--runtime wheel` shows that the proof itself works.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.serving import tritonserver
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import IMAGE, ServerRuntime
from pipeline.validation.servers import ServerEvidence, require_passed, validate_servers
from tools.edge import make_result_parser, print_now, run_tool
from tools.provenance import write_figure
from tools.readme import RESULTS, render_pages

START_SECONDS = 300.0  # for a container whose image has never been started
COMMANDS = {"docker": "make prove-native"}
Say = Callable[[str], None]
NATIVE = "backends/onnxruntime"  # of the native backend, below Triton's folder
# Runs where a native backend is, and prints the backend's digest and what its ONNX Runtime states.
PROBE = """
import ctypes, hashlib, json, pathlib, sys
class ApiBase(ctypes.Structure):
    _fields_ = [("api", ctypes.c_void_p), ("version", ctypes.CFUNCTYPE(ctypes.c_char_p))]
folder = pathlib.Path(sys.argv[1])
digest = hashlib.sha256((folder / "libtriton_onnxruntime.so").read_bytes()).hexdigest()
get_base = ctypes.CDLL(str(folder / "libonnxruntime.so")).OrtGetApiBase
get_base.restype = ctypes.POINTER(ApiBase)
version = get_base().contents.version().decode()
print(json.dumps({"sha256": digest, "onnxruntime": version}))
"""
OURS = "import json, onnxruntime; print(json.dumps({'onnxruntime': onnxruntime.__version__}))"


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run docker with these arguments; raise PipelineError if it is not installed."""
    program = shutil.which("docker")
    if not program:
        raise PipelineError(
            "no docker on the PATH: the native backend stays not verified, nothing was written"
        )
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def image_digest(report: Say) -> str:
    """Return the digest of NVIDIA's image, pulled if it is missing.

    Raises PipelineError when docker cannot be used or the image cannot be pulled.
    """
    running = docker("info")
    if running.returncode:
        raise PipelineError(f"docker cannot be used here: {_last_line(running.stderr)}")
    asked = ("image", "inspect", "--format", '{{join .RepoDigests " "}}', IMAGE)
    result = docker(*asked)
    if result.returncode:
        report(f"pulling {IMAGE}, some gigabytes")
        pulled = docker("pull", "--quiet", IMAGE)
        if pulled.returncode:
            raise PipelineError(f"{IMAGE} cannot be pulled: {_last_line(pulled.stderr)}")
        result = docker(*asked)
    return result.stdout.strip()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it does not say why"])[-1]


def describe_backend(runtime: ServerRuntime, image_digest: str | None) -> dict[str, Any]:
    """Return the backend's origin, the digest of its library, and the version of ONNX Runtime.

    What cannot be found out is left out, with the reason as `problem`.
    """
    if runtime.kind == "docker":
        origin, folder = f"NVIDIA's image {image_digest}", f"/opt/tritonserver/{NATIVE}"
        command = [*runtime.program, "--rm", "--entrypoint=python3", IMAGE, "-c", PROBE, folder]
    elif runtime.python:
        origin = "this project's python-based backend"
        command = [str(runtime.python), "-c", OURS]
    else:
        folder = str(Path(runtime.program[0]).resolve().parent.parent / NATIVE)
        origin, command = f"the build in {folder}", [sys.executable, "-c", PROBE, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"origin": origin, "problem": _last_line(done.stderr)}
    return {"origin": origin, **json.loads(done.stdout)}


def served(paths: Paths, kind: str, report: Say) -> tuple[str, ServerEvidence]:
    """Serve and validate over both protocols; return the runtime in words, and the evidence."""
    config = with_free_ports(ServeConfig(runtime=kind, start_seconds=START_SECONDS))
    runtime = tritonserver.find_runtime(paths, kind)
    with (
        tempfile.TemporaryDirectory() as folder,
        run_server(paths, config, report=report) as (server, _),
    ):
        urls = [server.http_url, server.grpc_url]
        evidence = validate_servers(paths, urls, file=Path(folder) / "evidence.json", report=report)
    return str(runtime), evidence


def prove(paths: Paths, kind: str, result: Path, report: Say) -> ServerEvidence:
    """Validate a runtime, and keep the evidence whether it passed or not.

    Raises PipelineError, before any file is changed, if the runtime cannot run.
    """
    digest = image_digest(report) if kind == "docker" else None
    backend = describe_backend(tritonserver.find_runtime(paths, kind), digest)
    result.unlink(missing_ok=True)  # the old result is about to be replaced
    runtime, evidence = served(paths, kind, report)
    record: dict[str, Any] = {
        "command": COMMANDS.get(kind, f"python -m tools.prove_native --runtime {kind}"),
        "runtime": kind,
        "runs_on": runtime,
        "image": IMAGE if kind == "docker" else None,
        "image_digest": digest,
        "backend": backend,
        **evidence.record(),
    }
    write_figure("native", result, record)
    return evidence


def main(arguments: list[str]) -> None:
    """Validate, keep the result, and render it into the pages."""
    parser = make_result_parser(__doc__)
    parser.add_argument("--root", type=Path, default=Paths.root)
    parser.add_argument("--runtime", choices=["docker", "path", "wheel"], default="docker")
    given = parser.parse_args(arguments)
    paths = replace(Paths(given.root), name=given.name)
    evidence = prove(paths, given.runtime, given.result, print_now)
    print(f"{evidence}\nwrote {given.result}")
    results = paths.root / RESULTS
    if given.result.resolve().parent == results.resolve():
        render_pages(paths.root, results)
    require_passed(evidence)


if __name__ == "__main__":
    run_tool(main)
