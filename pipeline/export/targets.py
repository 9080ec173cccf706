"""ONNX dialects that each Triton release loads, and what to export. Imports nothing heavy."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.core.errors import SettingError
from pipeline.core.text import Lines


@dataclass(frozen=True)
class Target:
    """A span of Triton releases, and the newest ONNX that their ONNX Runtime loads."""

    first: str  # YY.MM, which sorts as text
    last: str
    onnxruntime: str  # such as 1.20
    ir_version: int
    opset: int

    @property
    def releases(self) -> str:
        """The releases in words: first-last, or the name of a single one."""
        return self.first if self.first == self.last else f"{self.first}-{self.last}"


# From each release's build file; IR and opset were tested on the wheels of that ONNX Runtime.
SPANS = (
    Target("23.09", "24.02", "1.16", 9, 19),
    Target("24.03", "24.04", "1.17", 9, 20),
    Target("24.05", "24.07", "1.18", 10, 21),
    Target("24.08", "24.11", "1.19", 10, 21),
    Target("24.12", "25.02", "1.20", 10, 21),
    Target("25.03", "25.04", "1.21", 10, 22),
    Target("25.05", "25.07", "1.22", 10, 22),
    Target("25.08", "26.01", "1.23", 11, 23),
    Target("26.02", "26.06", "1.24", 13, 25),
    Target("26.07", "26.07", "1.27", 13, 26),
)
OLDEST, NEWEST = SPANS[0].first, SPANS[-1].last
# What torch 2.13's exporter writes without converting between versions; tested one by one.
OPSETS = range(18, 26)
# The IR that ONNX released with each opset, from onnx.helper.VERSION_TABLE of onnx 1.23; lower
# opsets get the default IR, which every release here loads.
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


def span(release: str) -> Target:
    """Return the span of a release `YY.MM`.

    Raises SettingError, which names the supported releases, when it is in no span.
    """
    limits = f"releases {OLDEST} to {NEWEST} are known"
    if not re.fullmatch(r"[0-9]{2}\.(0[1-9]|1[0-2])", release):
        raise SettingError(f"{release!r} is not a Triton release (YY.MM); {limits}")
    if release < OLDEST:
        raise SettingError(f"Triton {release} is too old: {limits}. Take one of their containers")
    if release > NEWEST:
        raise SettingError(
            f"Triton {release} is too new: {limits}. Export for {NEWEST}: later releases load "
            "that as well, since ONNX Runtime is backward compatible"
        )
    return next(span for span in SPANS if release <= span.last)


def target(release: str) -> Target:
    """Return what Triton `release` (YY.MM) loads; raise SettingError when it is unknown."""
    return replace(span(release), first=release, last=release)


@dataclass(frozen=True)
class ExportConfig:
    """An ONNX dialect; by default one that every Triton since 23.09 loads."""

    opset: int = 18
    ir_version: int = 9

    def __str__(self) -> str:
        return f"opset {self.opset}, IR {self.ir_version}"


def onnx_dialect(release: str | None = None, opset: int | None = None) -> ExportConfig:
    """Return the ONNX dialect to export: that of `opset`, else the release's newest or the default.

    Raises SettingError for an unknown release, and for an opset that our exporter does not write
    or that the release does not load.
    """
    if opset is not None and opset not in OPSETS:
        raise SettingError(
            f"opset {opset} cannot be exported: choose {OPSETS[0]} to {OPSETS[-1]}, or leave out "
            f"--opset for {ExportConfig.opset}, which every Triton since {OLDEST} loads"
        )
    if release is not None:
        wanted = target(release)
        if opset is not None and opset > wanted.opset:
            first = next(span.first for span in SPANS if opset <= span.opset)
            raise SettingError(
                f"Triton {release} cannot load opset {opset}: its ONNX Runtime "
                f"{wanted.onnxruntime} loads up to {wanted.opset}. Choose a lower opset, or Triton "
                f"{first} or later"
            )
        opset = min(wanted.opset, OPSETS[-1]) if opset is None else opset
    opset = opset or ExportConfig.opset
    return ExportConfig(opset, _IR_VERSIONS.get(opset, ExportConfig.ir_version))


def find_oldest(opset: int, ir_version: int) -> Target | None:
    """Return the oldest known release that loads such a file, or None if no known one does."""
    loading = (s for s in SPANS if opset <= s.opset and ir_version <= s.ir_version)
    return next((replace(oldest, last=oldest.first) for oldest in loading), None)


def records() -> list[dict[str, Any]]:
    """Return each span, with the opset and IR that we export for it, as JSON-ready values."""
    return [{**asdict(span), "export": asdict(onnx_dialect(span.last))} for span in SPANS]


def format_targets() -> str:
    """Return a printable table of Triton releases: what each loads, and what we export for it."""
    lines = [f"{'Triton':<13} {'ONNX Runtime':<13} {'loads up to':<16} exported for it"]
    for row in SPANS:
        loads = f"opset {row.opset}, IR {row.ir_version}"
        start = f"{row.releases:<13} {row.onnxruntime:<13} {loads:<16}"
        lines.append(f"{start} {onnx_dialect(row.last)}")
    return Lines(*lines, f"Without a target: {onnx_dialect()}, which all of them load.")
