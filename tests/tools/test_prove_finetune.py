import numpy as np

from pipeline.data.splits import load_split
from pipeline.images.read import prepare_picture
from tests.conftest import Chain
from tools.prove_finetune import OWN, choose_own, encode, write_by_hand


def test_the_hand_is_a_fixed_slant_that_a_client_reads_as_pictures_of_digits(empty: Chain) -> None:
    digits = load_split("mnist", empty.paths.data("mnist"), "test").images[:8]
    pictures = write_by_hand(digits)
    np.testing.assert_array_equal(pictures, write_by_hand(digits))
    assert pictures.dtype == np.uint8
    seen = np.stack([prepare_picture(encode(picture)).image for picture in pictures])
    assert seen.shape == digits.shape
    one = pictures[2] < 128  # MNIST's third test digit is an upright 1
    top, bottom = (np.flatnonzero(one[rows].any(axis=0)) for rows in (slice(88), slice(88, None)))
    assert top.mean() > bottom.mean() + 10


def test_own_samples_are_twenty_of_each_digit_other_ones_for_each_seed() -> None:
    labels = np.arange(1000) % 10
    first, again, other = (choose_own(labels, seed) for seed in (0, 0, 1))
    assert len(set(first)) == 10 * OWN
    np.testing.assert_array_equal(np.bincount(labels[first]), 10 * [OWN])
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
