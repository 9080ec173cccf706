"""Two measurements of a benchmark against each other: what got slower, or less accurate.

Machines are not as fast today as yesterday, so speeds are compared as parts of a yardstick that was
measured in the same rounds. What else a machine does only ever slows a round down, so the faster
half of them counts; and no difference counts that the rounds themselves differ by, or that others
may have made who took more of the machine in one measurement than in the other. Where one request
is asked at a time, the fastest answers are compared as well: they tell most on a busy machine.

A machine that is slow for minutes slows all rounds of a row alike, which no noise within the
measurement shows: what seems slower is measured once more, and counts where it is slower again.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.text import Lines

YARDSTICKS = ("yardstick", "no-op")  # the first that is there; records of old have the second
BESIDE = (*YARDSTICKS, "ONNX Runtime")  # rows beside those of the model: they tell nothing of it
LEAST_ROUNDS = 3
MEND = "it must be what 'pipeline benchmark --json' printed, or wrote, for the same --what"
UNSOUND = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
SLOWER = 0.10  # of a row's speed, that counts
LESS_ACCURATE = 0.0005  # of the images, as a fraction
# How many standard errors a row must lie apart, by how many rounds count. Simulated with rounds
# that a busy machine slows down now and then: once in a hundred comparisons of fifty rows at most.
SURE = {2: 12.0, 3: 8.0}
SURE_OF_MORE = 6.0
# How much slower something gets when others take more of the machine: what is left to it, to such a
# power. More than its part, since threads that wait for each other wait for the last of them.
SHARED = {"speed": 2.0, "latency": 0.5}
MOST_SHARED = 0.95


@dataclass(frozen=True)
class Change:
    """What became of one row."""

    row: str
    what: str  # speed, latency (of the fastest answers) or accuracy
    before: float  # as parts of the yardstick's, larger is faster; accuracy 0 to 1
    after: float
    noise: float  # what a change must exceed, in the units of `change`
    verdict: str  # worse, better, same

    @property
    def change(self) -> float:
        """Of speeds as a fraction, of accuracies in fractions of the images."""
        return self.after - self.before if self.what == "accuracy" else self.after / self.before - 1

    def __str__(self) -> str:
        is_speed = self.what != "accuracy"
        shown = f"{self.change:+.1%} fast" if is_speed else f"{self.change:+.2%} of images"
        return f"{self.verdict:<6} {self.what:<8} {shown} (noise {self.noise:.1%})  {self.row}"


@dataclass(frozen=True)
class Comparison:
    """All rows that both measurements have, and those that only one has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    of_model: int  # speeds that were compared of the model itself, not of what ran beside it

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]

    @property
    def is_doubtful(self) -> bool:
        """Whether something seems slower: of the same images, accuracies leave no doubt."""
        return any(change.what != "accuracy" for change in self.worse)

    @property
    def seen(self) -> float:
        """The change of speed or latency that would have been seen in the middle one of them."""
        noises = [change.noise for change in self.changes if change.what != "accuracy"]
        return max(SLOWER, statistics.median(noises)) if noises else SLOWER

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        changes = [{**asdict(change), "change": change.change} for change in self.changes]
        return {**asdict(self), "changes": changes, "seen": self.seen}

    def __str__(self) -> str:
        told = [str(change) for change in self.changes if change.verdict != "same"]
        same = len(self.changes) - len(told)
        told.append(f"{same} of {len(self.changes)} are the same within the noise")
        told.append(f"in the middle row, a change beyond {self.seen:.0%} would have been seen")
        for name, rows in (("before", self.only_before), ("now", self.only_after)):
            if rows:
                told.append(f"only {name}: {', '.join(rows)}")
        return Lines(*told)


def read(file: Path, asked: Sequence[str], name: str) -> dict[str, dict[str, Any]]:
    """The records in a benchmark's JSON, by what was measured.

    Raises PipelineError unless there is one of each that is `asked`, of the model of that name.
    """
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{file} cannot be read ({error}): {MEND}") from error
    if not isinstance(record, dict):
        raise PipelineError(f"{file} is no measurement: {MEND}")
    found = {}
    for what in asked:
        one = record.get(what) if record.get("what") == "all" else record
        if not isinstance(one, dict) or one.get("what") != what:
            raise PipelineError(f"{file} has no measurement of {what}: {MEND}")
        try:
            compare(one, one)  # what can be held against itself has all that is needed
        except UNSOUND as error:
            raise _no_measurement(error) from error
        if one.get("name") != name:
            raise PipelineError(
                f"{file} is a measurement of the model {one.get('name')}, and {name} would be "
                "measured: give --name, or a measurement of the same model"
            )
        found[what] = one
    return found


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    slower: float = SLOWER,
    less_accurate: float = LESS_ACCURATE,
) -> Comparison:
    """What changed between two records of one kind of benchmark."""
    changes: list[Change] = []
    olds = {_name(row): row for row in before["rows"]}
    for what in SHARED:
        changes += _speeds(what, before, after, slower)
    changes += _accuracies(before, after, less_accurate)
    return Comparison(
        tuple(changes),
        tuple(_only(before, after)),
        tuple(_only(after, before)),
        sum(one.what == "speed" and olds[one.row]["name"] not in BESIDE for one in changes),
    )


def confirmed(first: Comparison, second: Comparison, slower: float = SLOWER) -> Comparison:
    """The second measurement held against the same as the first, with what both found slower.

    Of what lay beyond the noise in the first, being slower again than is allowed is enough.
    """
    doubted = {(change.row, change.what) for change in first.worse}

    def judged(change: Change) -> Change:
        if change.what == "accuracy":
            return change
        if (change.row, change.what) in doubted and change.change < -slower:
            return replace(change, verdict="worse")
        return replace(change, verdict="same") if change.verdict == "worse" else change

    return replace(second, changes=tuple(map(judged, second.changes)))


def require_no_worse(comparison: Comparison) -> None:
    """Raise CheckFailedError where something got worse beyond noise and threshold.

    Raises PipelineError where nothing of the model was compared.
    """
    if worse := comparison.worse:
        raise CheckFailedError(
            f"{len(worse)} of {len(comparison.changes)} got worse: " + "; ".join(map(str, worse))
        )
    if not comparison.of_model:
        raise PipelineError(f"no row of the model is in both, so nothing was compared: {MEND}")


def _only(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """What the one record has and the other one lacks."""
    there = {_name(row) for row in theirs["rows"]}
    yield from (name for row in ours["rows"] if (name := _name(row)) not in there)
    scored = theirs.get("scores", {})
    yield from (f"accuracy of {name}" for name in ours.get("scores", {}) if name not in scored)


def _no_measurement(error: Exception) -> PipelineError:
    said = f"{type(error).__name__}: {error}"
    return PipelineError(f"no measurement to compare with ({said}): {MEND}")


def _rounds(what: str, record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Logarithms of each row's rounds, as parts of the yardstick's; the faster half of them."""
    find = {"speed": _throughputs, "latency": _fastest}[what]
    try:
        rounds = {_name(row): found for row in record["rows"] if (found := find(row))}
        measures = [name for wanted in YARDSTICKS for name in rounds if name.startswith(wanted)]
        if not measures and what == "latency":
            return {}  # a record of old has none
        theirs = rounds.pop(measures[0])
        if what == "latency":  # of a core that nobody else had: no round differs from another
            theirs = [statistics.mean(_faster_half(theirs))] * len(theirs)
        return {name: _parts(ours, theirs) for name, ours in rounds.items()}
    except UNSOUND as error:
        raise _no_measurement(error) from error


def _throughputs(row: Mapping[str, Any]) -> list[float]:
    """Logarithms of images a second; none for an open loop, whose rate was asked for."""
    return [] if row.get("rate") else [math.log(one) for one in row["images_per_second"]["rounds"]]


def _fastest(row: Mapping[str, Any]) -> list[float]:
    """Logarithms of how fast the fastest answers were, where only one was asked for at a time."""
    if row["concurrency"] != 1 or "fastest_ms" not in row:
        return []
    return [-math.log(one) for one in row["fastest_ms"]["rounds"]]


def _faster_half(rounds: Sequence[float]) -> list[float]:
    return sorted(rounds)[len(rounds) // 2 :]


def _parts(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Parts of the yardstick's same rounds. A row that settled early has fewer than that."""
    if not LEAST_ROUNDS <= len(ours) <= len(theirs):
        raise ValueError(f"{len(ours)} rounds tell nothing of noise")
    if not all(map(math.isfinite, (*ours, *theirs))):
        raise ValueError("a speed is no number")
    return _faster_half([our - their for our, their in zip(ours, theirs, strict=False)])


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, {row['way']}, batch {row['batch']}, {row['concurrency']} at once"


def _speeds(
    what: str, before: Mapping[str, Any], after: Mapping[str, Any], slower: float
) -> Iterator[Change]:
    olds, news = _rounds(what, before), _rounds(what, after)
    variances = {row: _variance(olds[row], news[row]) for row in olds if row in news}
    once, again = ({_name(row): row for row in one["rows"]} for one in (before, after))
    for row, own in variances.items():
        at_once = once[row]["concurrency"]
        # A few rounds tell little of a row's own noise: what is usual among the rows counts as
        # much. Those with one request at a time are quieter than the others.
        alike = [variances[other] for other in variances if once[other]["concurrency"] == at_once]
        variance = (own + statistics.median(alike)) / 2
        more = abs(again[row].get("others", 0.0) - once[row].get("others", 0.0))
        shared = (1 - min(more, MOST_SHARED)) ** -SHARED[what] - 1
        yield _speed(row, what, olds[row], news[row], variance, shared, slower)


def _variance(before: Sequence[float], after: Sequence[float]) -> float:
    """The variance of a round, from those of both measurements."""
    return statistics.mean(statistics.variance(rounds) for rounds in (before, after))


def _speed(
    row: str,
    what: str,
    before: Sequence[float],
    after: Sequence[float],
    variance: float,
    shared: float,
    slower: float,
) -> Change:
    old, new = statistics.mean(before), statistics.mean(after)
    error = math.sqrt(variance * (1 / len(before) + 1 / len(after)))
    sure = SURE.get(min(len(before), len(after)), SURE_OF_MORE)
    noise, change = math.expm1(sure * error) + shared, math.expm1(new - old)
    down, up = max(slower, noise / (1 + noise)), max(slower, noise)  # half is as far as twice
    verdict = "worse" if change < -down else "better" if change > up else "same"
    return Change(row, what, math.exp(old), math.exp(new), noise, verdict)


def _accuracies(
    before: Mapping[str, Any], after: Mapping[str, Any], less: float
) -> Iterator[Change]:
    """Accuracies have no noise: both are of the same images."""
    olds, news = before.get("scores", {}), after.get("scores", {})
    for name in olds:
        if name in news:
            old, new = _accuracy(olds[name]), _accuracy(news[name])
            verdict = "worse" if new < old - less else "better" if new > old + less else "same"
            yield Change(name, "accuracy", old, new, 0.0, verdict)


def _accuracy(score: Mapping[str, Any]) -> float:
    accuracy = float(score["accuracy"])
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{accuracy} is no accuracy")
    return accuracy
