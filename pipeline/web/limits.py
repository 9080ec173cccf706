"""The gateway's limits: on one picture, and on all requests that are under way."""

import io
import ipaddress
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

from PIL import Image, PngImagePlugin

from pipeline.core.errors import PipelineError
from pipeline.images.read import TOO_MANY_PIXELS, UNREADABLE

MAX_BYTES = 10 * 2**20  # of one picture
# Phones make JPEGs of up to 24.5 million pixels; 8.9 million are a scanned page or 4K screenshot.
MAX_PIXELS = {"JPEG": 24_500_000, "PNG": 8_900_000, "WEBP": 8_900_000}
MAX_SCANS = 64  # of a JPEG; each decodes the whole picture again, and cameras write about ten
MAX_TEXT_BYTES = 2**20  # of a PNG's compressed texts, in total
_FORMATS = "PNG, JPEG or WebP"

# By default, Pillow lets a PNG's texts grow to 64 MiB before the first pixel is read.
PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES


class RefusedError(PipelineError):
    """A refused request: `status` gives the reason to programs, the message to people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FullError(RefusedError):
    """A request refused because there is too much to do; a later one may succeed."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message)


_BEGINNINGS = {"PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "WEBP": rb"RIFF....WEBP"}


def check_picture(content: bytes) -> str:
    """Return a picture's format; RefusedError if it is invalid or costs too much to decode.

    No pixel is decoded for it. The error's status is 400 for an empty body or a damaged header, 415
    for another format, and 413 for too many pixels or scans.
    """
    if not content:
        raise RefusedError(400, f"the request has no body: send a {_FORMATS} picture")
    kinds = [k for k, begin in _BEGINNINGS.items() if re.match(begin, content, re.DOTALL)]
    if not kinds:
        problem = _format_unreadable("its format is unknown")
        raise RefusedError(415, f"{problem} (with curl: --data-binary @FILE, not -F or -d)")
    (kind,) = kinds
    if kind == "JPEG" and content.count(b"\xff\xda") > MAX_SCANS:
        raise RefusedError(413, f"the JPEG has more than {MAX_SCANS} scans: save it again")
    width, height = _read_size(content, kind)
    if width * height > MAX_PIXELS[kind]:
        sizes = {"width": width, "height": height, "allowed": MAX_PIXELS[kind]}
        raise RefusedError(413, TOO_MANY_PIXELS.format(name="the picture", **sizes))
    return kind


def _format_unreadable(reason: str) -> str:
    return UNREADABLE.format(name="the picture", reason=reason, formats=_FORMATS)


def _read_size(content: bytes, kind: str) -> tuple[int, int]:
    """Return the canvas's width and height in pixels, from the header alone."""
    try:
        if kind != "WEBP":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about sizes that are refused anyway
                with Image.open(io.BytesIO(content), formats=(kind,)) as image:
                    return image.size
        # Pillow allocates a WebP's pixels when it opens it: take the size from the first chunk.
        chunk, data = content[12:16], content[20:30]
        if len(data) == 10 and chunk == b"VP8X":
            return _to_int(data[4:7]) + 1, _to_int(data[7:10]) + 1
        if len(data) == 10 and chunk == b"VP8 ":
            return _to_int(data[6:8]) & 0x3FFF, _to_int(data[8:10]) & 0x3FFF
        if len(data) == 10 and chunk == b"VP8L":
            bits = _to_int(data[1:5])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        raise ValueError("the first chunk is not a picture's")
    except Image.DecompressionBombError as error:
        raise RefusedError(413, f"the picture has too many pixels ({error}): reduce it") from error
    except (OSError, SyntaxError, TypeError, ValueError, OverflowError) as error:
        raise RefusedError(400, _format_unreadable("its header is damaged")) from error


def _to_int(data: bytes) -> int:
    return int.from_bytes(data, "little")


def client_of(host: str) -> str:
    """Return the name to count a client by: its address, or for IPv6 its whole /64 network."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address) or address.ipv4_mapped:
        return host
    return f"{int(address) >> 64:x}::/64"


def is_fair(wanted: int, mine: int, held: int, limit: int) -> bool:
    """Return whether a client that holds `mine` of the `held` may hold `wanted` more of `limit`.

    It may hold as much as it leaves free: one client alone gets half of `limit`, n clients get
    1 / (n + 1) each. If all of them take their full share, the same share is left for the next.
    """
    return mine + wanted <= limit - held


@dataclass
class Room:
    """The requests under way and the bytes of their bodies, both limited and shared fairly."""

    requests: int = 64
    bytes: int = 64 * 2**20
    taken: Counter[str] = field(default_factory=Counter)  # requests by client
    held: Counter[str] = field(default_factory=Counter)  # bytes by client

    def enter(self, client: str) -> None:
        """Take a place for a client; raise FullError if that exceeds its fair share."""
        if not is_fair(1, self.taken[client], self.taken.total(), self.requests):
            raise FullError("too many requests are in progress: try again")
        self.taken[client] += 1

    def leave(self, client: str) -> None:
        """Release a client's place."""
        self.taken[client] -= 1
        self.taken += Counter()  # forgets clients that hold nothing

    def hold(self, client: str, count: int) -> None:
        """Hold `count` more bytes for a client; raise FullError if that exceeds its fair share."""
        if not is_fair(count, self.held[client], self.held.total(), self.bytes):
            raise FullError("too many large pictures are in progress: try again")
        self.held[client] += count

    def release(self, client: str, count: int) -> None:
        """Release `count` bytes of a client."""
        self.held[client] -= count
        self.held += Counter()
