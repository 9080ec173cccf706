"""Strings of digits in the outputs of a CTC network: the likeliest, and how likely. Needs numpy.

Connectionist temporal classification (Graves et al. 2006): at each step the network gives a
probability to every digit and to the blank, which is the last. An alignment is one symbol a step;
it stands for the string that is left when repeated symbols are merged and blanks removed. The
probability of a string is the sum over all its alignments.
"""

# Shape letters: N strips, T steps, K digits, L the longest string's digits, S = 2 L + 1 states.

from typing import NamedTuple

import numpy as np

WIDTH = 8  # strings that the beam search keeps at each step
AT_ONCE = 256  # strips, so that their beams fit into a core's cache
NONE = np.uint64(2**64 - 1)  # in place of the hash of a prefix that is in the beam already
HASH = np.uint64(0x100000001B3)  # of FNV-1a: multiplied and added to, for each digit of a prefix


class Reading(NamedTuple):
    """A string that a strip may show."""

    text: str
    probability: float  # over all alignments, 0 to 1


def greedy(outputs: np.ndarray) -> np.ndarray:
    """Return the string of each strip's likeliest alignment, str (N,), of outputs (N, T, K + 1)."""
    path = outputs.argmax(axis=2)  # (N, T)
    is_digit = path < outputs.shape[2] - 1
    is_digit[:, 1:] &= path[:, 1:] != path[:, :-1]
    digits = np.full((len(path), max(1, is_digit.sum(axis=1).max(initial=0))), -1)
    rows, steps = np.nonzero(is_digit)
    digits[rows, is_digit.cumsum(axis=1)[rows, steps] - 1] = path[rows, steps]
    return to_texts(digits)


def to_texts(digits: np.ndarray) -> np.ndarray:
    """Return strings, str (N,), of their digits (N, L), with a negative number after the last."""
    codes = np.where(digits < 0, 0, digits + ord("0")).astype(np.uint32)
    texts: np.ndarray = codes.view(f"<U{codes.shape[1]}")[:, 0]
    return texts


def to_digits(texts: np.ndarray, length: int = 0) -> np.ndarray:
    """Return the digits of strings (N,), int64 (N, L), with -1 after the last.

    L is the longest string's length, or `length` if that is more.
    """
    longest = max(texts.itemsize // 4, length, 1)
    codes = texts.astype(f"<U{longest}").view(np.uint32).reshape(len(texts), longest)
    return np.where(codes > 0, codes.astype(np.int64) - ord("0"), -1)


def sum_alignments(outputs: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of each string's probability, float64 (N,).

    `outputs` (N, T, K + 1) are log-probabilities, `texts` (N,) one string a strip. A string that
    does not fit into the steps, or is less likely than float64 can tell, has -inf. This is the
    forward algorithm of the paper, scaled at each step.
    """
    digits = to_digits(texts)
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


def search(outputs: np.ndarray, width: int = WIDTH) -> list[list[Reading]]:
    """Return the likeliest strings of each strip's outputs (N, T, K + 1), the likeliest first.

    Prefix beam search (Hannun et al. 2014, arXiv:1408.2873) over all strips at once. The
    probabilities of the strings that are left at its end are then computed exactly.
    """
    found = []
    for start in range(0, len(outputs), AT_ONCE):
        part = outputs[start : start + AT_ONCE]
        texts = _search_beam(part, width)  # (N, W)
        repeated = np.repeat(part, texts.shape[1], axis=0)
        logs = sum_alignments(repeated, texts.reshape(-1)).reshape(texts.shape)
        for strip, of_strip in zip(texts, np.exp(logs), strict=True):
            # A beam that is wider than there are strings has some twice.
            readings = dict(zip(map(str, strip), map(float, of_strip), strict=True))
            ranked = sorted(readings.items(), key=lambda item: -item[1])
            found.append([Reading(*item) for item in ranked])
    return found


def _search_beam(outputs: np.ndarray, width: int) -> np.ndarray:
    """Return the strings that a beam of this width ends with, str (N, W)."""
    chances = np.exp(outputs.astype(np.float64))
    count, steps, symbols = outputs.shape
    blank, rows = symbols - 1, np.arange(count)[:, np.newaxis]
    texts = np.full((count, 1, steps), -1, np.int8)  # digits of the prefixes in the beam
    lengths, last = np.zeros((2, count, 1), np.int64)
    last += blank  # the last digit; none yet
    hashes = np.zeros((count, 1), np.uint64)  # of the prefixes
    # Probability of each prefix's alignments so far: that end in a blank, and in its last digit.
    after_blank, after_digit = np.ones((count, 1)), np.zeros((count, 1))
    for step in range(steps):
        now = chances[:, step]
        both, beam = after_blank + after_digit, hashes.shape[1]
        stay_blank, stay_digit = both * now[:, blank:], after_digit * now[rows, last]
        is_repeated = last[:, :, np.newaxis] == np.arange(blank)  # a blank must come between
        start = np.where(is_repeated, after_blank[:, :, np.newaxis], both[:, :, np.newaxis])
        grown = (start * now[:, np.newaxis, :blank]).reshape(count, -1)  # (N, W K)
        grown_hashes = hashes[:, :, np.newaxis] * HASH + np.arange(1, symbols, dtype=np.uint64)
        grown_hashes = grown_hashes.reshape(count, -1)
        # A longer prefix may be in the beam already.
        is_same = grown_hashes[:, :, np.newaxis] == hashes[:, np.newaxis]  # (N, W K, W)
        strip, longer, present = np.nonzero(is_same)
        stay_digit[strip, present] += grown[strip, longer]
        grown[strip, longer], grown_hashes[strip, longer] = 0.0, NONE
        new_blank = np.concatenate([stay_blank, np.zeros_like(grown)], axis=1)
        new_digit = np.concatenate([stay_digit, grown], axis=1)
        total = new_blank + new_digit
        kept = np.argsort(-total, axis=1, kind="stable")[:, :width]
        is_longer = kept >= beam
        parent = np.where(is_longer, (kept - beam) // blank, kept)
        digit = np.where(is_longer, (kept - beam) % blank, last[rows, parent])
        texts, lengths = texts[rows, parent], lengths[rows, parent]
        strip, place = np.nonzero(is_longer)
        texts[strip, place, lengths[strip, place]] = digit[strip, place]
        lengths, last = lengths + is_longer, digit
        hashes = np.concatenate([hashes, grown_hashes], axis=1)[rows, kept]
        after_blank, after_digit = new_blank[rows, kept], new_digit[rows, kept]
    return to_texts(texts.reshape(-1, steps)).reshape(count, -1)


def find_best(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each strip's likeliest string, str (N,), and its log-probability, float64 (N,).

    A string of a probability above one half is the likeliest. Where that of the likeliest alignment
    has less, the strings are searched.
    """
    texts = greedy(outputs)
    logs = sum_alignments(outputs, texts)
    doubtful = np.flatnonzero(~(logs > np.log(0.5)))
    if len(doubtful):
        better = [readings[0] for readings in search(outputs[doubtful])]
        found = np.array([reading.text for reading in better])
        texts = texts.astype(np.promote_types(texts.dtype, found.dtype))
        texts[doubtful] = found
        logs[doubtful] = np.log([reading.probability for reading in better])
    return texts, logs


def find_margins(outputs: np.ndarray) -> np.ndarray:
    """Return how far each strip's answer is from changing, nats per step, float64 (N,).

    It is the difference in log-probability of the likeliest string and of all others together (of
    the second, where the likeliest has at most one half), divided by T: if no output of a strip
    changes by more than half its margin, its string stays.
    """
    logs = find_best(outputs)[1]
    others = np.log(np.maximum(-np.expm1(logs), np.finfo(np.float64).eps))
    doubtful = np.flatnonzero(~(logs > np.log(0.5)))
    for row, readings in zip(doubtful, search(outputs[doubtful]), strict=True):
        others[row] = np.log(readings[1].probability)
    return np.asarray((logs - others) / outputs.shape[1])
