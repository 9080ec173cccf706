"""Training loop: five lines a step, with the batches, schedule and averaging around them."""

# Shape letters: B batch, M non-digits, N images, K classes.

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adadelta, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import evaluate
from pipeline.core.paths import FOLDER
from pipeline.data.splits import Split
from pipeline.training.augment import augment
from pipeline.training.checkpoint import RunState, optimizer_tensors, restore_optimizer
from pipeline.training.device import Placement, prepare_network, synchronize
from pipeline.training.networks import Network, build, eager_predictor
from pipeline.training.outliers import Outliers, PictureOutliers
from pipeline.training.recipes import Recipe, TrainConfig
from pipeline.training.strips import ctc_loss, make_strips

EPOCH_STRIDE = 1_000_003  # distance between the seeds of two runs: more than a run has steps
FOLLOW_EVERY = 4  # steps between two updates of the averaged weights


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training run."""

    epoch: float  # passes done, with fractions
    epochs: float
    step: int
    loss: float  # of the latest batch, in nats
    lr: float
    images_per_second: float
    seconds: float  # of training so far, preparation included; evaluation is not counted
    validation_accuracy: float | None = None  # 0 to 1, where it was measured

    def __str__(self) -> str:
        accuracy, left = self.validation_accuracy, self.seconds * (self.epochs / self.epoch - 1)
        text = f"epoch {self.epoch:.2f}/{round(self.epochs, 2):g}: loss {self.loss:.4f}"
        text += "" if accuracy is None else f", validation accuracy {accuracy:.2%}"
        if self.epoch < 0.02 * self.epochs:  # too early to estimate the remaining time
            return text
        return f"{text}, {self.images_per_second:,.0f} images/s, {left:.0f} s left"


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of `step`; it depends on the step only, so a resume is exact."""
    if recipe.schedule == "decay":
        return recipe.lr * recipe.gamma ** (step // steps_per_epoch)
    # One cycle (Smith 2018, arXiv:1708.07120): linear up, then down along a cosine.
    done, warm_up = (step + 0.5) / steps, recipe.warm_up
    if done < warm_up:
        return recipe.lr * (0.04 + 0.96 * done / warm_up)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def distortion(recipe: Recipe, step: int, steps: int) -> float:
    """Return the strength of the recipe's distortion at `step`, from 1 (full) to 0 (none)."""
    left = 1 - step / steps
    return min(1.0, left / recipe.fade) if recipe.fade else 1.0


class Batches:
    """Batches by step: each depends only on the seed and the step, not on earlier batches.

    Several processes share a batch: each has its own part.
    """

    def __init__(
        self, split: Split, recipe: Recipe, seed: int, placement: Placement, dataset: str = "mnist"
    ) -> None:
        self.images = torch.from_numpy(split.images).to(placement.device)  # whole split, uint8
        self.labels = torch.from_numpy(split.labels).to(placement.device)
        self.classes = len(split.classes)
        self.recipe, self.seed, self.placement = recipe, seed, placement
        self.size = min(recipe.batch_size, len(split))
        if self.size % placement.processes:
            parts = f"{placement.processes} processes"
            raise PipelineError(
                f"a batch of {self.size} cannot be divided among {parts}: change --batch-size"
            )
        self.steps_per_epoch = len(split) // self.size
        self.steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self.is_folder = dataset.startswith(FOLDER)
        source = PictureOutliers if self.is_folder else Outliers
        self.outliers = source(self.images, self.labels, seed) if recipe.outliers else None
        self.is_of_strips = recipe.network == "strip"
        self._epoch, self._order = -1, torch.empty(0)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images (B, 1, 28, 28), distorted if the recipe distorts, and labels (B,).

        If the recipe has outliers, M images of no class follow, and probabilities (B + M, K)
        replace the labels. For a network over strips, the images are strips (B, 1, 28, 280), and
        the labels their texts (B, L).
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * EPOCH_STRIDE + epoch)
            self._epoch = epoch
            self._order = torch.randperm(len(self.labels), generator=generator)
        rank, processes = self.placement.rank, self.placement.processes
        batch = self._order[position * self.size : (position + 1) * self.size][rank::processes]
        batch = batch.to(self.labels.device)
        # For distortion and dropout: each process draws other random numbers.
        torch.manual_seed((self.seed * EPOCH_STRIDE + step) * processes + rank)
        strength = distortion(self.recipe, step, self.steps)
        if self.is_of_strips:
            return make_strips(
                self.images, self.labels, len(batch), self.recipe, strength, self.outliers
            )
        images, labels = self.images[batch], self.labels[batch]
        if not self.outliers:
            return augment(images, self.recipe, strength, self.is_folder), labels
        count = round(self.recipe.outliers * len(labels))
        painted = self.outliers.draw_painted(count // 10)
        written = self.outliers.draw_written(count - len(painted))
        images = augment(torch.cat([images, written]), self.recipe, strength, self.is_folder)
        certain = functional.one_hot(labels, self.classes).float()
        unknown = certain.new_full((count, self.classes), 1 / self.classes)  # equally likely
        return torch.cat([images, painted]), torch.cat([certain, unknown])


class Learner:
    """State that changes in training and goes into a checkpoint: weights, average, optimizer."""

    def __init__(self, config: TrainConfig, classes: int, placement: Placement) -> None:
        recipe = config.settings
        torch.manual_seed(config.seed)
        self.network = build(recipe, classes)
        self.model = prepare_network(self.network, placement, config.compiled)
        settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "adamw":
            settings |= {"betas": (recipe.beta1, recipe.beta2), "fused": True}
        optimizers = {"adamw": AdamW, "adadelta": Adadelta, "sgd": SGD}
        self.optimizer = optimizers[recipe.optimizer](self.network.parameters(), **settings)
        self.average: AveragedModel | None = None
        if recipe.average:
            follow = get_ema_multi_avg_fn(recipe.average**FOLLOW_EVERY)  # type: ignore[no-untyped-call]  # torch's
            self.average = AveragedModel(self.network, multi_avg_fn=follow, use_buffers=True)
        averages = {"average": self.average} if self.average else {}
        self.modules: dict[str, nn.Module] = {"model": self.network, **averages}

    @property
    def best(self) -> Network:
        """The network to evaluate: the average, once it has been updated."""
        if self.average and self.average.n_averaged:
            return cast(Network, self.average.module)
        return self.network

    def snapshot(self, step: int, seconds: float) -> RunState:
        """Return the state of the run after `step` optimizer steps and `seconds` of training."""
        tensors = optimizer_tensors(self.optimizer)
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return RunState(step, seconds, tensors)

    def restore(self, state: RunState) -> None:
        """Restore `state`, so that the run continues exactly where it stopped."""
        for name, module in self.modules.items():
            keys = module.state_dict()
            module.load_state_dict({key: state.tensors[f"{name}.{key}"] for key in keys})
        restore_optimizer(self.optimizer, state.tensors)


def choose_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Any]:
    """Return the mean loss in nats of outputs for labels: CTC for strings, else cross-entropy."""
    if recipe.network == "strip":
        return ctc_loss
    return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)


def train(
    config: TrainConfig,
    train_split: Split,
    validation: Split,
    placement: Placement,
    state: RunState | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    save: Callable[[RunState], None] = lambda state: None,
    is_stopped: Callable[[], bool] = lambda: False,
    save_every: int = 0,
) -> tuple[Network, TrainingProgress]:
    """Train a network on `train_split`; return it with the last progress.

    Continues exactly from `state`. Calls `save` with a new state after each epoch, and after every
    `save_every` steps unless that is 0. When `is_stopped` returns true, saves and raises
    KeyboardInterrupt. Raises PipelineError when the loss is not finite.
    """
    recipe = config.settings
    start = time.perf_counter() - (state.seconds if state else 0.0)  # moved on in each pause
    batches = Batches(train_split, recipe, config.seed, placement, config.dataset)
    learner = Learner(config, len(train_split.classes), placement)
    model, optimizer = learner.model, learner.optimizer
    loss_function = choose_loss(recipe)
    if state:
        learner.restore(state)

    for step in range(state.step if state else 0, batches.steps):
        images, labels = batches.at(step)
        lr = learning_rate(recipe, step, batches.steps, batches.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()

        optimizer.zero_grad()
        outputs = model(images)
        loss = loss_function(outputs, labels)
        loss.backward()
        optimizer.step()

        done = step + 1
        mean_loss, must_stop = synchronize(placement, loss.item(), is_stopped())
        progress = _progress(done, batches, mean_loss, lr, time.perf_counter() - start)
        left = batches.steps - done
        if learner.average and left <= batches.steps // 2 and left % FOLLOW_EVERY == 0:
            learner.average.update_parameters(learner.network)
        is_last, ends_epoch = done == batches.steps, done % batches.steps_per_epoch == 0
        pause = time.perf_counter()  # not counted: evaluation and writing
        if placement.is_first and (ends_epoch or is_last):
            predictor = eager_predictor(learner.best.eval(), placement.device)
            metrics = evaluate(predictor, validation.images, validation.labels)
            progress = replace(progress, validation_accuracy=metrics.accuracy)
        on_progress(progress)
        is_due = ends_epoch or must_stop or (save_every and done % save_every == 0)
        if is_due and not is_last:
            save(learner.snapshot(done, progress.seconds))
        if must_stop and not is_last:
            raise KeyboardInterrupt
        start += time.perf_counter() - pause
    return learner.best.eval(), progress


def _progress(
    done: int, batches: Batches, loss: float, lr: float, seconds: float
) -> TrainingProgress:
    """Return the progress after `done` steps; raise PipelineError when the loss is not finite."""
    if not math.isfinite(loss):
        raise PipelineError(
            f"the loss is {loss} at step {done} of {batches.steps} with learning rate {lr:.3g}: "
            "try a smaller --lr"
        )
    return TrainingProgress(
        epoch=done / batches.steps_per_epoch,
        epochs=batches.steps / batches.steps_per_epoch,
        step=done,
        loss=loss,
        lr=lr,
        images_per_second=done * batches.size / seconds,
        seconds=seconds,
    )
