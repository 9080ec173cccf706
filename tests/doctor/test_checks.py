"""What doctor finds, each problem planted."""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.core.paths import Paths
from pipeline.doctor import checks as doctor
from pipeline.doctor import packages
from pipeline.doctor.packages import Check
from pipeline.serving import tritonserver
from pipeline.serving.settings import ServeConfig
from tests.conftest import REPOSITORY, Chain, error_line, flip_bit, link_server_environment


class Space(NamedTuple):
    """As shutil.disk_usage tells it."""

    total: int
    used: int
    free: int


def distribution(folder: Path, name: str, version: str) -> None:
    """Plant the record of an installed distribution."""
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def checks_of(root: Path, what: str, config: ServeConfig = ServeConfig()) -> list[Check]:
    """The results of one of doctor's slow checks, in a project at `root`."""
    model = root / "models" / "doctor" / "1" / "model.onnx"
    return packages.run_check(what, *doctor.list_checks(Paths(root), model, config)[what])


def check_of(root: Path, what: str, config: ServeConfig = ServeConfig()) -> Check:
    (check,) = checks_of(root, what, config)
    return check


def quick_check(what: str) -> Check:
    (check,) = (check for check in packages.run_quick_checks() if check.what == what)
    return check


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first where Python looks for packages, here and in processes of ours."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "site"


def rebuild_of(root: Path) -> str:
    """The command that builds the server's environment of the project at `root` again."""
    return f"rm -rf {root / '.venv-triton'} && make .venv-triton"


@pytest.fixture
def servers(tmp_path: Path) -> Path:
    """A server's environment of links to the real one, to be damaged."""
    (real,) = (REPOSITORY / ".venv-triton").glob("lib/python3.*/site-packages")
    copy = tmp_path / ".venv-triton" / "lib" / real.parent.name / "site-packages"
    package = copy / "pytriton" / "tritonserver"
    package.mkdir(parents=True)
    for entry in real.iterdir():
        if entry.name != "pytriton":
            (copy / entry.name).symlink_to(entry)
    for entry in (real / "pytriton" / "tritonserver").iterdir():
        (package / entry.name).symlink_to(entry)
    (tmp_path / ".venv-triton" / "bin").mkdir()
    python = tmp_path / ".venv-triton" / "bin" / "python"
    python.symlink_to(REPOSITORY / ".venv-triton" / "bin" / "python")
    return copy


@pytest.mark.server
def test_where_all_is_well_it_says_so_and_exits_with_0(chain: Chain) -> None:
    link_server_environment(chain)
    result = chain.run("doctor")
    assert result.exit_code == 0, result.output
    assert "started, loaded a model, answered" in result.stdout
    assert "every file matches its SHA-256" in result.stdout
    assert "problem" not in result.stdout
    assert result.stdout.endswith("next: pipeline serve --detach\n")  # it is packaged


def test_where_nothing_is_made_yet_everything_is_made_next(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those that start processes, and find nothing wrong with this machine: see the test before.
    monkeypatch.setattr(packages, "check_torch", list)
    monkeypatch.setattr(packages, "check_providers", lambda model: [])
    monkeypatch.setattr(doctor, "_check_server", lambda paths, model: [])
    assert empty.run("doctor").stdout.endswith("next: make all\n")


@pytest.mark.usefixtures("no_checkout")
def test_problems_are_named_with_what_mends_them_and_exit_with_1(
    empty: Chain, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(planted))  # no docker either
    shutil.rmtree(empty.paths.data("mnist"), ignore_errors=True)
    (planted / "torch").mkdir(parents=True)
    (planted / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so is cut off')")
    result = empty.run("doctor", "--json")
    assert result.exit_code == 1
    assert "problems: training, exporting or serving would fail" in error_line(result)
    record = json.loads(result.stdout)
    problems = {one["what"]: one for one in record["checks"] if one["level"] == "problem"}
    assert set(problems) >= {"torch", "tritonserver", "data"}
    assert record["problems"] == len(problems)
    assert "libtorch.so is cut off" in problems["torch"]["found"]
    build = f"make -C {empty.root.parent / 'checkout'} .venv-triton"
    assert f"does not exist: run '{build}'" in problems["tritonserver"]["found"]
    assert problems["tritonserver"]["fix"] == build
    assert problems["data"]["fix"] == "pipeline data fetch"
    assert all(one["fix"] for one in problems.values())


@pytest.mark.parametrize(
    "kind", ["ImportError", "ValueError", "type('VersionError', (Exception,), {})"]
)
def test_a_library_that_doctor_itself_needs_and_that_does_not_start_is_said_in_words(
    planted: Path, kind: str
) -> None:
    (planted / "onnx").mkdir(parents=True)
    (planted / "onnx" / "__init__.py").write_text(f"raise {kind}('onnx is cut off')")
    command = [sys.executable, "-m", "pipeline", "doctor", "--json"]
    path = f"{planted}{os.pathsep}{REPOSITORY}"
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    check = json.loads(done.stdout)["checks"][-1]
    assert "onnx is cut off" in check["found"]
    assert check["fix"] == packages.rebuild()


def test_what_a_look_stumbles_over_is_a_problem_and_the_others_still_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Paths(tmp_path).server
    record.parent.mkdir()
    record.write_text("{")
    python = tmp_path / ".venv-triton" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")  # nobody may execute it
    (tmp_path / ".venv-triton/lib/python3.12/site-packages/pytriton/tritonserver").mkdir(
        parents=True
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "check_torch", list)
    monkeypatch.setattr(packages, "check_providers", lambda model: [])
    found = {check.what: check for check in doctor.examine(Paths(tmp_path)).checks}
    assert {what for what, one in found.items() if one.level == "problem"} == {
        *("tritonserver", "data", "ports")
    }
    assert (
        f"PermissionError: [Errno 13] Permission denied: '{python}'" in found["tritonserver"].found
    )
    assert found["tritonserver"].fix == rebuild_of(tmp_path)
    assert "server.json is not readable JSON" in found["ports"].found
    assert found["ports"].fix.startswith(f"rm {record}")
    assert check_of(tmp_path / "not" / "yet", "disk").level == "ok"


@pytest.mark.parametrize("lacking", ["bin/python", "pytriton"])
def test_a_servers_environment_that_make_has_built_is_mended_by_building_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: Path, lacking: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    python = tmp_path / ".venv-triton" / "bin" / "python"
    if lacking == "pytriton":
        shutil.rmtree(servers / "pytriton")
    else:
        python.unlink()
        python.symlink_to(tmp_path / "python3.9")  # which went when the system was upgraded
    check = check_of(tmp_path, "tritonserver")
    assert f"lacks {lacking}" in check.found
    assert check.fix == rebuild_of(tmp_path)


def put_docker(folder: Path, script: str) -> None:
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_where_the_wheel_is_not_for_the_machine_its_environment_is_no_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    check = check_of(tmp_path, "tritonserver")
    assert check.fix == f"serve with Docker and {tritonserver.IMAGE}, or on Linux on x86-64"
    put_docker(tmp_path, "exit 1")
    after = check_of(tmp_path, "tritonserver")
    assert after.fix == ("start Docker's engine" if system == "linux" else check.fix)


def test_our_own_package_is_missed_with_what_brings_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "DISTRIBUTION", "nobodys-package")
    assert quick_check("packages").fix == packages.rebuild()


def test_an_environment_is_removed_only_where_we_run_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "prefix", str(REPOSITORY / ".venv"))
    assert packages.rebuild() == "rm -rf .venv && make .venv"
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert packages.rebuild("PYTHON=x") == "make .venv PYTHON=x"
    monkeypatch.chdir("/")
    assert packages.rebuild() == f"make -C {REPOSITORY} .venv"


def test_numpy_2_in_the_servers_environment_is_a_problem(tmp_path: Path, servers: Path) -> None:
    for record in servers.glob("numpy-*.dist-info"):
        record.unlink()
    distribution(servers, "numpy", "2.1.0")
    check = check_of(tmp_path, "tritonserver")
    assert check.level == "problem"
    assert "has numpy 2.1.0 and needs numpy 1" in check.found
    assert check.fix == rebuild_of(tmp_path)


def test_a_missing_stub_is_a_problem(tmp_path: Path, servers: Path) -> None:
    (servers / "pytriton" / "tritonserver" / "python_backend_stubs").unlink()
    (tmp_path / "models" / "doctor").mkdir(parents=True)
    check = checks_of(tmp_path, "tritonserver")[-1]
    assert check.level == "problem"
    assert "has no stub for Python" in check.found
    assert check.fix == rebuild_of(tmp_path)


@pytest.mark.usefixtures("no_checkout")
@pytest.mark.parametrize(("script", "level"), [("exit 1", "problem"), ("echo 27.1", "ok")])
def test_docker_without_its_engine_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, level: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    put_docker(tmp_path, script)
    check = check_of(tmp_path, "tritonserver")
    assert check.level == level
    assert level == "ok" or check.fix == f"make -C {tmp_path / 'checkout'} .venv-triton"


def test_two_runtimes_side_by_side_are_a_problem(planted: Path) -> None:
    distribution(planted, "onnxruntime", "1.30.0")
    check = quick_check("ONNX Runtime")
    assert check.level == "problem"
    assert "onnxruntime and onnxruntime-gpu are both installed" in check.found
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu && " in check.fix
    assert check.fix.endswith("-m pip install onnxruntime-gpu")


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_either_build_of_onnx_runtime_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    versions = importlib.metadata.distributions

    def installed(**context: Any) -> Iterable[importlib.metadata.Distribution]:
        asked = context.get("name", "")
        if asked.startswith("onnxruntime"):
            return versions(name="click") if asked == name else []
        return versions(**context)

    monkeypatch.setattr(importlib.metadata, "distributions", installed)
    assert packages.check_packages() == "as required by pyproject.toml"


@pytest.mark.parametrize(
    ("gpus", "providers", "found"),
    [
        ([], ["cpu"], {}),
        ([], ["cpu", "cuda"], {"cuda": ("ok", "in the build, but there is no GPU")}),
        (["nvidia0"], ["cpu"], {"cuda": ("warning", "is not in this build")}),
        (["nvidia0"], ["cpu", "cuda"], {"cuda": ("warning", "no libcublas")}),
    ],
)
def test_the_providers_of_onnx_runtime_are_judged_by_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[str],
    providers: list[str],
    found: dict[str, tuple[str, str]],
) -> None:
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / gpu for gpu in gpus])
    failing = {name: "" if name == "cpu" else "no libcublas" for name in providers}
    facts = {"version": "1.31.1", "providers": failing}
    monkeypatch.setattr(packages, "_probe", lambda *arguments: facts)
    checks = {check.what.split()[-1]: check for check in packages.check_providers(Path("m"))}
    assert checks.pop("cpu").level == "ok"
    assert {name: (check.level, check.found) for name, check in checks.items()} == found
    for check in checks.values():
        assert check.level == "ok" or check.fix
        if check.found == "is not in this build":
            assert "pip uninstall --yes onnxruntime && " in check.fix
            assert check.fix.endswith("-m pip install onnxruntime-gpu")


def test_without_extras_only_what_comes_without_them_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["click>=8.2", "nothing-of-ours>=2", "also-missing>=1; extra == 'train'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    assert quick_check("packages").found == "nothing-of-ours is missing; also-missing is missing"
    monkeypatch.setattr(packages, "is_client_only", lambda: True)
    check = quick_check("packages")
    assert (check.level, check.found) == ("problem", "nothing-of-ours is missing")
    assert check.fix == f"{sys.executable} -m pip install handwriting-pipeline"


def test_outside_of_a_clone_pip_installs_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "CHECKOUT", tmp_path)
    assert packages.rebuild() == f"{sys.executable} -m pip install 'handwriting-pipeline[train]'"


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("click", "7.0", r"click 7\.0, but >=8\.\d is needed"),
        ("torch", "1.13.1", r"torch 1\.13\.1, but >=2\.9 is needed"),
    ],
)
def test_packages_that_do_not_fit_are_a_problem(
    planted: Path, name: str, version: str, said: str
) -> None:
    distribution(planted, name, version)
    check = quick_check("packages")
    assert check.level == "problem"
    assert re.fullmatch(said, check.found)
    assert "make .venv" in check.fix


def test_a_runtime_that_does_not_start_is_a_problem(planted: Path, tmp_path: Path) -> None:
    planted.mkdir()
    (planted / "onnxruntime.py").write_text("raise ImportError('libcublas is missing')")
    check = check_of(tmp_path, "ONNX Runtime")
    assert (check.level, check.found) == (
        "problem",
        "does not start: ImportError: libcublas is missing",
    )


def test_a_taken_port_is_a_problem(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = check_of(tmp_path, "ports", ServeConfig(grpc_port=port))
    assert check.level == "problem"
    assert f"{port} (grpc): Address already in use" in check.found
    assert check.fix == "pipeline serve --port auto"


def test_cut_data_are_a_problem(empty: Chain) -> None:
    file = next(iter(sorted(empty.paths.data("mnist").glob("*ubyte"))))
    content = file.read_bytes()
    file.unlink()  # it may be a link to everybody's
    file.write_bytes(content[:-1])
    check = check_of(empty.root, "data")
    assert check.level == "problem"
    assert file.name in check.found
    file.write_bytes(content)
    flip_bit(file, 100)
    assert check_of(empty.root, "data").level == "problem"


def test_a_cache_that_is_read_only_is_a_problem(tmp_path: Path) -> None:
    cache = Paths(tmp_path).data("mnist")
    cache.mkdir(parents=True)
    assert check_of(tmp_path, "folders").level == "ok"
    cache.chmod(0o555)
    try:
        check = check_of(tmp_path, "folders")
    finally:
        cache.chmod(0o755)
    assert (check.level, check.found) == ("problem", f"{cache}: it is read-only")


def test_a_file_where_a_folder_belongs_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    check = check_of(tmp_path, "folders")
    assert (check.level, check.found) == (
        "problem",
        f"{tmp_path / 'runs'}: it is a file, but a folder is needed",
    )


def test_too_little_space_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Space(1 << 40, 1 << 40, 32 << 20))
    assert check_of(tmp_path, "disk").level == "problem"
    check = check_of(tmp_path, "shared memory")
    assert check.level == "problem"
    assert "32 MiB are free in /dev/shm, but the server needs 64" in check.found


def test_a_gpu_that_torch_leaves_out_is_said_and_does_not_stop_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def glob(folder: Path, pattern: str) -> list[Path]:
        return [folder / "nvidia0"]

    monkeypatch.setattr(Path, "glob", glob)
    on_cpu = Check("ok", "torch", "2.13.0+cpu, built without CUDA; trains on the CPU")
    (check,) = packages.run_check("GPU", "", lambda: packages.check_gpus([on_cpu]))
    assert (check.level, "torch does not use it" in check.found) == ("warning", True)
    on_gpu = Check("ok", "torch", "2.13.0, built for CUDA 13.0; A GPU")
    assert isinstance(packages.check_gpus([on_gpu]), str)


@pytest.mark.parametrize(("version", "level"), [("2.31", "problem"), ("2.35", "ok")])
def test_an_old_glibc_is_a_problem_for_the_wheel(
    monkeypatch: pytest.MonkeyPatch, version: str, level: str
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", version))
    (check,) = packages.run_check("glibc", "", doctor._check_glibc)
    assert check.level == level


def test_another_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    check = quick_check("Python")
    assert check.level == "problem"
    assert check.fix.endswith("PYTHON=python3.13")


def test_torch_is_not_imported_by_doctor_itself() -> None:
    code = "import sys, pipeline.doctor.checks; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
