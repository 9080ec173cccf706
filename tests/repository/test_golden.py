import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipeline.core.errors import CheckFailedError, CorruptError
from pipeline.core.evaluate import Predictor, margins
from pipeline.core.files import sha256
from pipeline.repository.golden import (
    Golden,
    choose_golden,
    compare_golden,
    hash_golden,
    pack_golden,
    raise_problems,
    unpack_golden,
)


def golden_of(outputs: np.ndarray, bound: float = 1e-4) -> Golden:
    count = len(outputs)
    images = np.zeros((count, 1, 2, 2), np.uint8)
    labels = outputs.argmax(axis=1)
    return Golden(images, labels, outputs.astype(np.float64), np.full(count, bound))


@pytest.fixture
def golden() -> Golden:
    return golden_of(np.log(np.random.default_rng(0).dirichlet(np.ones(10), 20)))


def says(outputs: np.ndarray) -> Predictor:
    """A predictor that says `outputs`, whatever it is asked, one call after another."""
    position = 0

    def predict(images: np.ndarray) -> np.ndarray:
        nonlocal position
        rows = outputs[position : position + len(images)]
        position = (position + len(images)) % len(outputs)
        return rows

    return predict


def test_the_right_answers_pass_at_every_batch_size(golden: Golden) -> None:
    problems = compare_golden(golden, says(golden.outputs.astype(np.float32)), (1, 2, 7))
    assert not problems
    raise_problems(problems, "it", "fix")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outputs: outputs + np.float32(2e-4), "differs by 0.0002, its bound is 0.0001"),
        (lambda outputs: np.where(outputs == outputs, np.nan, 0).astype(np.float32), "by inf"),
        (lambda outputs: outputs[:, ::-1].copy(), "20 answers have another class"),
        (lambda outputs: outputs[:, :9], r"answers are float32 \(20, 9\), not"),
        (lambda outputs: outputs.astype(np.int64), "answers are int64"),
    ],
)
def test_other_answers_do_not_pass(
    golden: Golden, change: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    problems = compare_golden(golden, says(change(golden.outputs.astype(np.float32))), (4,))
    assert re.search(said, "; ".join(problems))
    with pytest.raises(CheckFailedError, match="it is wrong"):
        raise_problems(problems, "it is wrong", "fix it")


def test_a_predictor_that_fails_does_not_pass(golden: Golden) -> None:
    def fails(images: np.ndarray) -> np.ndarray:
        raise CheckFailedError("no")

    assert compare_golden(golden, fails, (2,)) == ["batch size 2: no"]


CLOSE = np.log(np.array([[0.500001, 0.499999], [0.9, 0.1]]))


def test_no_class_may_change_however_near_the_answer_is() -> None:
    swapped = CLOSE.copy()
    swapped[0] = CLOSE[0, ::-1]
    problems = compare_golden(golden_of(CLOSE, 1e-4), says(swapped), (2,))
    assert problems == ["batch size 2: 1 of 2 answers have another class"]


@pytest.mark.parametrize("bound", [1e-4, 1e9, float("inf")])
def test_a_golden_set_that_accepts_a_wrong_class_is_refused(bound: float) -> None:
    content = pack_golden(golden_of(CLOSE, bound))
    with pytest.raises(
        CheckFailedError, match="it accepts wrong classes: the bound .* in . of 2 images"
    ):
        unpack_golden(content, "it")
    assert len(unpack_golden(pack_golden(golden_of(CLOSE, 1e-6)), "it").labels) == 2


def test_a_golden_set_has_only_images_whose_margin_exceeds_their_bound() -> None:
    images, labels = np.zeros((2, 1), np.uint8), np.zeros(2, np.int64)
    assert len(choose_golden(images, labels, CLOSE, np.full(2, 1e-4)).labels) == 1
    with pytest.raises(CheckFailedError, match="no image is fit for the golden set"):
        choose_golden(images, labels, CLOSE, np.full(2, 10.0))


def test_a_golden_set_has_the_plainest_and_the_hardest_of_each_class() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, 2000)
    outputs = rng.normal(size=(2000, 10))
    images = np.arange(2000, dtype=np.int64)[:, np.newaxis]
    golden = choose_golden(images, labels, outputs, np.full(2000, 1e-9))
    assert golden.labels.tolist() == [label for label in range(10) for _ in range(10)]
    ahead = margins(outputs)
    for label in range(10):
        ranked = np.sort(ahead[labels == label])
        chosen = np.sort(ahead[golden.images[golden.labels == label, 0]])
        assert chosen.tolist() == [*ranked[:5], *ranked[-5:]]
    assert ahead[golden.images[0, 0]] == ahead[labels == 0].max()


def test_a_class_with_few_images_has_them_all_and_a_hundred_classes_share_a_hundred() -> None:
    outputs = np.random.default_rng(2).normal(size=(300, 100))
    images = np.zeros((300, 1), np.uint8)
    few = choose_golden(images[:3], np.array([0, 1, 1]), outputs[:3], np.full(3, 1e-9))
    assert few.labels.tolist() == [0, 1, 1]
    many = choose_golden(images, np.arange(300) % 100, outputs, np.full(300, 1e-9))
    assert len(many.labels) == 100


def test_a_golden_set_is_the_same_bytes_each_time_and_comes_back_whole(golden: Golden) -> None:
    content = pack_golden(golden)
    assert pack_golden(golden) == content
    again = unpack_golden(content, "it")
    for name in Golden.__dataclass_fields__:
        assert np.array_equal(getattr(again, name), getattr(golden, name))


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes them for an option
    return buffer.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    """A golden set whose images are many by their header, and none by their bytes."""
    header = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    return buffer.getvalue()


ONE = np.zeros((1, 2))


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        npz(images=np.zeros(1)),
        npz(images=np.zeros(2), labels=np.zeros(1), outputs=ONE, bounds=np.ones(1)),
        npz(images=np.zeros(1), labels=np.zeros(1), outputs=ONE, bounds=np.zeros(1)),
        npz(
            images=np.zeros(1),
            labels=np.zeros(1),
            outputs=ONE.astype(np.float32),
            bounds=np.ones(1),
        ),
        npz(images=np.zeros(()), labels=np.zeros(1, int), outputs=ONE, bounds=np.ones(1)),
        npz(images=np.zeros(1), labels=np.zeros(1, int), outputs=ONE, bounds=np.array(["1"])),
        npz(images=np.zeros(1), labels=np.zeros(1, int), outputs=ONE, bounds=np.ones((1, 2))),
        npz(images=np.zeros(1), labels=np.zeros(1, int), outputs=ONE[:, :1], bounds=np.ones(1)),
        npz(images=np.zeros(1), labels=np.zeros(1, int), outputs=ONE + np.inf, bounds=np.ones(1)),
        npz(images=np.zeros(1), labels=np.zeros(1), outputs=ONE, bounds=np.ones(1)),
        claiming((10**13,)),
        npz(
            images=np.array([{"a": 1}], dtype=object),
            labels=np.zeros(1),
            outputs=ONE,
            bounds=np.ones(1),
        ),
    ],
)
def test_a_golden_set_that_is_none_is_corrupt_and_nothing_is_unpickled(content: bytes) -> None:
    with pytest.raises(CorruptError, match="golden set"):
        unpack_golden(content, "it")


def test_a_golden_set_that_unpacks_to_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.repository.golden._MAX_GOLDEN_BYTES", 100)
    with pytest.raises(CorruptError, match="unpacks to more"):
        unpack_golden(npz(images=np.zeros(1000)), "it")


def test_bounds_belong_to_their_rows(golden: Golden) -> None:
    loose = replace(golden, bounds=np.where(np.arange(20) == 3, 1.0, 1e-4))
    off = golden.outputs.copy()
    off[3] += 0.5
    assert not compare_golden(loose, says(off), (20,))
    off[4] += 0.5
    assert "image 4 differs by 0.5" in compare_golden(loose, says(off), (20,))[0]


SCORES = np.arange(40, dtype=np.int32).reshape(20, 2)


def test_the_scores_of_an_exact_model_travel_with_its_images(golden: Golden) -> None:
    exact = replace(golden, scores=SCORES)
    unpacked = unpack_golden(pack_golden(exact), "it")
    assert unpacked.scores is not None
    assert np.array_equal(unpacked.scores, SCORES)
    assert np.array_equal(exact.select([3, 1]).scores, SCORES[[3, 1]])  # type: ignore[arg-type]
    assert hash_golden(unpacked) == sha256(SCORES.tobytes())
    assert hash_golden(golden) is None


def test_scores_that_are_not_equal_do_not_pass(golden: Golden) -> None:
    exact, answers = replace(golden, scores=SCORES), golden.outputs.astype(np.float32)
    assert not compare_golden(exact, says(answers), (7,), says(SCORES))
    wrong = SCORES + (SCORES == 9)
    problems = compare_golden(exact, says(answers), (7,), says(wrong))
    assert problems == ["batch size 7: scores: 1 of 20 are not equal, the first is image 4"]


@pytest.mark.parametrize("scores", [SCORES[:19], SCORES.astype(np.int64)])
def test_scores_that_do_not_fit_their_images_are_corrupt(
    golden: Golden, scores: np.ndarray
) -> None:
    with pytest.raises(CorruptError, match="its arrays do not fit each other"):
        unpack_golden(pack_golden(replace(golden, scores=scores)), "it")
