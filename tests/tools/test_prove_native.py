"""The proof of the native backend itself, tried on the server that can run here."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.files import sha256
from pipeline.serving import tritonserver
from pipeline.serving.tritonserver import IMAGE, ServerRuntime
from tests.conftest import REPOSITORY, Chain, link_server_environment
from tools import prove_native
from tools.provenance import write_figure
from tools.readme import NATIVE_NOT_VERIFIED, RESULTS, render_page

BLOCK = "<!-- figures:gpu -->\n<!-- /figures -->"
# A docker whose container is the wheel's server on this machine: it takes the command line apart.
DOCKER = """#!{python}
import os, sys
with open({calls!r}, "a") as calls:
    print(*" ".join(sys.argv[1:]).split(), file=calls)
if sys.argv[1] == "info":
    print("27.1")
if sys.argv[1:3] == ["image", "inspect"]:
    print("the-image@sha256:abc")
if "--entrypoint=python3" in sys.argv:
    assert sys.argv[-1] == "/opt/tritonserver/backends/onnxruntime"
    os.execv(sys.executable, [sys.executable, *sys.argv[-3:-1], {library!r}])
if sys.argv[1] == "run":
    options, command = sys.argv[2:sys.argv.index({image!r})], sys.argv[sys.argv.index({image!r}):]
    given = dict(option.split("=", 1) for option in options if "=" in option)
    kind, source, inside, mode = given["--mount"].split(",")
    assert (kind, inside, mode) == ("type=bind", "target=/models", "readonly")
    assert command[1] == "tritonserver"
    repository = source.removeprefix("source=")
    assert given["-p"].startswith("127.0.0.1:")
    arguments = [a.replace("/models", repository).replace("0.0.0.0", "127.0.0.1")
                 for a in command[2:]]
    shared = "--backend-config=python,shm-region-prefix-name=" + given["--name"]
    os.environ.update({environment!r})
    os.environ["PATH"] = {path!r} + os.environ["PATH"]
    program = {program!r}
    os.execv(program, [program, *arguments, "--backend-directory=" + {backends!r}, shared])
"""


def put_on_path(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "docker").write_text(script)
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def put_native_backend(folder: Path) -> Path:
    """Make a folder with the libraries of a native backend: this environment's ONNX Runtime."""
    folder.mkdir()
    (folder / "libtriton_onnxruntime.so").write_bytes(b"a native backend")
    capi = Path(onnxruntime.__file__).parent / "capi"
    (library,) = capi.glob("libonnxruntime.so.*")
    (folder / "libonnxruntime.so").symlink_to(library)
    return folder


def test_a_native_backend_on_the_path_is_told_by_its_digest_and_its_onnx_runtime(
    tmp_path: Path,
) -> None:
    (tmp_path / "backends").mkdir()
    folder = put_native_backend(tmp_path / "backends" / "onnxruntime")
    runtime = ServerRuntime("path", (str(tmp_path / "bin" / "tritonserver"),), {})
    expected = {
        "origin": f"the build in {folder}",
        "sha256": sha256(b"a native backend"),
        "onnxruntime": onnxruntime.__version__,
    }
    assert prove_native.describe_backend(runtime, None) == expected
    (folder / "libonnxruntime.so").unlink()
    described = prove_native.describe_backend(runtime, None)
    assert described["origin"] == expected["origin"]
    assert "libonnxruntime.so" in described["problem"]


@pytest.mark.server
def test_the_flow_of_docker_ends_with_evidence_a_readme_and_no_container(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_server_environment(chain)
    wheel = tritonserver.find_runtime(chain.paths, "wheel")
    tritonserver.copy_backends(wheel, tmp_path / "backends")
    calls = tmp_path / "calls"
    script = DOCKER.format(
        python=sys.executable,
        calls=str(calls),
        image=IMAGE,
        environment=wheel.environment,
        path=f"{wheel.python.parent if wheel.python else ''}:",
        program=wheel.program[0],
        backends=str(tmp_path / "backends"),
        library=str(put_native_backend(tmp_path / "native")),
    )
    put_on_path(tmp_path / "bin", script, monkeypatch)
    readme = chain.root / "README.md"
    readme.write_text(BLOCK)
    results = chain.root / RESULTS
    results.mkdir(parents=True)
    native = results / "native.json"
    prove_native.main([str(native), "--root", str(chain.root)])
    record = json.loads(native.read_text())
    assert (record["passed"], record["runtime"], record["image"]) == (True, "docker", IMAGE)
    assert record["image_digest"] == "the-image@sha256:abc"
    assert record["protocols"] == ["http", "grpc"]
    assert record["backend"] == {
        "origin": "NVIDIA's image the-image@sha256:abc",
        "sha256": sha256(b"a native backend"),
        "onnxruntime": onnxruntime.__version__,
    }
    date = record["measured_at"][:10]
    assert f"native backend: verified on {date} with `make prove-native`" in " ".join(
        readme.read_text().split()
    )
    asked = [line.split() for line in calls.read_text().splitlines()]
    asked = [line for line in asked if line[0] != "info"]  # whether the engine answers
    assert [line[0] for line in asked] == ["image", "run", "run", "rm"]
    assert f"--name={asked[3][2]}" in asked[2]
    assert not chain.paths.replay.exists()
    # A wrong server's evidence takes its place, and the README says no more than before.
    write_figure("native", native, {**record, "passed": False})
    assert NATIVE_NOT_VERIFIED in " ".join(render_page(BLOCK, results).split())


def test_evidence_of_a_native_backend_is_told_in_the_readme(tmp_path: Path) -> None:
    rounds = [
        {"images": 700, "max_abs_diff": diff, "max_ratio": diff * 1e5} for diff in (1e-6, 2e-6)
    ]
    record = {
        "passed": True,
        "runtime": "docker",
        "runs_on": "an image",
        "command": "make prove-native",
        "measured_at": "2026-11-30",
        "backend": {"onnxruntime": "1.24.4"},
        "golden": {"images": 100},
        "protocols": ["http", "grpc"],
        "servers": [{"server": {"version": "2.60"}, "rounds": [each]} for each in rounds],
    }
    write_figure("native", tmp_path / "native.json", record)
    text = " ".join(render_page(BLOCK, tmp_path).split())
    versions = "Triton 2.60, ONNX Runtime 1.24.4"
    assert f"verified on 2026-11-30 with `make prove-native` (an image; {versions})" in text
    assert "1,400 answers about 100 golden images over HTTP and gRPC, one by one" in text
    assert "largest difference 2.0e-06, 20% of the largest allowed difference." in text


def test_the_wheel_is_no_native_backend(tmp_path: Path) -> None:
    write_figure("native", tmp_path / "native.json", {"passed": True, "runtime": "wheel"})
    assert NATIVE_NOT_VERIFIED in " ".join(render_page(BLOCK, tmp_path).split())


def test_without_docker_it_is_one_line_exit_1_and_nothing_is_written(tmp_path: Path) -> None:
    kept = tmp_path / "native.json"
    kept.write_text("kept")
    command = [sys.executable, "-m", "tools.prove_native", str(kept)]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no docker on the PATH")
    assert len(done.stderr.splitlines()) == 1
    assert kept.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["native.json"]


def test_a_docker_that_does_not_run_or_cannot_pull_is_told_by_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    put_on_path(
        tmp_path / "dead", "#!/bin/sh\necho 'is the daemon running?' >&2; exit 1\n", monkeypatch
    )
    with pytest.raises(PipelineError, match=r"cannot be used here: is the daemon running\?"):
        prove_native.image_digest(said.append)
    offline = "#!/bin/sh\n[ $1 = info ] || { echo no route >&2; exit 1; }\n"
    put_on_path(tmp_path / "offline", offline, monkeypatch)
    with pytest.raises(PipelineError, match="cannot be pulled: no route"):
        prove_native.image_digest(said.append)
    assert said == [f"pulling {IMAGE}, some gigabytes"]
