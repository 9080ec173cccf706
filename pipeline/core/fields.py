"""Rules of fields: which strings of digits a form's field can hold.

A rule is an automaton that reads a string's digits from left to right: the search for strings drops
one as soon as no string that begins so obeys, and at its end takes only those that do.
"""

import re
from calendar import monthrange
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.core.errors import SettingError

HELP = (
    "luhn, isbn13, date (eight digits: year, month, day as in 20261231), length:N, range:A-B,"
    " regex:R (digits . \\d [0-9] [^0-9] | ( ) * + ? {m} {m,} {m,n}; all of the string must match)"
    " or list:FILE (a string of digits on each line)"
)
MOST = 99  # digits that length:N and a regular expression's {m,n} can ask for


@dataclass(frozen=True)
class Rule:
    """What a field can hold."""

    text: str  # as the user wrote it
    start: Hashable  # the state before the first digit
    # The state after one more digit, 0 to 9; None if no string that begins so obeys.
    step: Callable[[Any, int], Hashable | None]
    is_accepted: Callable[[Any], bool]  # whether a string that ends in this state obeys

    def is_obeyed(self, digits: str) -> bool:
        """Return whether a string of digits obeys the rule."""
        state: Hashable | None = self.start
        for digit in digits:
            state = self.step(state, int(digit))
            if state is None:
                return False
        return self.is_accepted(state)


def parse_rule(text: str) -> Rule:
    """Return the rule that a user wrote; raise SettingError if it is not one of HELP."""
    kind, colon, value = text.partition(":")
    if kind in PLAIN and not colon:
        return PLAIN[kind]
    if kind not in WITH_VALUE or not value:
        raise SettingError(f"rule must be one of {HELP}; got {text!r}")
    return WITH_VALUE[kind](text, value)


def _step_luhn(state: tuple[int, int, int], digit: int) -> tuple[int, int, int]:
    """Sum the digits, every second doubled: it is known at the end only which of them are."""
    as_is, doubled, count = state  # sums modulo 10, by what happens to the last digit
    twice = 2 * digit - 9 * (digit > 4)
    return (doubled + digit) % 10, (as_is + twice) % 10, min(count + 1, 2)


def _step_isbn13(state: tuple[int, int], digit: int) -> tuple[int, int] | None:
    """Sum the digits with weights 1 and 3 in turn (ISO 2108); the first three are 978 or 979."""
    place, total = state
    total = (total + digit * (1 + place % 2 * 2)) % 10
    is_possible = str(digit) in ("9", "7", "89")[place] if place < 3 else place < 12 or total == 0
    return (place + 1, total) if is_possible and place < 13 else None


def _of_prefixes(
    text: str, begins: Callable[[str], bool], is_accepted: Callable[[str], bool]
) -> Rule:
    """Return the rule whose states are what was read so far."""

    def step(prefix: str, digit: int) -> str | None:
        longer = f"{prefix}{digit}"
        return longer if begins(longer) else None

    return Rule(text, "", step, is_accepted)


def _begins_within(prefix: str, spans: Iterable[tuple[str, str]]) -> bool:
    """Return whether a string from the first to the last of a span, all equally long, begins so."""
    return any(
        first <= prefix.ljust(len(first), "9") and prefix.ljust(len(last), "0") <= last
        for first, last in spans
        if len(prefix) <= len(first)
    )


def _begins_date(text: str) -> bool:
    year, rest = int(text[:4]), text[4:]
    if not rest:
        return len(text) < 4 or year > 0
    months = range(1, 13)
    return _begins_within(rest, ((f"{m:02}01", f"{m:02}{monthrange(year, m)[1]}") for m in months))


def _make_length(text: str, value: str) -> Rule:
    if not re.fullmatch("[1-9][0-9]?", value):
        raise SettingError(f"length:N needs a whole number from 1 to {MOST}; got {text!r}")
    return _make_regex(text, f"\\d{{{value}}}")


def _make_range(text: str, value: str) -> Rule:
    match = re.fullmatch("([0-9]+)-([0-9]+)", value)
    if not match or int(match[1]) > int(match[2]) or len(match[1]) > len(match[2]):
        raise SettingError(f"range:A-B needs two numbers such as 1-500, A <= B; got {text!r}")
    low, high = match.groups()
    # Of each length, first and last string. Only those as long as A may begin with zeros.
    lengths = range(len(low), len(high) + 1)
    firsts = [low, *("1".ljust(length, "0") for length in lengths[1:])]
    lasts = [*("9" * length for length in lengths[:-1]), high]
    spans = dict(zip(lengths, zip(firsts, lasts, strict=True), strict=True))

    def is_accepted(number: str) -> bool:
        length = len(number)
        return length in spans and spans[length][0] <= number <= spans[length][1]

    return _of_prefixes(text, lambda prefix: _begins_within(prefix, spans.values()), is_accepted)


def _make_list(text: str, value: str) -> Rule:
    try:
        lines = Path(value).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read the strings of rule {text!r}: {error}") from error
    wrong = next((line for line in lines if not re.fullmatch("[0-9]+", line)), None)
    if wrong is not None or not lines:
        problem = f"has {wrong!r}" if lines else "is empty"
        raise SettingError(f"{value} needs a string of digits on each line, but {problem}")
    prefixes = {line[:length] for line in lines for length in range(1, len(line) + 1)}
    return _of_prefixes(text, prefixes.__contains__, frozenset(lines).__contains__)


# Regular expressions, by derivatives (Brzozowski 1964): the state is the expression that the rest
# of the string must match. Python's `re` cannot say whether a string is the beginning of a match.
# An expression is one of: a set of digits, ("then", first, rest), ("or", set of expressions),
# ("many", expression).
Expression = tuple[Any, ...] | frozenset[int]
NOTHING: Expression = frozenset()  # matches no string
EMPTY: Expression = ("many", NOTHING)  # matches the empty string
TOKEN = re.compile(
    r"\\d|\[\^?(?:[0-9](?:-[0-9])?)+\]|\{[0-9]+(?:,[0-9]*)?\}|[0-9.|()*+?]|(.)", re.S
)
REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def _then(first: Expression, rest: Expression) -> Expression:
    if NOTHING in (first, rest):
        return NOTHING
    return rest if first == EMPTY else ("then", first, rest)


def _or(*parts: Expression) -> Expression:
    flat: set[Expression] = set()
    for part in parts:
        flat |= part[1] if isinstance(part, tuple) and part[0] == "or" else {part}
    flat.discard(NOTHING)
    if len(flat) < 2:
        return flat.pop() if flat else NOTHING
    return "or", frozenset(flat)


def _count(expression: Expression) -> int:
    """Return how many digits are written in an expression."""
    if isinstance(expression, frozenset):
        return 1
    return sum(map(_count, expression[1] if expression[0] == "or" else expression[1:]))


def _matches_empty(expression: Expression) -> bool:
    if isinstance(expression, frozenset):
        return False
    kind, *parts = expression
    if kind == "or":
        return any(map(_matches_empty, parts[0]))
    return kind == "many" or all(map(_matches_empty, parts))


def _derive(expression: Expression, digit: int) -> Expression:
    """Return what the rest must match after the digit."""
    if isinstance(expression, frozenset):
        return EMPTY if digit in expression else NOTHING
    if expression[0] == "or":
        return _or(*(_derive(part, digit) for part in expression[1]))
    if expression[0] == "many":
        return _then(_derive(expression[1], digit), expression)
    _, first, rest = expression
    derived = _then(_derive(first, digit), rest)
    return _or(derived, _derive(rest, digit)) if _matches_empty(first) else derived


def _make_regex(text: str, value: str) -> Rule:
    pattern = value.removeprefix("^").removesuffix("$")
    tokens = deque(match[0] for match in TOKEN.finditer(pattern))
    unknown = next((match[1] for match in TOKEN.finditer(pattern) if match[1]), None)
    if unknown:
        raise SettingError(f"{unknown!r} in rule {text!r} is not supported; a rule is {HELP}")

    def read_choice() -> Expression:
        options = [read_chain()]
        while tokens and tokens[0] == "|":
            tokens.popleft()
            options.append(read_chain())
        return _or(*options)

    def read_chain() -> Expression:
        parts = []
        while tokens and tokens[0] not in ("|", ")"):
            part = read_part()
            parts.append(read_repeats(part))
        chain = EMPTY
        for part in reversed(parts):
            chain = _then(part, chain)
        return chain

    def read_part() -> Expression:
        token = tokens.popleft()
        if token == "(":
            inner = read_choice()
            if not tokens:
                raise SettingError(f"a ')' is missing in rule {text!r}")
            tokens.popleft()
            return inner
        if token in REPEATS or token[0] == "{":
            raise SettingError(f"{token!r} in rule {text!r} follows nothing that it could repeat")
        if token in (".", "\\d"):
            return frozenset(range(10))
        pairs = re.findall("([0-9])(?:-([0-9]))?", token)
        digits = {d for first, last in pairs for d in range(int(first), int(last or first) + 1)}
        return frozenset(set(range(10)) - digits if token[:2] == "[^" else digits)

    def read_repeats(part: Expression) -> Expression:
        if not tokens or not (tokens[0] in REPEATS or tokens[0][0] == "{"):
            return part
        token = tokens.popleft()
        if token in REPEATS:
            fewest, most = REPEATS[token]
        else:
            first, comma, last = token[1:-1].partition(",")
            fewest, most = int(first), int(last or first) if last or not comma else None
        if max(fewest, most or 1) * _count(part) > MOST or (most is not None and most < fewest):
            raise SettingError(
                f"{token} in rule {text!r} must be in order and ask for at most {MOST} digits"
            )
        repeated: Expression = ("many", part) if most is None else EMPTY
        for _ in range((most or fewest) - fewest):
            repeated = _or(EMPTY, _then(part, repeated))
        for _ in range(fewest):
            repeated = _then(part, repeated)
        return repeated

    whole = read_choice()
    if tokens:
        raise SettingError(f"a ')' in rule {text!r} closes nothing")
    derive = lru_cache(4096)(_derive)
    return Rule(text, whole, lambda state, digit: derive(state, digit) or None, _matches_empty)


PLAIN = {
    "luhn": Rule("luhn", (0, 0, 0), _step_luhn, lambda state: state[0] == 0 and state[2] == 2),
    "isbn13": Rule("isbn13", (0, 0), _step_isbn13, lambda state: state[0] == 13),
    "date": _of_prefixes("date", _begins_date, lambda text: len(text) == 8),
}
WITH_VALUE: dict[str, Callable[[str, str], Rule]] = {
    "length": _make_length,
    "range": _make_range,
    "regex": _make_regex,
    "list": _make_list,
}
