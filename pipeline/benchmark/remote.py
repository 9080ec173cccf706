"""Speed of any model on any server of KServe's protocol, version 2, as perf_analyzer has it.

The server tells the model's inputs, which get random data or zeros: nothing is known of the
answers but that they came. Rows are measured in turns, in ROUNDS windows each.
"""

# Shape letters: B batch.

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from tritonclient.utils import triton_to_np_dtype

from pipeline.benchmark.load import (
    TIMEOUT,
    Questions,
    build_requests,
    count_during,
    keep_asking,
)
from pipeline.benchmark.target import InputTensor, LoadTarget, Measured
from pipeline.benchmark.timing import LAST, TimedRow, Window, measure_answered
from pipeline.client.client import Client
from pipeline.client.faults import explain_fault
from pipeline.core.errors import CheckFailedError, PipelineError, ServerError
from pipeline.core.machine import machine

ROUNDS = LAST  # windows of a row, so that it shows whether they agree
STRING = 128  # letters in a random string, as in perf_analyzer
LARGEST = 1 << 30  # bytes of a request's tensor; gRPC's limit is twice that
NO_STATISTICS = "{} does not list the extension 'statistics': it tells no times of its own"
PROBE = 0.01  # seconds: one request, or a few
Dimensions = tuple[int, ...]
Report = Callable[[str], None]


@dataclass(frozen=True)
class RemoteBenchmark:
    """Settings of the measurement: a row for each batch size and concurrency."""

    concurrencies: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    seconds: float = 10.0  # of each row
    shapes: Mapping[str, Dimensions] = field(default_factory=dict)  # without the batch
    is_zero: bool = False  # zeros and empty strings instead of random data


@dataclass(frozen=True)
class Remote:
    """The result of the measurement."""

    target: LoadTarget
    server: Mapping[str, Any]  # its metadata
    model: Mapping[str, Any]  # its metadata
    statistics: str  # why there are no times of the server's own; empty if there are
    config: RemoteBenchmark
    rows: tuple[TimedRow, ...]

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        return {
            "what": "url",
            **machine(),
            "url": str(self.target.endpoint),
            "name": self.target.name,
            "version": self.target.version,
            "server": dict(self.server),
            "model": dict(self.model),
            "statistics": self.statistics,
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
        }

    def require_answers(self) -> None:
        """Raise CheckFailedError if a request failed; ServerError if most had no answer at all."""
        faults = [fault for row in self.rows for fault in row.joined.faults]
        if not faults:
            return
        usual = Counter(fault.kind for fault in faults).most_common(1)[0][0]
        first = next(fault for fault in faults if fault.kind == usual)
        error = explain_fault(first, self.target, TIMEOUT)
        total = len(faults) + sum(len(row.joined.latencies) for row in self.rows)
        kind = ServerError if isinstance(error, ServerError) else CheckFailedError
        raise kind(f"{len(faults):,} of {total:,} requests failed and count in no rate: {error}")


def benchmark_remote(
    target: LoadTarget,
    config: RemoteBenchmark = RemoteBenchmark(),
    report: Report = lambda line: None,
) -> Remote:
    """Measure the target's model in closed loops.

    Requests that fail during the measurement are in the rows, with their reasons. Raises
    PipelineError if the model takes no such request, and ServerError if there is no answer.
    """
    client = Client(
        target.endpoint,
        target.name,
        version=target.version,
        certificates=target.certificates,
        headers=target.headers,
    )
    with client:
        return _measure(client, target, config, report)


def _measure(client: Client, target: LoadTarget, config: RemoteBenchmark, report: Report) -> Remote:
    server, model = client.metadata(), client.metadata(of_model=True)
    extensions = server.get("extensions", [])
    largest, optional = None, set()
    if "model_configuration" in extensions:
        told = client.config()
        largest = told.max_batch_size
        optional = {tensor.name for tensor in told.input if tensor.optional}
    inputs = [tensor for tensor in model.get("inputs", []) if tensor["name"] not in optional]
    outputs = tuple(tensor["name"] for tensor in model.get("outputs", []))
    target = replace(target, outputs=outputs, is_binary="binary_tensor_data" in extensions)
    questions = []
    for batch in config.batches:
        tensors = make_tensors(target.name, inputs, largest, batch, config)
        questions.append(Questions(target, batch, build_requests(target, [tensors])))
    for asked in questions:  # a model that refuses such a request is found before minutes of load
        if faults := keep_asking(asked, 1, PROBE).faults:
            raise explain_fault(faults[0], target, TIMEOUT)
    statistics = "" if "statistics" in extensions else NO_STATISTICS.format(target.endpoint)
    windows: dict[tuple[int, int], list[Window]] = {}

    def measure(asked: Questions, concurrency: int, round_: int, seconds: float) -> Window:
        def tell(measured: Measured) -> None:
            rate = len(measured.latencies) * asked.batch
            passed = max(0.0, time.perf_counter() - measured.begin)
            report(
                f"round {round_} of {ROUNDS}, batch {asked.batch}, concurrency {concurrency}: "
                f"{passed:.1f} of {seconds:.1f} s, {rate / max(passed, 0.1):,.0f} inferences/s, "
                f"{len(measured.faults):,} failed"
            )

        return keep_asking(asked, concurrency, seconds, tell)

    for turn in range(1, ROUNDS + 1):
        for asked, concurrency in itertools.product(questions, config.concurrencies):
            ask = functools.partial(measure, asked, concurrency, turn)
            window = functools.partial(measure_answered, ask, config.seconds / ROUNDS)
            of_cell = windows.setdefault((asked.batch, concurrency), [])
            of_cell.append(window() if statistics else count_during(client, target, window))
    protocol = "grpc" if target.endpoint.is_grpc else "http"
    rows = (TimedRow(target.name, protocol, *cell, tuple(windows[cell])) for cell in windows)
    return Remote(target, server, model, statistics, config, tuple(rows))


def make_tensors(
    name: str,
    inputs: Sequence[Mapping[str, Any]],
    largest: int | None,
    batch: int,
    config: RemoteBenchmark,
) -> list[InputTensor]:
    """Return data for the inputs (B, ...) of a model, as its metadata describes them.

    `largest` is its largest batch, 0 if it has no batches; None if the server does not tell: then
    it has batches if the first dimension of each input is variable. Raises PipelineError for a
    batch or shapes that the model does not take, or if the metadata leave a dimension open.
    """
    if not inputs:
        raise PipelineError(f"the server names no inputs of {name}: add them to its metadata")
    dims = {tensor["name"]: [int(size) for size in tensor.get("shape", [])] for tensor in inputs}
    if unknown := set(config.shapes) - set(dims):
        valid = f"its inputs are {', '.join(dims)}"
        raise PipelineError(f"{name} has no input {min(unknown)!r} for --shape: {valid}")
    has_batches = bool(largest)
    if largest is None:
        has_batches = all(shape[:1] == [-1] for shape in dims.values())
    most = (largest or batch) if has_batches else 1
    if batch > most:
        raise PipelineError(f"{name} takes at most {most} in a batch, not {batch}: lower --batch")
    rng, tensors = np.random.default_rng(0), []
    for tensor in inputs:
        shape, datatype = dims[tensor["name"]][has_batches:], tensor["datatype"]
        given = config.shapes.get(tensor["name"], tuple(shape))
        option = f"--shape {tensor['name']}:{','.join('N' if d < 0 else str(d) for d in shape)}"
        fits = (size in (-1, own) and own > 0 for size, own in zip(shape, given, strict=False))
        if len(given) != len(shape) or not all(fits):
            raise PipelineError(f"{name} needs the shape of {tensor['name']}: give {option}")
        full = (batch,) * has_batches + tuple(given)
        values = _make_values(rng, datatype, full, config.is_zero)
        tensors.append(InputTensor(tensor["name"], datatype, values))
    return tensors


def _make_values(
    rng: np.random.Generator, datatype: str, shape: tuple[int, ...], is_zero: bool
) -> np.ndarray:
    """Return zeros, or floats from 0 to 1, integers from 0 to 127, letters or booleans."""
    dtype = np.float32 if datatype == "BF16" else triton_to_np_dtype(datatype)
    if dtype is None:
        raise PipelineError(f"the data type {datatype!r} is not one of KServe's protocol")
    size = math.prod(shape) * (STRING if datatype == "BYTES" else np.dtype(dtype).itemsize)
    if size > LARGEST:
        raise PipelineError(f"a request of {size:,} bytes is too large: lower --batch or --shape")
    if datatype == "BYTES":
        length = 0 if is_zero else STRING
        letters = rng.integers(97, 123, (math.prod(shape), length), np.uint8)
        return np.array([row.tobytes() for row in letters] or [b""], object).reshape(shape)
    if is_zero:
        return np.zeros(shape, dtype)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(0, 2 if datatype == "BOOL" else 128, shape).astype(dtype)
