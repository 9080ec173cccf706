"""Two measurements of a benchmark against each other: what got slower, or less accurate.

Machines are not as fast today as yesterday, so speeds are compared as parts of a yardstick that was
measured in the same rounds; and no difference counts that the rounds themselves differ by.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckFailedError, PipelineError

YARDSTICKS = {"infer": "yardstick", "serve": "no-op"}  # the rows that no change of ours moves
LEAST_ROUNDS = 3
MEND = "it must be what 'pipeline benchmark --json' printed, or wrote, for the same --what"
SLOWER = 0.10  # of a row's speed, that counts
LESS_ACCURATE = 0.0005  # of the images, as a fraction
# How many standard errors a row must lie apart: with some fifty rows of seven rounds, once in a
# thousand comparisons by chance alone (Student's t, 24 degrees of freedom).
SURE = 5.5


@dataclass(frozen=True)
class Change:
    """What became of one row."""

    row: str
    what: str  # speed or accuracy
    before: float  # speeds as parts of the yardstick's; accuracy 0 to 1
    after: float
    noise: float  # what a change must exceed, in the units of `change`
    verdict: str  # worse, better, same

    @property
    def change(self) -> float:
        """Of speeds as a fraction, of accuracies in fractions of the images."""
        return self.after - self.before if self.what == "accuracy" else self.after / self.before - 1

    def __str__(self) -> str:
        shown = f"{self.change:+.1%}" if self.what == "speed" else f"{self.change:+.2%} of images"
        return f"{self.verdict:<6} {self.what:<8} {shown} (noise {self.noise:.1%})  {self.row}"


@dataclass(frozen=True)
class Comparison:
    """All rows that both measurements have, and those that only one has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        changes = [{**asdict(change), "change": change.change} for change in self.changes]
        return {**asdict(self), "changes": changes}

    def __str__(self) -> str:
        told = [str(change) for change in self.changes if change.verdict != "same"]
        same = len(self.changes) - len(told)
        told.append(f"{same} of {len(self.changes)} are the same within the noise")
        for name, rows in (("before", self.only_before), ("now", self.only_after)):
            if rows:
                told.append(f"only {name}: {', '.join(rows)}")
        return "\n".join(told)


def read(file: Path, asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records in a benchmark's JSON, by what was measured.

    Raises PipelineError unless there is one of each that is `asked`.
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
        _speeds(one)
        found[what] = one
    return found


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    slower: float = SLOWER,
    less_accurate: float = LESS_ACCURATE,
) -> Comparison:
    """What changed between two records of one kind of benchmark."""
    olds, news = _speeds(before), _speeds(after)
    rows = [row for row in olds if row in news]
    variances = {row: _variance(olds[row], news[row]) for row in rows}
    # A few rounds tell little of a row's own noise: what is usual among the rows counts as much.
    usual = statistics.median(variances.values()) if rows else 0.0
    changes = [
        _speed(row, olds[row], news[row], (variances[row] + usual) / 2, slower) for row in rows
    ]
    changes += _accuracies(before, after, less_accurate)
    return Comparison(
        tuple(changes),
        tuple(row for row in olds if row not in news),
        tuple(row for row in news if row not in olds),
    )


def require_no_worse(comparison: Comparison) -> None:
    """Raise CheckFailedError where something got worse beyond noise and threshold."""
    if worse := comparison.worse:
        raise CheckFailedError(
            f"{len(worse)} of {len(comparison.changes)} got worse: " + "; ".join(map(str, worse))
        )


def _speeds(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each row's logarithms of its rounds' speeds over the yardstick's of the same round."""
    try:
        rounds = {_name(row): row["images_per_second"]["rounds"] for row in record["rows"]}
        (measure,) = [
            _name(row) for row in record["rows"] if row["name"] == YARDSTICKS[record["what"]]
        ]
        theirs = rounds.pop(measure)
        return {name: _logarithms(ours, theirs) for name, ours in rounds.items()}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PipelineError(
            f"no measurement to compare with ({type(error).__name__}: {error}): {MEND}"
        ) from error


def _logarithms(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    if len(ours) < LEAST_ROUNDS:
        raise ValueError(f"{len(ours)} rounds tell nothing of noise")
    return [math.log(our / their) for our, their in zip(ours, theirs, strict=True)]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, {row['way']}, batch {row['batch']}, {row['concurrency']} at once"


def _variance(before: Sequence[float], after: Sequence[float]) -> float:
    """The variance of a round, from those of both measurements."""
    return statistics.mean(statistics.variance(rounds) for rounds in (before, after))


def _speed(
    row: str, before: Sequence[float], after: Sequence[float], variance: float, slower: float
) -> Change:
    old, new = statistics.mean(before), statistics.mean(after)
    error = math.sqrt(variance * (1 / len(before) + 1 / len(after)))
    noise, change = math.expm1(SURE * error), math.expm1(new - old)
    down, up = max(slower, noise / (1 + noise)), max(slower, noise)  # half is as far as twice
    verdict = "worse" if change < -down else "better" if change > up else "same"
    return Change(row, "speed", math.exp(old), math.exp(new), noise, verdict)


def _accuracies(
    before: Mapping[str, Any], after: Mapping[str, Any], less: float
) -> Iterator[Change]:
    """Accuracies have no noise: both are of the same images."""
    olds, news = before.get("scores", {}), after.get("scores", {})
    for name in olds:
        if name in news:
            old, new = olds[name]["accuracy"], news[name]["accuracy"]
            verdict = "worse" if new < old - less else "better" if new > old + less else "same"
            yield Change(name, "accuracy", old, new, 0.0, verdict)
