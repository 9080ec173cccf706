"""Decoding of strings, compared with the sum over all alignments and with PyTorch."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import strings
from pipeline.core.evaluate import apply_temperature, fit_temperature, judge, margins, score


def draw(count: int, steps: int, symbols: int, seed: int, sharpness: float = 2.0) -> np.ndarray:
    """Random log-probabilities float64 (N, T, K + 1)."""
    logits = np.random.default_rng(seed).normal(size=(count, steps, symbols)) * sharpness
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=2, keepdims=True)))


def collapse(path: tuple[int, ...], blank: int) -> str:
    kept = [symbol for symbol, _ in itertools.groupby(path)]
    return "".join(str(symbol) for symbol in kept if symbol != blank)


def enumerate_strings(outputs: np.ndarray) -> dict[str, float]:
    """Probability of every string of outputs (T, K + 1), by enumeration."""
    steps, symbols = outputs.shape
    totals: dict[str, float] = defaultdict(float)
    for path in itertools.product(range(symbols), repeat=steps):
        totals[collapse(path, symbols - 1)] += float(np.exp(outputs[range(steps), path].sum()))
    return totals


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 10_000))
def test_a_string_has_the_probability_of_all_its_alignments(
    steps: int, symbols: int, seed: int
) -> None:
    outputs = draw(1, steps, symbols, seed)
    totals = enumerate_strings(outputs[0])
    texts = np.array([*totals, "0" * (steps + 1)])  # the last fits into no alignment
    logs = strings.sum_alignments(np.repeat(outputs, len(texts), axis=0), texts)
    np.testing.assert_allclose(np.exp(logs), [*totals.values(), 0.0], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 10_000))
def test_the_likeliest_string_is_found_by_its_sum(steps: int, symbols: int, seed: int) -> None:
    outputs = draw(3, steps, symbols, seed, 1.0)
    texts, logs = strings.find_best(outputs)
    for row in range(3):
        totals = enumerate_strings(outputs[row])
        assert totals[texts[row]] == pytest.approx(max(totals.values()), abs=1e-9)
        assert np.exp(logs[row]) == pytest.approx(totals[texts[row]], abs=1e-9)
        (readings,) = strings.search(outputs[row : row + 1], width=len(totals))
        assert [reading.probability for reading in readings[:3]] == pytest.approx(
            sorted(totals.values(), reverse=True)[:3], abs=1e-9
        )


def test_the_likelihood_is_that_of_pytorchs_loss() -> None:
    outputs, rng = draw(64, 40, 11, 0), np.random.default_rng(1)
    texts = np.array(["".join(map(str, rng.integers(10, size=n % 14))) for n in range(64)])
    loss = torch.nn.functional.ctc_loss(
        torch.from_numpy(outputs).permute(1, 0, 2),
        torch.tensor([int(digit) for text in texts for digit in text]),
        torch.full((64,), 40),
        torch.tensor([len(text) for text in texts]),
        blank=10,
        reduction="none",
    )
    np.testing.assert_allclose(strings.sum_alignments(outputs, texts), -loss.numpy(), rtol=1e-9)


def certain(texts: list[str], steps: int = 20) -> np.ndarray:
    """Outputs (N, T, 11) that surely are these strings: a digit at each even step."""
    outputs = np.full((len(texts), steps, 11), -12.0)
    outputs[:, :, 10] = -1e-4
    for row, text in enumerate(texts):
        for place, digit in enumerate(text):
            outputs[row, 2 * place, [10, int(digit)]] = outputs[row, 2 * place, [int(digit), 10]]
    return outputs


def test_the_greedy_string_merges_repeats_and_keeps_what_a_blank_separates() -> None:
    texts = ["", "7", "00", "1123", "9999999999"]
    outputs = certain(texts)
    outputs[1, 1] = outputs[1, 0]  # the 7 for two steps
    assert strings.greedy(outputs).tolist() == texts


def test_summed_and_not_greedy_probability_decides() -> None:
    # Graves 2006, figure 3: the likeliest alignment is blank, blank; the likeliest string is "0".
    outputs = np.log(np.array([[[0.4, 0.6], [0.4, 0.6]]]))
    assert strings.greedy(outputs).tolist() == [""]
    texts, logs = strings.find_best(outputs)
    assert (texts.tolist(), np.exp(logs)) == (["0"], pytest.approx([0.64]))


@pytest.mark.parametrize("damage", ["blank", "time"])
def test_a_moved_blank_and_reversed_time_change_every_string(damage: str) -> None:
    outputs = certain(["2026", "80331", "12"])
    changed = np.roll(outputs, 1, axis=2) if damage == "blank" else outputs[:, ::-1]
    assert (strings.find_best(changed)[0] != strings.find_best(outputs)[0]).all()
    assert judge(outputs, changed).is_changed.all()


def test_a_change_below_half_the_margin_leaves_every_string() -> None:
    outputs, rng = draw(60, 12, 4, 3, 4.0), np.random.default_rng(2)
    reach = margins(outputs)[:, np.newaxis, np.newaxis] / 2
    texts = strings.find_best(outputs)[0]
    for _ in range(20):
        moved = outputs + reach * rng.choice([-0.999, 0.999], size=outputs.shape)
        assert (strings.find_best(moved)[0] == texts).all()


def test_metrics_and_temperature_of_strings_come_from_the_same_calls() -> None:
    texts = np.array(["2026", "80331", "12", "7"] * 300)
    outputs = certain(list(texts))
    assert score(outputs, texts).accuracy == 1.0
    wrong = np.where(np.arange(1200) % 10 == 0, "3", texts)
    assert score(outputs, wrong).accuracy == pytest.approx(0.9)
    assert fit_temperature(outputs, wrong) > 1.5  # too certain for a tenth of mistakes
    hot = apply_temperature(outputs, 2.0)
    np.testing.assert_allclose(np.exp(hot).sum(axis=2), 1.0)
