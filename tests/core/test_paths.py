from pathlib import Path

import pytest

from pipeline.core import paths
from pipeline.core.paths import Paths, format_make, list_names


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that is not the current folder."""
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "Makefile").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(paths, "CHECKOUT", checkout)
    return checkout


def test_make_is_named_for_the_folder_in_which_the_user_stands(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert format_make("all") == f"make -C '{elsewhere}' all"
    Path("Makefile").touch()  # of another project
    assert format_make("all") == f"make -C '{elsewhere}' all"
    monkeypatch.chdir(elsewhere)
    assert format_make("all") == "make all"
    Path("Makefile").unlink()  # as where the package was installed without its checkout
    assert format_make("all") == "make -C CLONE all"


def test_the_servers_environment_next_to_the_package_is_used_unless_the_project_has_its_own(
    elsewhere: Path,
) -> None:
    project = Paths(Path("project"))
    assert project.triton_environment == Path("project/.venv-triton")
    (elsewhere / ".venv-triton").mkdir()
    assert project.triton_environment == elsewhere / ".venv-triton"
    Path("project").mkdir()
    Path("project/.venv-triton").symlink_to("gone")  # broken, and yet the project's own
    assert project.triton_environment == Path("project/.venv-triton")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "none exists yet"),
        (["letters"], "there is letters"),
        (["handwriting", "letters"], "there are handwriting, letters. Did you mean 'handwriting'?"),
    ],
)
def test_names_that_exist_are_listed_with_the_closest(names: list[str], sentence: str) -> None:
    assert list_names("handwritng", names) == sentence


def test_models_are_those_exported_or_packaged(tmp_path: Path) -> None:
    for file in ("exported/a/manifest.json", "exported/model_repository/b/config.pbtxt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert Paths(tmp_path).find_models() == ["a", "b"]
