"""Rounds of windows: everything that is compared takes turns, until its speed has settled."""

import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeline.benchmark.timing import WITHIN, Window, is_settled
from pipeline.core.usage import others_seconds

QUIET = 0.08  # of the cores, that others may take in a window before it is measured again
AGAIN = 0.15  # of the windows, that may be measured again

Key = TypeVar("Key", bound=Hashable)
Measure = Callable[[], Window]


@dataclass(frozen=True)
class Until:
    """When to stop: each thing has settled, or has had so many windows."""

    least: int
    most: int
    within: float = WITHIN

    def is_over(self, windows: Sequence[Window]) -> bool:
        """Whether what has these windows needs no more."""
        speeds = [window.images_per_second for window in windows]
        return len(speeds) >= self.least and is_settled(speeds, self.within)


UNTIL = Until(least=5, most=7)


def take_turns(
    measures: Mapping[Key, Measure],
    group: Mapping[Key, Hashable],
    until: Until,
    report: Callable[[str], None] = lambda line: None,
) -> dict[Key, list[Window]]:
    """Windows of each, in rounds; every other round goes backwards.

    A group goes on until all in it have settled, so that they have the same rounds. What is in no
    group is a yardstick, and measured for as long as anything is. Windows that others disturbed are
    measured again, within limits; their wrong answers count all the same.
    """
    windows: dict[Key, list[Window]] = {key: [] for key in measures}
    spare = round(AGAIN * until.least * len(measures))
    for turn in range(until.most):
        wanted = {group[key] for key in group if not until.is_over(windows[key])}
        if not wanted:
            break
        present = [key for key in measures if key not in group or group[key] in wanted]
        report(f"round {turn + 1} of {until.most} at most: {len(present)} windows")
        for key in present if turn % 2 == 0 else reversed(present):
            window = watched(measures[key])
            if window.others > QUIET and spare:
                spare -= 1
                window = _quieter(window, watched(measures[key]))
            windows[key].append(window)
    return windows


def watched(measure: Measure) -> Window:
    """A window, with the part of the machine that others took meanwhile."""
    start, before = time.perf_counter(), others_seconds()
    window = measure()
    taken = others_seconds() - before
    spent = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return replace(window, others=min(1.0, max(0.0, taken / spent)))


def _quieter(first: Window, second: Window) -> Window:
    kept = min(first, second, key=lambda window: window.others)
    wrong, failed = first.wrong + second.wrong, first.failed + second.failed
    return replace(kept, wrong=wrong, failed=failed)
