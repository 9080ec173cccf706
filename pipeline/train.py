"""The training loop of the learner's note, five lines a step, and a run made around it."""

# Shape letters: B batch, K classes.

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import (
    State,
    load_checkpoint,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
    save_weights,
)
from pipeline.config import Paths, Recipe, TrainConfig
from pipeline.data import Split, digests, load_split
from pipeline.device import Placement, choose
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate
from pipeline.files import remove, write_bytes, write_json
from pipeline.model import Network, build, eager_predictor

WARM_UP = 0.25  # of the steps, in which one-cycle climbs to its peak


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


@dataclass(frozen=True)
class Summary:
    """What a finished run is worth, and what it was made of."""

    run: str
    recipe: str
    dataset: str
    seed: int
    device: str
    threads: int
    torch: str
    steps: int
    parameters: int
    classes: tuple[str, ...]
    train_seconds: float  # in the training loop; evaluation is not counted
    validation_accuracy: float  # fraction of images, 0 to 1
    test_accuracy: float  # fraction of images, 0 to 1
    test_loss: float  # mean negative log-likelihood, in nats
    weights_sha256: str
    data_sha256: dict[str, str]


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
    done = (step + 0.5) / steps
    if done < WARM_UP:
        return recipe.lr * (0.04 + 0.96 * done / WARM_UP)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order (count,) in which `epoch` visits the images: a function of seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


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
    images = torch.from_numpy(train_split.images).to(device)  # the whole split, uint8
    labels = torch.from_numpy(train_split.labels).to(device)
    batch_size = min(recipe.batch_size, len(train_split))
    steps_per_epoch = len(train_split) // batch_size
    steps = max(1, round(recipe.epochs * steps_per_epoch))

    torch.manual_seed(config.seed)
    model = build(recipe, len(train_split.classes)).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    optimizer = make_optimizer(model, recipe)
    loss_function = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    if state:
        model.load_state_dict({name: state.tensors[f"model.{name}"] for name in model.state_dict()})
        restore_optimizer(optimizer, state.tensors)
    first, seconds = (state.step, state.seconds) if state else (0, 0.0)
    clock = _Clock(seconds)
    order = shuffled(len(train_split), config.seed, first // steps_per_epoch)

    for step in range(first, steps):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            order = shuffled(len(train_split), config.seed, epoch)
        batch = order[position * batch_size : (position + 1) * batch_size].to(device)
        lr = learning_rate(recipe, step, steps, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout draws the same after a resume

        model.train()
        optimizer.zero_grad()
        outputs = model(images[batch])
        loss = loss_function(outputs, labels[batch])
        loss.backward()
        optimizer.step()

        if not math.isfinite(loss.item()):
            raise PipelineError(
                f"the loss is {loss.item()} at step {step + 1} of {steps} with learning rate "
                f"{lr:.3g}: try a smaller --lr; the last checkpoint is kept"
            )
        done = step + 1
        progress = Progress(
            epoch=done / steps_per_epoch,
            epochs=steps / steps_per_epoch,
            step=done,
            loss=loss.item(),
            lr=lr,
            images_per_second=(done - first) * batch_size / (clock.seconds() - seconds),
            seconds=clock.seconds(),
        )
        if done % steps_per_epoch == 0 or done == steps:
            with clock.paused():
                accuracy = evaluate(
                    eager_predictor(model.eval(), device), validation.images, validation.labels
                ).accuracy
                progress = replace(progress, validation_accuracy=accuracy)
                if done < steps:
                    save(snapshot(done, clock.seconds(), model, optimizer))
        on_progress(progress)
        if is_stopped() and done < steps:
            save(snapshot(done, clock.seconds(), model, optimizer))
            raise KeyboardInterrupt
    return model.eval(), progress


def snapshot(
    step: int, seconds: float, model: nn.Module, optimizer: torch.optim.Optimizer
) -> State:
    """The state of a run after `step` optimizer steps."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return State(step, seconds, {**weights, **optimizer_tensors(optimizer)})


class _Clock:
    """Seconds of training, without the pauses for evaluation and for writing."""

    def __init__(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        seconds = self.seconds()
        self._start = before - seconds
        yield
        self._start = time.perf_counter() - seconds


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came: the first one lets the step end, the second is at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(
    paths: Paths,
    config: TrainConfig,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
    on_epoch: Callable[[Progress], None] = lambda progress: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Train into `runs/<run>/` and score the result on the test split, which is read once.

    With `resume`, a finished run is returned as it is and an interrupted one goes on exactly.
    """
    if resume and paths.summary.exists():
        return _finished(paths, config)
    folder = paths.data(config.dataset)
    train_split = load_split(config.dataset, folder, "train")
    validation = load_split(config.dataset, folder, "validation")
    placement = choose(config.device)
    report(f"training {paths.run} with recipe {config.recipe} on {placement}")
    identity = _identity(config, placement)
    state = load_state(paths, identity) if resume else None
    if resume:
        report(
            f"resuming after step {state.step}" if state else "no checkpoint yet: from the start"
        )
    else:
        _forget(paths)
    write_json(paths.run_config, config.record())
    history = _history(paths, state.step if state else 0)

    def record(progress: Progress) -> None:
        if progress.validation_accuracy is None:
            on_step(progress)
            return
        history.append(asdict(progress))
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_bytes(paths.metrics, lines.encode())
        on_epoch(progress)

    with deferred_interrupt() as is_stopped:
        model, last = train(
            config,
            train_split,
            validation,
            placement,
            state,
            record,
            lambda new: save_state(paths, new, identity),
            is_stopped,
        )
    return _conclude(paths, config, placement, model, last)


def _conclude(
    paths: Paths, config: TrainConfig, placement: Placement, model: Network, last: Progress
) -> Summary:
    """Score `model` on the test split, write its weights, and say last of all that it is done."""
    test = load_split(config.dataset, paths.data(config.dataset), "test")
    metrics = evaluate(eager_predictor(model, placement.device), test.images, test.labels)
    summary = Summary(
        run=paths.run,
        recipe=config.recipe,
        dataset=config.dataset,
        seed=config.seed,
        device=placement.description,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        steps=last.step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=test.classes,
        train_seconds=round(last.seconds, 3),
        validation_accuracy=last.validation_accuracy or 0.0,
        test_accuracy=metrics.accuracy,
        test_loss=metrics.loss,
        weights_sha256=save_weights(paths, model, config, test.classes),
        data_sha256=digests(config.dataset),
    )
    write_json(paths.summary, asdict(summary))
    remove(paths.checkpoint)
    return summary


def _identity(config: TrainConfig, placement: Placement) -> dict[str, Any]:
    """What decides the weights bit for bit: a resume under another one is refused."""
    return {
        **config.record()["settings"],
        "recipe": config.recipe,
        "dataset": config.dataset,
        "seed": config.seed,
        "device": placement.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": digests(config.dataset),
    }


def _finished(paths: Paths, config: TrainConfig) -> Summary:
    checkpoint = load_checkpoint(paths)
    if checkpoint.config.record() != config.record():
        raise PipelineError(
            f"run {paths.run} is finished, with other settings (see {paths.run_config}): "
            "choose another --run, or train without --resume to replace it"
        )
    fields = {name: checkpoint.summary[name] for name in Summary.__dataclass_fields__}
    return Summary(**fields)


def _forget(paths: Paths) -> None:
    """Remove what an earlier run of this name left, its claim to be finished first."""
    for path in (paths.summary, paths.weights, paths.metrics, paths.checkpoint):
        remove(path)


def _history(paths: Paths, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to `step`."""
    if not step or not paths.metrics.exists():
        return []
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return [line for line in lines if line["step"] <= step]
