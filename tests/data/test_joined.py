"""MNIST joined with a folder of own digits: the splits, the digests, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.core.paths import data_name, model_name
from pipeline.core.signature import pictures_of
from pipeline.data import splits
from pipeline.data.catalog import DATASETS
from pipeline.data.fetch import fetch_data
from pipeline.data.folders import import_folder
from pipeline.data.splits import digests, load_split, verify
from pipeline.images.read import read_image
from pipeline.training.recipes import make_recipe
from tests.conftest import Chain, error_line


def write(folder: Path, counts: dict[str, int]) -> Path:
    """A folder of pictures, each with a bar of another length, dark on light."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture = np.full((60, 60), 255, np.uint8)
            picture[10 : 40 + index, 20 : 30 + 5 * number] = 0
            Image.fromarray(picture).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def own(empty: Chain) -> Path:
    return write(empty.root / "own", {"1": 12, "7": 2})


@pytest.fixture
def dataset(own: Path) -> str:
    return f"mnist+folder:{own}"


def test_the_folders_pictures_follow_mnists_in_each_split(empty: Chain, dataset: str) -> None:
    cache = fetch_data(dataset, empty.paths.data(dataset))
    sizes = {}
    for name in ("train", "validation", "test"):
        base = load_split("mnist", empty.paths.data("mnist"), name)
        joined = load_split(dataset, cache, name)
        assert joined.classes == base.classes
        np.testing.assert_array_equal(joined.images[: len(base)], base.images)
        np.testing.assert_array_equal(joined.labels[: len(base)], base.labels)
        sizes[name] = joined.labels[len(base) :]
    assert 7 not in {*sizes["validation"], *sizes["test"]}  # two of a digit: both are for training
    assert set(sizes["validation"]) == set(sizes["test"]) == {1}
    assert set(sizes["train"]) == {1, 7}


def test_few_own_pictures_are_repeated_to_a_tenth_of_the_training_images(
    empty: Chain, dataset: str
) -> None:
    joined = load_split(dataset, fetch_data(dataset, empty.paths.data(dataset)), "train")
    own = joined.images[55_000:]
    assert 0.095 < len(own) / len(joined) < 0.105
    counts = np.unique(own.reshape(len(own), -1), axis=0, return_counts=True)[1]
    assert len(set(counts)) == 1 < counts[0]


def test_more_own_pictures_than_that_are_not_repeated(
    empty: Chain, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = fetch_data(dataset, empty.paths.data(dataset))
    monkeypatch.setattr(splits, "OWN_SHARE", 0.0001)
    own = load_split(dataset, cache, "train").images[55_000:]
    assert len(own) == len(np.unique(own.reshape(len(own), -1), axis=0))


def test_own_pictures_are_prepared_as_a_client_of_mnist_does(
    empty: Chain, own: Path, dataset: str
) -> None:
    assert (pictures_of(dataset), pictures_of(f"folder:{own}")) == ("digit", "whole")
    assert pictures_of("folder:/mnist+x/y") == "whole"
    cache = fetch_data(dataset, empty.paths.data(dataset))
    parts = [load_split(dataset, cache, n).images[-1] for n in ("train", "validation", "test")]
    seen = [read_image(file).tobytes() for file in own.glob("*/*.png")]
    assert all(image.tobytes() in seen for image in parts)
    assert make_recipe("standard", dataset).outliers > 0  # MNIST's


def test_the_digests_are_those_of_mnist_and_of_the_folder(empty: Chain, dataset: str) -> None:
    cache = fetch_data(dataset, empty.paths.data(dataset))
    recorded = verify(dataset, cache)
    assert recorded == digests(dataset, cache)
    assert len(recorded) == 8
    for file in DATASETS["mnist"].files:
        assert recorded[f"../mnist/{file.name}"] == file.sha256
        assert (cache / "../mnist" / file.name).exists()
    (empty.paths.data("mnist") / file.name).unlink()
    with pytest.raises(PipelineError, match="pipeline data fetch"):
        verify(dataset, cache)


def test_its_name_is_neither_mnists_nor_the_folders(own: Path, dataset: str) -> None:
    assert (data_name(dataset), model_name(dataset)) == ("mnist-own", "mnist-own")
    assert data_name(f"folder:{own}") == "own"


def test_other_classes_than_mnists_are_refused_and_one_is_enough(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", {"7": 1, "seven": 3})
    with pytest.raises(PipelineError, match="'seven' is not one of MNIST's classes, 0 to 9"):
        import_folder(f"mnist+folder:{folder}", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    for file in (folder / "seven").iterdir():
        file.unlink()
    (folder / "seven").rmdir()
    import_folder(f"mnist+folder:{folder}", tmp_path / "cache")


def test_the_command_line_takes_it_and_says_what_is_missing(empty: Chain, own: Path) -> None:
    option = ("--dataset", f"mnist+folder:{own}")
    assert f"run 'pipeline data fetch --dataset mnist+folder:{own}'" in error_line(
        empty.run("train", *option)
    )
    fetched = empty.run("data", "fetch", *option)
    assert f"next: pipeline train --dataset mnist+folder:{own}" in fetched.stdout
    assert empty.run("data", "fetch", "--dataset", "mnist+folder:").exit_code == 2
    assert empty.run("data", "fetch", "--dataset", "kmnist+folder:own").exit_code == 2


def test_a_run_tells_the_accuracy_on_mnist_and_on_the_folder(chain: Chain) -> None:
    option = ("--dataset", f"mnist+folder:{write(chain.root / 'own', {'1': 12})}")
    assert chain.run("data", "fetch", *option).exit_code == 0
    result = chain.run("train", "--init", "handwriting", *option, "--epochs", "0.02")
    assert result.exit_code == 0, result.output
    assert "before:\n" in result.stderr
    for text in (result.stderr, result.stdout):
        assert "% of the 10,000 test images of mnist\n" in text
        assert "test images of mnist-own\n" in text
    summary = chain.record(
        "train",
        "--run",
        "mnist-own",
        *option,
        "--resume",
        "--init",
        "handwriting",
        "--epochs",
        "0.02",
    )
    (mnist, accuracy), (own, own_accuracy) = summary["parts"].values()
    assert own >= 1
    right = mnist * accuracy + own * own_accuracy
    assert right / (mnist + own) == pytest.approx(summary["test_accuracy"])
