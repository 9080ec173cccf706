"""Text for people: escaping of untrusted text, text of several lines, tables."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


class Lines(str):
    """Text of several lines: `Lines("title", *rows)`; `escape` keeps line breaks only in these.

    An f-string or `+` turns it into an ordinary `str` again.
    """

    __slots__ = ()

    def __new__(cls, *lines: object) -> "Lines":
        """Join `lines`, each of them escaped."""
        return super().__new__(cls, "\n".join(map(escape, lines)))

    def __str__(self) -> "Lines":
        return self  # str() would make it an ordinary str

    def __getnewargs__(self) -> tuple[str, ...]:  # type: ignore[override]  # str's has one
        # Copies and pickles call __new__ again.
        return tuple(str.__str__(self).split("\n"))


def escape(text: object) -> str:
    r"""Return `text` as one line of printable characters; `Lines` are returned unchanged.

    A name in a file, a folder or an answer may hold anything: a line feed that forges a line, an
    ESC or BEL that a terminal obeys, a mark that reverses the direction of writing, a byte that is
    not text. These become `\n`, `\x1b`, `\x07`, `\u202e`, `\udcff`. A backslash is not escaped:
    printed text is for reading, not for parsing.
    """
    text = str(text)
    if isinstance(text, Lines) or text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 error" or "3 errors"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def load_template(room: str, name: str, **filters: Callable[..., str]) -> "Template":
    """Return a room's template; an undefined variable in it is an error, as is a missing one."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(f"pipeline.{room}", "."),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def columns(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> Lines:
    """Format rows as a table under their header.

    `align` has an l (left) or r (right) for each column; by default only the first is left-aligned.

    A cell is never wrapped: untrusted text must not begin a line.
    """
    from tabulate import tabulate  # not installed with the client alone

    text = tabulate(
        # Not as `headers`, which tabulate spaces wider.
        [header, *([escape(cell) for cell in row] for row in rows)],
        tablefmt="plain",
        colalign=["left" if a == "l" else "right" for a in align or "l".ljust(len(header), "r")],
        disable_numparse=True,
    )
    return Lines(*map(str.rstrip, text.split("\n")))
