"""What a load generator sends where, and what it measures, over either protocol."""

# Shape letters: B batch.

import functools
import ssl
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tritonclient.utils import serialize_byte_tensor

from pipeline.client.endpoint import RemoteModel
from pipeline.client.faults import Fault

PAUSE = 0.05  # seconds after a failed request, so that a server that refuses is not flooded


@dataclass(frozen=True)
class LoadTarget(RemoteModel):
    """A model at a server, and what a request to it looks like."""

    outputs: tuple[str, ...] = ()  # that a request asks for; none: all of them
    is_binary: bool = True  # over HTTP; False: as JSON, for a server that takes nothing else

    @functools.cached_property
    def context(self) -> ssl.SSLContext | None:
        """Python's TLS context; None without TLS."""
        return self.certificates.context() if self.endpoint.is_secure else None


class InputTensor(NamedTuple):
    """An input of a request."""

    name: str
    datatype: str  # the protocol's name
    values: np.ndarray  # (B, ...); bytes for BYTES, float32 for BF16

    def raw(self) -> bytes:
        """Return the values as the protocol's binary data."""
        if self.datatype == "BYTES":
            return bytes(serialize_byte_tensor(self.values).item())
        values = np.ascontiguousarray(self.values)
        # BF16 is the upper half of a float32.
        return (values.view(np.uint16)[..., 1::2] if self.datatype == "BF16" else values).tobytes()


@dataclass
class Measured:
    """What the callers of one closed loop measure together, in any of their threads."""

    begin: float  # by time.perf_counter(); only requests that end after it count
    end: float  # when the callers stop
    has_answers: bool  # whether answers are kept, to be checked after the time is up
    latencies: list[float] = field(default_factory=list)  # seconds
    sends: list[float] = field(default_factory=list)  # seconds of these in which it was sent
    receives: list[float] = field(default_factory=list)  # likewise, received
    answers: list[tuple[int, bytes]] = field(default_factory=list)  # with the request's number
    faults: list[Fault] = field(default_factory=list)

    def add(self, turn: int, answer: bytes, start: float, sent: float, first: float) -> None:
        """Add an answered request: when it began, was sent, and its answer began to come."""
        done = time.perf_counter()
        if self.has_answers:
            self.answers.append((turn, answer))
        if self.begin <= done < self.end:
            self.latencies.append(done - start)
            self.sends.append(sent - start)
            self.receives.append(done - first)
