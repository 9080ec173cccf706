"""Strings of digits in the outputs of a CTC network: the likeliest, and how likely. Needs numpy.

Connectionist temporal classification (Graves et al. 2006): at each step the network gives a
probability to every digit and to the blank, which is the last. An alignment is one symbol a step;
it stands for the string that is left when repeated symbols are merged and blanks removed. The
probability of a string is the sum over all its alignments.
"""

# Shape letters: N strips, T steps, K digits, L the longest string's digits, S = 2 L + 1 states.

from typing import NamedTuple

import numpy as np

from pipeline.core.fields import Rule

WIDTH = 8  # strings that the beam search keeps at each step
OBEYING = 64  # with a rule: one in ten obeys a check digit, and only at its end it is known which
WIDEST = 512  # with a rule that no string of a narrower search obeys
AT_ONCE = 256  # strips, so that their beams fit into a core's cache
NONE = np.uint64(2**64 - 1)  # in place of the hash of a prefix that is in the beam already
HASH = np.uint64(0x100000001B3)  # of FNV-1a: multiplied and added to, for each digit of a prefix


class Reading(NamedTuple):
    """A string that a strip may show."""

    text: str
    probability: float  # over all alignments, 0 to 1


class StringAnswer(NamedTuple):
    """The strings that a strip may show, and where the digits of the likeliest are."""

    readings: tuple[Reading, ...]  # those that obey the rule, the likeliest first; empty if none
    places: tuple[tuple[int, int], ...]  # first and last step of each digit of the first reading
    likeliest: Reading  # whether it obeys the rule or not


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
    states, may_skip, lengths = _expand(texts, outputs.shape[2] - 1)
    chances = np.exp(outputs.astype(np.float64))
    count = len(states)
    rows = np.arange(count)
    alpha = np.zeros(states.shape)
    alpha[:, 0] = 1.0  # before the first step, as after a blank
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


def _expand(texts: np.ndarray, blank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what an alignment of each string (N,) passes through.

    The symbols, int64 (N, S): its digits with blanks around them. Whether each can come right after
    the one before the last, bool (N, S): a digit after another one. The strings' lengths (N,).
    """
    digits = to_digits(texts)
    states = np.full((len(digits), 2 * digits.shape[1] + 1), blank)
    states[:, 1::2] = np.where(digits < 0, blank, digits)
    may_skip = np.zeros(states.shape, bool)
    may_skip[:, 3::2] = (digits[:, 1:] != digits[:, :-1]) & (digits[:, 1:] >= 0)
    return states, may_skip, (digits >= 0).sum(axis=1)


def find_places(row: np.ndarray, text: str) -> tuple[tuple[int, int], ...]:
    """Return the first and the last step of each digit, by the string's likeliest alignment.

    `row` (T, K + 1) are one strip's outputs, in which the string fits (Viterbi's algorithm).
    """
    (states,), (may_skip,), _ = _expand(np.array([text]), row.shape[1] - 1)
    best = np.where(np.arange(len(states)) > 0, -np.inf, 0.0)
    moves = np.zeros((len(row), len(states)), int)  # states passed on the way to each
    for step, values in enumerate(row.astype(np.float64)):
        options = np.full((3, len(states)), -np.inf)
        options[0], options[1, 1:] = best, best[:-1]
        options[2, 2:] = np.where(may_skip[2:], best[:-2], -np.inf)
        moves[step] = options.argmax(axis=0)
        best = options.max(axis=0) + values[states]
    state = 2 * len(text)
    state -= int(bool(text) and best[state - 1] > best[state])
    path = []
    for move in moves[::-1]:
        path.append(state)
        state -= move[state]
    path.reverse()
    firsts = [path.index(2 * place + 1) for place in range(len(text))]
    return tuple((first, first + path.count(path[first]) - 1) for first in firsts)


def read_string(
    row: np.ndarray, top: int, width: int = WIDTH, rule: Rule | None = None
) -> StringAnswer:
    """Return the `top` likeliest strings of one strip's outputs (T, K + 1), and the first's places.

    With a rule, they are the likeliest that obey it. A probability is that among all strings.
    """
    ranked = search(row[np.newaxis], max(width, top))[0]
    likeliest = ranked[0]
    if rule and not all(rule.is_obeyed(reading.text) for reading in ranked[:top]):
        ranked = search(row[np.newaxis], max(OBEYING, width, top), rule)[0]
    places = find_places(row, ranked[0].text) if ranked else ()
    return StringAnswer(tuple(ranked[:top]), places, likeliest)


class _States:
    """The numbers of a rule's states, as a search meets them; -1 is that of no state."""

    def __init__(self, rule: Rule, digits: int) -> None:
        self._rule, self._digits = rule, digits
        self._states, self._numbers = [rule.start], {rule.start: 0}
        self._rows = {-1: [-1] * digits}

    def follow(self, numbers: np.ndarray) -> np.ndarray:
        """Return the states after each digit (..., K) of the states (...)."""
        unique, places = np.unique(numbers, return_inverse=True)
        table = np.array([self._rows.get(n) or self._add_row(n) for n in unique.tolist()])
        return table[places.reshape(numbers.shape)]

    def _add_row(self, number: int) -> list[int]:
        row = self._rows[number] = [-1] * self._digits
        for digit in range(self._digits):
            state = self._rule.step(self._states[number], digit)
            if state is not None:
                if state not in self._numbers:
                    self._numbers[state] = len(self._states)
                    self._states.append(state)
                row[digit] = self._numbers[state]
        return row


def search(
    outputs: np.ndarray, width: int = WIDTH, rule: Rule | None = None
) -> list[list[Reading]]:
    """Return the likeliest strings of each strip's outputs (N, T, K + 1), the likeliest first.

    Prefix beam search (Hannun et al. 2014, arXiv:1408.2873) over all strips at once. The
    probabilities of the strings that are left at its end are then computed exactly. With a rule,
    only strings that obey it are searched; a strip for which none is found is searched again with
    the WIDEST beam, and may have none.
    """
    found = []
    at_once = max(1, AT_ONCE * WIDTH // width)
    for start in range(0, len(outputs), at_once):
        part = outputs[start : start + at_once]
        texts = _search_beam(part, width, rule)  # (N, W)
        repeated = np.repeat(part, texts.shape[1], axis=0)
        logs = sum_alignments(repeated, texts.reshape(-1)).reshape(texts.shape)
        for strip, of_strip in zip(texts, np.exp(logs), strict=True):
            # A beam that is wider than there are strings has some twice.
            readings = dict(zip(map(str, strip), map(float, of_strip), strict=True))
            if rule:
                readings = {t: p for t, p in readings.items() if p and rule.is_obeyed(t)}
            ranked = sorted(readings.items(), key=lambda item: -item[1])
            found.append([Reading(*item) for item in ranked])
    missing = [strip for strip, ranked in enumerate(found) if not ranked]
    if missing and width < WIDEST:
        wider = search(outputs[missing], WIDEST, rule)
        for number, obeying in zip(missing, wider, strict=True):
            found[number] = obeying
    return found


def _search_beam(outputs: np.ndarray, width: int, rule: Rule | None) -> np.ndarray:
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
    rule_states = _States(rule, blank) if rule else None
    states = np.zeros((count, 1), np.int64)  # the rule's, after each prefix
    for step in range(steps):
        now = chances[:, step]
        both, beam = after_blank + after_digit, hashes.shape[1]
        stay_blank, stay_digit = both * now[:, blank:], after_digit * now[rows, last]
        is_repeated = last[:, :, np.newaxis] == np.arange(blank)  # a blank must come between
        start = np.where(is_repeated, after_blank[:, :, np.newaxis], both[:, :, np.newaxis])
        if rule_states:
            following = rule_states.follow(states)  # (N, W, K)
            start[following < 0] = 0.0
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
        if rule_states:
            states = np.concatenate([states, following.reshape(count, -1)], axis=1)[rows, kept]
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
