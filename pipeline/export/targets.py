"""ONNX dialects that each Triton release loads, and what to export. Imports nothing heavy."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.core.errors import PipelineError
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

    Raises PipelineError, which names the known releases, when it is in no span.
    """
    known = f"releases {OLDEST} to {NEWEST} are known"
    written = re.fullmatch(r"[0-9]{2}\.([0-9]{2})", release)
    if not written or not 1 <= int(written[1]) <= 12:
        raise PipelineError(f"{release!r} is no Triton release, which is written YY.MM; {known}")
    if release < OLDEST:
        raise PipelineError(f"Triton {release} is too old: {known}. Take one of their containers")
    if release > NEWEST:
        raise PipelineError(
            f"Triton {release} is newer than what is known here: {known}. Export for {NEWEST}: "
            "ONNX Runtime is backward compatible, so later releases load that as well"
        )
    return next(span for span in SPANS if release <= span.last)


def target(release: str) -> Target:
    """Return what Triton `release` (YY.MM) loads; raise PipelineError when it is unknown."""
    return replace(span(release), first=release, last=release)


@dataclass(frozen=True)
class ExportConfig:
    """An ONNX dialect; by default one that every Triton since 23.09 loads."""

    opset: int = 18
    ir_version: int = 9


def onnx_dialect(release: str | None = None, opset: int | None = None) -> ExportConfig:
    """Return the ONNX dialect to export: that of `opset`, else the release's newest or the default.

    Raises PipelineError for an unknown release, and for an opset that our exporter does not write
    or that the release does not load.
    """
    if opset is not None and opset not in OPSETS:
        raise PipelineError(
            f"opset {opset} cannot be exported: take {OPSETS[0]} to {OPSETS[-1]}, or none for "
            f"{ExportConfig.opset}, which every Triton since {OLDEST} loads"
        )
    if release is None:
        return _written(ExportConfig.opset if opset is None else opset)
    wanted = target(release)
    if opset is not None and opset > wanted.opset:
        first = next(span.first for span in SPANS if opset <= span.opset)
        raise PipelineError(
            f"Triton {release} cannot load opset {opset}: its ONNX Runtime "
            f"{wanted.onnxruntime} loads opset {wanted.opset} at most. Ask for no opset above "
            f"that, or for Triton {first} or later"
        )
    return _written(min(wanted.opset, OPSETS[-1]) if opset is None else opset)


def _written(opset: int) -> ExportConfig:
    return ExportConfig(opset, _IR_VERSIONS.get(opset, ExportConfig.ir_version))


def loaded_by(opset: int, ir_version: int) -> Target | None:
    """Return the oldest known release that loads such a file, or None if no known one does."""
    for candidate in SPANS:
        if opset <= candidate.opset and ir_version <= candidate.ir_version:
            return replace(candidate, last=candidate.first)
    return None


def records() -> list[dict[str, Any]]:
    """Return each span, with the opset and IR that we export for it, as JSON-ready values."""
    return [{**asdict(span), "export": asdict(onnx_dialect(span.last))} for span in SPANS]


def listing() -> str:
    """Return a printable table of Triton releases: what each loads, and what we export for it."""
    lines = [f"{'Triton':<13} {'ONNX Runtime':<13} {'loads up to':<16} exported for it"]
    for row in SPANS:
        ours = onnx_dialect(row.last)
        loads = f"opset {row.opset}, IR {row.ir_version}"
        lines.append(
            f"{row.releases:<13} {row.onnxruntime:<13} {loads:<16} "
            f"opset {ours.opset}, IR {ours.ir_version}"
        )
    default = onnx_dialect()
    lines.append(
        f"Without a target: opset {default.opset}, IR {default.ir_version}, which all of them load."
    )
    return Lines(*lines)
