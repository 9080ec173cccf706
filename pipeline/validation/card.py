"""Model card of an export, made from its manifest and its validation record only."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.core.paths import FOLDER, JOINED, Paths
from pipeline.core.signature import pictures_of
from pipeline.core.text import load_template
from pipeline.training.recipes import TrainConfig
from pipeline.validation.compare import format_ratio

HUB = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
MOST_CLASSES = 100  # that a card lists


def render_card(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """Return the card in Hugging Face's layout; the same records give the same text."""
    training = manifest.get("training")
    dataset = training["dataset"] if training else FOLDER
    # JSON writes any text so that it is also a literal of YAML and of Python.
    template = load_template(
        "validation", "MODEL_CARD.md", code=_code, percent=percent, literal=json.dumps
    )
    return template.render(
        manifest=manifest,
        validation=validation,
        training=training,
        # Its name on the Hugging Face Hub, or ours; a local folder has no name.
        dataset=None if FOLDER in dataset else HUB.get(dataset, dataset),
        folder=f"{'MNIST and ' * dataset.startswith(JOINED)}a local folder of pictures",
        pictures=pictures_of(dataset) if training else manifest.get("pictures", "arrays"),
        # docs/results.md has photos and non-digits for the standard recipe on MNIST, no other.
        is_measured=training and training["settings"] == TrainConfig().record()["settings"],
        rows=format_variants(validation),
        wrong=round(validation["images"] * (1 - validation["variants"][0]["accuracy"])),
        classes=[_code(name) for name in manifest["classes"][:MOST_CLASSES]],
        # The card cannot contain its own digest.
        files={n: d for n, d in manifest["files"].items() if n != Paths().card.name},
    )


def format_variants(validation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of a row for each validated file, by the name of their column."""
    threads = [str(count) for count in validation["criterion"]["threads"]]
    return [
        {
            "precision": variant["precision"],
            "accuracy": percent(variant["accuracy"]),
            "flips": f"{variant['flipped']:,}",
            "chance": f"{variant['mcnemar_p']:.2g}",
            "largest_error": _format(variant["max_error"], "{:.2g}".format, "not finite"),
            "ratio": _format(variant["ratio"], format_ratio),
            "safety_factor": _format(variant["safety_factor"], format_ratio),
            "size": f"{variant['size'] / 1000:,.0f} kB",
            "speeds": [
                _format(variant["images_per_second"].get(count), "{:,.0f}".format)
                for count in threads
            ],
        }
        for variant in validation["variants"]
    ]


def percent(fraction: float) -> str:
    """Format a fraction, 0 to 1, in percent; only 0 and 1 are shown as 0 % and 100 %."""
    if 0 < fraction < 0.00005:
        return "< 0.01 %"
    if 0.99995 < fraction < 1:
        return "> 99.99 %"
    return f"{fraction:.2%}".replace("%", " %")


def _format(value: float | None, text: Callable[[float], str], missing: str = "unknown") -> str:
    return missing if value is None else text(value)


def _code(text: str) -> str:
    """Format any text as inline code, safe in Markdown and in a cell of a table."""
    plain = re.sub(r"\s+", " ", text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain or not plain.strip() else f"`{plain}`"
