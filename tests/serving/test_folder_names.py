"""Projects in folders whose names a shell, a list of paths or a terminal would misread."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli.command import Settings
from pipeline.cli.serve import echo_server
from pipeline.core.errors import PipelineError
from pipeline.repository import running
from pipeline.serving import process, tritonserver
from pipeline.serving.deploy import write_deployment
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import ServerRuntime
from tests.conftest import SHORT_TRAINING, Chain, error_line, link_server_environment
from tests.serving.test_deploy import packaged
from tests.serving.test_serve import assert_nothing_is_left

ODD = "it's a $HOME of ü日本"


@pytest.fixture
def odd(made: Chain, tmp_path: Path) -> Iterator[Chain]:
    """A copy of the small chain in a folder of an odd name, whose server is stopped at the end."""
    chain = Chain(tmp_path / ODD)
    shutil.copytree(made.root, chain.root, symlinks=True)
    link_server_environment(chain)
    yield chain
    chain.run("serve", "stop")


@pytest.mark.server
@pytest.mark.slow
def test_the_whole_chain_works_in_a_folder_of_an_odd_name(
    odd: Chain, short_proof: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = odd.root / "tmp;:"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is read again
    odd.record("data", "fetch")
    odd.record("data", "sample", str(odd.root / "digits"), "--count", "2")
    odd.record("train", *SHORT_TRAINING, "--resume")  # it is finished
    for command in ("export", "validate", "package"):
        odd.record(command)
    server = odd.record("serve", "--detach", "--port", "auto")
    assert server["models"] == {"handwriting": 2}
    assert odd.run("query", str(odd.root / "digits")).exit_code == 0
    assert odd.record("versions", "promote", "1")["is_served"]
    assert odd.record("serve", "stop")["done"].startswith("stopped the server")
    table = odd.record("validate", str(odd.paths.repository))
    assert [row["differing"] for row in table["rows"]] == [0] * 4
    assert odd.run("lint", str(odd.paths.repository)).exit_code == 0
    assert_nothing_is_left()
    assert not list(temporary.glob("handwriting-*"))


@pytest.mark.parametrize(
    "name",
    ["a b", "it's", "$HOME", "`id`", "a;b", "a&b", "(a)", "{a,b}", "a*", "~ü日本", "a:b", "a\\b"],
)
def test_only_a_plain_path_is_given_to_tritonserver(tmp_path: Path, name: str) -> None:
    environment, scratch = tmp_path / name / ".venv-triton", tmp_path / "scratch"
    repository = tmp_path / name / "repository"
    for folder in (environment / "bin", repository, scratch):
        folder.mkdir(parents=True)
    (environment / "bin" / "python").touch()
    runtime = ServerRuntime(
        "wheel",
        (str(environment / "bin" / "tritonserver"),),
        {"LD_LIBRARY_PATH": f"/lib:{environment / 'libs'}"},
        environment / "bin" / "python",
    )
    moved, shown = tritonserver.link_plain_paths(runtime, repository, scratch)
    assert shown.samefile(repository)
    assert moved.python
    assert moved.python.exists()
    command = tritonserver.build_command(
        moved, shown, ServeConfig(), "id", "key", scratch / "backends"
    )
    variables = tritonserver.build_environment(moved)
    for text in (*command, variables["PATH"], variables["LD_LIBRARY_PATH"]):
        assert name not in text
    assert variables["PATH"].split(":")[0] == str(moved.python.parent)
    # What needs no link keeps its name, in messages too.
    same = tritonserver.link_plain_paths(moved, tmp_path, scratch)
    assert same == (moved, tmp_path)


@pytest.mark.parametrize("folder", ["/a b", "/a:b", "/a'b", "/ü"])
def test_a_temporary_folder_of_an_odd_name_is_not_used_for_a_server(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", folder)
    assert tritonserver.scratch_parent() == Path("/tmp")
    monkeypatch.setattr("tempfile.tempdir", "/plain")
    assert tritonserver.scratch_parent() == Path("/plain")


@pytest.mark.parametrize("name", ['a:b,c"d', "a b", "ü"])
def test_docker_mounts_a_repository_of_any_name(tmp_path: Path, name: str) -> None:
    runtime, config = ServerRuntime("docker", ("docker", "run"), {}), ServeConfig()
    repository = tmp_path / name
    line = tritonserver.build_command(runtime, repository, config, "id", "key", tmp_path / "b")
    (mount,) = [part.removeprefix("--mount=") for part in line if part.startswith("--mount=")]
    (fields,) = csv.reader([mount])
    assert fields == ["type=bind", f"source={repository}", "target=/models", "readonly"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x9bb", "a\u2028b", os.fsdecode(b"a\xff")])
def test_a_path_that_would_garble_a_terminal_is_refused_in_words(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    result = Chain(root).run("serve", "--detach")
    assert result.exit_code == 1
    message = error_line(result)
    assert message.endswith("is not printable UTF-8: rename the folder")
    assert message.isascii()
    assert message.isprintable()
    assert list(root.iterdir()) == []
    # A repository need not lie below the root.
    refused = pytest.raises(PipelineError, match="is not printable UTF-8")
    runtime = ServerRuntime("path", ("true",), {})
    with refused, process.launch(runtime, root, ServeConfig()):
        pass


def test_a_deployment_in_a_folder_of_an_odd_name_finds_the_model(tmp_path: Path) -> None:
    paths = packaged(tmp_path / "it's a $HOME; of ü日本")
    for kind in ("compose", "kubernetes"):
        folder = paths.deployment(kind)
        done = write_deployment(paths, kind)
        files = {word for word in shlex.split(done.then) if word.startswith(str(folder))}
        assert files
        assert all(Path(file).exists() for file in files)
    compose = yaml.safe_load((paths.deployment("compose") / "compose.yaml").read_text())
    source = compose["services"]["triton"]["volumes"][0]["source"].replace("$$", "$")
    assert (paths.deployment("compose") / source).samefile(paths.packaged)
    fill = (paths.deployment("kubernetes") / "fill.yaml").read_text()
    (line,) = re.findall(r"^#   \((cd .*) && kubectl cp handwriting ", fill, re.MULTILINE)
    assert shlex.split(line) == ["cd", str(paths.repository)]


def test_what_serve_and_package_print_can_be_typed_in_a_folder_of_an_odd_name(
    made: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = Chain(tmp_path / ODD)
    shutil.copytree(made.root, chain.root, symlinks=True)
    next_command = chain.run("package").stdout.splitlines()[-1].removeprefix("next: ")
    repository = str(chain.paths.repository)
    assert shlex.split(next_command) == ["pipeline", "validate", repository]
    fields: dict[str, Any] = dict.fromkeys(running.Server.__dataclass_fields__, 1)
    server = running.Server(**{**fields, "models": {"handwriting": 1}})
    echo_server(Settings(chain.root), server)
    (line,) = re.findall("^try: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert f"@{chain.paths.packaged}/warmup/digit" in shlex.split(line)
    chain.paths.repository.chmod(0o777)
    message = error_line(chain.run("serve"))
    assert f"chmod o-w {shlex.quote(repository)}" in message


def test_a_path_that_is_too_long_is_an_error_in_a_line(tmp_path: Path) -> None:
    for folder in ("x" * 300, "/".join(["x" * 200] * 30)):
        for command in ("status", "stop"):
            result = Chain(tmp_path / folder).run("serve", command)
            assert result.exit_code == 1
            assert "File name too long" in error_line(result)


def test_a_current_folder_that_was_removed_is_an_error_in_a_line(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pipeline.cli.main import main\n"
        f"os.chdir({str(tmp_path)!r})\nos.rmdir({str(tmp_path)!r})\nmain(['serve', 'status'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == "Error: the current folder was deleted: change to another one\n"
