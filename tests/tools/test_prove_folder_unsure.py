import numpy as np
import pytest

from pipeline.data.splits import Split
from tools import prove_folder_unsure


def test_what_a_model_of_letters_is_shown_are_images_of_every_kind_and_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prove_folder_unsure, "EACH", 4)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 1, 28, 28), np.uint8)
    digits = Split(images, np.arange(20) % 10, tuple("0123456789"))
    letters = Split(images[:6], np.arange(6) % 2, ("A", "B"))
    first, again = (
        prove_folder_unsure.make_kinds(letters, digits, np.random.default_rng(1)) for _ in range(2)
    )
    assert len(first) == 10
    for name, shown in first.items():
        assert shown.dtype == np.uint8
        assert shown.shape[1:] == (1, 28, 28)
        np.testing.assert_array_equal(shown, again[name])
    assert len(first["parts of letters, enlarged"]) == 6
    assert len(first["scribbles"]) == 4
