"""The gate between a module and the file that ships, in numbers."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor
from pipeline.validation.compare import (
    Criterion,
    Reference,
    Verdict,
    allowed_flips,
    compare_file,
    compute_bounds,
    list_accepted,
    make_verdict,
    plan_runs,
    probe_images,
    require_stable,
)

CRITERION = Criterion(batch_sizes=(3, 64), largest_batch=8, threads=(1,))
ROWS = np.arange(100, dtype=np.float32)[:, np.newaxis]  # each row is its own number
OUTPUTS: np.ndarray = np.log(np.random.default_rng(0).dirichlet(np.ones(10), 100))
ROUNDED: np.ndarray = OUTPUTS.astype(np.float32)
REFERENCE = Reference(OUTPUTS, ROUNDED, OUTPUTS[:80].argmax(axis=1))


def says(outputs: np.ndarray) -> Predictor:
    """A predictor that knows each row's answer by the row's number."""
    return lambda images: outputs[images[:, 0].astype(int)]


def verdict(
    candidate: Predictor, precision: str = "fp32", reference: Reference = REFERENCE
) -> Verdict:
    return make_verdict(compare_file(precision, {1: candidate}, ROWS, reference, CRITERION))


def test_eager_float32_itself_passes_with_its_figures() -> None:
    held = verdict(says(ROUNDED))
    assert not held.problems
    assert (held.images, held.probes) == (80, 20)
    assert held.flips == ()
    assert held.max_error == held.eager_error
    assert held.ratio is not None
    assert held.ratio <= 1
    assert held.accuracy == 1
    margin = np.sort(OUTPUTS[:80], axis=1)
    assert held.safety_factor == pytest.approx(
        (margin[:, -1] - margin[:, -2]).min() / held.eager_error
    )
    assert held.images_per_second["1"] > 0
    assert "fp32: accuracy 100.00%, 0 flips" in str(held)
    timed = replace(held, images_per_second={"1": 1_250, "2": 2_400})
    assert str(timed).endswith(", 1,250 images/s on 1 thread and 2,400 images/s on 2 threads")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y + np.float32(1e-4), "100 of 100 rows differ by more than their bound"),
        (lambda y: np.where(y == y, np.nan, 0).astype(np.float32), "row 0 differs by inf"),
        (
            lambda y: y[:, ::-1].copy(),
            "with a margin over their bound: row 0 from",
        ),
        (lambda y: y.astype(np.float64), r"answers are float64 \(100, 10\), not float32"),
        (lambda y: y[:, :9], r"answers are float32 \(100, 9\), not"),
        (lambda y: y * np.float32(1 + 4e-6), "times eager float32's, 8 times is allowed"),
    ],
)
def test_other_answers_do_not_pass(change: Callable[[np.ndarray], np.ndarray], said: str) -> None:
    held = verdict(says(change(ROUNDED)))
    assert held.problems
    assert re.search(said, "; ".join(held.problems))


def test_one_row_in_one_run_is_enough() -> None:
    def forgetful(images: np.ndarray) -> np.ndarray:
        outputs: np.ndarray = ROUNDED[images[:, 0].astype(int)].copy()
        if len(images) == 3:
            outputs[images[:, 0] == 17] += np.float32(0.01)
        return outputs

    held = verdict(forgetful)
    assert held.problems[0].startswith(
        "1 of 100 rows differ by more than their bound (batch size 3, 1 thread): row 17 differs by"
    )


def test_a_file_that_fails_in_a_run_does_not_pass() -> None:
    def fails(images: np.ndarray) -> np.ndarray:
        raise CheckFailedError("no such batch")

    assert "batch size 3, 1 thread: no such batch" in verdict(fails).problems


def test_the_bound_is_twice_eagers_own_error_or_twice_the_floor() -> None:
    outputs = np.array([[-1.0, -20.0], [-1.0, -20.0]])
    allowed = compute_bounds(outputs, np.array([1.0, 0.0]), Criterion(floor=0.01))
    assert allowed.tolist() == [2.0, 2 * 0.01 * 20]


def test_a_class_may_change_only_where_the_margin_is_below_the_bound_and_is_listed() -> None:
    outputs = np.repeat(np.log([[0.7, 0.2, 0.1]]), 100, axis=0)
    outputs[5] = np.log([0.4 + 1e-9, 0.4, 0.2])
    swapped = outputs.astype(np.float32)
    swapped[5, :2] = swapped[5, 0], swapped[5, 0] + np.float32(1e-7)
    reference = Reference(outputs, outputs.astype(np.float32), np.zeros(100, np.int64))
    held = verdict(says(swapped), reference=reference)
    assert not held.problems
    (flip,) = held.flips
    assert (flip.row, flip.reference, flip.said, flip.label) == (5, 0, 1, 0)


def test_more_classes_than_a_few_may_not_change_even_where_they_tie() -> None:
    outputs = np.repeat(np.log([[0.7, 0.2, 0.1]]), 100, axis=0)
    outputs[:2] = np.log([0.4 + 1e-9, 0.4, 0.2])
    swapped = outputs.astype(np.float32)
    swapped[:2, :2] = swapped[0, 0], swapped[0, 0] + np.float32(1e-7)
    reference = Reference(outputs, outputs.astype(np.float32), np.zeros(100, np.int64))
    held = verdict(says(swapped), reference=reference)
    assert held.problems == ("2 images change class, at most 1 may",)


def test_five_classes_may_change_at_most_and_none_of_fewer_than_100_images() -> None:
    assert [allowed_flips(CRITERION, count) for count in (10, 99, 100, 499, 500, 10_000)] == [
        *(0, 0, 1, 4, 5, 5),
    ]


def with_a_class_that_is_masked(outputs: np.ndarray, dtype: type) -> np.ndarray:
    """Add a class whose output float32 can only tell in steps of 64."""
    return np.concatenate([outputs, np.full((len(outputs), 1), -(2.0**30))], 1).astype(dtype)


def test_one_enormous_output_does_not_excuse_the_others() -> None:
    outputs = with_a_class_that_is_masked(OUTPUTS, np.float64)
    reference = Reference(outputs, outputs.astype(np.float32), REFERENCE.labels)
    reversed_ = with_a_class_that_is_masked(OUTPUTS[:, ::-1], np.float32)
    stable = require_stable(reference, CRITERION)
    assert not verdict(says(outputs.astype(np.float32)), reference=stable).problems
    problems = verdict(says(reversed_), reference=stable).problems
    assert "100 of 100 rows differ by more than their bound" in problems[0]


@pytest.mark.parametrize(
    ("eager", "message"),
    [
        (-ROUNDED, r"not stable in float32: its largest error is 19\.5, 0\.\d+ is allowed"),
        (
            ROUNDED + np.float32(2e-3),
            r"0\.000427 is allowed at a median margin of 0\.427",
        ),
        (np.repeat(ROUNDED[:1], 100, 0), r"\d\d of 80 images change class against float64"),
    ],
)
def test_a_module_that_float32_cannot_compute_is_refused(eager: np.ndarray, message: str) -> None:
    with pytest.raises(CheckFailedError, match=message):
        require_stable(Reference(OUTPUTS, eager, REFERENCE.labels), CRITERION)


def test_a_module_that_tells_no_classes_apart_is_refused() -> None:
    same = np.zeros((100, 10))
    with pytest.raises(CheckFailedError, match="there is no margin to validate"):
        require_stable(Reference(same, same.astype(np.float32), REFERENCE.labels), CRITERION)


@pytest.mark.parametrize("count", [1, 20, 10_020])
def test_every_batch_size_is_tried_with_a_full_batch_and_every_row_at_some_sizes(
    count: int,
) -> None:
    criterion = Criterion()
    runs = list(plan_runs(criterion, count))
    assert {run.size for run in runs} == set(range(1, 257))
    assert all(len(run.rows) >= run.size and run.rows.max() < count for run in runs)
    whole = [run for run in runs if run.is_whole]
    assert len(whole) == len(criterion.batch_sizes) * len(criterion.threads)
    assert all(set(run.rows) == set(range(count)) for run in whole)


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    broken = Reference(np.full((100, 10), np.nan), ROUNDED, REFERENCE.labels)
    assert "the reference itself is not finite" in verdict(says(ROUNDED), reference=broken).problems


def flipped(count: int) -> np.ndarray:
    outputs = ROUNDED.copy()
    outputs[:count] = outputs[:count, ::-1]
    return outputs


@pytest.mark.parametrize(("precision", "allowed"), [("fp16", 0.0002), ("int8", 0.001)])
def test_a_lower_precision_may_lose_so_much_accuracy_and_no_more(
    precision: str, allowed: float
) -> None:
    assert dict(Criterion().lost_accuracy)[precision] == allowed
    assert not verdict(says(ROUNDED + np.float32(0.1)), precision).problems
    held = verdict(says(flipped(1)), precision)
    assert held.problems == (
        f"accuracy falls by 1.25 points against fp32 (1 of 80 images), {100 * allowed:.2f} is "
        f"allowed: give more images, or leave {precision} out",
    )
    assert len(held.flips) == 1
    assert held.mcnemar_p == 1.0
    assert verdict(says(flipped(8)), precision).mcnemar_p == pytest.approx(2 / 2**8)


def test_a_lower_precision_has_to_answer_a_row_alike_in_every_run() -> None:
    def moody(images: np.ndarray) -> np.ndarray:
        outputs: np.ndarray = ROUNDED[images[:, 0].astype(int)]
        return outputs + np.float32(1e-3 * (len(images) == 3))

    held = verdict(moody, "int8")
    assert "row 0 differs from its answer in the first run" in held.problems[0]


def test_a_hopeless_file_is_spared_the_rest_of_the_runs() -> None:
    asked: list[int] = []

    def wrong(images: np.ndarray) -> np.ndarray:
        asked.append(len(images))
        outputs: np.ndarray = -ROUNDED[images[:, 0].astype(int)]
        return outputs

    assert verdict(wrong).problems
    assert 3 not in asked


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_probes_are_blank_full_one_pixel_a_checkerboard_and_noise(dtype: type) -> None:
    images: np.ndarray = np.random.default_rng(0).integers(0, 200, (5, 3, 6, 6)).astype(dtype)
    probes = probe_images(images)
    high = 255 if dtype is np.uint8 else images.max()
    assert probes.shape == (20, 3, 6, 6)
    assert probes.dtype == dtype
    assert (probes[0].max(), probes[1].min()) == (0, high)
    assert (probes[2] == high).sum() == 1
    assert probes[3].mean() == high / 2
    assert len(np.unique(probes[4:])) > 100
    assert np.array_equal(probes, probe_images(images))


def test_a_graph_has_to_refuse_another_type_rank_or_size() -> None:
    images = np.zeros((4, 1, 5, 5), np.uint8)
    wrong = [
        *("float32 instead of uint8", "an axis too many", "an axis too few"),
        *(f"axis {axis} longer by one" for axis in (1, 2, 3)),
        *(f"axis {axis} of length 1" for axis in (2, 3)),
    ]

    def strict(rows: np.ndarray) -> np.ndarray:
        if rows.shape[1:] != (1, 5, 5) or rows.dtype != np.uint8:
            raise CheckFailedError("no")
        return rows

    assert list_accepted(strict, images) == []
    accepted = list_accepted(lambda rows: rows, images)
    assert sorted(accepted) == sorted(
        f"the graph accepts images with {what}, which it must refuse" for what in wrong
    )
