"""Rules of fields, compared with other ways to decide whether a string obeys."""

import itertools
import re
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import SettingError
from pipeline.core.fields import Rule, parse_rule


def strings(longest: int, digits: str = "0123456789") -> list[str]:
    lengths = range(longest + 1)
    return ["".join(s) for n in lengths for s in itertools.product(digits, repeat=n)]


def can_obey(rule: Rule, state: object, steps: int) -> bool:
    """Whether a string that obeys can be reached in so many more digits."""
    if rule.is_accepted(state):
        return True
    following = [rule.step(state, digit) for digit in range(10)] if steps else []
    return any(can_obey(rule, after, steps - 1) for after in following if after is not None)


@pytest.mark.parametrize(
    ("text", "obey", "disobey"),
    [
        ("luhn", ["79927398713", "4539578763621486", "18", "00"], ["79927398710", "81", "", "0"]),
        ("isbn13", ["9780306406157", "9791034301423"], ["9780306406158", "4006381333931", "978"]),
        ("date", ["20240229", "19991231", "00010101"], ["20230229", "00001231", "2024022", ""]),
        ("length:4", ["2026", "0000"], ["202", "20260", ""]),
        ("range:7-120", ["7", "10", "99", "120"], ["6", "07", "010", "121", "1000", ""]),
        ("range:007-031", ["007", "031"], ["7", "032", "0007"]),
        ("range:0-9", ["0", "9"], ["00", "10", ""]),
        ("regex:^20[0-3]\\d$", ["2026"], ["2046", "20261"]),
    ],
)
def test_a_rule_takes_what_obeys_and_nothing_else(
    text: str, obey: list[str], disobey: list[str]
) -> None:
    rule = parse_rule(text)
    assert [digits for digits in obey if not rule.is_obeyed(digits)] == []
    assert [digits for digits in disobey if rule.is_obeyed(digits)] == []
    for digits in obey:  # and no prefix of what obeys is dropped, or kept without an end
        state = rule.start
        for digit in map(int, digits):
            state = rule.step(state, digit)
            assert can_obey(rule, state, 13)


def test_a_tenth_of_all_strings_obeys_luhn_and_one_digit_changed_never_does() -> None:
    rule = parse_rule("luhn")
    obey = [text for text in strings(4) if len(text) == 4 and rule.is_obeyed(text)]
    assert len(obey) == 1000
    for text, place, digit in itertools.product(obey[::7], range(4), "0123456789"):
        changed = text[:place] + digit + text[place + 1 :]
        assert rule.is_obeyed(changed) == (changed == text)


@given(st.dates(), st.integers(1, 12), st.integers(1, 31))
def test_a_date_is_one_of_the_calendar(day: date, month: int, number: int) -> None:
    rule = parse_rule("date")
    assert rule.is_obeyed(f"{day.year:04}{day.month:02}{day.day:02}")
    try:
        date(day.year, month, number)
        is_real = True
    except ValueError:
        is_real = False
    assert rule.is_obeyed(f"{day.year:04}{month:02}{number:02}") == is_real


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1200), st.integers(0, 1200))
def test_a_range_is_that_of_the_numbers(first: int, second: int) -> None:
    low, high = sorted((first, second))
    rule = parse_rule(f"range:{low}-{high}")
    found = {text for text in strings(4) if rule.is_obeyed(text)}
    assert found == {str(number) for number in range(low, high + 1)}
    for text in strings(2):  # a prefix is dropped only if no number of the range begins so
        state = rule.start
        for digit in map(int, text):
            state = None if state is None else rule.step(state, digit)
        assert (state is not None) == any(number.startswith(text) for number in found)


EXPRESSIONS = st.recursive(
    st.sampled_from(["0", "1", "2", ".", "\\d", "[01]", "[^1]", "[0-2]", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS)
def test_a_regular_expression_matches_what_pythons_does(pattern: str) -> None:
    if not pattern:
        return
    rule = parse_rule(f"regex:{pattern}")
    for text in strings(4, "012"):
        assert rule.is_obeyed(text) == bool(re.fullmatch(pattern, text)), text
    for digit in range(3):  # what is not dropped has an end
        state = rule.step(rule.start, digit)
        assert state is None or can_obey(rule, state, 12)


def test_a_list_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "numbers.txt"
    file.write_text("2026\n80331\n\n")
    rule = parse_rule(f"list:{file}")
    assert [text for text in ("2026", "80331", "8033", "") if rule.is_obeyed(text)] == [
        "2026",
        "80331",
    ]
    file.write_text("2026\n8o331\n")
    with pytest.raises(SettingError, match="'8o331'"):
        parse_rule(f"list:{file}")
    file.write_text("")
    with pytest.raises(SettingError, match="is empty"):
        parse_rule(f"list:{file}")
    with pytest.raises(SettingError, match="cannot read the strings"):
        parse_rule(f"list:{tmp_path / 'missing.txt'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iban", "rule must be one of luhn, isbn13, date"),
        ("luhn:3", "rule must be one of"),
        ("length:", "rule must be one of"),
        ("length:0", "from 1 to 99"),
        ("length:x", "from 1 to 99"),
        ("range:9-3", "A <= B"),
        ("range:-3", "two numbers"),
        ("range:007-31", "A <= B"),
        ("regex:(1", "a '\\)' is missing"),
        ("regex:1)", "closes nothing"),
        ("regex:*1", "follows nothing"),
        ("regex:1**", "follows nothing"),
        ("regex:a1", "'a' in rule"),
        ("regex:\\w", "is not supported"),
        ("regex:[9-]", "is not supported"),
        ("regex:1{3,2}", "in order"),
        ("regex:((1{50}){50}){50}", "at most 99"),
    ],
)
def test_a_wrong_rule_is_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse_rule(text)
