import math

import numpy as np
import pytest

from pipeline.monitoring.drift import (
    distribution_shift,
    holm,
    kolmogorov,
    largest_share_shift,
    share_shift,
)

SAMPLES = 2000


@pytest.mark.parametrize(
    ("statistic", "p"),
    # Smirnov 1948, table of estimates of goodness of fit.
    [(0.0, 1.0), (0.5, 0.963945), (1.0, 0.270000), (1.36, 0.049486), (1.63, 0.009846)],
)
def test_kolmogorovs_distribution_is_the_published_one(statistic: float, p: float) -> None:
    assert kolmogorov(statistic) == pytest.approx(p, abs=1e-5)


def test_holm_adjusts_as_published() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )


@pytest.mark.parametrize("share", [0.006, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("images", [300, 3000])
def test_a_share_that_moved_by_what_is_allowed_alarms_no_more_often_than_it_says(
    share: float, images: int
) -> None:
    rng = np.random.default_rng(0)
    known = rng.binomial(5000, share, SAMPLES)
    found = rng.binomial(images, share + 0.02, SAMPLES)
    ps = [
        share_shift(int(k), 5000, int(f), images, 0.02).p for k, f in zip(known, found, strict=True)
    ]
    # Of shares near 0 it is milder than it says: the edge moves with what was counted.
    assert (0.01 if share < 0.1 else 0.03) < np.mean(np.array(ps) < 0.05) < 0.07
    assert np.mean(np.array(ps) < 0.005) < 0.015


def test_a_share_that_moved_further_is_found_and_the_more_images_the_surer() -> None:
    ps = [share_shift(500, 5000, n // 5, n, 0.02).p for n in (100, 1000, 10_000)]
    assert ps[0] > ps[1] > ps[2]
    assert ps[1] < 1e-6
    assert share_shift(500, 5000, 0, 1000, 0.02).effect == pytest.approx(-0.1)
    assert share_shift(0, 5000, 0, 1000, 0.02).p > 0.5
    assert share_shift(5000, 5000, 1000, 1000, 0.02).p > 0.5


def test_of_classes_the_one_that_moved_is_named_and_looking_at_all_is_paid_for() -> None:
    known = np.full(10, 500)
    found = np.full(10, 100)
    found[3] = 200
    shift = largest_share_shift(known, found, 0.1, 0.005)
    assert shift.at == 3
    alone = share_shift(500, 5000, 200, 1100, 0.01)
    assert shift.p == pytest.approx(10 * alone.p)


def test_distributions_that_are_the_same_alarm_no_more_often_than_said() -> None:
    rng = np.random.default_rng(1)
    bins = np.linspace(0, 1, 401)
    ps = []
    for _ in range(500):
        known, found = (np.histogram(rng.beta(8, 2, n), bins)[0] for n in (5000, 800))
        ps.append(distribution_shift(known, found, 0.0).p)
    assert np.mean(np.array(ps) < 0.05) <= 0.07
    assert np.mean(np.array(ps) < 0.5) == pytest.approx(0.5, abs=0.1)


def test_a_distribution_moved_by_less_than_allowed_never_alarms_however_many_images() -> None:
    known, found = np.array([500, 500]), np.array([5_900_000, 4_100_000])
    assert distribution_shift(known, found, 0.1).p == 1.0
    shift = distribution_shift(known, found, 0.0)
    assert shift.at == 1
    assert shift.effect == pytest.approx(0.09)
    assert shift.p < 1e-5
    assert math.isfinite(shift.statistic)
