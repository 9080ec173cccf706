"""Strips of digits to validate and test a reader of numbers on."""

from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.core.errors import CorruptError
from pipeline.data import strips
from pipeline.data.splits import Split, digests, load_split
from pipeline.data.strips import LENGTHS, build_strips
from tests.conftest import Chain, flip_bit, project


@pytest.fixture(scope="module")
def digits() -> Split:
    chain = project_root()
    return load_split("mnist", chain.paths.data("mnist"), "test")


def project_root() -> Chain:
    from tests.conftest import REPOSITORY

    return Chain(REPOSITORY)


@pytest.fixture
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """A project with the data set `numbers`, of few strips."""
    chain = project(tmp_path_factory.mktemp("numbers"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "TEST_STRIPS", 6)
        patch.setattr(strips, "VALIDATION_STRIPS", 5)
        chain.record("data", "fetch", "--dataset", "numbers")
        yield chain


def test_a_strip_is_decided_by_the_seed_and_has_its_digits_in_order(digits: Split) -> None:
    images, texts = build_strips(digits.images, digits.labels, 3, seed=7)
    again, same = build_strips(digits.images, digits.labels, 3, seed=7)
    others, _ = build_strips(digits.images, digits.labels, 3, seed=8)
    assert images.shape == (12, 28, 280)
    assert [len(text) for text in texts] == [length for length in LENGTHS for _ in range(3)]
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(texts, same)
    assert (images != others).any()


def test_on_half_of_the_strips_of_several_digits_some_are_joined(digits: Split) -> None:
    from pipeline.images.crop import label_pieces

    images, texts = build_strips(digits.images, digits.labels, 100, seed=3)
    several = [
        (image, len(text)) for image, text in zip(images, texts, strict=True) if len(text) > 1
    ]
    touching = [label_pieces(image >= 32)[1] < count for image, count in several]
    assert 0.4 < np.mean(touching) < 0.7  # a few digits have two pieces of their own


def test_the_splits_are_of_the_digits_of_the_same_splits(numbers: Chain) -> None:
    folder = numbers.paths.data("numbers")
    train, validation, test = (
        load_split("numbers", folder, name) for name in ("train", "validation", "test")
    )
    assert train.images.shape == (55_000, 1, 28, 28)
    assert train.labels.dtype == np.int64
    assert (validation.images.shape, test.images.shape) == ((20, 1, 28, 280), (24, 1, 28, 280))
    assert [len(text) for text in test.labels[::6]] == list(LENGTHS)
    assert {*"".join(test.labels)} <= {*test.classes}
    assert {"../mnist/train-images-idx3-ubyte", "t10k-images-idx3-ubyte"} <= {
        *digests("numbers", folder)
    }


def test_a_changed_strip_is_found(numbers: Chain) -> None:
    file = numbers.paths.data("numbers") / "t10k-images-idx3-ubyte"
    flip_bit(file)
    with pytest.raises(CorruptError, match="digest"):
        load_split("numbers", file.parent, "test")
    assert numbers.run("data", "verify", "--dataset", "numbers").exit_code == 4
    numbers.record("data", "fetch", "--dataset", "numbers")  # makes it again
    assert numbers.run("data", "verify", "--dataset", "numbers").exit_code == 0
