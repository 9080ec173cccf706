"""Rounds of windows, until what is measured has settled."""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pipeline.benchmark import timing
from pipeline.benchmark.timing import Until, Window, take_turns
from pipeline.core.machine import others_seconds, peak_bytes


def measuring(order: list[str], name: str, speeds: Iterator[int]) -> Callable[[], Window]:
    def measure() -> Window:
        order.append(name)
        return Window(1.0, 1, np.ones(next(speeds)), wrong=1)

    return measure


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "others_seconds", lambda: 0.0)


def test_rounds_go_on_until_all_of_a_group_have_settled_and_the_yardstick_with_them() -> None:
    order: list[str] = []
    speeds = {
        "steady": iter([100] * 9),
        "late": iter([100, 50, 100, 100, 100, 1]),
        "partner": iter([100] * 9),
        "never": iter([100, 50] * 9),
        "yardstick": iter([100] * 9),
    }
    measures = {name: measuring(order, name, found) for name, found in speeds.items()}
    group = {"steady": "alone", "late": "pair", "partner": "pair", "never": "wild"}
    windows = take_turns(measures, group, Until(least=3, most=7))
    counts = {name: len(found) for name, found in windows.items()}
    assert counts == {"steady": 3, "late": 5, "partner": 5, "never": 7, "yardstick": 7}
    assert order[:10] == [*measures, *reversed(measures)]  # every other round goes backwards


def test_nothing_is_measured_any_more_once_all_have_settled() -> None:
    order: list[str] = []
    measures = {name: measuring(order, name, iter([100] * 9)) for name in ("one", "yardstick")}
    take_turns(measures, {"one": 1}, Until(least=4, most=9))
    assert len(order) == 8


def test_a_window_that_others_disturbed_is_measured_again_and_its_mistakes_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = iter([0.0, 1e9, 0.0, 0.0, *[0.0] * 99])  # seconds of others, before and after
    monkeypatch.setattr(timing, "others_seconds", lambda: next(taken))
    speeds = iter([50, 100, 100, 100, 100])
    windows = take_turns({"one": measuring([], "one", speeds)}, {"one": 1}, Until(4, 4))["one"]
    assert [window.images_per_second for window in windows] == [100] * 4
    assert [window.wrong for window in windows] == [2, 1, 1, 1]
    assert windows[0].others == 0


def test_a_machine_that_is_never_quiet_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(timing, "others_seconds", lambda: float(next(taken)))
    order: list[str] = []
    measures = {str(n): measuring(order, str(n), iter([100] * 20)) for n in range(4)}
    windows = take_turns(measures, {name: name for name in measures}, Until(5, 5))
    assert len(order) == 20 + 3  # some again
    assert all(window.others == 1 for found in windows.values() for window in found)


def test_memory_and_time_are_those_of_the_processes() -> None:
    assert peak_bytes() > 20e6
    assert peak_bytes(os.getpid()) == pytest.approx(peak_bytes(), rel=0.2)
    assert peak_bytes(2**22 + 1) == 0  # nobody
    before = others_seconds()
    sum(range(3_000_000))  # our own work is not that of others
    assert others_seconds() >= before - 1
