"""Fields of settings with help texts, which the command line shows."""

from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def setting(default: T, text: str, **metadata: Any) -> T:
    """Return a dataclass field with a default, a help text, and what else its option needs.

    That is `choices`, or another `option` name or `metavar` than the field's.
    """
    value: T = field(default=default, metadata={"help": text, **metadata})
    return value
