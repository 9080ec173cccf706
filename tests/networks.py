"""Networks that tests export: ours as ONNX, and somebody's residual network, sound and broken."""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.signature import IMAGES, TensorSpec, log_probabilities
from pipeline.export import graph
from pipeline.export.export import export_program, to_onnx
from pipeline.export.sample import Sample


def onnx_of(model: nn.Module) -> bytes:
    """The network as ONNX, in the name of our signature."""
    wanted = graph.Signature(IMAGES, log_probabilities(10), 18, 9)
    return to_onnx(export_program(model, IMAGES), wanted, {})


def residual_onnx(model: nn.Module) -> bytes:
    """Export a residual network, in the name of its own signature."""
    images = TensorSpec("images", "uint8", (3, 32, 32))
    wanted = graph.Signature(images, TensorSpec("logits", "float32", (5,)), 18, 9)
    return to_onnx(export_program(model, images), wanted, {})


class Residual(nn.Module):
    """Two residual blocks over images uint8 (B, 3, 32, 32); answers logits (B, 5)."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.44]).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255 - self.mean
        x = F.relu(self.norm(self.stem(x)))  # (B, 8, 16, 16)
        x = F.relu(self.first(x) + x)
        x = F.relu(self.second(x) + x)
        return self.answer(F.adaptive_avg_pool2d(x, 1))

    def answer(self, x: Tensor) -> Tensor:
        """Map pooled features (B, 8, 1, 1) to logits (B, 5)."""
        scores: Tensor = self.classifier(x.flatten(1))
        return scores


class Turncoat(Residual):
    """The same, with the opposite answers in float32."""

    def answer(self, x: Tensor) -> Tensor:
        scores = super().answer(x)
        return scores if scores.dtype == torch.float64 else -scores


class Swamped(Residual):
    """The same, rounded to whole numbers in float32 by a large constant that comes and goes."""

    def answer(self, x: Tensor) -> Tensor:
        return (super().answer(x) + 1.6e7) - 1.6e7


class Counting(Residual):
    """The same, with the opposite answer at every second call."""

    calls = 0

    def answer(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().answer(x) * (-1 if self.calls % 2 else 1)


class Tiring(Residual):
    """The same, with the opposite answers after its first eight calls."""

    calls = 0

    def answer(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().answer(x) * (-1 if self.calls > 8 else 1)


class ByThreads(Residual):
    """The same, with the opposite answers on one thread."""

    def answer(self, x: Tensor) -> Tensor:
        return super().answer(x) * (-1 if torch.get_num_threads() == 1 else 1)


class ByAddress(Residual):
    """The same, with the opposite answers to images that are not aligned to 16 bytes."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) * (-1 if pixels.data_ptr() % 16 else 1)


class Mixing(Residual):
    """The same with a reshape that mixes rows."""

    def answer(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(x.flatten().view(8, -1).t())
        return scores


def _filled(model: nn.Module) -> nn.Module:
    """The model with weights drawn from a seed and statistics of some images."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
        model.train()
        model(torch.from_numpy(residual_sample().images[:64]))
    return model


def residual() -> nn.Module:
    """A sound module."""
    return _filled(Residual())


def mixing() -> nn.Module:
    """A module with the same weights and a planted bug."""
    return with_residual_weights(Mixing)


def with_residual_weights(kind: type[Residual]) -> nn.Module:
    """Make a module of `kind` with the sound module's weights."""
    model = kind()
    model.load_state_dict(residual().state_dict())
    return model


def turncoat() -> nn.Module:
    """A module that is right in float64 only."""
    return with_residual_weights(Turncoat)


def swamped() -> nn.Module:
    """A module that float32 cannot compute."""
    return with_residual_weights(Swamped)


def counting() -> nn.Module:
    """A module whose answers depend on how often it was called."""
    return with_residual_weights(Counting)


def tiring() -> nn.Module:
    """A module whose answers change after a few calls."""
    return with_residual_weights(Tiring)


def by_threads() -> nn.Module:
    """A module whose answers depend on the number of threads."""
    return with_residual_weights(ByThreads)


def by_address() -> nn.Module:
    """A module whose answers depend on where its images lie in memory."""
    return with_residual_weights(ByAddress)


def unseeded() -> nn.Module:
    """A module with other weights each time."""
    return Residual()


def failing() -> nn.Module:
    """A factory that does not come to an end."""
    raise ValueError("no weights here")


def no_module() -> Any:
    """A factory of something else."""
    return 3


def residual_sample(count: int = 150) -> Sample:
    """Images for the residual network, five kinds of them under noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, count)
    kinds, noise = rng.integers(0, 128, (5, 3, 32, 32)), rng.integers(0, 128, (count, 3, 32, 32))
    images = (kinds[labels] + noise).astype(np.uint8)
    return Sample(images, labels, images)


def flat() -> nn.Module:
    """A module of flat floats (B, 12) that answers log-probabilities (B, 4)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 4), nn.LogSoftmax(dim=1))


class Stubborn(Residual):
    """The same, which stays in training mode."""

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(True)
        return self


def stubborn() -> nn.Module:
    """A module that .eval() does not reach."""
    return with_residual_weights(Stubborn)


class Moving(Residual):
    """The same, whose batch normalization uses and moves the statistics of each batch."""

    def forward(self, pixels: Tensor) -> Tensor:
        F.batch_norm(pixels.float(), *self.moved, training=True)
        return super().forward(pixels)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving", torch.zeros(2, 3))

    @property
    def moved(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, which a call changes."""
        return self.moving[0], self.moving[1]  # type: ignore[index]


def moving() -> nn.Module:
    """A module that each call changes."""
    torch.manual_seed(0)
    return Moving()


def batchwise() -> nn.Module:
    """A module that keeps no statistics, and so uses those of each batch."""
    model = residual()
    model.norm = nn.BatchNorm2d(8, track_running_stats=False)
    return model


class Several(Residual):
    """The same with its features, in a tuple, a dictionary or an object of transformers' kind."""

    def forward(self, pixels: Tensor) -> Any:
        scores = super().forward(pixels)
        return self.pack(hidden=scores[:, :, None], logits=scores)

    def pack(self, **outputs: Tensor) -> Any:
        return outputs


class InTuple(Several):
    def pack(self, **outputs: Tensor) -> Any:
        return tuple(outputs.values())


class ModelOutput(OrderedDict[str, Tensor]):
    """Behaves as transformers' class of this name: an ordered dictionary."""


class AsTransformers(Several):
    def pack(self, **outputs: Tensor) -> Any:
        return ModelOutput(outputs)


def several() -> nn.Module:
    """A module that answers a dictionary."""
    return with_residual_weights(Several)


def several_in_a_tuple() -> nn.Module:
    """A module that answers a tuple."""
    return with_residual_weights(InTuple)


def model_output() -> nn.Module:
    """A module that answers as transformers' do."""
    return with_residual_weights(AsTransformers)


def of_floats() -> nn.Module:
    """A module that refuses bytes."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3)


def double() -> nn.Module:
    """A module of float64."""
    return flat().double()


class Masked(nn.Linear):
    """A linear classifier that rules its last class out."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return scores + torch.tensor([0.0, 0.0, 0.0, -torch.inf])


def masked() -> nn.Module:
    """A module whose answers are not finite."""
    torch.manual_seed(0)
    return Masked(12, 4)
