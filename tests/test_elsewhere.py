"""What runs on macOS and Windows, as far as Linux can tell: each command really runs there."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from pipeline.core.errors import PipelineError
from pipeline.export.first_run import require_first_run
from pipeline.images.read import write_png
from pipeline.training.device import choose_placement
from tests import fakes
from tests.conftest import REPOSITORY, Chain

Served = tuple[Chain, dict[str, Any]]
SYSTEMS = ("macos", "windows")
MANY = 80  # pictures: more than the first batches, so that other processes read them


class Done(NamedTuple):
    """What became of a command."""

    code: int
    out: str
    err: str


def run_on(system: str, commands: list[list[str]]) -> list[Done]:
    """Run commands in a fresh process that hides what `system` lacks."""
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "tests.elsewhere", system]
    done = subprocess.run(
        command,
        input=json.dumps(commands).encode(),
        capture_output=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr.decode()
    return [Done(*result) for result in json.loads(done.stdout.splitlines()[-1])]


def draw(path: Path) -> str:
    line = np.full((1, 28, 28), 255, np.uint8)
    line[0, 4:24, 13:15] = 0
    write_png(line, path)
    return str(path)


@pytest.mark.parametrize("system", SYSTEMS)
def test_query_lint_package_and_versions_run_on_macos_and_windows(
    chain: Chain, tmp_path: Path, system: str
) -> None:
    picture, log = draw(tmp_path / "\u0446.png"), tmp_path / "log"
    (tmp_path / "many").mkdir()
    for number in range(MANY):
        draw(tmp_path / "many" / f"{number}.png")
    root = ["--root", str(chain.root)]
    with (
        fakes.http_server(fakes.as_triton) as (http, _),
        fakes.grpc_server(fakes.as_triton) as (
            grpc,
            _,
        ),
    ):
        done = run_on(
            system,
            [
                [*root, "query", "--onnx", picture, "--prediction-log", str(log)],
                [*root, "--json", "query", "--onnx", str(tmp_path / "many")],
                ["query", "--url", f"http://127.0.0.1:{http}", picture],
                ["query", "--url", f"grpc://127.0.0.1:{grpc}", picture],
                [*root, "package", "--archive"],
                [*root, "lint"],
                [*root, "versions", "promote", "1"],
                [*root, "drift", str(log)],
                [*root, "runs", "list"],
                ["--version", "-v"],
            ],
        )
    assert [each.code for each in done[:7]] == [0] * 7, done
    assert "\\u0446.png" in done[0].out  # a pipe of Windows cannot take it as it is
    assert len(done[1].out.splitlines()) == MANY
    assert "handwriting/2 (version 2" in done[4].out
    assert len(log.read_bytes().splitlines()) == 1
    assert "Traceback" not in done[7].err  # one prediction is too few to judge
    assert [each.code for each in done[8:]] == [0, 0], done[8:]


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_needs_linux_says_so_in_one_line_on_macos_and_windows(
    chain: Chain, system: str
) -> None:
    root = ["--root", str(chain.root)]
    commands = (["serve"], ["serve", "--detach"], ["serve", "stop"], ["lint", "--live"])
    for done in run_on(system, [[*root, *command] for command in commands]):
        assert done.code == 1
        name = {"macos": "Darwin", "windows": "Windows"}[system]
        (error,) = (line for line in done.err.splitlines() if line != LIVE)
        assert error.startswith(f"Error: serving needs Linux, this is {name}: all commands up to")


LIVE = "loading each model in a temporary server"


ROTATE = """
import numpy as np
from pipeline.client.log import PredictionLog
from pipeline.client.prediction import Prediction
log = PredictionLog({path!r}, max_bytes=1000)
for _ in range(9):
    log.add("m", np.zeros((1, 1, 28, 28), np.uint8), [Prediction("7", 0.9, (), "1", None, True)])
print(log.lost)
"""
RENAME = """
import os
with open({path!r}, "w"):
    os.replace({path!r}, {path!r} + "2")
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_full_log_is_replaced_where_no_open_file_can_be_renamed(
    tmp_path: Path, system: str
) -> None:
    path = str(tmp_path / "log")
    (done,) = run_on(system, [["-c", ROTATE.format(path=path)]])
    assert (done.code, done.out.strip()) == (0, "0"), done
    assert sorted(file.name for file in tmp_path.iterdir()) == [".log.lock", "log", "log.1"]


def test_a_file_that_is_open_cannot_be_renamed_in_the_windows_of_these_tests(
    tmp_path: Path,
) -> None:
    with pytest.raises(AssertionError, match="Held"):
        run_on("windows", [["-c", RENAME.format(path=str(tmp_path / "file"))]])


def test_windows_trains_in_one_process_and_runs_no_foreign_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(PipelineError, match="needs Linux or macOS"):
        require_first_run(b"")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match="several processes need Linux or macOS"):
        choose_placement("cpu")


@pytest.mark.server
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_running_server_is_validated_from_macos_and_windows(
    served: Served, tmp_path: Path, system: str
) -> None:
    chain, server = served
    urls = [f"{scheme}://127.0.0.1:{server[f'{scheme}_port']}" for scheme in ("http", "grpc")]
    evidence = ["--evidence", str(tmp_path / "evidence.json")]
    (done,) = run_on(system, [["--root", str(chain.root), "validate", *urls, *evidence]])
    assert done.code == 0, done


PROBES = {  # each uses something that is not there
    "windows": ("fcntl", "os.getuid()", "os.O_NOFOLLOW", "signal.SIGKILL", "os.open('/', 0)"),
    "macos": ("os.sched_getaffinity(0)", "open('/proc/self/stat')"),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_a_platform_lacks_is_really_hidden(system: str) -> None:
    probes = [f"try: import os, signal, fcntl; {probe}" for probe in PROBES[system]]
    code = f"from tests import elsewhere as e\ne.hide({system!r})\nfailed = 0\n" + "".join(
        f"{probe}\nexcept (ImportError, AttributeError, OSError): failed += 1\n"
        for probe in (p if system == "windows" else p.replace(", fcntl", "") for p in probes)
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(failed)"],
        capture_output=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert int(done.stdout) == len(PROBES[system])


def test_the_workflow_runs_the_light_commands_on_macos_and_windows() -> None:
    folder = REPOSITORY / ".github" / "workflows"
    if not folder.is_dir():
        pytest.skip("no workflows here")
    light = yaml.safe_load((folder / "ci.yml").read_text("utf-8"))["jobs"]["light"]
    systems = {name.partition("-")[0] for name in light["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu", "macos", "windows"}
    script = "\n".join(step.get("run", "") for step in light["steps"])
    for name in ("doctor", "lint", "package", "query --url", "validate http", "query --onnx"):
        assert f"pipeline {name}" in script
    schema = ["--builtin-schema", "vendor.github-workflows"]
    command = [sys.executable, "-m", "check_jsonschema", *schema, *map(str, folder.iterdir())]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_package_states_the_platforms() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    systems = {c.split(" :: ", 1)[1] for c in project["classifiers"] if c.startswith("Operating")}
    assert {"MacOS", "Microsoft :: Windows", "POSIX :: Linux"} == systems
