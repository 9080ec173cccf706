"""The broken things that the gates are tried with are counted, so that none gets lost unseen.

A new one raises its number here. One that goes needs a reason in its commit, since a gate that
nothing tries may stand open.
"""

import importlib
import math
from inspect import getmembers, isfunction

import pytest

from tools.mutations import CASES, LOADS, UNTRIED


def cases_in(module: str) -> int:
    """Count the cases that pytest makes of a module's tests."""
    count = 0
    for name, function in getmembers(importlib.import_module(f"tests.{module}"), isfunction):
        if name.startswith("test_"):
            marks = getattr(function, "pytestmark", [])
            count += math.prod(len(mark.args[1]) for mark in marks if mark.name == "parametrize")
    return count


@pytest.mark.parametrize(
    ("module", "count"),
    [
        ("validation.test_sabotage", 68),
        ("export.test_policy", 243),
        ("client.test_faults", 262),
    ],
)
def test_no_broken_thing_is_lost(module: str, count: int) -> None:
    assert cases_in(module) == count


def test_lint_is_tried_with_every_mutation_and_sound_variation() -> None:
    sound = [case for case in CASES if case.expected in (LOADS, UNTRIED)]
    assert (len(CASES) - len(sound), len(sound)) == (110, 49)
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.why for case in CASES)
