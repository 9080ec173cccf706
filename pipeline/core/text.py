"""Text for people: what comes from elsewhere is escaped, and lines are put together here."""

from collections.abc import Iterable, Sequence


class Lines(str):
    """Text of several lines: `Lines("title", *rows)`. Nothing else keeps a line break in `escape`.

    What is made of it by an f-string or `+` is an ordinary `str` again.
    """

    __slots__ = ()

    def __new__(cls, *lines: object) -> "Lines":
        """Put `lines` together, each of them escaped."""
        return super().__new__(cls, "\n".join(map(escape, lines)))

    def __str__(self) -> "Lines":
        return self  # str() would make it an ordinary str

    def __getnewargs__(self) -> tuple[str, ...]:  # type: ignore[override]  # str's has one
        return tuple(
            str.__str__(self).split("\n")
        )  # for copies and pickles, which call __new__ again


def escape(text: object) -> str:
    r"""Return `text` as one line of printable characters; `Lines` stay as they are.

    A name in a file, a folder or an answer may hold anything: a line feed that forges a line, an
    ESC or BEL that a terminal obeys, a mark that turns the direction of writing, a byte that is
    not text. These become `\n`, `\x1b`, `\x07`, `\u202e`, `\udcff`. A backslash is left alone:
    what is printed is to be read, not to be parsed.
    """
    text = str(text)
    if isinstance(text, Lines) or text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Lines:
    """Lay rows out under their header, the first column to the left and the others to the right.

    A cell is never wrapped: what a foreign name says must not begin a line.
    """
    from tabulate import tabulate  # not installed with the client alone

    text = tabulate(
        [header, *([escape(cell) for cell in row] for row in rows)],  # `headers` are spaced wider
        tablefmt="plain",
        colalign=("left", *("right",) * (len(header) - 1)),
        disable_numparse=True,
    )
    return Lines(*text.split("\n"))
