"""Promote and roll back repeatedly under load, and check that no client gets a wrong answer.

Run by `make prove-swap`, a hundred times; by the tests, twice.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.repository.running import Server
from pipeline.repository.versions import list_versions
from pipeline.serving import supervise, swap
from pipeline.serving.serve import with_free_ports
from pipeline.serving.settings import ServeConfig
from tools.provenance import write_figure
from tools.readme import render_pages
from tools.traffic import Traffic, expected, traffic

TOLERANCE = 1e-4  # of an answer's log-probabilities
IMAGES = 1_000  # of the test split
TRAIN = ["train", "--recipe", "quick", "--epochs", "0.125"]


@dataclass(frozen=True)
class Outcome:
    """Results of the promotions, and of the requests during them."""

    promotes: int  # promotions and rollbacks, in turn
    clients: tuple[str, ...]  # the protocol of each
    requests: int
    wrong: int  # the answer of another image or version, or an unknown one
    failed: int
    by_version: dict[int, int]  # right answers
    versions_apart: float  # smallest difference of two versions' answers to one image
    tolerance: float
    seconds: float
    slowest_request_seconds: float
    median_promote_seconds: float
    problems: tuple[str, ...]  # the first few of the wrong and failed

    @property
    def is_perfect(self) -> bool:
        """Whether all answers were correct, both versions answered, and a mix-up is detectable."""
        return (
            self.wrong == self.failed == 0
            and len(self.by_version) == 2
            and self.versions_apart > 2 * self.tolerance
        )


def prove(
    paths: Paths,
    server: Server,
    images: np.ndarray,
    promotes: int,
    requests: int,
    report: Callable[[str], object] = lambda line: None,
    pause: float = 0.0,
) -> Outcome:
    """Switch between two versions under four clients until both numbers are reached.

    The numbers are `promotes` and `requests`. Each client waits `pause` seconds after a request.
    """
    numbers = [version.version for version in list_versions(paths).versions]
    outputs = expected(paths, numbers, images)
    first, second = (outputs[number] for number in numbers)
    urls = (server.http_url, server.grpc_url) * 2
    ask = Traffic("", paths.name, images, outputs, TOLERANCE, pause=pause)
    begin, seconds = time.monotonic(), list[float]()
    with traffic(urls, ask) as running:
        while len(seconds) < promotes or running.requests < requests:
            seconds.append(_change(paths, numbers))
            running.await_more(1)  # each client has sent a request to the current version by now
            report(f"{len(seconds)} changes, {running.requests:,} requests")
        tally = running.stop()
    return Outcome(
        promotes=len(seconds),
        clients=tuple(url.partition(":")[0] for url in urls),
        requests=tally.requests,
        wrong=tally.wrong,
        failed=tally.failed,
        by_version=dict(tally.by_version),
        versions_apart=float(np.abs(first - second).max(axis=1).min()),
        tolerance=TOLERANCE,
        seconds=round(time.monotonic() - begin, 1),
        slowest_request_seconds=round(tally.slowest, 3),
        median_promote_seconds=round(statistics.median(seconds), 2),
        problems=tuple(f"{problem.url}: {problem.message}" for problem in tally.problems[:5]),
    )


def _change(paths: Paths, numbers: list[int]) -> float:
    """Promote the version that is not served, or roll back to it, in turn; return the seconds."""
    begin = time.monotonic()
    before = swap.find_served_version(paths)
    (other,) = set(numbers) - {before}
    change = swap.promote(paths, other) if before == numbers[0] else swap.rollback(paths)
    assert (change.version, change.is_served) == (other, True)
    return time.monotonic() - begin


def make_two_versions(root: Path, report: Callable[[str], object]) -> Paths:
    """Train two small networks from two seeds, and package them as versions of one model."""
    for seed in ("0", "1"):
        run = ["--run", f"seed-{seed}"]
        for command in (
            [*TRAIN, *run, "--seed", seed],
            ["export", *run, "--name", "handwriting"],
            ["validate"],
            ["package"],
        ):
            report(f"pipeline {' '.join(command)}")
            line = [sys.executable, "-m", "pipeline", "--root", str(root), "-q", *command]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return Paths(root)


@contextlib.contextmanager
def serving(paths: Paths) -> Iterator[Server]:
    """Serve the repository on a separate server until the end of the block."""
    server = supervise.detach(paths, with_free_ports(ServeConfig()))
    try:
        yield server
    finally:
        supervise.stop(paths)


def main(result: Path, promotes: int, requests: int) -> None:
    """Run the check with two trained networks in a temporary folder, and keep the result."""

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        (root / "data" / "mnist").symlink_to(Path("data/mnist").resolve())
        (root / ".venv-triton").symlink_to(Path(".venv-triton").resolve())
        images = load_split("mnist", root / "data" / "mnist", "test").images[:IMAGES]
        paths = make_two_versions(root, say)
        with serving(paths) as server:
            outcome = prove(paths, server, images, promotes, requests, say)
    write_figure("swap", result, {"command": "make prove-swap", **machine(), **asdict(outcome)})
    say(f"{outcome}")
    render_pages()
    say(f"wrote {result}")
    if not outcome.is_perfect:
        raise SystemExit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
