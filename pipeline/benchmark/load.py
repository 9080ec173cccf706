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
from typing import Any, Protocol

import grpc
import numpy as np
import tritonclient.grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from pipeline.benchmark import load_http
from pipeline.benchmark.load_http import Measured
from pipeline.benchmark.timing import Window, count_errors, measure_answered, warm_up
from pipeline.core.errors import ServerError
from pipeline.repository import config_pbtxt

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT = 30.0  # seconds for one answer
POLL = 0.01  # seconds
CONNECTIONS = 64  # over HTTP; the wait for a free one is part of a request's latency
Done = Callable[[bytes | None], None]  # takes the answer, or None if there is none
Send = Callable[[int, Done], None]  # starts request number int, and returns without waiting
_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Questions:
    """Requests of one batch size, ready to send, and the classes that their answers must have."""

    way: str  # grpc or http
    batch: int
    requests: tuple[bytes, ...]
    classes: tuple[np.ndarray, ...]  # int64 (B,) each
    dtype: str  # of the outputs


def build_questions(
    config: config_pbtxt.ModelConfig,
    batches: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    way: str = "grpc",
) -> Questions:
    """Build a request to a served model for each batch (B, ...), with its known classes (B,)."""
    requests = tuple(_WAYS[way].request(config, images) for images in batches)
    dtype = config_pbtxt.dtype(config.output[0])
    return Questions(way, len(batches[0]), requests, tuple(classes), dtype)


def _build_request(config: config_pbtxt.ModelConfig, images: np.ndarray) -> bytes:
    message = service_pb2.ModelInferRequest(model_name=config.name)
    tensor = message.inputs.add(name=config.input[0].name, shape=images.shape)
    tensor.datatype = np_to_triton_dtype(images.dtype)
    message.outputs.add(name=config.output[0].name)
    message.raw_input_contents.append(np.ascontiguousarray(images).tobytes())
    return bytes(message.SerializeToString())


def keep_asking(address: str, questions: Questions, concurrency: int, seconds: float) -> Window:
    """Measure a closed loop of `concurrency` requests for `seconds`, checking every class."""
    begin = time.perf_counter() + warm_up(seconds)
    latencies, answers, failed = _WAYS[questions.way].ask(
        address, questions.requests, concurrency, begin, begin + seconds
    )
    return Window(
        seconds, questions.batch, np.array(latencies), count_wrong(questions, answers), failed
    )


def count_wrong(questions: Questions, answers: Iterable[tuple[int, bytes]]) -> int:
    """Count the images answered with a wrong class; `answers` are (request number, bytes).

    All images of an unreadable answer count as wrong.
    """
    wrong = 0
    for turn, answer in answers:
        classes = questions.classes[turn % len(questions.classes)]
        try:
            content = _WAYS[questions.way].content(answer)
            outputs = np.frombuffer(content, questions.dtype).reshape(len(classes), -1)
            wrong += count_errors(outputs, classes)
        except (DecodeError, ValueError):  # not exactly one output, or not one row per image
            wrong += len(classes)
    return wrong


async def _ask_all(
    address: str, requests: tuple[bytes, ...], concurrency: int, begin: float, end: float
) -> Measured:
    latencies: list[float] = []
    answers: list[tuple[int, bytes]] = []
    failed = 0

    async def caller(turn: int, call: Any) -> None:
        nonlocal failed
        now = time.perf_counter()
        while now < end:
            request = requests[turn % len(requests)]
            try:
                answers.append((turn, await call(request, timeout=TIMEOUT)))
            except grpc.aio.AioRpcError:
                failed += 1
                now = time.perf_counter()
                continue
            then, now = now, time.perf_counter()
            turn += concurrency
            if begin <= now < end:
                latencies.append(now - then)

    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)  # bytes out, bytes in
        await asyncio.gather(*(caller(turn, call) for turn in range(concurrency)))
    return latencies, answers, failed


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


class ServerLoad:
    """Access to a running server for a benchmark: its addresses, counters and model loading."""

    def __init__(self, http: str, grpc: str, admin_key: str, key_header: str) -> None:
        self.addresses = {"http": http, "grpc": grpc}
        self._headers = {f"triton-grpc-protocol-{key_header}": admin_key}
        self._client = tritonclient.grpc.InferenceServerClient(grpc)

    def __enter__(self) -> "ServerLoad":
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def load(self, name: str) -> None:
        """Load a model of the server's repository."""
        try:
            self._client.load_model(name, headers=self._headers, client_timeout=TIMEOUT)
        except InferenceServerException as error:
            raise ServerError(f"the server cannot load {name}: {error.message()}") from error

    def read_counters(self, name: str) -> ModelCounters:
        """Return Triton's counters of a model."""
        try:
            answer = self._client.get_inference_statistics(name, client_timeout=TIMEOUT)
        except InferenceServerException as error:
            message = f"the server does not return statistics of {name}: {error.message()}"
            raise ServerError(message) from error
        stats = answer.model_stats[-1]
        parts = {part: getattr(stats.inference_stats, part).ns for part in _PARTS}
        requests = stats.inference_stats.success.count
        return ModelCounters(stats.inference_count, stats.execution_count, requests, parts)

    def measure(self, name: str, questions: Questions, concurrency: int, seconds: float) -> Window:
        """Measure a window of a closed loop on the model, with the server's own times."""
        address = self.addresses[questions.way]
        ask = functools.partial(keep_asking, address, questions, concurrency)
        return self.count_during(name, lambda: measure_answered(ask, seconds))

    def count_during(self, name: str, measure: Callable[[], Window]) -> Window:
        """Call `measure` and add the server's own times of the model to its window."""
        before = self.read_counters(name)
        window = measure()
        return replace(window, split=self.read_counters(name).since(before))


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
    address: str,
    questions: Questions,
    rate: float,
    seconds: float,
    seed: int,
    clock: Clock = SystemClock(),
) -> Window:
    """Measure an open loop of `rate` requests per second, checking the class of every answer."""
    before = warm_up(seconds)
    times = draw_arrivals(rate, before + seconds, seed)
    with _WAYS[questions.way].sender(address, questions.requests) as send:
        sent = drive(send, times, clock, TIMEOUT)
    answers = [(turn, answer) for turn, answer in enumerate(sent.answers) if answer is not None]
    wrong, failed = count_wrong(questions, answers), len(times) - len(answers)
    counted = sent.after(sent.start + before)
    return Window(seconds, questions.batch, counted.latencies, wrong, failed, late=counted.late)


@contextmanager
def _open_grpc(address: str, requests: tuple[bytes, ...]) -> Iterator[Send]:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)  # bytes out, bytes in

        def send(turn: int, done: Done) -> None:
            future = call.future(requests[turn % len(requests)], timeout=TIMEOUT)
            future.add_done_callback(
                lambda ended: done(None if ended.exception() else ended.result())
            )

        yield send


@contextmanager
def _open_http(address: str, requests: tuple[bytes, ...]) -> Iterator[Send]:
    with closing(load_http.Pool(address, CONNECTIONS, TIMEOUT)) as pool:
        yield lambda turn, done: pool.send(requests[turn % len(requests)], done)


@dataclass(frozen=True)
class _Way:
    """The functions of one protocol."""

    request: Callable[[config_pbtxt.ModelConfig, np.ndarray], bytes]
    ask: Callable[[str, tuple[bytes, ...], int, float, float], Measured]  # in a closed loop
    sender: Callable[[str, tuple[bytes, ...]], AbstractContextManager[Send]]  # for an open loop
    content: Callable[[bytes], bytes]


_WAYS = {
    "grpc": _Way(
        _build_request,
        lambda *load: asyncio.run(_ask_all(*load)),
        _open_grpc,
        _content_of,
    ),
    "http": _Way(load_http.build_request, load_http.ask_all, _open_http, load_http.content_of),
}
