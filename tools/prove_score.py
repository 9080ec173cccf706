"""Score a million images with two kills on the way, and compare with an uninterrupted run.

prove_score.py RESULT IMAGES
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet as pq

from pipeline.core.evaluate import predict
from pipeline.core.machine import cores, machine
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.scoring.cluster import SCRATCH
from tools.provenance import write_figure
from tools.readme import render_pages

CHUNK = 10_000  # images in one write
SAMPLE = 60_000  # images for ONNX Runtime in process, before and after
BATCHES = (64, 256, 1024)
FEWER = 10  # factor of fewer images in the run that gives the reference for memory
LEAST = 0.7  # smallest rate, as a fraction of the rate in process
MAY_GROW = 0.1  # growth of the peak, as a fraction of the peak with fewer images


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each image (N, 28, 28) by up to two pixels in each direction."""
    moves = rng.integers(-2, 3, (len(images), 2))
    moved = np.empty_like(images)
    for move in np.unique(moves, axis=0):
        chosen = (moves == move).all(axis=1)
        moved[chosen] = np.roll(images[chosen], tuple(move), (1, 2))
    return moved


def write_source(path: Path, images: int) -> None:
    """Write this many digits of MNIST's test split as .npy, each shifted by up to two pixels."""
    digits = load_split("mnist", Path("data/mnist"), "test").images[:, 0]
    rng = np.random.default_rng(0)
    stored = np.lib.format.open_memmap(path, "w+", np.uint8, (images, 28, 28))
    for start in range(0, images, CHUNK):
        stored[start : start + CHUNK] = shifted(digits[: images - start], rng)
    stored.flush()


def tree(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    pids = {pid}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids |= {
                pid_below for child in path.read_text().split() for pid_below in tree(int(child))
            }
        except OSError:  # it ended meanwhile
            continue
    return pids


def memory(pid: int) -> int:
    """Return the bytes of memory of a process tree, with shared memory counted once (PSS)."""
    total = 0
    for one in tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


@contextmanager
def scoring(source: Path, output: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run the command in a separate process, killed at the end of the block."""
    command = [sys.executable, "-m", "pipeline", "--json", "score", str(source)]
    process = subprocess.Popen(
        [*command, "--output", str(output)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: "subprocess.Popen[str]") -> None:
    """Send SIGKILL to a process and its descendants, if it runs."""
    if process.poll() is None:
        for pid in tree(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def whole(source: Path, output: Path) -> tuple[dict[str, Any], int]:
    """Run without interruption; return the record, and the peak bytes of its processes' memory."""
    peak = [0]
    with scoring(source, output) as process:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                peak[0] = max(peak[0], memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        said, _ = process.communicate()
        ended.set()
        watcher.join()
    assert process.returncode == 0, said
    record: dict[str, Any] = json.loads(said)
    return record, peak[0]


def interrupt(source: Path, output: Path, parts: int) -> int:
    """Kill a run and its processes once it has written `parts` files; return their number."""
    with scoring(source, output) as process:
        while len(list(output.glob("part-*"))) < parts:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        kill(process)
    assert process.returncode == -signal.SIGKILL
    return len(list(output.glob("part-*")))


def in_process(onnx: bytes, images: np.ndarray) -> dict[str, float]:
    """Measure ONNX Runtime in this process, on all cores: images/s by sessions and batch size."""
    results = {}
    for batch in BATCHES:
        predictor = onnx_predictor(onnx, cores())
        predictor(images[:batch])
        start = time.perf_counter()
        predict(predictor, images, batch)
        results[f"one session, batches of {batch}"] = len(images) / (time.perf_counter() - start)
    predictors = [onnx_predictor(onnx, 1) for _ in range(cores())]
    halves = np.array_split(images, cores())
    with ThreadPoolExecutor(cores()) as pool:
        start = time.perf_counter()
        list(pool.map(predict, predictors, halves, [BATCHES[0]] * cores()))
        name = f"a session for each core, batches of {BATCHES[0]}"
        results[name] = len(images) / (time.perf_counter() - start)
    return results


def digest(output: Path) -> dict[str, Any]:
    """Return row count, a check of the ids, models, and one SHA-256 of all answers by id."""
    table = pq.read_table(output).sort_by("id").combine_chunks()
    ids = table["id"].to_pylist()
    top = table["top"].combine_chunks().flatten()
    answers = hashlib.sha256()
    for texts in (map(str, ids), table["label"].to_pylist(), top.field("label").to_pylist()):
        answers.update("\n".join(texts).encode())
    for numbers in (table["probability"], table["sure"], top.field("probability")):
        answers.update(numbers.to_numpy(zero_copy_only=False).tobytes())
    return {
        "rows": len(ids),
        "are_ids_right": ids == list(range(len(ids))),
        "models": table["digest"].unique().to_pylist(),
        "sha256": answers.hexdigest(),
    }


def prove(folder: Path, images: int) -> dict[str, Any]:
    """Measure and compare all runs in a temporary folder; return the record."""
    source, small = folder / "many.npy", folder / "few.npy"
    write_source(source, images)
    write_source(small, images // FEWER)
    pixels = np.load(source, mmap_mode="r")[:SAMPLE, np.newaxis].copy()
    onnx = Paths().onnx.read_bytes()
    _, few_peak = whole(small, folder / "few")
    before = in_process(onnx, pixels)
    record, peak = whole(source, folder / "whole")
    after = in_process(onnx, pixels)
    killed, total = folder / "killed", len(list((folder / "whole").glob("part-*")))
    kills = [interrupt(source, killed, total * part // 3) for part in (1, 2)]
    resumed, _ = whole(source, killed)
    wanted, results = digest(folder / "whole"), digest(killed)
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    left = [str(path) for path in killed.glob(".*")]
    return {
        "images": images,
        "model": wanted["models"],
        "rate": record["images_per_second"],
        "start_seconds": record["start_seconds"],
        "seconds": record["seconds"],
        "in_process_before": before,
        "in_process_after": after,
        "ratio": record["images_per_second"] / max(rates.values()),
        "fewer_images": images // FEWER,
        "fewer_peak_bytes": few_peak,
        "peak_bytes": peak,
        "kills": [{"files": files, "of": total} for files in kills],
        "resumed": resumed["resumed"],
        "uninterrupted": wanted,
        "killed": results,
        "left": [*left, *map(str, Path(tempfile.gettempdir()).glob(f"{SCRATCH}-*"))],
    }


def main(result: Path, images: int) -> None:
    """Run the comparison, check it, and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        results = prove(Path(folder), images)
    record = {"command": "make prove-score", **machine(), **results}
    print(json.dumps(record, indent=2))
    assert results["killed"] == results["uninterrupted"]
    assert results["killed"]["rows"] == images
    assert results["killed"]["are_ids_right"]
    assert 0 < results["resumed"] < images
    assert not results["left"]
    write_figure("score", result, record)
    render_pages()
    print(f"wrote {result}")
    if (
        results["ratio"] < LEAST
        or results["peak_bytes"] > (1 + MAY_GROW) * results["fewer_peak_bytes"]
    ):
        raise SystemExit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
