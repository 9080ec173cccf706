"""Score a million images, killed twice on the way, and hold it against a run left alone.

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

CHUNK = 10_000  # images written at once
SAMPLE = 60_000  # images that ONNX Runtime gets in process, before and after
BATCHES = (64, 256, 1024)
FEWER = 10  # how many times fewer images the memory is held against
LEAST = 0.7  # of the rate in process
MAY_GROW = 0.1  # of the peak with fewer images


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image (N, 28, 28) moved by up to two pixels in each direction."""
    moves = rng.integers(-2, 3, (len(images), 2))
    found = np.empty_like(images)
    for move in np.unique(moves, axis=0):
        chosen = (moves == move).all(axis=1)
        found[chosen] = np.roll(images[chosen], tuple(move), (1, 2))
    return found


def write_source(path: Path, images: int) -> None:
    """So many digits of MNIST's test split as .npy, each shifted a little."""
    digits = load_split("mnist", Path("data/mnist"), "test").images[:, 0]
    rng = np.random.default_rng(0)
    stored = np.lib.format.open_memmap(path, "w+", np.uint8, (images, 28, 28))
    for start in range(0, images, CHUNK):
        stored[start : start + CHUNK] = shifted(digits[: images - start], rng)
    stored.flush()


def tree(pid: int) -> set[int]:
    """A process and all below it."""
    found = {pid}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= {one for child in path.read_text().split() for one in tree(int(child))}
        except OSError:  # it ended while we looked
            continue
    return found


def memory(pid: int) -> int:
    """Bytes that the processes of a tree hold, what they share counted once (PSS)."""
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
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "pipeline", "--json", "score", str(source)]
    process = subprocess.Popen(
        [*command, "--output", str(output)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process and to all below it, if it runs."""
    if process.poll() is None:
        for pid in tree(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def whole(source: Path, output: Path) -> tuple[dict[str, Any], int]:
    """What an uninterrupted run reports, and the most memory that its processes held."""
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
    """Kill a run, and all its processes, once so many files are there; return how many were."""
    with scoring(source, output) as process:
        while len(list(output.glob("part-*"))) < parts:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        kill(process)
    assert process.returncode == -signal.SIGKILL
    return len(list(output.glob("part-*")))


def in_process(onnx: bytes, images: np.ndarray) -> dict[str, float]:
    """Images/s of ONNX Runtime in this process with a thread for each core, by how it is asked."""
    found = {}
    for batch in BATCHES:
        predictor = onnx_predictor(onnx, cores())
        predictor(images[:batch])
        start = time.perf_counter()
        predict(predictor, images, batch)
        found[f"one session, batches of {batch}"] = len(images) / (time.perf_counter() - start)
    predictors = [onnx_predictor(onnx, 1) for _ in range(cores())]
    halves = np.array_split(images, cores())
    with ThreadPoolExecutor(cores()) as pool:
        start = time.perf_counter()
        list(pool.map(predict, predictors, halves, [BATCHES[0]] * cores()))
        name = f"a session for each core, batches of {BATCHES[0]}"
        found[name] = len(images) / (time.perf_counter() - start)
    return found


def digest(output: Path) -> dict[str, Any]:
    """Row count, ids, and one SHA-256 of all answers in the order of their ids."""
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
    """What was measured and compared, in a folder that goes afterwards."""
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
    wanted, found = digest(folder / "whole"), digest(killed)
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
        "killed": found,
        "left": [*left, *map(str, Path(tempfile.gettempdir()).glob(f"{SCRATCH}-*"))],
    }


def main(result: Path, images: int) -> None:
    """Prove it, and write what was found."""
    with tempfile.TemporaryDirectory() as folder:
        found = prove(Path(folder), images)
    record = {"command": "make prove-score", **machine(), **found}
    print(json.dumps(record, indent=2))
    assert found["killed"] == found["uninterrupted"]
    assert found["killed"]["rows"] == images
    assert found["killed"]["are_ids_right"]
    assert 0 < found["resumed"] < images
    assert not found["left"]
    write_figure("score", result, record)
    render_pages()
    print(f"wrote {result}")
    if found["ratio"] < LEAST or found["peak_bytes"] > (1 + MAY_GROW) * found["fewer_peak_bytes"]:
        raise SystemExit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
