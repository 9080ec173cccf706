"""Networks with all preprocessing inside: uint8 images in, log-probabilities out."""

# Shape letters: B batch, C channels, H height, W width, K classes.

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.evaluate import Predictor
from pipeline.training.recipes import Recipe

# Of MNIST's training pixels, scaled to 0..1. They are part of the model: no client needs them.
MEAN, STD = 0.1307, 0.3081


class Network(nn.Module):
    """Base class of the networks: one signature, with all preprocessing inside.

    Subclasses define `features` and `classifier`, or their own `logits`. The temperature is 1.0
    until it is fitted. The computation runs in the dtype of the buffers, so `.double()` makes a
    float64 reference of the same weights.
    """

    features: nn.Module
    classifier: nn.Module
    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN))
        self.register_buffer("std", torch.tensor(STD))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, 1, 28, 28) to log-probabilities (B, K)."""
        x = images.to(self.mean.dtype) / 255.0  # (B, 1, 28, 28): paper 0.0, ink 1.0
        x = (x - self.mean) / self.std
        return torch.log_softmax(self.logits(x) / self.temperature, dim=-1)  # (B, K)

    def logits(self, x: Tensor) -> Tensor:
        """Map normalized images (B, 1, 28, 28) to logits (B, K)."""
        scores: Tensor = self.classifier(self.features(x).flatten(1))
        return scores


class DigitNorm(nn.BatchNorm2d):
    """Batch normalization by the digits of a batch only, not by the non-digits after them.

    `outliers` is the number of non-digits per digit. Non-digits vary so much that common statistics
    would fit neither.
    """

    def __init__(self, channels: int, momentum: float, outliers: float) -> None:
        super().__init__(channels, momentum=momentum)
        self.outliers = outliers

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.outliers):
            return super().forward(x)
        count = round(len(x) / (1 + self.outliers))
        running = (self.running_mean, self.running_var, self.momentum)
        settings = (self.weight, self.bias, running, count, self.eps)
        normalized: Tensor = _ByDigits.apply(x, *settings)  # type: ignore[no-untyped-call]  # torch's
        return normalized


class _ByDigits(torch.autograd.Function):
    """Normalization of rows (B, C, H, W) by the first `count` of them, with all gradients.

    Gradients also flow through their statistics: otherwise the non-digits would shift these without
    limit. `running` (two statistics (C,) and a momentum) is updated from them. The backward pass is
    written by hand, since autograd's takes twice as long.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Any, count: int, eps: float
    ) -> Tensor:
        running_mean, running_var, momentum = running
        _, mean, scale = torch.native_batch_norm(
            x[:count], None, None, running_mean, running_var, True, momentum, eps
        )  # (C,) each; the scale is 1 / deviation
        variance = scale.pow(-2) - eps
        ctx.save_for_backward(x, weight, mean, scale, variance)
        ctx.count, ctx.eps = count, eps
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, variance = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, variance, mean, scale, False, ctx.eps, [True] * 3
        )
        digits = x[: ctx.count]
        each = weight * scale / (digits.numel() / len(weight))  # (C,): the share of one pixel
        slope = each * of_weight * scale
        shift = (each * of_bias - slope * mean).view(-1, 1, 1)
        of_x[: ctx.count].sub_(torch.addcmul(shift, digits, slope.view(-1, 1, 1)))
        return of_x, of_weight, of_bias, None, None, None


class Cnn(Network):
    """A small CNN that shrinks the image early: four convolutions, then maximum and mean.

    With `padded`, it sees the border as well as the middle, at more than twice the cost. If trained
    with outliers (images of none of its classes), it has one more score for them: see `share_none`.
    """

    features: nn.Sequential
    classifier: nn.Linear

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        a, b, c, d = recipe.channels
        pad, side = (1, 7) if recipe.padded else (0, 3)
        self.knows_none = recipe.outliers > 0

        def normalize(channels: int) -> list[nn.Module]:
            return [DigitNorm(channels, recipe.norm_momentum, recipe.outliers), nn.ReLU()]

        self.features = nn.Sequential(
            nn.Conv2d(1, a, 5, stride=2, padding=2 * pad),  # (B, a, 12, 12); padded 14
            nn.ReLU(),
            nn.Conv2d(a, b, 3, padding=pad, bias=False),  # (B, b, 10, 10); 14
            nn.MaxPool2d(2),  # (B, b, 5, 5); 7; before the normalization: cheaper
            *normalize(b),
            nn.Dropout(recipe.dropout),
            nn.Conv2d(b, c, 3, padding=1, bias=False),  # (B, c, 5, 5); 7
            *normalize(c),
            nn.Conv2d(c, d, 3, padding=pad, bias=False),  # (B, d, 3, 3); 7
            *normalize(d),
        )
        self.maximum, self.mean_pool = nn.MaxPool2d(side), nn.AvgPool2d(side)
        self.dropout = nn.Dropout(recipe.dropout)
        self.classifier = nn.Linear(2 * d, classes + self.knows_none)

    def logits(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.cat([self.maximum(x), self.mean_pool(x)], dim=1)  # (B, 2 d, 1, 1)
        # Channels last: then the gradient is too, and the pools need not copy it.
        x = x.permute(0, 2, 3, 1).flatten(1)  # (B, 2 d)
        scores: Tensor = self.classifier(self.dropout(x))
        return share_none(scores) if self.knows_none else scores  # (B, K)


def share_none(scores: Tensor) -> Tensor:
    """Return log-probabilities (B, K) of K classes, from scores (B, K + 1).

    The last score is for none of the classes; its probability is shared equally among all K.
    """
    logs = torch.log_softmax(scores, dim=1)
    classes = logs[:, :-1]
    part = logs[:, -1:] - math.log(classes.shape[1])
    # The same as logaddexp, which in ONNX would be the logarithm of a sum that may be 0.
    return classes + functional.softplus(part - classes)


class ClassicCnn(Network):
    """The two-convolution network of PyTorch's MNIST example, used as the baseline.

    https://github.com/pytorch/examples/blob/main/mnist/main.py
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        a, b = recipe.channels
        self.features = nn.Sequential(
            nn.Conv2d(1, a, 3),  # (B, a, 26, 26)
            nn.ReLU(),
            nn.Conv2d(a, b, 3),  # (B, b, 24, 24)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, b, 12, 12)
            nn.Dropout(0.25),
        )
        self.classifier = nn.Sequential(
            nn.Linear(b * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)
        )


class RecordCnn(Network):
    """The network of a 0.76-second training record: https://github.com/tuomaso/train_mnist_fast."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        a, b = recipe.channels
        self.features = nn.Sequential(
            nn.Conv2d(1, a, 5),  # (B, a, 24, 24)
            nn.MaxPool2d(2),  # (B, a, 12, 12)
            nn.ReLU(),
            nn.Conv2d(a, b, 3),  # (B, b, 10, 10)
            nn.MaxPool2d(2),  # (B, b, 5, 5)
            nn.ReLU(),
        )
        hidden = nn.Linear(b * 5 * 5, 256)
        self.classifier = nn.Sequential(hidden, nn.ReLU(), nn.Linear(256, classes))


class Net(Network):
    """The two-layer network of the learner's note: 784-128-10."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        (hidden,) = recipe.channels
        self.layer1 = nn.Linear(28 * 28, hidden)
        self.layer2 = nn.Linear(hidden, classes)

    def logits(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer2(torch.relu(self.layer1(x.flatten(1))))
        return scores


class StripCnn(Network):
    """A convolutional network over a strip, for CTC: a score for each class and the blank, a step.

    It shrinks the strip early on, to a step for every three columns, and gives up its height before
    the last layers. A step sees 35 columns.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        a, b, c, d, e = recipe.channels

        def convolve(before: int, after: int, kernel: tuple[int, int], **how: Any) -> nn.Module:
            norm = nn.BatchNorm2d(after, momentum=recipe.norm_momentum)
            return nn.Sequential(
                nn.Conv2d(before, after, kernel, bias=False, **how), norm, nn.ReLU()
            )

        self.features = nn.Sequential(
            convolve(1, a, (5, 5), stride=(2, 3), padding=2),  # (B, a, 14, 94)
            convolve(a, b, (3, 3), stride=(2, 1), padding=1),  # (B, b, 7, 94)
            convolve(b, c, (3, 3), padding=(0, 1)),  # (B, c, 5, 94)
            nn.MaxPool2d((2, 1), ceil_mode=True),  # (B, c, 3, 94)
            convolve(c, d, (3, 3), padding=(0, 1)),  # (B, d, 1, 94)
            nn.Dropout(recipe.dropout),
            convolve(d, e, (1, 5), padding=(0, 2)),  # (B, e, 1, 94)
            nn.Dropout(recipe.dropout),
        )
        self.classifier = nn.Linear(e, classes + 1)

    def logits(self, x: Tensor) -> Tensor:
        """Map normalized strips (B, 1, 28, 280) to scores (B, 94, K + 1)."""
        x = self.features(x).squeeze(2).transpose(1, 2)  # (B, 94, e)
        scores: Tensor = self.classifier(x)
        return scores


def build(recipe: Recipe, classes: int) -> Network:
    """Build the recipe's network with random weights from torch's global generator."""
    networks = {
        "cnn": Cnn,
        "classic": ClassicCnn,
        "record": RecordCnn,
        "net": Net,
        "strip": StripCnn,
    }
    return networks[recipe.network](recipe, classes)


def eager_predictor(model: nn.Module, device: torch.device | None = None) -> Predictor:
    """Return a predictor that runs `model` in its current mode on `device` (default: the CPU)."""
    place = device or torch.device("cpu")
    model.to(place)

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs: np.ndarray = model(torch.from_numpy(images).to(place)).cpu().numpy()
        return outputs

    return predict
