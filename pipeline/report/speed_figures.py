"""Drawings of how fast something is, in the manner of `figures`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from pipeline.report.figures import ACCENT, INK, MUTED, SECOND, STYLE, svg

WIDTH, ROW, REST = 5.8, 0.19, 0.9  # inches: of a figure, of a row, of what is no row
MARKS = {"p50": ("o", 5.0), "p90": ("|", 7.0), "p95": ("|", 7.0), "p99": ("D", 4.0)}


@dataclass(frozen=True)
class Bar:
    """A throughput in images a second."""

    label: str
    median: float
    least: float
    most: float
    ceiling: float | None  # of a model that computes nothing, asked the same way


@dataclass(frozen=True)
class Span:
    """Percentiles of a latency in milliseconds, those that can be claimed."""

    label: str
    percentiles: Mapping[str, float]
    is_open: bool


def throughput(bars: Sequence[Bar]) -> str:
    """The median as a bar, least to most as a whisker, what the server can do at most as a mark."""
    with rc_context(STYLE):
        figure, axes = _rows([bar.label for bar in bars], "images a second")
        places = range(len(bars))
        axes.barh(places, [bar.median for bar in bars], color=ACCENT, alpha=0.45, height=0.66)
        lines = axes.hlines(
            places, [bar.least for bar in bars], [bar.most for bar in bars], color=INK, lw=1.2
        )
        lines.set_label("least to most")
        known = [(place, bar.ceiling) for place, bar in enumerate(bars) if bar.ceiling]
        if known:
            at, ceilings = zip(*known, strict=True)
            axes.plot(ceilings, at, "|", color=SECOND, ms=8, mew=2, label="computing nothing")
        axes.set_xlim(left=min(bar.least for bar in bars if bar.least > 0) / 2)
        _legend(axes)
        return svg(figure, "throughput", "images a second of each row, least to most")


def latencies(spans: Sequence[Span]) -> str:
    """Each row's percentiles on a line; those of an open loop in another colour."""
    spans = [span for span in spans if span.percentiles]
    with rc_context(STYLE):
        figure, axes = _rows([span.label for span in spans], "latency (ms)")
        for place, span in enumerate(spans):
            colour = SECOND if span.is_open else ACCENT
            known = list(span.percentiles.values())
            axes.hlines(place, min(known), max(known), color=colour, lw=1.2)
            for name, value in span.percentiles.items():
                mark, size = MARKS[name]
                axes.plot(value, place, mark, color=colour, ms=size)
        for name in ("p50", "p90", "p99"):
            axes.plot([], [], MARKS[name][0], color=MUTED, label=name.replace("p90", "p90, p95"))
        axes.plot([], [], "-", color=SECOND, label="open loop")
        _legend(axes)
        return svg(figure, "latencies", "percentiles of each row's latency in milliseconds")


def _rows(labels: Sequence[str], x: str) -> tuple[Figure, Axes]:
    """Axes with a row for each label, the first on top, and a logarithmic scale."""
    figure = Figure(figsize=(WIDTH, REST + ROW * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(which="both", length=0)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        labelcolor=MUTED,
        fontsize=8,
        handletextpad=0.4,
        columnspacing=1.2,
    )
