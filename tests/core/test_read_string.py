"""One strip's strings, obeying a rule or not, and the places of digits, also in JavaScript."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import strings
from pipeline.core.fields import parse_rule
from tests.conftest import REPOSITORY
from tests.core.test_strings import certain, collapse, draw, enumerate_strings

VECTORS = json.loads((REPOSITORY / "tests" / "vectors" / "strings.json").read_text())
SCRIPT = REPOSITORY / "pipeline" / "web" / "page" / "strings.js"
RULES = ["luhn", "length:2", "length:3", "range:1-12", "regex:(01|10)*", "regex:0?1+", "date"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 10_000), st.sampled_from(RULES))
def test_the_likeliest_string_that_obeys_is_found(
    steps: int, symbols: int, seed: int, text: str
) -> None:
    row, rule = draw(1, steps, symbols, seed, 1.0)[0], parse_rule(text)
    totals = enumerate_strings(row)
    obeying = sorted((p for t, p in totals.items() if rule.is_obeyed(t)), reverse=True)
    answer = strings.read_string(row, 3, len(totals), rule)  # a beam that drops none
    assert all(rule.is_obeyed(reading.text) for reading in answer.readings)
    found = [reading.probability for reading in answer.readings]
    assert found == pytest.approx(obeying[:3], abs=1e-9)
    assert answer.likeliest.probability == pytest.approx(max(totals.values()), abs=1e-9)
    assert len(answer.places) == (len(answer.readings[0].text) if answer.readings else 0)


def test_a_rule_corrects_a_digit_and_the_answer_says_what_was_likelier() -> None:
    row = certain(["79927398713"], 26)[0]
    row[8] = -12.0
    row[8, [7, 5]] = np.log([0.4, 0.6])  # rather a 5, with which the check digit is wrong
    assert strings.read_string(row, 2).readings[0].text == "79925398713"
    answer = strings.read_string(row, 2, rule=parse_rule("luhn"))
    assert answer.readings[0].text == "79927398713"
    assert answer.readings[0].probability == pytest.approx(0.4, abs=0.01)
    assert answer.likeliest.text == "79925398713"
    assert answer.likeliest.probability == pytest.approx(0.6, abs=0.01)
    assert answer.places == tuple((2 * place, 2 * place) for place in range(11))


def test_without_a_string_that_obeys_there_is_no_reading() -> None:
    answer = strings.read_string(certain(["2026"], 8)[0], 3, rule=parse_rule("length:9"))
    assert (answer.readings, answer.places) == ((), ())
    assert answer.likeliest.text == "2026"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10_000))
def test_places_are_those_of_the_likeliest_alignment(steps: int, symbols: int, seed: int) -> None:
    row = draw(1, steps, symbols, seed)[0]
    blank = symbols - 1
    best: dict[str, tuple[float, tuple[int, ...]]] = {}
    for path in itertools.product(range(symbols), repeat=steps):
        likelihood = float(row[range(steps), path].sum())
        text = collapse(path, blank)
        best[text] = max(best.get(text, (-np.inf, ())), (likelihood, path))
    for text, (_, path) in best.items():
        runs = [(symbol, len(list(run))) for symbol, run in itertools.groupby(path)]
        ends = np.cumsum([length for _, length in runs])
        places = [
            (int(end) - length, int(end) - 1)
            for (symbol, length), end in zip(runs, ends, strict=True)
            if symbol != blank
        ]
        assert list(strings.find_places(row, text)) == places


def in_javascript(rows: list[list[list[float]]], script: Path = SCRIPT) -> list[dict[str, Any]]:
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here")
    command = [node, str(REPOSITORY / "tests" / "run_strings.mjs"), str(script)]
    done = subprocess.run(command, input=json.dumps(rows).encode(), capture_output=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def is_same(answer: Any, vector: Any) -> bool:
    found, expected = dict(answer["readings"]), dict(vector["readings"])
    is_read = list(found) == list(expected) and found == pytest.approx(expected, abs=1e-9)
    return bool(is_read and answer["places"] == vector["places"])


def test_a_vector_is_read_as_it_must_be_in_python() -> None:
    assert len(VECTORS) == 6
    for vector in VECTORS:
        answer = strings.read_string(np.array(vector["outputs"]), 3)
        found = {"readings": answer.readings, "places": [list(place) for place in answer.places]}
        assert is_same(found, vector)


def test_the_vectors_are_read_as_in_python_by_javascript() -> None:
    answers = in_javascript([vector["outputs"] for vector in VECTORS])
    assert all(map(is_same, answers, VECTORS))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("const blank = symbols - 1;", "const blank = 0;"),  # the blank elsewhere
        ("chances[at + symbols - 1]", "chances[at]"),
        ("symbols, text, sum)", "symbols, text, max)"),  # the likeliest alignment, not all
        ("Array.from(outputs, Math.exp)", "Array.from(outputs, Math.exp).reverse()"),
    ],
)
def test_the_vectors_notice_sabotage_of_the_javascript(
    right: str, wrong: str, tmp_path: Path
) -> None:
    script = tmp_path / "strings.js"
    source = SCRIPT.read_text()
    assert right in source
    script.write_text(source.replace(right, wrong))
    answers = in_javascript([vector["outputs"] for vector in VECTORS], script)
    assert not all(map(is_same, answers, VECTORS))


@pytest.mark.parametrize("damage", ["blank", "time"])
def test_the_vectors_notice_sabotage_of_the_outputs(damage: str) -> None:
    for vector in VECTORS:
        row = np.array(vector["outputs"])
        changed = np.roll(row, 1, axis=1) if damage == "blank" else row[::-1]
        text, readings = vector["readings"][0][0], strings.read_string(changed, 3).readings
        is_palindrome = damage == "time" and text == text[::-1]
        assert readings[0].text != text or is_palindrome


def test_the_vectors_notice_the_likeliest_alignment_in_place_of_the_sum_over_all() -> None:
    for vector in VECTORS:
        (text, chance), row = vector["readings"][0], np.array(vector["outputs"])
        assert not text or np.exp(row.max(axis=1).sum()) < 0.99 * chance
