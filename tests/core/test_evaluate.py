from dataclasses import astuple

import numpy as np
import pytest

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import (
    FEWEST,
    apply_temperature,
    calibration_error,
    class_scores,
    confusion,
    evaluate,
    fit_min_probability,
    fit_temperature,
    is_refused,
    judge,
    predict,
    reliability,
    score,
    wilson_interval,
    worst_mistakes,
)


def log_probabilities(rows: list[list[float]]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def test_metrics_are_those_of_the_definitions() -> None:
    outputs = log_probabilities([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    metrics = score(outputs, np.array([0, 2]))
    assert metrics.images == 2
    assert metrics.accuracy == 0.5
    assert metrics.loss == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_a_predictor_is_asked_in_batches_and_its_answers_keep_their_order() -> None:
    sizes = []

    def predictor(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return images.reshape(len(images), -1).astype(np.float32)

    images = np.arange(7, dtype=np.uint8).reshape(7, 1)
    assert predict(predictor, images, 3).ravel().tolist() == list(range(7))
    assert sizes == [3, 3, 1]
    assert evaluate(predictor, np.ones((2, 1), np.uint8), np.array([0, 0])).loss == -1.0


def test_answers_are_judged_row_by_row_each_by_its_bound() -> None:
    reference = log_probabilities([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    outputs = reference.copy()
    outputs[1] = np.log([0.1, 0.9])
    outputs[2] += 0.01
    judgement = judge(reference, outputs, np.array([0.1, 0.1, 0.02]))
    assert judgement.errors == pytest.approx([0, np.log(9), 0.01], rel=1e-5)
    assert judgement.is_changed.tolist() == judgement.is_beyond.tolist() == [False, True, False]
    assert judgement.ratios == pytest.approx([0, 10 * np.log(9), 0.5], rel=1e-5)
    assert judgement.problems([7, 8, 9]) == [
        "1 of 3 answers have another class",
        "1 of 3 answers exceed their bounds: image 8 differs by 2.2, its bound is 0.1",
    ]
    assert judge(reference, outputs, 3.0).problems(range(3))[1:] == []
    assert judge(reference, reference, 0.0).problems(range(3)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_is_infinitely_far(value: float) -> None:
    reference = log_probabilities([[0.5, 0.5]])
    assert judge(reference, np.full_like(reference, value)).errors.tolist() == [np.inf]


@pytest.mark.parametrize(
    ("outputs", "dtype", "message"),
    [
        (np.zeros((2, 4)), np.floating, r"answers are float64 \(2, 4\), not floating \(2, 3\)"),
        (np.zeros((2, 3), int), np.floating, "answers are int64"),
        (np.zeros((2, 3)), np.float32, r"answers are float64 \(2, 3\), not float32"),
    ],
)
def test_answers_of_another_shape_or_type_are_refused(
    outputs: np.ndarray, dtype: type[np.generic], message: str
) -> None:
    with pytest.raises(CheckFailedError, match=message):
        judge(np.zeros((2, 3)), outputs, dtype=dtype)


def drawn(count: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities that are `sharpness` times too sure, and labels of the true ones."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, 4)) * 2
    true = apply_temperature(logits, 1.0)
    labels = np.array([rng.choice(4, p=np.exp(row)) for row in true])
    return apply_temperature(true, 1 / sharpness), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_a_fitted_temperature_undoes_what_was_too_sure(sharpness: float) -> None:
    outputs, labels = drawn(4000, sharpness)
    temperature = fit_temperature(outputs, labels)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    fitted = apply_temperature(outputs, temperature)
    assert np.array_equal(fitted.argmax(axis=1), outputs.argmax(axis=1))
    assert np.exp(fitted).sum(axis=1) == pytest.approx(1)
    assert score(fitted, labels).loss <= score(outputs, labels).loss
    if sharpness != 1.0:
        assert calibration_error(fitted, labels) < calibration_error(outputs, labels) / 2


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    outputs = log_probabilities([[0.8, 0.2]] * 10)
    labels = np.array([0] * 5 + [1] * 5)
    assert calibration_error(outputs, labels) == pytest.approx(0.3, abs=1e-6)
    assert calibration_error(log_probabilities([[1 - 1e-7, 1e-7]]), np.array([0])) < 1e-6


def test_class_scores_are_those_counted_by_hand() -> None:
    # Three of class 0, one of them taken for 1; two of class 1; one of class 2, taken for 1.
    said = [0, 0, 1, 1, 1, 1]
    outputs = log_probabilities([[0.9 if k == s else 0.05 for k in range(3)] for s in said])
    counts = confusion(outputs, np.array([0, 0, 0, 1, 1, 2]))
    assert counts.tolist() == [[2, 1, 0], [0, 2, 0], [0, 1, 0]]
    first, second, third = class_scores(counts)
    assert astuple(first) == pytest.approx((3, 1.0, 2 / 3, 0.8))
    assert astuple(second) == pytest.approx((2, 0.5, 1.0, 2 / 3))
    assert astuple(third) == (1, None, 0.0, 0.0)  # never said: nothing to be precise about


def test_the_worst_mistake_gives_the_truth_the_least_probability() -> None:
    outputs = log_probabilities([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.99, 0.01]])
    labels = np.array([1, 1, 1, 0])
    assert worst_mistakes(outputs, labels, 5).tolist() == [1, 0]
    assert worst_mistakes(outputs, labels, 1).tolist() == [1]


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0


def test_reliability_leaves_out_empty_bins() -> None:
    outputs = log_probabilities([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4]])
    low, high = reliability(outputs, np.array([0, 1, 0]), bins=10)
    assert astuple(low) == pytest.approx((1, 0.6, 1.0))
    assert astuple(high) == pytest.approx((2, 0.95, 0.5))


def test_bins_of_few_images_are_merged_with_the_next_below_and_the_lowest_with_that_above() -> None:
    shares = [0.95, 0.95, 0.95, 0.85, 0.85, 0.85, 0.75, 0.75, 0.65, 0.55]
    outputs, labels = log_probabilities([[p, 1 - p] for p in shares]), np.zeros(10, int)
    bins = reliability(outputs, labels, bins=10, fewest=3)
    assert [b.images for b in bins] == [3 + 1, 3, 3]
    assert bins[0].confidence == pytest.approx((0.75 + 0.75 + 0.65 + 0.55) / 4)
    assert [b.images for b in reliability(outputs, labels, bins=10, fewest=11)] == [10]


def test_the_threshold_refuses_the_share_that_was_asked_for_and_nobody_at_it() -> None:
    sure = np.linspace(0.5, 0.9995, 1000)
    outputs = log_probabilities([[p, 1 - p] for p in sure])
    threshold = fit_min_probability(outputs, 0.01)
    assert threshold is not None
    assert is_refused(outputs, threshold).sum() == 10
    assert not is_refused(outputs[10:], threshold).any()
    assert not is_refused(outputs, 0.0).any()


def test_too_few_images_have_no_threshold_and_a_small_number_a_cautious_one() -> None:
    chances = np.repeat(np.linspace(0.7, 0.9, 200), 10)
    outputs = log_probabilities([[p, 1 - p] for p in chances])
    assert fit_min_probability(outputs[: FEWEST - 1]) is None
    few, more, all_ = (fit_min_probability(outputs[:: 2000 // n]) for n in (200, 500, 2000))
    assert few is not None
    assert more is not None
    assert all_ is not None
    assert 0.5 < few < more < all_ == pytest.approx(0.701, abs=0.001)


def test_an_answer_of_nearly_certain_probability_is_never_below_the_threshold() -> None:
    outputs = log_probabilities([[0.99999, 0.00001]] * 5000)
    assert fit_min_probability(outputs) == 0.95


def test_a_few_images_that_are_all_correct_do_not_drive_the_temperature_to_its_limit() -> None:
    outputs, labels = log_probabilities([[0.95, 0.05]] * 5000), np.zeros(5000, np.int64)
    temperatures = [fit_temperature(outputs[:n], labels[:n]) for n in (3, 27, 177, 5000)]
    assert 0.85 < temperatures[0] < 1
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[2] > 0.3
    assert temperatures[3] == pytest.approx(0.25)  # its limit, which a run reports
