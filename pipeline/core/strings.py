"""Strings of digits in the outputs of a CTC network: the likeliest, and how likely. Needs numpy.

Connectionist temporal classification (Graves et al. 2006): at each step the network gives a
probability to every digit and to the blank, which is the last. An alignment is one symbol a step;
it stands for the string that is left when repeated symbols are merged and blanks removed. The
probability of a string is the sum over all its alignments.
"""

# Shape letters: N strips, T steps, K digits, L the longest string's digits, S = 2 L + 1 states.

import heapq
from collections import defaultdict
from typing import NamedTuple

import numpy as np

WIDTH = 16  # strings that the beam search keeps at each step
RARE = 1e-4  # a symbol of a lower probability does not extend a string in the search


class Reading(NamedTuple):
    """A string that a strip may show."""

    text: str
    probability: float  # over all alignments, 0 to 1


def greedy(outputs: np.ndarray) -> np.ndarray:
    """Return the string of each strip's likeliest alignment, str (N,), of outputs (N, T, K + 1)."""
    path = outputs.argmax(axis=2)  # (N, T)
    is_digit = path < outputs.shape[2] - 1
    is_digit[:, 1:] &= path[:, 1:] != path[:, :-1]
    codes = np.zeros((len(path), max(1, is_digit.sum(axis=1).max(initial=0))), np.uint32)
    rows, steps = np.nonzero(is_digit)
    places = is_digit.cumsum(axis=1)[rows, steps] - 1
    codes[rows, places] = path[rows, steps] + ord("0")
    texts: np.ndarray = codes.view(f"<U{codes.shape[1]}")[:, 0]
    return texts


def to_symbols(texts: np.ndarray) -> np.ndarray:
    """Return the digits of strings (N,), int64 (N, L), with -1 after the last."""
    wide = np.asarray(texts, np.str_)
    codes = np.ascontiguousarray(wide).view(np.uint32).reshape(len(wide), wide.itemsize // 4)
    return np.where(codes > 0, codes.astype(np.int64) - ord("0"), -1)


def log_likelihood(outputs: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of each string's probability, float64 (N,).

    `outputs` (N, T, K + 1) are log-probabilities, `texts` (N,) one string a strip. A string that
    does not fit into the steps, or is less likely than float64 can tell, has -inf. This is the
    forward algorithm of the paper, scaled at each step.
    """
    digits = to_symbols(texts)
    count, blank = len(digits), outputs.shape[2] - 1
    states = np.full((count, 2 * digits.shape[1] + 1), blank)  # (N, S): blanks between digits
    states[:, 1::2] = np.where(digits < 0, blank, digits)
    # From one digit to the next without a blank, unless they are equal.
    may_skip = np.zeros(states.shape, bool)
    may_skip[:, 3::2] = (digits[:, 1:] != digits[:, :-1]) & (digits[:, 1:] >= 0)
    lengths = (digits >= 0).sum(axis=1)
    chances = np.exp(outputs.astype(np.float64))
    rows = np.arange(count)
    alpha = np.zeros(states.shape)
    alpha[:, 0] = 1.0  # before the first step, as after a blank
    may_start = np.zeros(states.shape, bool)
    may_start[:, :2] = True
    total = np.zeros(count)
    for step in range(outputs.shape[1]):
        moved = alpha.copy()
        moved[:, 1:] += alpha[:, :-1]
        moved[:, 2:] += alpha[:, :-2] * may_skip[:, 2:]
        alpha = moved * chances[rows[:, np.newaxis], step, states]
        largest = alpha.max(axis=1)
        scale = np.where(largest > 0, largest, 1.0)
        alpha /= scale[:, np.newaxis]
        total += np.log(scale)
    end = alpha[rows, 2 * lengths] + np.where(lengths, alpha[rows, 2 * lengths - 1], 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(total + np.log(end), 0.0))


def search(outputs: np.ndarray, width: int = WIDTH) -> list[Reading]:
    """Return the likeliest strings of one strip's outputs (T, K + 1), the likeliest first.

    Prefix beam search (Hannun et al. 2014, arXiv:1408.2873). The probabilities of the strings that
    are left at its end are then computed exactly.
    """
    blank = outputs.shape[1] - 1
    # The probability of each string's alignments so far: that end in a blank, and in its digit.
    beam = {"": (1.0, 0.0)}
    for chances in np.exp(outputs.astype(np.float64)).tolist():
        grown: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        likely = [digit for digit in range(blank) if chances[digit] > RARE]
        for text, (after_blank, after_digit) in beam.items():
            both, last = after_blank + after_digit, int(text[-1]) if text else blank
            grown[text][0] += both * chances[blank]
            grown[text][1] += after_digit * chances[last]
            for digit in likely:
                start = after_blank if digit == last else both
                grown[f"{text}{digit}"][1] += start * chances[digit]
        kept = heapq.nlargest(width, grown, key=lambda text: sum(grown[text]))
        beam = {text: (grown[text][0], grown[text][1]) for text in kept}
    texts = np.array(list(beam))
    logs = log_likelihood(np.repeat(outputs[np.newaxis], len(texts), axis=0), texts)
    order = np.argsort(-logs, kind="stable")
    return [Reading(str(texts[index]), float(np.exp(logs[index]))) for index in order]


def find_best(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each strip's likeliest string, str (N,), and its log-probability, float64 (N,).

    A string of a probability above one half is the likeliest. Where that of the likeliest alignment
    has less, the strings are searched.
    """
    texts = greedy(outputs)
    logs = log_likelihood(outputs, texts)
    found = {int(row): search(outputs[row])[0] for row in np.flatnonzero(logs <= np.log(0.5))}
    better = {row: best for row, best in found.items() if best.probability > np.exp(logs[row])}
    longest = max([texts.itemsize // 4, *(len(best.text) for best in better.values())])
    texts = texts.astype(f"<U{longest}")
    for row, best in better.items():
        texts[row], logs[row] = best.text, np.log(best.probability)
    return texts, logs


def margins(outputs: np.ndarray) -> np.ndarray:
    """Return how far each strip's answer is from changing, nats per step, float64 (N,).

    It is the difference in log-probability of the likeliest string and of all others together (of
    the second, where the likeliest has at most one half), divided by T: if no output of a strip
    changes by more than half its margin, its string stays.
    """
    logs = find_best(outputs)[1]
    others = np.log(np.maximum(-np.expm1(logs), np.finfo(np.float64).eps))
    for row in np.flatnonzero(logs <= np.log(0.5)):
        if readings := search(outputs[row])[1:]:
            others[row] = np.log(readings[0].probability)
    return np.asarray((logs - others) / outputs.shape[1])
