"""Accuracy of the recipes, and their training time relative to a yardstick in the same run."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.files import read_json, remove, write_json
from pipeline.core.paths import Paths
from pipeline.data.splits import Split, load_split
from pipeline.training.device import choose_placement
from pipeline.training.loop import TrainingProgress, train
from pipeline.training.networks import build
from pipeline.training.recipes import RECIPES, TrainConfig, make_recipe
from pipeline.training.run import train_run

SEEDS = {"quick": 5, "record": 5, "standard": 3}
YARDSTICK = "baseline"
YARDSTICK_EPOCHS = 1.0 / 8  # measured before and after each run of a recipe
# Two-sided 95 % of Student's t, for 1 to 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class SeedTrial:
    """One run of a recipe, between two runs of the yardstick."""

    seed: int
    test_accuracy: float  # fraction of images, 0 to 1
    seconds: float  # in the training loop
    yardstick_seconds: float  # for all of baseline's epochs, extrapolated from both yardstick runs

    @property
    def share(self) -> float:
        """The recipe's time as a fraction of the yardstick's."""
        return self.seconds / self.yardstick_seconds


@dataclass(frozen=True)
class TrainingRow:
    """A recipe's accuracy and time over its seeds."""

    recipe: str
    parameters: int
    multiply_adds: int  # for one image
    trials: tuple[SeedTrial, ...]

    @property
    def accuracy(self) -> float:
        return statistics.mean(trial.test_accuracy for trial in self.trials)

    @property
    def deviation(self) -> float:
        """The standard deviation of the accuracy over seeds; 0 for a single seed."""
        accuracies = [trial.test_accuracy for trial in self.trials]
        return statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """Half the 95 % confidence interval of the mean accuracy; 0 for a single seed."""
        count = len(self.trials)
        return STUDENT[count - 2] * self.deviation / math.sqrt(count) if count > 1 else 0.0

    @property
    def share(self) -> float:
        """The median of the trials' shares of the yardstick's time."""
        return statistics.median(trial.share for trial in self.trials)

    def record(self) -> dict[str, Any]:
        """Return the row as values for JSON, with every seed's trial."""
        keys = ("accuracy", "deviation", "half_width", "share")
        return {**asdict(self), **{key: getattr(self, key) for key in keys}}

    def __str__(self) -> str:
        return (
            f"{self.recipe:<10} {self.accuracy:>8.3%} ± {self.half_width:.3%}  "
            f"1/{1 / self.share:,.0f} of {YARDSTICK}'s time"
        )


def count_multiply_adds(recipe: str) -> int:
    """Count the multiply-adds of one image in the network's convolutions and linear layers."""
    model = build(RECIPES[recipe], 10).eval()
    with FlopCounterMode(display=False) as counter:  # it counts two per multiply-add
        model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    return int(counter.get_total_flops()) // 2


def _estimate_seconds(train_split: Split, validation: Split) -> float:
    """Estimate the seconds of all of baseline's epochs, from a fraction of one epoch."""
    settings = replace(RECIPES[YARDSTICK], epochs=YARDSTICK_EPOCHS)
    placement = choose_placement("cpu")
    _, last = train(TrainConfig(YARDSTICK, settings), train_split, validation, placement)
    return last.seconds * RECIPES[YARDSTICK].epochs / last.epoch


def benchmark_training(
    paths: Paths,
    recipes: Sequence[str] = tuple(SEEDS),
    seeds: int | None = None,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
    on_step: Callable[[TrainingProgress], None] = lambda progress: None,
) -> list[TrainingRow]:
    """Train each recipe with its seeds on MNIST, on the CPU, each as a separate run.

    With `resume`, keeps trials that an earlier call finished and continues one that it began.
    """
    for name in recipes:
        make_recipe(name)  # check all names before spending minutes on the first recipe
    train_split, validation = (
        load_split("mnist", paths.data("mnist"), name) for name in ("train", "validation")
    )
    few = replace(validation, images=validation.images[:500], labels=validation.labels[:500])
    rows = []
    for recipe in recipes:
        trials = []
        for seed in range(1, (seeds or SEEDS.get(recipe, 3)) + 1):
            of_trial = replace(paths, run=f"benchmark-{recipe}-{seed}")
            config = TrainConfig(recipe, RECIPES[recipe], seed=seed, device="cpu")
            trial = None
            if resume and of_trial.trial.exists():
                record = read_json(of_trial.trial, "run the benchmark without --resume")
                if record.get("config") == config.record():
                    trial = SeedTrial(**record["trial"])
            if not trial:
                remove(of_trial.trial)
                before = _estimate_seconds(train_split, few)
                summary = train_run(of_trial, config, resume, on_step=on_step)
                seconds = (before + _estimate_seconds(train_split, few)) / 2
                trial = SeedTrial(seed, summary.test_accuracy, summary.train_seconds, seconds)
                write_json(of_trial.trial, {"config": config.record(), "trial": asdict(trial)})
            trials.append(trial)
            report(f"{recipe}, seed {seed}: {trial.test_accuracy:.2%}, 1/{1 / trial.share:,.0f}")
        parameters = sum(p.numel() for p in build(RECIPES[recipe], 10).parameters())
        rows.append(TrainingRow(recipe, parameters, count_multiply_adds(recipe), tuple(trials)))
    return rows
