"""Fields of settings with what the command line shows of them: help, choices, limits, unit."""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from pipeline.core.errors import SettingError, require_choice

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The range of a number, with the names that Click has for it; NaN is in no range."""

    min: float
    max: float | None = None
    min_open: bool = False  # whether `min` itself is excluded
    max_open: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = self.min < value or (self.min == value and not self.min_open)
        is_below = self.max is None or value < self.max or (value == self.max and not self.max_open)
        return is_above and is_below

    def __str__(self) -> str:
        upper = "" if self.max is None else f"{'<' if self.max_open else '<='}{self.max}"
        return f"{self.min}{'<' if self.min_open else '<='}x{upper}"


POSITIVE, COUNT = Limits(0, min_open=True), Limits(1)


def setting(default: T, text: str, **metadata: Any) -> T:
    """Return a dataclass field with a default, a help text, and what else its option needs.

    That is `choices`, `limits`, the `unit` of its values, or another
    `option` name than the field's.
    """
    value: T = field(default=default, metadata={"help": text, **metadata})
    return value


def require_valid(settings: Any) -> None:
    """Raise SettingError for the first field of a dataclass outside its choices or limits.

    None is always allowed.
    """
    for item in fields(settings):
        name, value = item.name.replace("_", "-"), getattr(settings, item.name)
        if value is None:
            continue
        if "choices" in item.metadata:
            require_choice(name, value, item.metadata["choices"])
        limits = item.metadata.get("limits")
        if limits and value not in limits:
            raise SettingError(f"{name} must be in the range {limits}, got {value}")
