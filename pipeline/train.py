"""The training loop of the learner's note: five lines a step, and what they need around them."""

# Shape letters: B batch, N images, K classes.

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.augment import augment
from pipeline.checkpoint import State, optimizer_tensors, restore_optimizer
from pipeline.config import Recipe, TrainConfig
from pipeline.data import Split
from pipeline.device import Placement
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate
from pipeline.model import Network, build, eager_predictor

EPOCH_STRIDE = 1_000_003  # between the seeds of two runs: more than a run has steps


@dataclass(frozen=True)
class Progress:
    """Where a training run stands."""

    epoch: float  # passes done, in parts
    epochs: float
    step: int
    loss: float  # of the latest batch, in nats
    lr: float
    images_per_second: float
    seconds: float  # of training so far; evaluation is not counted
    validation_accuracy: float | None = None  # 0 to 1, where it was measured

    def __str__(self) -> str:
        left = self.seconds * (self.epochs / self.epoch - 1)
        accuracy = self.validation_accuracy
        known = "" if accuracy is None else f", validation accuracy {accuracy:.2%}"
        return (
            f"epoch {self.epoch:.2f}/{self.epochs:g}: loss {self.loss:.4f}{known}, "
            f"{self.images_per_second:,.0f} images/s, {left:.0f} s left"
        )


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters of `model`."""
    parameters, lr, decay = model.parameters(), recipe.lr, recipe.weight_decay
    if recipe.optimizer == "adadelta":
        return torch.optim.Adadelta(parameters, lr=lr, weight_decay=decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=decay, fused=True)


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of `step`: a function of the step alone, so that a resume is exact."""
    if recipe.schedule == "decay":
        return recipe.lr * recipe.gamma ** (step // steps_per_epoch)
    # One cycle (Smith 2018, arXiv:1708.07120): up in a line, then down along a cosine.
    done, warm_up = (step + 0.5) / steps, recipe.warm_up
    if done < warm_up:
        return recipe.lr * (0.04 + 0.96 * done / warm_up)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order (count,) in which `epoch` visits the images: a function of seed and epoch."""
    generator = torch.Generator().manual_seed(seed * EPOCH_STRIDE + epoch)
    return torch.randperm(count, generator=generator)


class Batches:
    """The batch of any step: a function of the seed and the step, whatever came before."""

    def __init__(self, split: Split, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.images = torch.from_numpy(split.images).to(device)  # the whole split, uint8
        self.labels = torch.from_numpy(split.labels).to(device)
        self.recipe, self.seed = recipe, seed
        self.size = min(recipe.batch_size, len(split))
        self.steps_per_epoch = len(split) // self.size
        self.steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self._epoch, self._order = -1, torch.empty(0)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 1, 28, 28), distorted if the recipe says so, and labels (B,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self.labels), self.seed, epoch)
        batch = self._order[position * self.size : (position + 1) * self.size]
        batch = batch.to(self.labels.device)
        torch.manual_seed(self.seed * EPOCH_STRIDE + step)  # for distortion and for dropout
        return augment(self.images[batch], self.recipe), self.labels[batch]


def train(
    config: TrainConfig,
    train_split: Split,
    validation: Split,
    placement: Placement,
    state: State | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    save: Callable[[State], None] = lambda state: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[Network, Progress]:
    """A network trained on `train_split`, and where the run ended.

    Continues from `state` exactly; hands a new state to `save` after each epoch and when
    `is_stopped` says so, then raises KeyboardInterrupt. Raises PipelineError when the loss is not
    finite.
    """
    recipe, device = config.settings, placement.device
    batches = Batches(train_split, recipe, config.seed, device)
    steps, steps_per_epoch = batches.steps, batches.steps_per_epoch
    torch.manual_seed(config.seed)
    model = build(recipe, len(train_split.classes)).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    optimizer = make_optimizer(model, recipe)
    average = _average(model, recipe)
    loss_function = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    first, clock = 0, _Clock()
    if state:
        first, clock = state.step, _Clock(state.seconds)
        _restore(state, model, average, optimizer)

    for step in range(first, steps):
        images, labels = batches.at(step)
        lr = learning_rate(recipe, step, steps, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()

        optimizer.zero_grad()
        outputs = model(images)
        loss = loss_function(outputs, labels)
        loss.backward()
        optimizer.step()

        done = step + 1
        progress = _progress(done, batches, loss.item(), lr, clock.seconds())
        if average and step >= steps // 2:
            average.update_parameters(model)
        is_last, ends_epoch = done == steps, done % steps_per_epoch == 0
        with clock.paused():
            if ends_epoch or is_last:
                best = _best(model, average, done > steps // 2)
                predictor = eager_predictor(best, device)
                accuracy = evaluate(predictor, validation.images, validation.labels).accuracy
                progress = replace(progress, validation_accuracy=accuracy)
            on_progress(progress)
            must_stop = is_stopped()
            if not is_last and (ends_epoch or must_stop):
                save(snapshot(done, progress.seconds, model, average, optimizer))
            if not is_last and must_stop:
                raise KeyboardInterrupt
    return _best(model, average, True), progress


def _progress(done: int, batches: Batches, loss: float, lr: float, seconds: float) -> Progress:
    """Where the run stands after `done` steps; PipelineError when its loss is not finite."""
    if not math.isfinite(loss):
        raise PipelineError(
            f"the loss is {loss} at step {done} of {batches.steps} with learning rate {lr:.3g}: "
            "try a smaller --lr; the last checkpoint is kept"
        )
    return Progress(
        epoch=done / batches.steps_per_epoch,
        epochs=batches.steps / batches.steps_per_epoch,
        step=done,
        loss=loss,
        lr=lr,
        images_per_second=done * batches.size / seconds,
        seconds=seconds,
    )


def _average(model: Network, recipe: Recipe) -> AveragedModel | None:
    """A copy of `model` that will follow it slowly, where the recipe wants one."""
    if not recipe.average:
        return None
    follow = get_ema_multi_avg_fn(recipe.average)  # type: ignore[no-untyped-call]  # torch's
    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)


def _best(model: Network, average: AveragedModel | None, is_averaged: bool) -> Network:
    """The network to judge by, in evaluation mode."""
    if average and is_averaged:
        return cast(Network, average.module).eval()
    return model.eval()


def snapshot(
    step: int,
    seconds: float,
    model: Network,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
) -> State:
    """The state of a run after `step` optimizer steps."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    return State(step, seconds, {**tensors, **optimizer_tensors(optimizer)})


def _restore(
    state: State,
    model: Network,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    for name, module in (("model", model), ("average", average)):
        if module:
            module.load_state_dict(
                {key: state.tensors[f"{name}.{key}"] for key in module.state_dict()}
            )
    restore_optimizer(optimizer, state.tensors)


class _Clock:
    """Seconds of training, without the pauses for evaluation and for writing."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._start = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        seconds = self.seconds()
        yield
        self._start = time.perf_counter() - seconds
