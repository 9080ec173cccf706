"""A folder of pictures as a data set: what it becomes, and what is said when it cannot."""

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pipeline.cli.main import main
from pipeline.client.client import Client
from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256
from pipeline.core.paths import Paths
from pipeline.data.folders import _assign_splits, import_folder
from pipeline.data.splits import Split, load_split, verify
from pipeline.images.read import read_image
from pipeline.repository import config_pbtxt
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.training.recipes import Recipe, choose_epochs
from tests.conftest import REPOSITORY, Chain, error_line, link_server_environment


def draw(path: Path, kind: int = 0, seed: int = 0, side: int = 60) -> None:
    """A filled shape: 0 is a disc, 1 a square, 2 a triangle. Each seed is another picture."""
    rng = random.Random(seed)
    picture = Image.new("RGB", (side + rng.randrange(60), side + rng.randrange(60)), "white")
    r = side * rng.uniform(0.3, 0.45)
    x, y = picture.width / 2, picture.height / 2 + seed % 3
    pen = ImageDraw.Draw(picture)
    if kind == 0:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(seed % 60, 0, 0))
    elif kind == 1:
        pen.rectangle((x - r, y - r, x + r, y + r), fill=(seed % 60, 0, 0))
    else:
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=(seed % 60, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def shapes(folder: Path, count: int = 12, classes: tuple[str, ...] = ("a", "b c", "ñ:1")) -> Path:
    for kind, name in enumerate(classes):
        for index in range(count):
            draw(folder / name / f"{index:03d}.png", kind % 3, 1000 * kind + index)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shapes(tmp_path / "shapes")


def splits(folder: Path, cache: Path) -> dict[str, Split]:
    return {
        name: load_split(f"folder:{folder}", cache, name)
        for name in ("train", "validation", "test")
    }


def pictures(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def problem(folder: Path) -> str:
    """What the import says of a folder; it must have written nothing."""
    cache = folder.parent / "cache"
    with pytest.raises(PipelineError) as caught:
        import_folder(f"folder:{folder}", cache)
    assert caught.value.exit_code == 1
    assert not cache.exists()
    return str(caught.value)


# What it becomes


def test_a_folder_becomes_three_splits_with_its_folders_as_classes(
    folder: Path, tmp_path: Path
) -> None:
    cache = import_folder(f"folder:{folder}", tmp_path / "cache")
    made = splits(folder, cache)
    assert sum(map(len, made.values())) == 36
    for split in made.values():
        assert split.classes == ("a", "b c", "ñ:1")
        assert set(split.labels) == {0, 1, 2}
        assert split.images.shape == (len(split), 1, 28, 28)
    assert set(verify(f"folder:{folder}", cache)) == {p.name for p in cache.glob("*-ubyte")}


def test_training_sees_a_picture_as_the_client_sends_it(folder: Path, tmp_path: Path) -> None:
    made = splits(folder, import_folder(f"folder:{folder}", tmp_path / "cache"))
    seen = set.union(*map(pictures, made.values()))
    files = list(folder.glob("*/*.png"))
    assert {read_image(file, pictures="whole").tobytes() for file in files} == seen


def test_another_picture_leaves_the_others_in_their_splits(folder: Path, tmp_path: Path) -> None:
    shapes(folder, 40)
    before = splits(folder, import_folder(f"folder:{folder}", tmp_path / "cache"))
    draw(folder / "a" / "new.png", 0, 999)
    lines: list[str] = []
    after = splits(folder, import_folder(f"folder:{folder}", tmp_path / "cache", lines.append))
    assert any("changed since" in line for line in lines)
    for name, split in before.items():
        assert pictures(split) <= pictures(after[name])


def test_what_did_not_change_is_not_imported_again(folder: Path, tmp_path: Path) -> None:
    cache = import_folder(f"folder:{folder}", tmp_path / "cache")
    before = {path: (path.stat().st_mtime_ns, sha256(path)) for path in cache.glob("*")}
    import_folder(f"folder:{folder}", cache)
    assert {path: (path.stat().st_mtime_ns, sha256(path)) for path in cache.glob("*")} == before


def test_a_spoilt_cache_is_an_error_of_exit_status_4_and_fetching_mends_it(
    folder: Path, tmp_path: Path
) -> None:
    cache = import_folder(f"folder:{folder}", tmp_path / "cache")
    path = cache / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x05")
    with pytest.raises(CorruptError, match=f"pipeline data fetch --dataset folder:{folder}"):
        load_split(f"folder:{folder}", cache, "test")
    import_folder(f"folder:{folder}", cache)
    assert len(load_split(f"folder:{folder}", cache, "test")) >= 3


@pytest.mark.parametrize("text", ["{", '{"schema": 1, "source": "folder:%s"}'])
def test_a_damaged_record_is_corrupt(folder: Path, tmp_path: Path, text: str) -> None:
    cache = import_folder(f"folder:{folder}", tmp_path / "cache")
    (cache / "dataset.json").write_text(text.replace("%s", str(folder)))
    with pytest.raises(CorruptError, match="dataset.json"):
        load_split(f"folder:{folder}", cache, "test")


@given(st.sets(st.binary(min_size=32, max_size=32), min_size=3, max_size=200))
@settings(max_examples=100, deadline=None)
def test_every_class_has_a_picture_in_each_split(digests: set[bytes]) -> None:
    labels = np.zeros(len(digests), np.uint8)
    parts = _assign_splits("folder:folder", ("a",), labels, list(digests))
    assert set(parts.tolist()) == {0, 1, 2}


def test_copies_of_a_picture_lie_in_one_split(folder: Path, tmp_path: Path) -> None:
    for path in list((folder / "a").iterdir()):
        (folder / "a" / f"copy-{path.name}").write_bytes(path.read_bytes())
    made = splits(folder, import_folder(f"folder:{folder}", tmp_path / "cache"))
    assert sum(map(len, made.values())) == 48
    assert not pictures(made["train"]) & (pictures(made["test"]) | pictures(made["validation"]))


def test_hidden_and_other_files_are_left_out_and_capital_suffixes_are_not(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "a" / "000.png").rename(folder / "a" / "000.PNG")
    (folder / ".DS_Store").write_text("x")
    (folder / ".git").mkdir()
    (folder / "a" / ".hidden.png").write_text("x")
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "README").write_text("x")
    lines: list[str] = []
    made = splits(folder, import_folder(f"folder:{folder}", tmp_path / "cache", lines.append))
    assert sum(map(len, made.values())) == 36
    assert "ignored 2 files that are not pictures by their names: README, a/notes.txt" in lines


def test_a_hundred_classes_are_no_limit(tmp_path: Path) -> None:
    folder = shapes(tmp_path / "many", 3, tuple(f"class {n}" for n in range(100)))
    made = splits(folder, import_folder(f"folder:{folder}", tmp_path / "cache"))
    assert len(made["test"].classes) == len(made["test"]) == 100


# What is wrong with it


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'gone'} is not a folder" in problem(tmp_path / "gone")


@pytest.mark.parametrize("classes", [(), ("only",)])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, classes: tuple[str, ...]) -> None:
    (tmp_path / "set").mkdir()
    assert "2 to 256 folders of classes" in problem(shapes(tmp_path / "set", 3, classes))


def test_all_problems_are_named_at_once(folder: Path) -> None:
    (folder / "empty").mkdir()
    draw(folder / "stray.png")
    draw(folder / "a" / "nested" / "0.png")
    said = problem(folder)
    assert "empty has no picture" in said
    assert "stray.png is in no folder of a class" in said
    assert "a/nested is a folder in a class" in said


def test_a_class_with_too_few_pictures_is_named(folder: Path) -> None:
    draw(folder / "single" / "0.png", seed=5000)
    (folder / "single" / "1.png").write_bytes((folder / "single" / "0.png").read_bytes())
    assert "single needs 3 different pictures, it has 1" in problem(folder)


def test_unreadable_pictures_are_named_up_to_ten_and_counted(folder: Path) -> None:
    for index in range(12):
        (folder / "a" / f"bad{index}.png").write_text(f"no picture {index}")
    said = problem(folder)
    assert said.count("cannot be read as an image") == 10
    assert "and 2 more" in said
    assert f"{folder}/a/bad" in said
    assert "pipeline data fetch --skip-unreadable" in said


def test_skipping_unreadable_pictures_lists_them_and_imports_the_others(
    folder: Path, tmp_path: Path
) -> None:
    cache = import_folder(f"folder:{folder}", tmp_path / "cache")
    before = splits(folder, cache)
    (folder / "a" / "bad.png").write_text("no picture")
    Image.new("L", (30, 30), 200).save(folder / "b c" / "even.png")
    command = ("data", "fetch", "--dataset", f"folder:{folder}")
    assert run(tmp_path, *command)[0] == 1
    code, output = run(tmp_path, *command, "--skip-unreadable")
    assert code == 0
    assert f"skipped 2 pictures of {folder}:" in output
    assert "a/bad.png cannot be read as an image" in output
    assert "b c/even.png shows no ink" in output
    assert "imported 36 pictures of 3 classes" in output
    cache = tmp_path / "data" / "shapes"
    assert json.loads((cache / "dataset.json").read_text())["skipped"] == [
        "a/bad.png",
        "b c/even.png",
    ]
    for name, split in splits(folder, cache).items():
        np.testing.assert_array_equal(split.images, before[name].images)
    assert "is unchanged" in run(tmp_path, *command)[1]  # what follows needs no flag


def test_a_class_with_too_few_readable_pictures_is_named_although_others_are_skipped(
    folder: Path, tmp_path: Path
) -> None:
    for path in list((folder / "a").iterdir())[2:]:
        path.write_bytes(path.name.encode())
    with pytest.raises(PipelineError, match="a needs 3 different pictures, it has 2"):
        import_folder(f"folder:{folder}", tmp_path / "cache", skip_unreadable=True)


def test_skipping_is_for_folders_only(tmp_path: Path) -> None:
    assert run(tmp_path, "data", "fetch", "--skip-unreadable")[0] == 2


def test_a_picture_that_shows_nothing_is_refused_as_the_client_refuses_it(folder: Path) -> None:
    Image.new("L", (30, 30), 200).save(folder / "a" / "even.png")
    assert "even.png shows no ink" in problem(folder)


def test_one_picture_in_two_classes_is_an_error(folder: Path) -> None:
    (folder / "a" / "same.png").write_bytes((folder / "b c" / "000.png").read_bytes())
    assert "are the same picture in two classes" in problem(folder)


def test_a_class_that_no_line_can_hold_is_refused(folder: Path) -> None:
    (folder / "a").rename(folder / "a\nb")
    assert r"'a\nb' has characters that no label can have" in problem(folder)


def test_another_folder_of_the_same_name_is_never_taken_for_the_first(tmp_path: Path) -> None:
    one, other = shapes(tmp_path / "1" / "set"), shapes(tmp_path / "2" / "set")
    cache = import_folder(f"folder:{one}", tmp_path / "cache")
    for attempt in (import_folder, verify):
        with pytest.raises(PipelineError, match=f"{one}.*of the same name") as caught:
            attempt(f"folder:{other}", cache)
        assert caught.value.exit_code == 1
    verify(f"folder:{one}", cache)


# The command line


def run(root: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["--root", str(root), *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("fashon-mnist", "Did you mean 'fashion-mnist'?"),
        ("anything", "folder:PATH is a folder of pictures; there are mnist, fashion-mnist"),
        ("folder:", "folder:PATH is a folder of pictures"),
        ("folder:some/mnist", "'mnist' is reserved"),
        ("folder:handwriting/", "'handwriting' is reserved"),
        ("folder:model_repository", "'model_repository' is reserved"),
        ("folder:my letters", "'my letters' is not valid"),
        ("folder:/", "is not valid"),
    ],
)
def test_a_data_set_that_cannot_be_is_wrong_usage(tmp_path: Path, dataset: str, said: str) -> None:
    code, output = run(tmp_path, "data", "fetch", "--dataset", dataset)
    assert code == 2
    assert said in output.replace("\n", " ")


def test_a_path_is_the_same_set_however_it_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, "data", "fetch", "--dataset", "folder:shapes/")[0] == 0
    for path in ("shapes", "./shapes//", f"{folder}/", "shapes/../shapes"):
        assert run(tmp_path, "data", "verify", "--dataset", f"folder:{path}")[0] == 0


def test_training_on_what_was_not_fetched_names_the_command(folder: Path, tmp_path: Path) -> None:
    code, output = run(tmp_path, "train", "--dataset", f"folder:{folder}")
    assert code == 1
    assert f"run 'pipeline data fetch --dataset folder:{folder}'" in output


def test_a_small_set_is_trained_for_four_hundred_steps(folder: Path, tmp_path: Path) -> None:
    dataset = f"folder:{folder}"
    cache = import_folder(dataset, tmp_path / "cache")
    assert choose_epochs(Recipe(), dataset, cache) == 400
    assert choose_epochs(Recipe(epochs=500), dataset, cache) == 500
    assert choose_epochs(Recipe(), "mnist", cache) == 1


# The whole chain


@pytest.mark.server
@pytest.mark.slow
def test_a_folder_is_served_beside_handwriting_whose_files_stay_as_they_are(
    chain: Chain, short_proof: None, tmp_path: Path
) -> None:
    folder = shapes(tmp_path / "shapes", 40)
    link_server_environment(chain)
    repository = str(chain.paths.repository)
    ours = [chain.paths.export, chain.paths.packaged, chain.paths.run_folder]
    files = [path for top in ours for path in top.rglob("*") if path.is_file()]
    before = {path: sha256(path) for path in files}
    dataset = ("--dataset", f"folder:{folder}")
    for command in (
        ("data", "fetch", *dataset),
        ("train", *dataset, "--recipe", "quick", "--epochs", "150"),
        ("export", "--run", "shapes"),
        ("validate", "--name", "shapes"),
        ("package", "--name", "shapes"),
    ):
        chain.record(*command)
    table = chain.record("validate", repository, "--name", "shapes")
    assert table["name"] == "shapes"
    assert {path: sha256(path) for path in files} == before
    assert chain.run("validate", repository, "--name", "other").exit_code == 1

    shaped = Paths(chain.root, name="shapes", run="shapes")
    labels = (shaped.packaged / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert labels == ["a", "b c", "ñ:1"]
    with run_server(chain.paths, with_free_ports(ServeConfig())) as (server, _):
        with Client(server.http_url, "shapes") as http, Client(server.grpc_url, "shapes") as grpc:
            for client in (http, grpc):
                asked = [folder / name / "000.png" for name in labels]
                assert [answer.label for answer in client.classify(asked)] == labels
        result = chain.run(
            "--json", "query", "--name", "shapes", "--url", server.http_url, str(asked[1])
        )
        assert json.loads(result.stdout)["label"] == "b c"

    draw(folder / "a" / "new.png", 0, 9999)
    chain.record("data", "fetch", *dataset)
    stale = chain.run("validate", "--name", "shapes")
    assert stale.exit_code == 1
    assert "has changed since the model was trained" in error_line(stale)


def test_only_a_model_of_whole_pictures_says_so(made: Chain) -> None:
    config = config_pbtxt.read(made.paths.packaged / "config.pbtxt")
    assert "pictures" not in config.parameters
    assert config_pbtxt.pictures(config) == "digit"


def test_a_whole_picture_of_28_x_28_is_taken_as_it_is(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", pictures="whole")
    np.testing.assert_array_equal(image, levels[np.newaxis])


@pytest.mark.parametrize("path", ["/some/letters", "/some/letters/", "/some/./x/../letters//"])
def test_make_calls_the_model_as_the_folder(path: str) -> None:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("MAKE")}
    old = ("-o", ".venv/done", "-o", ".venv-triton/done")
    done = subprocess.run(
        ["make", "-n", *old, "all", f"DATASET=folder:{path}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "data fetch --dataset 'folder:/some/letters'" in done.stdout
    assert "validate exported/model_repository --name letters" in done.stdout


def test_where_the_pictures_are_is_said_once(tmp_path: Path) -> None:
    folder = shapes(tmp_path / "shapes")
    result = Chain(tmp_path).run("data", "fetch", "--dataset", f"folder:{folder}", "--from", "x")
    assert result.exit_code == 2
    assert "--from is not for folder:PATH" in result.stderr
