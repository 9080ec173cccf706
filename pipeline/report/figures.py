"""Figures as SVG elements inside a page, with the page's colours (light or dark) and fonts."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipeline.core.evaluate import Bin, wilson_interval

SIZE = (5.2, 3.1)  # inches; a page scales it
MARGIN_BINS = 60
# Placeholder colours for Matplotlib; in the SVG the page's CSS variables replace them.
INK, MUTED, GRID, ACCENT, SECOND = ("#010203", "#010204", "#010205", "#010206", "#010207")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", SECOND: "second"}
_MUTED_PARTS = ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "legend.labelcolor")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,  # text stays text, in the page's font
    "text.color": INK,
    "lines.linewidth": 1.8,
    "grid.linewidth": 0.7,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(_MUTED_PARTS, MUTED),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
Line = Mapping[str, Any]  # a line of metrics.jsonl


@rc_context(STYLE)
def draw_losses(lines: Sequence[Line]) -> str:
    """Draw the training loss over the epochs, and its running mean."""
    epochs, losses = ([line[key] for line in lines] for key in ("epoch", "loss"))
    figure, axes = _make_axes("epoch", "training loss (nats)")
    axes.plot(epochs, losses, ".", color=MUTED, alpha=0.45, ms=4, mew=0, label="one batch")
    # A running mean over about a twelfth of the values.
    weight, mean, total, means = 1 - 1 / max(1.0, len(losses) / 12), 0.0, 0.0, []
    for loss in losses:
        mean, total = weight * mean + loss, weight * total + 1
        means.append(mean / total)
    axes.plot(epochs, means, color=ACCENT, label="running mean")
    if min(losses) > 0:
        _use_logarithm(axes, "y")
    _add_legend_above(axes, 2)
    return to_svg(figure, "loss", f"training loss, from {losses[0]:.3g} to {losses[-1]:.3g}")


@rc_context(STYLE)
def draw_accuracies(lines: Sequence[Line]) -> str:
    """Draw the validation accuracy in percent after each epoch."""
    measured = [line for line in lines if "validation_accuracy" in line]
    epochs = [line["epoch"] for line in measured]
    percent = [100 * line["validation_accuracy"] for line in measured]
    figure, axes = _make_axes("epoch", "validation accuracy (%)")
    axes.plot(epochs, percent, "o-" if len(epochs) <= 40 else "-", color=ACCENT, ms=5)
    end = (epochs[-1], percent[-1])
    axes.annotate(
        f"{percent[-1]:.2f} %", end, (0, 8), textcoords="offset points", ha="right", color=INK
    )
    axes.set_xlim(0, epochs[-1] * 1.04)
    room = max(0.2, 0.15 * (max(percent) - min(percent)))
    axes.set_ylim(min(percent) - room, min(100.0, max(percent) + room))
    axes.ticklabel_format(axis="y", useOffset=False)
    return to_svg(figure, "accuracy", f"validation accuracy, at last {percent[-1]:.2f} %")


@rc_context(STYLE)
def draw_reliability(before: Sequence[Bin], after: Sequence[Bin]) -> str:
    """Draw accuracy over mean probability, before and after the temperature was fitted."""
    figure, axes = _make_axes("mean probability", "accuracy")
    axes.plot([0, 1], [0, 1], ls=(0, (2, 3)), lw=1.2, color=MUTED, label="calibrated")
    axes.plot(*_points(before), "s--", color=SECOND, ms=4, lw=1.2, label="before")
    confidences, accuracies = _points(after)
    ranges = [wilson_interval(round(b.accuracy * b.images), b.images) for b in after]
    axes.vlines(confidences, *zip(*ranges, strict=True), color=ACCENT, lw=1, alpha=0.6)
    axes.plot(confidences, accuracies, "o-", color=ACCENT, ms=4.5, label="after")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _add_legend_above(axes, 3)
    return to_svg(figure, "reliability", "accuracy by mean probability")


@rc_context(STYLE)
def draw_confidence(before: Sequence[Bin], after: Sequence[Bin]) -> str:
    """Draw the number of images over mean probability, before and after the temperature."""
    figure, axes = _make_axes("mean probability", "images")
    series = ((before, SECOND, "s--", "before"), (after, ACCENT, "o-", "after"))
    for bins, colour, marker, label in series:
        counts = [b.images for b in bins]
        axes.plot(_points(bins)[0], counts, marker, color=colour, ms=4, lw=1.2, label=label)
    _use_logarithm(axes, "y")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0.9)
    _add_legend_above(axes, 2)
    return to_svg(figure, "histogram", "images by mean probability")


@rc_context(STYLE)
def draw_margins(margins: Sequence[float], largest: Mapping[str, float]) -> str:
    """Draw a histogram of the images' margins, and a line at the largest error of each file."""
    positive = [margin for margin in margins if margin > 0] or [1.0]
    low, high = min(positive) / 1.1, max(positive) * 1.1
    step = (high / low) ** (1 / MARGIN_BINS)
    figure, axes = _make_axes("margin of the likeliest class (nats)", "images")
    edges = [low * step**index for index in range(MARGIN_BINS + 1)]
    axes.hist(positive, edges, histtype="stepfilled", color=ACCENT, alpha=0.35, lw=0)
    styles = zip((INK, SECOND, ACCENT), ("-", "--", ":"), strict=True)
    for (name, error), (colour, dashes) in zip(largest.items(), styles, strict=False):
        axes.axvline(error, color=colour, ls=dashes, label=f"{name} {error:.2g}")
    _use_logarithm(axes, "x")
    _use_logarithm(axes, "y")
    axes.set_ylim(bottom=0.9)
    if largest:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, title="largest error")
    return to_svg(figure, "margins", "images by their margin, and the largest errors")


@rc_context(STYLE)
def draw_rates(classes: Sequence[str], before: Sequence[float], now: Sequence[float]) -> str:
    """Draw the percentage of answers with each class, in the reference profile and in a log."""
    figure, axes = _make_axes("class", "answers (%)")
    places = range(len(classes))
    series = ((before, -0.2, MUTED, "reference"), (now, 0.2, ACCENT, "log"))
    for rates, shift, colour, label in series:
        heights = [100 * rate for rate in rates]
        axes.bar([at + shift for at in places], heights, 0.4, color=colour, label=label)
    axes.set_xticks(list(places), list(classes), rotation=90 if len(classes) > 12 else 0)
    axes.grid(visible=False, axis="x")
    _add_legend_above(axes, 2)
    return to_svg(figure, "rates", "rate of each class, in the reference and in the log")


@rc_context(STYLE)
def draw_shares(
    what: str, edges: Sequence[float], before: Sequence[int], now: Sequence[int]
) -> str:
    """Draw the percentage of images below each value, in the reference profile and a log.

    The counts are those of the bins between `edges`.
    """
    figure, axes = _make_axes(what, "images below it (%)")
    series = ((before, MUTED, "--", "reference"), (now, ACCENT, "-", "log"))
    for counts, colour, dashes, label in series:
        shares = [100 * part / sum(counts) for part in accumulate(counts, initial=0)]
        axes.plot(edges, shares, dashes, color=colour, label=label)
    axes.set_ylim(0, 102)
    if what == "confidence":  # stretched towards 1, where most answers are
        least = 1e-6
        stretch = (
            lambda values: -np.log10(np.maximum(1 - values, least)),
            lambda places: 1 - 10.0**-places,
        )
        axes.set_xscale("function", functions=stretch)
        axes.set(xlim=(0, 1 - least), xticks=[0, 0.9, 0.99, 0.999, 0.9999, 0.99999])
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    _add_legend_above(axes, 2)
    return to_svg(figure, f"below-{what}", f"the share of images below each {what}")


def _add_legend_above(axes: Axes, columns: int) -> None:
    narrow = {"fontsize": 8, "handletextpad": 0.4, "columnspacing": 1.2}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, **narrow)


def _make_axes(x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.tick_params(which="both", length=0)
    return figure, axes


def _use_logarithm(axes: Axes, which: Literal["x", "y"]) -> None:
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.tick_params(axis=which, which="both", length=3, color=MUTED)
    axis.set_major_formatter(lambda value, position: _format_power(value))

    axis.set_minor_locator(LogLocator(subs=(1.5, *range(2, 10)), numticks=100))

    def label_minor(value: float, position: float) -> str:
        """Label values between the powers of ten, where there are few of these."""
        low, high = axis.get_view_interval()
        shown = (
            "" if high > 100 * low else "2.0 5.0" if high > 10 * low else "1.5 2.0 3.0 4.0 6.0 8.0"
        )
        return _format_power(value) if f"{value:.1e}"[:3] in shown else ""

    axis.set_minor_formatter(label_minor)


def _format_power(value: float) -> str:
    """Format a value of a logarithmic axis, with a power of ten where that is shorter."""
    if 1e-3 <= value < 1e6:
        return f"{value:,g}"
    digit, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digit == "1" else f"{digit}·{power}"


def _points(bins: Sequence[Bin]) -> tuple[list[float], list[float]]:
    return [b.confidence for b in bins], [b.accuracy for b in bins]


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an `<svg>` element whose bytes depend only on its content.

    IDs are salted with `name`, so that figures in one page share no ID.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        omitted = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=omitted)
    text = buffer.getvalue()
    width, height = (72 * inches for inches in figure.get_size_inches())
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body)  # it would apply to the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*", "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body.strip()}'


WIDTH, ROW, REST = 5.8, 0.19, 0.9  # inches: of a figure, of a row, of the rest of a figure's height
MARKS = {"p50": ("o", 5.0), "p90": ("|", 7.0), "p95": ("|", 7.0), "p99": ("D", 4.0)}


@rc_context(STYLE)
def draw_throughput(
    labels: Sequence[str], speeds: Sequence[Mapping[str, float]], ceilings: Sequence[float | None]
) -> str:
    """Draw images per second: median (bar), least to most (whisker) and ceiling (mark) per row.

    The ceiling is the speed of a model that computes nothing, measured in the same way.
    """
    figure, axes = _make_rows(labels, "images per second")
    places = range(len(labels))
    least, median, most = ([speed[key] for speed in speeds] for key in ("min", "median", "max"))
    axes.barh(places, median, color=ACCENT, alpha=0.45, height=0.66)
    axes.hlines(places, least, most, color=INK, lw=1.2).set_label("least to most")
    if any(ceilings):
        marks = [ceiling or np.nan for ceiling in ceilings]
        axes.plot(marks, places, "|", color=SECOND, ms=8, mew=2, label="empty model")
    axes.set_xlim(left=min(speed for speed in least if speed > 0) / 2)
    _add_legend_above(axes, 4)
    return to_svg(figure, "throughput", "images per second of each row, least to most")


@rc_context(STYLE)
def draw_latencies(
    labels: Sequence[str], percentiles: Sequence[Mapping[str, float]], is_open: Sequence[bool]
) -> str:
    """Draw each row's percentiles in milliseconds on a line, in another colour for open loops.

    Rows without percentiles are left out.
    """
    shown = [row for row in zip(labels, percentiles, is_open, strict=True) if row[1]]
    figure, axes = _make_rows([label for label, _, _ in shown], "latency (ms)")
    for place, (_, values, of_open_loop) in enumerate(shown):
        colour = SECOND if of_open_loop else ACCENT
        axes.hlines(place, min(values.values()), max(values.values()), color=colour, lw=1.2)
        for name, value in values.items():
            mark, size = MARKS[name]
            axes.plot(value, place, mark, color=colour, ms=size)
    for name in ("p50", "p90", "p99"):
        axes.plot([], [], MARKS[name][0], color=MUTED, label=name.replace("p90", "p90, p95"))
    axes.plot([], [], "-", color=SECOND, label="open loop")
    _add_legend_above(axes, 4)
    return to_svg(figure, "latencies", "percentiles of each row's latency in milliseconds")


def _make_rows(labels: Sequence[str], x: str) -> tuple[Figure, Axes]:
    """Create axes with a row for each label, the first on top, and a logarithmic x scale."""
    figure, axes = _make_axes(x, "", (WIDTH, REST + ROW * len(labels)))
    _use_logarithm(axes, "x")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes
