"""Comparison of two measurements of a benchmark: which rows became slower or less accurate.

A row is slower if the median of its rounds has fallen by more than 10 % and by more than the spread
of the rounds in both measurements. Each round is first divided by the yardstick's same round, since
a machine's speed differs from day to day.

Other load on the machine can only slow a round down, so only the faster half of the rounds counts.
A difference that other processes may have caused, by using more of the machine in one measurement
than in the other, does not count. With one request at a time, the fastest answers are compared as
well: they are the most reliable number on a busy machine.

A machine that is slow for minutes slows all rounds of a row equally, which the noise within a
measurement cannot show. Rows that seem slower are therefore measured once more, and count only if
they are slower again.
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

YARDSTICKS = ("yardstick", "no-op")  # the first one present; old records have the second
NOT_OF_MODEL = (*YARDSTICKS, "ONNX Runtime")  # rows that are not the model's own
LEAST_ROUNDS = 3
FIX = "give the JSON that 'pipeline benchmark' wrote or printed for the same --what"
UNSOUND = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
SLOWER = 0.10  # smallest loss that counts, as a fraction of a row's speed
LESS_ACCURATE = 0.0005  # smallest loss that counts, as a fraction of the images
# How many spreads a row must have changed by, for each number of rounds that count. From simulated
# rounds that a busy machine sometimes slows down: at most one false alarm in a hundred comparisons
# of fifty rows.
SPREADS = {2: 2.5, 3: 1.4, 4: 1.0}
# How much slower a row may get per additional fraction of the machine that other processes use:
# twice that fraction, since threads that wait for each other wait for the slowest one.
SHARED = 2.0


@dataclass(frozen=True)
class RowChange:
    """The change of one row between two measurements."""

    row: str
    what: str  # speed, latency (of the fastest answers) or accuracy
    before: float  # relative to the yardstick, larger is faster; accuracy 0 to 1
    after: float
    noise: float  # what a change must exceed, in the units of `change`
    verdict: str  # worse, better, same

    @property
    def change(self) -> float:
        """The change: of a speed relative to before, of an accuracy as a fraction of the images."""
        return self.after - self.before if self.what == "accuracy" else self.after / self.before - 1

    def __str__(self) -> str:
        unit = f"{self.change:+.2%} of images" if self.what == "accuracy" else f"{self.change:+.1%}"
        return f"{self.verdict:<6} {self.what:<8} {unit} (noise {self.noise:.1%})  {self.row}"


@dataclass(frozen=True)
class Comparison:
    """Changes of the rows that both measurements have, and names of rows that only one has."""

    changes: tuple[RowChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    of_model: int  # number of compared speeds that are the model's own

    @property
    def worse(self) -> list[RowChange]:
        return [change for change in self.changes if change.verdict == "worse"]

    @property
    def is_doubtful(self) -> bool:
        """Whether some row seems slower; accuracies need no second measurement."""
        return any(change.what != "accuracy" for change in self.worse)

    @property
    def seen(self) -> float:
        """The smallest change of speed or latency that is detected in the median row."""
        noises = [change.noise for change in self.changes if change.what != "accuracy"]
        return max(SLOWER, statistics.median(noises)) if noises else SLOWER

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        changes = [{**asdict(change), "change": change.change} for change in self.changes]
        return {**asdict(self), "changes": changes, "seen": self.seen}

    def __str__(self) -> str:
        changed = [change for change in self.changes if change.verdict != "same"]
        same = len(self.changes) - len(changed)
        lines = [
            *changed,
            f"{same} of {len(self.changes)} are the same within the noise",
            f"the smallest change that is detected in the median row is {self.seen:.0%}",
        ]
        for name, rows in (("before", self.only_before), ("now", self.only_after)):
            lines += [f"only {name}: {', '.join(rows)}"] if rows else []
        return Lines(*lines)


def read_measurements(file: Path, kinds: Sequence[str], name: str) -> dict[str, dict[str, Any]]:
    """Read the records in a benchmark's JSON, by what was measured.

    Raises PipelineError unless there is a record of each of `kinds`, of the model `name`.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{file} cannot be read ({error}): {FIX}") from error
    records = {}
    for what in kinds:
        is_all = isinstance(content, dict) and content.get("what") == "all"
        record = content.get(what) if is_all else content
        if not isinstance(record, dict) or record.get("what") != what:
            raise PipelineError(f"{file} has no measurement of {what}: {FIX}")
        compare_records(record, record)  # a record that can be compared with itself is complete
        if record.get("name") != name:
            message = f"{file} measures the model {record.get('name')!r}, not {name!r}"
            raise PipelineError(f"{message}: give --name, or another file with --compare")
        records[what] = record
    return records


def compare_records(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare two records of one kind of benchmark.

    Raises PipelineError if one is not a valid record of a benchmark.
    """
    try:
        names = {_label(row): row["name"] for row in before["rows"]}
        speeds = list(_compare_rounds(before, after, "speed"))
        changes = [*speeds, *_compare_rounds(before, after, "latency")]
        scores = after.get("scores", {})
        for name, score in before.get("scores", {}).items():
            if name in scores:  # without noise, as the images are the same
                old, new = float(score["accuracy"]), float(scores[name]["accuracy"])
                if not (0 <= old <= 1 and 0 <= new <= 1):
                    raise ValueError(f"{old} or {new} is not an accuracy")
                verdict = _judge(new - old, LESS_ACCURATE)
                changes.append(RowChange(name, "accuracy", old, new, 0.0, verdict))
        of_model = sum(names[change.row] not in NOT_OF_MODEL for change in speeds)
        return Comparison(
            tuple(changes), _find_missing(before, after), _find_missing(after, before), of_model
        )
    except UNSOUND as error:
        message = f"the measurement is damaged ({type(error).__name__}: {error}): {FIX}"
        raise PipelineError(message) from error


def confirm(first: Comparison, second: Comparison) -> Comparison:
    """Return the second comparison, where a row is slower only if it is in both comparisons.

    Both compare with the same earlier measurement. A row that was slower beyond the noise in the
    first needs only exceed SLOWER in the second.
    """
    doubted = {(change.row, change.what) for change in first.worse}
    changes = []
    for change in second.changes:
        if change.what != "accuracy":
            if (change.row, change.what) in doubted and change.change < -SLOWER:
                change = replace(change, verdict="worse")
            elif change.verdict == "worse":
                change = replace(change, verdict="same")
        changes.append(change)
    return replace(second, changes=tuple(changes))


def require_no_worse(comparison: Comparison) -> None:
    """Raise CheckFailedError if a row became worse beyond noise and threshold.

    Raises PipelineError if no row of the model was compared.
    """
    if worse := comparison.worse:
        count, listed = len(comparison.changes), "; ".join(map(str, worse))
        raise CheckFailedError(f"{len(worse)} of {count} got worse: {listed}")
    if not comparison.of_model:
        raise PipelineError(f"the measurements have no row of the model in common: {FIX}")


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, {row['way']}, batch {row['batch']}, concurrency {row['concurrency']}"


def _find_missing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the rows and accuracies that the first record has and the second lacks."""
    rows, scores = ({_label(row) for row in theirs["rows"]}, theirs.get("scores", {}))
    return (
        *(label for label in map(_label, ours["rows"]) if label not in rows),
        *(f"accuracy of {name}" for name in ours.get("scores", {}) if name not in scores),
    )


def _read_rounds(record: Mapping[str, Any], what: str) -> dict[str, list[float]]:
    """Return logarithms of the faster half of each row's rounds, relative to the yardstick."""
    rounds = {}
    for row in record["rows"]:
        # An open loop's rate is a setting; fastest answers are useful only without concurrency.
        if what == "speed" and not row.get("rate"):
            rounds[_label(row)] = [math.log(speed) for speed in row["images_per_second"]["rounds"]]
        elif what == "latency" and row["concurrency"] == 1 and "fastest_ms" in row:
            rounds[_label(row)] = [-math.log(ms) for ms in row["fastest_ms"]["rounds"]]
    yardsticks = [name for start in YARDSTICKS for name in rounds if name.startswith(start)]
    if not yardsticks and what == "latency":
        return {}  # an old record has no latencies of its yardstick
    yardstick = rounds.pop(yardsticks[0])
    if what == "latency":  # measured on an undisturbed core: equal in all rounds
        yardstick = [statistics.median(yardstick)] * len(yardstick)
    for name, own in rounds.items():
        if not LEAST_ROUNDS <= len(own) <= len(yardstick):
            raise ValueError(f"{len(own)} rounds are too few")
        # A row that settled early has fewer rounds than the yardstick has.
        parts = [ours - theirs for ours, theirs in zip(own, yardstick, strict=False)]
        if not all(map(math.isfinite, parts)):
            raise ValueError("a speed is not finite")
        rounds[name] = sorted(parts)[len(parts) // 2 :]
    return rounds


def _compare_rounds(
    before: Mapping[str, Any], after: Mapping[str, Any], what: str
) -> Iterator[RowChange]:
    """Yield the change of each row in both records, by median and spread of its rounds."""
    olds, news = _read_rounds(before, what), _read_rounds(after, what)
    others = [
        {_label(row): row.get("others", 0.0) for row in record["rows"]}
        for record in (before, after)
    ]
    spreads = {  # from the slowest to the fastest round, added over both measurements
        row: sum(rounds[row][-1] - rounds[row][0] for rounds in (olds, news))
        for row in olds
        if row in news
    }
    # A few rounds tell little about a row's own noise: use at least the median row's.
    usual = statistics.median(spreads.values()) if spreads else 0.0
    for row, spread in spreads.items():
        fewest = min(len(olds[row]), len(news[row]), max(SPREADS))
        shared = SHARED * abs(others[1][row] - others[0][row])
        noise = math.expm1(SPREADS[fewest] * max(spread, usual)) + shared
        old, new = (math.exp(statistics.median(rounds[row])) for rounds in (olds, news))
        limit = max(SLOWER, noise if new > old else noise / (1 + noise))  # half is as far as double
        yield RowChange(row, what, old, new, noise, _judge(new / old - 1, limit))


def _judge(change: float, limit: float) -> str:
    return "same" if abs(change) <= limit else "worse" if change < 0 else "better"
