"""What 20 own samples of each digit do for a hand that MNIST lacks, and what they cost on MNIST.

The hand is a fixed deformation of MNIST's test digits, which no network is trained on: slanted,
with a thicker stroke, and bent. For each seed, the standard recipe is trained on MNIST and then
fine-tuned with 200 of these pictures, as `pipeline train --init RUN --dataset mnist+folder:PATH`
does. The others are for measuring, with the same digits undeformed.

  python -m tools.prove_finetune RESULT
"""

import argparse
import io
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch.nn import functional

from pipeline.core.evaluate import predict
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.fetch import fetch_data
from pipeline.data.splits import load_split
from pipeline.images.read import prepare_picture
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.networks import eager_predictor
from pipeline.training.recipes import TrainConfig, tune_recipe
from pipeline.training.run import train_run
from tools.edge import print_now, run_tool
from tools.readme import keep_result

# Shape letters: N images, S side of a picture in pixels.

SEEDS = (0, 1, 2)
OWN = 20  # samples of each digit
SCALE, MARGIN = 4, 8  # of a picture, against an image of MNIST; the margin in its pixels
SLANT, STROKE, BEND = 0.7, 7, 0.1  # tangent; pixels of a picture; part of half its side


@dataclass(frozen=True)
class Row:
    """Shares of wrong answers, 0 to 1, of one seed's networks."""

    seed: int
    hand_before: float
    hand_after: float
    mnist_before: float
    mnist_after: float


def write_by_hand(images: np.ndarray) -> np.ndarray:
    """Return digits, uint8 (N, 1, 28, 28), as the hand writes them: dark on light (N, S, S)."""
    pixels = functional.pad(torch.from_numpy(images).float() / 255, [MARGIN] * 4)
    pixels = functional.interpolate(pixels, scale_factor=SCALE, mode="bicubic").clamp(0, 1)
    pixels = functional.max_pool2d(pixels, STROKE, stride=1, padding=STROKE // 2)
    side = pixels.shape[-1]
    line = (2 * torch.arange(side) + 1) / side - 1
    down, across = torch.meshgrid(line, line, indexing="ij")
    x = across + SLANT * down + BEND * torch.sin(4.5 * down + 1)
    y = down + BEND * torch.sin(5 * across)
    grid = torch.stack([x, y], dim=-1).expand(len(images), -1, -1, -1)
    ink = functional.grid_sample(pixels, grid, align_corners=False)[:, 0]
    return (255 * (1 - ink)).round().to(torch.uint8).numpy()


def encode(picture: np.ndarray) -> bytes:
    """Return a picture, uint8 (S, S), as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def choose_own(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the indices of OWN samples of each digit, drawn from a seed."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == digit))[:OWN] for digit in range(10)]
    return np.concatenate(drawn)


def measure(root: Path, seed: int, pictures: list[bytes], hand: np.ndarray) -> Row:
    """Train and fine-tune with a seed; measure on what is not among the own samples.

    `pictures` and `hand`, uint8 (N, 1, 28, 28), are the test digits as the hand writes them: PNGs,
    and what the network gets of them.
    """
    dataset = f"mnist+folder:{root / f'own{seed}'}"
    paths, tuned = Paths(root, run=f"base{seed}"), Paths(root, run=f"tuned{seed}")
    config = TrainConfig(seed=seed, device="cpu")
    base = train_run(paths, config, report=print_now)
    test = load_split("mnist", paths.data("mnist"), "test")
    own = choose_own(test.labels, seed)
    for index in own:
        file = root / f"own{seed}" / test.classes[test.labels[index]] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pictures[index])
    fetch_data(dataset, paths.data(dataset), report=print_now)
    recipe = tune_recipe(config.settings, dataset)
    start = (paths.run, base.weights_sha256)
    train_run(tuned, TrainConfig("standard", recipe, dataset, seed, "cpu", False, *start))
    rest = np.setdiff1d(np.arange(len(test)), own)
    shares = []
    for images in (hand[rest], test.images[rest]):
        for run in (paths, tuned):
            outputs = predict(eager_predictor(load_checkpoint(run).model), images)
            shares.append(float((outputs.argmax(axis=1) != test.labels[rest]).mean()))
    print_now(f"seed {seed}: wrong on the hand, then on MNIST, before and after: {shares}")
    return Row(seed, *shares)


def main(arguments: list[str]) -> None:
    """Measure with every seed, print the table, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    given = parser.parse_args(arguments)
    data = Paths().data("mnist").resolve()
    test = load_split("mnist", data, "test")
    pictures = [encode(picture) for picture in write_by_hand(test.images)]
    hand = np.stack([prepare_picture(picture).image for picture in pictures])
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "data").mkdir()
        (Path(place) / "data" / "mnist").symlink_to(data)
        rows = [measure(Path(place), seed, pictures, hand) for seed in SEEDS]
    names = ("hand_before", "hand_after", "mnist_before", "mnist_after")
    means = {name: float(np.mean([getattr(row, name) for row in rows])) for name in names}
    cells = [[row.seed, *(f"{getattr(row, name):.2%}" for name in names)] for row in rows]
    cells.append(["mean", *(f"{means[name]:.2%}" for name in names)])
    print(tabulate(cells, ("seed", *(name.replace("_", ", ") for name in names))))
    record = {"rows": [asdict(row) for row in rows], "means": means, "own": 10 * OWN}
    record |= {"images": len(test) - 10 * OWN, **machine()}
    keep_result("finetune", given.result, "make prove-finetune", record)


if __name__ == "__main__":
    run_tool(main)
