"""Ask a server in an open loop, over gRPC or HTTP."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import grpc
import numpy as np

from pipeline.benchmark import load_http
from pipeline.benchmark.load import METHOD, TIMEOUT, Questions, count_wrong
from pipeline.benchmark.open_loop import Clock, Done, Send, SystemClock, arrivals, drive
from pipeline.benchmark.timing import Window, warm_up

CONNECTIONS = 64  # over HTTP; a request that finds none waits, and its latency counts on


def open_loop(
    address: str,
    asked: Questions,
    rate: float,
    seconds: float,
    seed: int,
    clock: Clock = SystemClock(),
) -> Window:
    """A window of requests that come so many a second, each answer held to its classes."""
    before = warm_up(seconds)
    times = arrivals(rate, before + seconds, seed)
    with _SENDERS[asked.way](address, asked.requests) as send:
        sent = drive(send, times, clock, TIMEOUT)
    answers = [(turn, answer) for turn, answer in enumerate(sent.answers) if answer is not None]
    counted = sent.after(sent.start + before)
    return Window(
        seconds,
        asked.batch,
        counted.latencies,
        count_wrong(asked, answers),
        int((~np.isfinite(sent.ended)).sum()),
        late=counted.late,
    )


@contextmanager
def _over_grpc(address: str, requests: tuple[bytes, ...]) -> Iterator[Send]:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)  # bytes out, bytes in

        def send(turn: int, done: Done) -> None:
            future = call.future(requests[turn % len(requests)], timeout=TIMEOUT)
            future.add_done_callback(
                lambda ended: done(None if ended.exception() else ended.result())
            )

        yield send


@contextmanager
def _over_http(address: str, requests: tuple[bytes, ...]) -> Iterator[Send]:
    pool = load_http.Pool(address, CONNECTIONS, TIMEOUT)
    try:
        yield lambda turn, done: pool.send(requests[turn % len(requests)], done)
    finally:
        pool.close()


_SENDERS: dict[str, Callable[[str, tuple[bytes, ...]], AbstractContextManager[Send]]] = {
    "grpc": _over_grpc,
    "http": _over_http,
}
