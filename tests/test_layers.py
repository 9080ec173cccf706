"""The shape of the code: rooms, what they hand out, and what must not be loaded."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "pipeline"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
MOST_FILES = 16  # in a room, subfolders apart


@pytest.mark.parametrize("room", ["cli", "doctor"])
def test_importing_every_module_of_a_room_loads_no_torch(room: str) -> None:
    names = [f"pipeline.{room}.{path.stem}" for path in (PACKAGE / room).glob("[!_]*.py")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert done.returncode == 0


def test_rooms_are_small_enough_to_be_read_through() -> None:
    beside = [path.name for path in PACKAGE.iterdir() if path.is_file()]
    assert len(beside) <= 6
    for room in ROOMS:
        files = [path.name for path in room.iterdir() if path.is_file()]
        assert len(files) <= MOST_FILES, room.name


def handed_out(room: Path) -> set[str]:
    """The names that a room's `__init__` says it hands out."""
    tree = ast.parse((room / "__init__.py").read_text())
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline.")
        for alias in node.names
        if alias.asname
    }


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_hands_out_names_that_equal_no_module(room: Path) -> None:
    names = handed_out(room)
    modules = {module.name for module in pkgutil.iter_modules([str(room)])}
    assert not names & (modules | {other.name for other in ROOMS})
    loaded = importlib.import_module(f"pipeline.{room.name}")
    for name in names:
        assert getattr(loaded, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loaded.no_such_name


def test_the_client_is_imported_from_its_room() -> None:
    from pipeline.client import AsyncClient, Certificates, Client

    assert {AsyncClient.__name__, Certificates.__name__, Client.__name__} <= handed_out(
        PACKAGE / "client"
    )


def test_the_package_carries_its_types() -> None:
    assert (Path(pipeline.__file__).parent / "py.typed").is_file()


def test_the_backend_imports_nothing_of_ours() -> None:
    for path in (PACKAGE / "serving" / "backend").rglob("*.py"):
        assert "pipeline" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)


def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = done.stdout.decode().split("\0")
    return [path for name in names if name and (path := REPOSITORY / name).is_file()]


def test_nothing_names_a_path_of_one_machine_or_the_host_of_a_package_registry() -> None:
    hosts = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "deb." + "debian")
    folders = ("/" + "root/", "/" + "work/", "/" + "home/")
    for path in tracked():
        text = path.read_text(errors="ignore")
        for name in (*hosts, *folders):
            assert name not in text, f"{path} names {name}"
