"""What the gateway accepts of a picture, and how much of everything at once."""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, PngImagePlugin

from pipeline.errors import PipelineError

MAX_BYTES = 10 * 2**20  # of one picture
# Telephones make JPEGs of up to 24.5 million pixels; 8.9 are a page's scan, or a 4K screenshot.
MAX_PIXELS = {"JPEG": 24_500_000, "PNG": 8_900_000, "WEBP": 8_900_000}
MAX_SCANS = 64  # of a JPEG, each of which decodes the whole picture again; cameras write about ten
MAX_TEXT_BYTES = 2**20  # that a PNG's compressed texts may have together
_KINDS = "a PNG, JPEG or WebP picture"

# Pillow's own limit lets a PNG's texts grow to 64 MiB before the first pixel is read.
PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES


class RefusedError(PipelineError):
    """A request that is not answered: `status` says why to a program, the message to a person."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FullError(RefusedError):
    """There is too much to do at the moment: asking again later helps."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message)


def picture_kind(content: bytes) -> str | None:
    """PNG, JPEG or WEBP, by how the content begins; None for anything else."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return None


def check_picture(content: bytes) -> None:
    """Refuse what is no picture, or one that would cost too much, before a pixel is decoded.

    Raises RefusedError: 400 for nothing or a damaged header, 415 for another kind, 413 for a size.
    """
    if not content:
        raise RefusedError(400, f"the request has no body: send {_KINDS}")
    kind = picture_kind(content)
    if kind is None:
        raise RefusedError(
            415,
            f"the body is not {_KINDS}: convert it, and send the file as it is (curl: "
            "--data-binary @FILE, neither -F nor -d)",
        )
    if kind == "JPEG" and content.count(b"\xff\xda") > MAX_SCANS:
        raise RefusedError(413, f"the JPEG has more than {MAX_SCANS} scans: save it again")
    # Pillow makes room for a WebP's pixels as soon as it opens one.
    width, height = _webp_size(content) if kind == "WEBP" else _size(content, kind)
    if width * height > MAX_PIXELS[kind]:
        raise RefusedError(
            413,
            f"the {kind} has {width} x {height} pixels, {MAX_PIXELS[kind]} are allowed: reduce it",
        )


def _size(content: bytes, kind: str) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused anyway
            with Image.open(io.BytesIO(content), formats=(kind,)) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise RefusedError(413, f"the picture has too many pixels ({error}): reduce it") from error
    except (OSError, SyntaxError, TypeError, ValueError, OverflowError) as error:
        raise RefusedError(400, f"the picture's header is damaged: send {_KINDS}") from error


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of the canvas, from the first chunk of a WebP's container."""
    chunk, data = content[12:16], content[20:30]
    if len(data) == 10 and chunk == b"VP8X":
        return _number(data[4:7]) + 1, _number(data[7:10]) + 1
    if len(data) == 10 and chunk == b"VP8 ":
        return _number(data[6:8]) & 0x3FFF, _number(data[8:10]) & 0x3FFF
    if len(data) == 10 and chunk == b"VP8L":
        bits = _number(data[1:5])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise RefusedError(400, f"the picture's header is damaged: send {_KINDS}")


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


@dataclass
class Room:
    """How many requests may be under way at once, and how many bytes they may hold together."""

    requests: int = 64
    bytes: int = 64 * 2**20
    taken: int = 0  # requests
    held: int = 0  # bytes

    def enter(self) -> None:
        """Take a place; FullError when there is none."""
        if self.taken >= self.requests:
            raise FullError(f"{self.requests} requests are under way already: ask again")
        self.taken += 1

    def hold(self, count: int) -> None:
        """Make room for `count` more bytes; FullError when there is none."""
        if self.held + count > self.bytes:
            raise FullError("too many large pictures are under way already: ask again")
        self.held += count

    def leave(self, count: int) -> None:
        """Give a place back, and the bytes that it held."""
        self.taken -= 1
        self.held -= count
