"""Load on a server in closed and open loops, at a client cost that is small next to the server's.

Requests are built once and sent as bytes; answers are kept as bytes and read after the time is up.

A closed loop waits for an answer before it sends the next request. While a server stalls, it
receives fewer requests, and only one slow request shows the stall.

In an open loop, requests are sent at given times, whether or not earlier ones were answered. The
times are drawn beforehand, as for many independent clients (a Poisson process), and a latency
counts from when its request was due.
"""

# Shape letters: N images, B batch, K classes.

import asyncio
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from threading import Event, Thread
from typing import Any, Protocol

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

from pipeline.benchmark import load_http
from pipeline.benchmark.target import PAUSE, InputTensor, LoadTarget, Measured
from pipeline.benchmark.timing import Window, count_errors, measure_answered, warm_up
from pipeline.client.client import Client
from pipeline.client.connection import to_message
from pipeline.client.endpoint import endpoint
from pipeline.client.faults import Fault, of_grpc
from pipeline.client.grpc_connection import OPTIONS, read_credentials
from pipeline.repository import config_pbtxt

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT = 30.0  # seconds for one answer
POLL = 0.01  # seconds
TICK = 0.2  # seconds between two reports of progress
CONNECTIONS = 64  # over HTTP; the wait for a free one is part of a request's latency
Done = Callable[[bytes | None], None]  # takes the answer, or None if there is none
Send = Callable[[int, Done], None]  # starts request number int, and returns without waiting
_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Questions:
    """Requests of one batch size, ready to send, and the classes that their answers must have."""

    target: LoadTarget
    batch: int
    requests: tuple[bytes, ...]
    classes: tuple[np.ndarray, ...] = ()  # int64 (B,) each; none: they are not known
    dtype: str = ""  # of the outputs, if the classes are known

    @property
    def way(self) -> "_Way":
        return _WAYS["grpc" if self.target.endpoint.is_grpc else "http"]


def build_questions(
    config: config_pbtxt.ModelConfig,
    batches: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    url: str,
) -> Questions:
    """Build a request to a served model for each batch (B, ...), with its known classes (B,)."""
    target = LoadTarget(endpoint(url), config.name, outputs=(config.output[0].name,))
    name, dtype = config.input[0].name, config_pbtxt.dtype(config.output[0])
    tensors = [[InputTensor(name, np_to_triton_dtype(images.dtype), images)] for images in batches]
    return Questions(
        target, len(batches[0]), build_requests(target, tensors), tuple(classes), dtype
    )


def build_requests(
    target: LoadTarget, inputs: Iterable[Sequence[InputTensor]]
) -> tuple[bytes, ...]:
    """Build a request for the inputs of each batch."""
    build = _build_request if target.endpoint.is_grpc else load_http.build_request
    return tuple(build(target, tensors) for tensors in inputs)


def _build_request(target: LoadTarget, tensors: Sequence[InputTensor]) -> bytes:
    message = service_pb2.ModelInferRequest(model_name=target.name, model_version=target.version)
    for tensor in tensors:
        name, datatype, values = tensor
        message.inputs.add(name=name, datatype=datatype, shape=values.shape)
        message.raw_input_contents.append(tensor.raw())
    for name in target.outputs:
        message.outputs.add(name=name)
    return bytes(message.SerializeToString())


def keep_asking(
    questions: Questions,
    concurrency: int,
    seconds: float,
    report: Callable[[Measured], None] = lambda measured: None,
) -> Window:
    """Measure a closed loop of `concurrency` requests for `seconds`, checking known classes.

    Calls `report` several times a second, in another thread.
    """
    begin = time.perf_counter() + warm_up(seconds)
    measured, is_done = Measured(begin, begin + seconds, bool(questions.classes)), Event()

    def tick() -> None:
        while not is_done.wait(TICK):
            report(measured)

    ticker = Thread(target=tick, daemon=True)
    ticker.start()
    try:
        questions.way.ask(questions.target, questions.requests, concurrency, measured)
    finally:
        is_done.set()
        ticker.join()
    client = {}
    if measured.latencies:
        parts = {"send_us": measured.sends, "recv_us": measured.receives}
        client = {name: float(np.mean(part) * 1e6) for name, part in parts.items()}
    return Window(
        seconds,
        questions.batch,
        np.array(measured.latencies),
        count_wrong(questions, measured.answers),
        len(measured.faults),
        client=client,
        faults=tuple(measured.faults),
    )


def count_wrong(questions: Questions, answers: Iterable[tuple[int, bytes]]) -> int:
    """Count the images answered with a wrong class; `answers` are (request number, bytes).

    All images of an unreadable answer count as wrong.
    """
    wrong = 0
    for turn, answer in answers:
        classes = questions.classes[turn % len(questions.classes)]
        try:
            content = questions.way.content(answer)
            outputs = np.frombuffer(content, questions.dtype).reshape(len(classes), -1)
            wrong += count_errors(outputs, classes)
        except (DecodeError, ValueError):  # not exactly one output, or not one row per image
            wrong += len(classes)
    return wrong


async def _ask_all(
    target: LoadTarget, requests: tuple[bytes, ...], concurrency: int, measured: Measured
) -> None:
    metadata = tuple((name.lower(), value) for name, value in target.headers.items())

    async def caller(turn: int, call: Any) -> None:
        while (start := time.perf_counter()) < measured.end:
            request = requests[turn % len(requests)]
            try:
                pending = call(request, metadata=metadata, timeout=TIMEOUT)
                sent = time.perf_counter()
                answer = await pending
                come = time.perf_counter()
                if not measured.has_answers:  # else decoded when the time is up
                    service_pb2.ModelInferResponse.FromString(answer)
            except grpc.aio.AioRpcError as error:
                measured.faults.append(of_grpc(error.code().name, error.details() or ""))
                await asyncio.sleep(PAUSE)
                continue
            except DecodeError:
                measured.faults.append(Fault("alien", "its answer is not a ModelInferResponse"))
                await asyncio.sleep(PAUSE)
                continue
            measured.add(turn, answer, start, sent, come)
            turn += concurrency

    async with _open_channel(grpc.aio, target) as channel:
        call = channel.unary_unary(METHOD)  # bytes out, bytes in
        await asyncio.gather(*(caller(turn, call) for turn in range(concurrency)))


def _open_channel(library: Any, target: LoadTarget) -> Any:
    """Open a channel of grpc or grpc.aio to the target."""
    credentials = read_credentials(target)
    if credentials:
        return library.secure_channel(target.endpoint.address, credentials, OPTIONS)
    return library.insecure_channel(target.endpoint.address, OPTIONS)


def _content_of(answer: bytes) -> bytes:
    (content,) = service_pb2.ModelInferResponse.FromString(answer).raw_output_contents
    return bytes(content)


@dataclass(frozen=True)
class ModelCounters:
    """Triton's counters of a model since it was loaded."""

    images: int
    executions: int
    requests: int
    nanoseconds: dict[str, int]  # by part

    def since(self, earlier: "ModelCounters") -> dict[str, float]:
        """Return microseconds per request in each part since `earlier`, and the mean batch size."""
        requests = max(1, self.requests - earlier.requests)
        executions = max(1, self.executions - earlier.executions)
        parts = {
            f"{part}_us": (count - earlier.nanoseconds[part]) / requests / 1e3
            for part, count in self.nanoseconds.items()
        }
        return {**parts, "batch": (self.images - earlier.images) / executions}


def read_counters(client: Client, name: str, version: str = "") -> ModelCounters:
    """Return Triton's counters of a model; raise PipelineError without its statistics."""
    answer = client.call_triton("get_inference_statistics", name, version)
    stats = to_message(answer, service_pb2.ModelStatisticsResponse).model_stats[-1]
    parts = {part: getattr(stats.inference_stats, part).ns for part in _PARTS}
    requests = stats.inference_stats.success.count
    return ModelCounters(stats.inference_count, stats.execution_count, requests, parts)


def measure(client: Client, questions: Questions, concurrency: int, seconds: float) -> Window:
    """Measure a window of a closed loop, with the server's own times by `client`."""
    ask = functools.partial(keep_asking, questions, concurrency)
    return count_during(client, questions.target, lambda: measure_answered(ask, seconds))


def count_during(client: Client, target: LoadTarget, measure: Callable[[], Window]) -> Window:
    """Call `measure` and add the server's own times of the model to its window.

    The network's part is what these and the client's own times leave of the mean latency: with
    the server's reading and writing, as in perf_analyzer.
    """
    before = read_counters(client, target.name, target.version)
    window = measure()
    split = read_counters(client, target.name, target.version).since(before)
    if window.client:
        known = sum(split[f"{part}_us"] for part in _PARTS) + sum(window.client.values())
        split["network_us"] = max(0.0, float(window.latencies.mean() * 1e6) - known)
    return replace(window, split=split)


class Clock(Protocol):
    """Time in seconds, and waiting until a given time."""

    def now(self) -> float: ...
    def wait(self, until: float) -> None: ...


class SystemClock:
    """The time of this machine."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, until: float) -> None:
        if (left := until - self.now()) > 0:
            time.sleep(left)


@dataclass
class Sent:
    """The requests of an open loop, in the order in which they were due."""

    start: float  # seconds of the clock
    due: np.ndarray  # float64, seconds of the clock
    begun: np.ndarray  # when each was sent, likewise
    ended: np.ndarray  # when each was answered, likewise; infinite if never
    answers: list[bytes | None] = field(default_factory=list)

    @property
    def latencies(self) -> np.ndarray:
        """Seconds from a request's due time to its answer, for the answered requests."""
        return np.asarray((self.ended - self.due)[np.isfinite(self.ended)])

    @property
    def late(self) -> np.ndarray:
        """Seconds by which the client sent each request too late."""
        return np.asarray(self.begun - self.due)

    def after(self, begin: float) -> "Sent":
        """Return only the requests that were due from `begin` on."""
        first = int(np.searchsorted(self.due, begin))
        return Sent(
            begin, self.due[first:], self.begun[first:], self.ended[first:], self.answers[first:]
        )


def draw_arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Draw due times, float64 seconds from 0 on, of `rate` requests per second on average."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * seconds)
    return np.sort(rng.uniform(0, seconds, count))


def drive(send: Send, times: np.ndarray, clock: Clock, patience: float) -> Sent:
    """Send each request at its time, in seconds from now, and wait for all answers.

    Stops waiting `patience` seconds after the last request.
    """
    count = len(times)
    start = clock.now()
    sent = Sent(start, start + times, np.zeros(count), np.full(count, np.inf), [None] * count)
    open_requests = set(range(count))

    def finish(turn: int, answer: bytes | None) -> None:
        if answer is not None:
            sent.ended[turn], sent.answers[turn] = clock.now(), answer
        open_requests.discard(turn)

    for turn, due in enumerate(sent.due):
        clock.wait(float(due))
        sent.begun[turn] = clock.now()
        send(turn, functools.partial(finish, turn))
    deadline = clock.now() + patience
    while open_requests and clock.now() < deadline:
        clock.wait(clock.now() + POLL)
    return sent


def run_open_loop(
    questions: Questions,
    rate: float,
    seconds: float,
    seed: int,
    clock: Clock = SystemClock(),
) -> Window:
    """Measure an open loop of `rate` requests per second, checking the class of every answer."""
    before = warm_up(seconds)
    times = draw_arrivals(rate, before + seconds, seed)
    with questions.way.sender(questions.target, questions.requests) as send:
        sent = drive(send, times, clock, TIMEOUT)
    answers = [(turn, answer) for turn, answer in enumerate(sent.answers) if answer is not None]
    wrong, failed = count_wrong(questions, answers), len(times) - len(answers)
    counted = sent.after(sent.start + before)
    return Window(seconds, questions.batch, counted.latencies, wrong, failed, late=counted.late)


@contextmanager
def _open_grpc(target: LoadTarget, requests: tuple[bytes, ...]) -> Iterator[Send]:
    with _open_channel(grpc, target) as channel:
        call = channel.unary_unary(METHOD)  # bytes out, bytes in

        def send(turn: int, done: Done) -> None:
            future = call.future(requests[turn % len(requests)], timeout=TIMEOUT)
            future.add_done_callback(
                lambda ended: done(None if ended.exception() else ended.result())
            )

        yield send


@contextmanager
def _open_http(target: LoadTarget, requests: tuple[bytes, ...]) -> Iterator[Send]:
    with closing(load_http.Pool(target, CONNECTIONS, TIMEOUT)) as pool:
        yield lambda turn, done: pool.send(requests[turn % len(requests)], done)


@dataclass(frozen=True)
class _Way:
    """The functions of one protocol."""

    ask: Callable[[LoadTarget, tuple[bytes, ...], int, Measured], None]  # in a closed loop
    sender: Callable[
        [LoadTarget, tuple[bytes, ...]], AbstractContextManager[Send]
    ]  # for an open loop
    content: Callable[[bytes], bytes]


_WAYS = {
    "grpc": _Way(lambda *load: asyncio.run(_ask_all(*load)), _open_grpc, _content_of),
    "http": _Way(load_http.ask_all, _open_http, load_http.content_of),
}
