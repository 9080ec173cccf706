"""How often a model of a folder of letters is sure of what is not a letter.

Draws a folder of capital letters in 16 fonts, dark on light, and trains the standard recipe on it
with and without images of no class, with three seeds. What is shown is made in another way than
what training adds.

  python -m tools.prove_folder_unsure RESULT
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate

from pipeline.core.evaluate import is_refused, predict
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.folders import SPLITS, import_folder
from pipeline.data.splits import Split, load_split
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.networks import eager_predictor
from pipeline.training.recipes import TrainConfig, choose_epochs, make_recipe
from pipeline.training.run import train_run
from tools import nondigits
from tools.edge import print_now, run_tool
from tools.readme import keep_result

# Shape letters: N images.

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS, ALIKE = "346789", "0125"  # the others may be O, I, Z, S
COPIES = 6  # of each letter in each font
SIDE = 56  # pixels of a picture
EACH = 1000  # images of a kind, at most
SEEDS = (0, 1, 2)
FONTS = (*nondigits.FONTS, *nondigits.FONTS_HELD_BACK)


@dataclass(frozen=True)
class Row:
    """Answers to one kind of images, of the models of all seeds."""

    name: str
    images: int
    sure: float  # share at or above the model's threshold, 0 to 1
    probability: float  # mean, of the likeliest class


@dataclass(frozen=True)
class Trained:
    """What the models of one setting answered."""

    outliers: float  # images of no class, as a fraction of the others
    thresholds: tuple[float | None, ...]  # one for each seed
    temperatures: tuple[float, ...]
    accuracy: float  # of the letters of the test split, 0 to 1; mean
    rows: tuple[Row, ...]


def draw_sign(sign: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Image.Image:
    """Draw a letter or sign, dark on light, with a little of everything left to chance."""
    paper, ink = int(rng.integers(190, 256)), int(rng.integers(0, 90))
    picture = Image.new("L", (SIDE, SIDE), paper)
    middle = tuple(SIDE / 2 + rng.uniform(-4, 4, 2))
    font = font.font_variant(size=int(rng.integers(28, 42)))
    ImageDraw.Draw(picture).text(middle, sign, ink, font, anchor="mm")
    return picture.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=paper)


def draw_folder(folder: Path, rng: np.random.Generator) -> None:
    """Write the letters of all fonts into a folder with a folder for each."""
    for letter in LETTERS:
        (folder / letter).mkdir(parents=True)
        for index, font in enumerate(map(nondigits._load_font, FONTS)):
            for copy in range(COPIES):
                draw_sign(letter, font, rng).save(folder / letter / f"{index:02}-{copy}.png")


def make_kinds(letters: Split, digits: Split, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return images uint8 (N, 1, 28, 28) of each kind that no letter is."""

    def shrink(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((28, 28), Image.Resampling.BOX))[np.newaxis]

    def draw_all(signs: str) -> np.ndarray:
        fonts = [nondigits._load_font(font) for font in FONTS]
        return np.stack([shrink(draw_sign(s, f, rng)) for s in signs for f in fonts])

    def repeat(make: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        return np.stack([make(rng) for _ in range(EACH)])

    def written(labels: str) -> np.ndarray:
        return digits.images[np.isin(digits.labels, [int(label) for label in labels])][:EACH]

    def cut_corner(image: np.ndarray) -> np.ndarray:
        top, left = rng.integers(4, 11, 2)
        corner = Image.fromarray(image[0, top : top + 14, left : left + 14])
        return np.asarray(corner.resize((28, 28), Image.Resampling.BICUBIC))[np.newaxis]

    kept, alike = ", ".join(DIGITS), ", ".join(ALIKE)
    return {
        f"MNIST's digits {kept}, dark on light": 255 - written(DIGITS),
        f"MNIST's digits {kept}, light on dark": written(DIGITS),
        f"digits {kept} of the fonts": draw_all(DIGITS),
        "signs of the fonts": draw_all(nondigits.SIGNS),
        "parts of letters, enlarged": np.stack([cut_corner(image) for image in letters.images]),
        "scribbles": 255 - repeat(nondigits.scribble),
        "uniform noise": repeat(nondigits.uniform),
        "Gaussian noise": repeat(nondigits.gaussian),
        "blank paper": repeat(nondigits.blank),
        f"MNIST's digits that may be letters ({alike})": 255 - written(ALIKE),
    }


def measure(root: Path, dataset: str, outliers: float | None, digits: Split) -> Trained:
    """Train with every seed, and show the models the test split and each kind."""
    folder = Paths(root).data(dataset)
    letters = load_split(dataset, folder, "test")
    kinds = {"letters (test split)": letters.images}
    kinds |= make_kinds(letters, digits, np.random.default_rng(1))
    recipe = make_recipe("standard", dataset, outliers=outliers)
    recipe = replace(recipe, epochs=choose_epochs(recipe, dataset, folder))
    summaries, outputs = [], []
    for seed in SEEDS:
        paths = Paths(root, run=f"{recipe.outliers}-{seed}")
        config = TrainConfig("standard", recipe, dataset, seed, "cpu")
        summaries.append(train_run(paths, config, report=print_now))
        predictor = eager_predictor(load_checkpoint(paths).model)
        outputs.append({name: predict(predictor, images) for name, images in kinds.items()})
    rows = []
    for name in kinds:
        refused = [
            is_refused(output[name], summary.min_probability)
            for output, summary in zip(outputs, summaries, strict=True)
            if summary.min_probability is not None  # there are enough letters to fit it
        ]
        likeliest = np.exp(np.concatenate([output[name].max(axis=1) for output in outputs]))
        sure = 1 - float(np.concatenate(refused).mean())
        rows.append(Row(name, len(likeliest), sure, float(likeliest.mean())))
    return Trained(
        recipe.outliers,
        tuple(summary.min_probability for summary in summaries),
        tuple(summary.temperature for summary in summaries),
        float(np.mean([summary.test_accuracy for summary in summaries])),
        tuple(rows),
    )


def main(arguments: list[str]) -> None:
    """Measure both, print them next to each other, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    given = parser.parse_args(arguments)
    digits = load_split("mnist", Paths().data("mnist"), "test")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        draw_folder(root / "letters", np.random.default_rng(0))
        dataset = f"folder:{root / 'letters'}"
        import_folder(dataset, Paths(root).data(dataset), print_now)
        counts = {n: len(load_split(dataset, Paths(root).data(dataset), n)) for n in SPLITS}
        without, with_ = (measure(root, dataset, share, digits) for share in (0.0, None))
    cells = [
        (a.name, f"{a.images:,}", f"{a.sure:.1%}", f"{b.sure:.1%}", a.probability, b.probability)
        for a, b in zip(without.rows, with_.rows, strict=True)
    ]
    header = ("shown", "answers", "sure without", "with", "probability without", "with")
    print(tabulate(cells, header, floatfmt=".3f"))
    for trained in (without, with_):
        print(f"{trained.accuracy:.2%} of the letters; thresholds {trained.thresholds}")
    record: dict[str, Any] = {"without": asdict(without), "with": asdict(with_), "counts": counts}
    record |= {"seeds": SEEDS, **machine()}
    keep_result("folder_unsure", given.result, "make prove-folder-unsure", record)


if __name__ == "__main__":
    run_tool(main)
