"""The model card of an export, from its manifest and its proof, and nothing else."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.core.paths import FOLDER, Paths
from pipeline.core.signature import pictures_of
from pipeline.validation.compare import rounded

HUB = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
MOST_CLASSES = 100  # that a card names


@dataclass(frozen=True)
class VariantRow:
    """What the proof found of one file, as the cells of a table."""

    precision: str
    accuracy: str
    flips: str
    chance: str  # McNemar's p
    largest_error: str
    ratio: str  # of the largest error to eager float32's
    safety_factor: str
    size: str
    speeds: tuple[str, ...]  # images per second, by the criterion's numbers of threads


def model_card(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """The card in Hugging Face's layout; the same records give the same text."""
    environment = Environment(
        loader=PackageLoader("pipeline.validation", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "percent": percent, "literal": _literal}
    return environment.get_template("MODEL_CARD.md").render(
        manifest=manifest,
        validation=validation,
        training=manifest.get("training"),
        is_given=manifest.get("is_given", False),
        dataset=_dataset(manifest),
        pictures=_pictures(manifest),
        rows=variant_rows(validation),
        wrong=round(validation["images"] * (1 - validation["variants"][0]["accuracy"])),
        classes=[_code(name) for name in manifest["classes"][:MOST_CLASSES]],
        # The card cannot name its own digest.
        files={n: d for n, d in manifest["files"].items() if n != Paths().card.name},
    )


def variant_rows(validation: Mapping[str, Any]) -> tuple[VariantRow, ...]:
    """A row for each file that was proven."""
    threads = [str(count) for count in validation["criterion"]["threads"]]
    return tuple(
        VariantRow(
            precision=found["precision"],
            accuracy=percent(found["accuracy"]),
            flips=f"{found['flipped']:,}",
            chance=f"{found['mcnemar_p']:.2g}",
            largest_error=_known(found["max_error"], "{:.2g}".format, "not finite"),
            ratio=_known(found["ratio"], rounded),
            safety_factor=_known(found["safety_factor"], rounded),
            size=f"{found['size'] / 1000:,.0f} kB",
            speeds=tuple(
                _known(found["images_per_second"].get(count), "{:,.0f}".format) for count in threads
            ),
        )
        for found in validation["variants"]
    )


def percent(fraction: float) -> str:
    """A fraction, 0 to 1, in percent; never rounded to a certainty that it is not."""
    if 0 < fraction < 0.00005:
        return "< 0.01 %"
    if 0.99995 < fraction < 1:
        return "> 99.99 %"
    return f"{fraction:.2%}".replace("%", " %")


def _known(value: float | None, words: Callable[[float], str], lack: str = "unknown") -> str:
    return lack if value is None else words(value)


def _dataset(manifest: Mapping[str, Any]) -> str | None:
    """What the data set is called on the Hugging Face Hub, or by us; a local folder has no name."""
    name = manifest["training"]["dataset"] if "training" in manifest else FOLDER
    return None if name.startswith(FOLDER) else HUB.get(name, name)


def _pictures(manifest: Mapping[str, Any]) -> str:
    """How pictures become the model's images, as `pictures_of` has it; `arrays` for a module."""
    training = manifest.get("training")
    return pictures_of(training["dataset"]) if training else "arrays"


def _code(text: str) -> str:
    """Anybody's text as inline code that Markdown does not read, also in a cell of a table."""
    plain = re.sub(r"\s+", " ", text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain or not plain.strip() else f"`{plain}`"


def _literal(text: str) -> str:
    """Anybody's text as a string of YAML, and of Python as well."""
    return json.dumps(text)
