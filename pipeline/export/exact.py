"""The exact variant: a network of whole numbers, whose answers are equal on every runtime.

A float32 holds every whole number up to 2^24. Where weights and activations are whole numbers and
no sum can reach 2^24, no addition rounds, so the order in which a runtime adds does not matter.
`to_exact` makes such a network of a trained one, without training (see docs/exact.md):

- Scaling and batch normalization are folded into the weights of the layer before or after them.
- `Sums` is a convolution or linear layer. Its weights and what it is given have at most 11 bits:
  TF32, to which GPUs round the factors of a product, keeps as many.
- `Scale` and `Round` make 8 bits of the sums: times a power of two for each channel, clipped,
  rounded down. What one step of them stands for follows from calibration images.
- The sums of the last layer are the scores. What the trained network makes of them, such as
  log-probabilities, is computed as before, in floating point: that part is not exact.
"""

# Shape letters: N images, C channels or features, H height, W width.

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from pipeline.core.errors import CheckFailedError
from pipeline.core.signature import SCORES, TensorSpec

LARGEST_SUM = 2**24  # a sum must stay below: float32 does not hold every whole number above
LARGEST_FACTOR = 2**11 - 1  # of a product, so that TF32 does not round it
LARGEST_ACTIVATION = 2**8 - 1
_BATCH = 64  # images in a calibration step
Interval = tuple[Tensor, Tensor]  # least and largest value of each number, float64 (1, C, H, W)


class Step(nn.Module):
    """A step of an exact network; one that never falls where its input rises has these bounds."""

    def bounds(self, low: Tensor, high: Tensor) -> Interval:
        """Return the least and the largest value of each result, given those of the input."""
        return self(low).double(), self(high).double()


class Pixels(Step):
    """Images as whole numbers: bytes as they are, other numbers in steps of a power of two."""

    step: Tensor

    def __init__(self, step: float, is_byte: bool) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(step))
        self.is_byte = is_byte

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.step.dtype)
        if self.is_byte:
            return x
        return torch.floor(torch.clamp(x / self.step + 0.5, -LARGEST_FACTOR, LARGEST_FACTOR))


class Centre(Step):
    """Whole numbers minus the one that stands for zero, which a convolution pads with."""

    zero: Tensor

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.register_buffer("zero", zero.float())  # (1, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.zero


class Sums(Step):
    """A convolution, or a linear layer, whose weights and bias are whole numbers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, how: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.how = how  # stride, padding, dilation and groups; None for a linear layer

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.weight, self.bias)

    def combine(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the layer's sums with these weights instead of its own."""
        if self.how is None:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, *self.how)

    def bounds(self, low: Tensor, high: Tensor) -> Interval:
        """Return what no part of a sum can leave, in whatever order its products are added."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        weight, bias = self.weight.double(), self.bias.double()
        rising, falling, none = weight.clamp(min=0), weight.clamp(max=0), torch.zeros_like(bias)
        least = self.combine(high, falling, bias.clamp(max=0)) + self.combine(low, rising, none)
        most = self.combine(high, rising, bias.clamp(min=0)) + self.combine(low, falling, none)
        return least, most


class Scale(Step):
    """Numbers times a power of two for each channel, or times -1."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float())  # (1, C, 1, 1) or (1, C)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Round(Step):
    """Numbers clipped and rounded down."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(torch.clamp(x, self.low, self.high))


class PoolSum(Step):
    """The sum over each window of a mean pool, times a power of two and rounded down."""

    ones: Tensor

    def __init__(self, window: Tensor, stride: Any, scale: float) -> None:
        super().__init__()
        self.register_buffer("ones", window)  # float32 (C, 1, h, w)
        self.stride, self.scale = stride, scale  # without a stride, the window is the whole map

    def forward(self, x: Tensor) -> Tensor:
        if self.stride is None:
            x = x.sum((2, 3), keepdim=True)
        else:
            x = functional.conv2d(x, self.ones.to(x.dtype), None, self.stride, groups=x.shape[1])
        return torch.floor(x * self.scale + 0.5) if self.scale < 1 else x


@dataclass(frozen=True)
class _Whole:
    """Whole numbers in the new network, each with what it stands for: scale * number + offset."""

    node: fx.Node
    scale: Tensor  # float64 (1, C, H, W) or (1, C)
    offset: Tensor  # the same


@dataclass(frozen=True)
class _Layer:
    """A layer that is not rounded yet: sign * max-pools(its sums), in the trained network's units.

    What follows it up to the next ReLU is folded into it.
    """

    source: _Whole
    weight: Tensor  # float64, for the source's whole numbers
    bias: Tensor  # float64 (C,)
    how: tuple[Any, ...] | None  # as in Sums
    sign: Tensor  # float64 (C,), 1 or -1: a negative scale turns a maximum into a minimum
    pools: tuple[tuple[Any, ...], ...] = ()  # the arguments of the max-pools after it


_UNCHANGED = {"to", "dropout", "feature_dropout", "clone", "contiguous", "detach", "alias"}
_SHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose"}
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"}
_LAYERS = {"conv2d", "linear", "batch_norm", *_POOLS}


def to_exact(
    program: torch.export.ExportedProgram, images: np.ndarray, largest_factor: int = LARGEST_FACTOR
) -> fx.GraphModule:
    """Convert a classifier to whole numbers; the result answers (outputs, int32 scores).

    The ranges of activations are measured on calibration `images` (N, ...). Raises CheckFailedError
    without images, and for the first operation that cannot be converted, by its name.
    """
    if not len(images):
        raise CheckFailedError("exact needs images for its calibration: there are none")
    source = program.module()
    assert isinstance(source, fx.GraphModule)
    with torch.no_grad():
        return _Converter(source, torch.from_numpy(images), largest_factor).convert()


def scores_of(network: fx.GraphModule, images: TensorSpec) -> TensorSpec:
    """Return the second output of an exact network."""
    blank = torch.zeros(1, *images.shape, dtype=getattr(torch, images.dtype))
    return TensorSpec(SCORES, "int32", tuple(network(blank)[1].shape[1:]))


def require_bounds(network: fx.GraphModule, images: TensorSpec) -> int:
    """Return the largest magnitude that a sum of an exact network can reach, for any images.

    Computed from the weights. Raises CheckFailedError, with the layer's name, if it is 2^24 or
    more, or if a weight or bias is not a whole number.
    """
    largest = 0.0
    ranges: dict[fx.Node, Interval] = {}
    for node in network.graph.nodes:
        if node.name == SCORES:
            break
        ranges[node] = _propagate(network, node, ranges, images)
        layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Sums):
            largest = max(largest, *(float(bound.abs().max()) for bound in ranges[node]))
            if largest >= LARGEST_SUM:
                raise CheckFailedError(f"{node.name}: a sum may reach {largest:,.0f}, over 2^24")
            if any((values != values.round()).any() for values in (layer.weight, layer.bias)):
                raise CheckFailedError(f"{node.name}: a weight is not a whole number")
    return int(largest)


def _propagate(
    network: nn.Module, node: fx.Node, ranges: Mapping[fx.Node, Interval], images: TensorSpec
) -> Interval:
    """Return the range of a node's whole numbers, from those of the nodes before it."""
    if node.op == "placeholder":
        dtype = np.dtype(images.dtype)
        limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        ones = torch.ones(1, *images.shape, dtype=torch.float64)
        low, high = ones * float(limits.min), ones * float(limits.max)
    elif node.op == "call_module":
        step = network.get_submodule(str(node.target))
        assert isinstance(step, Step)
        low, high = step.bounds(*ranges[node.args[0]])  # type: ignore[index]
    else:
        function: Any = node.target
        low = function(*fx.map_arg(node.args, lambda given: ranges[given][0]))
        high = function(*fx.map_arg(node.args, lambda given: ranges[given][1]))
    return low, high


class _Recorder(fx.Interpreter):
    """Runs of the trained network: its constants, and the shape and range of all other values."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.constants: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...] | None] = {}  # without the batch
        self.ranges: dict[fx.Node, tuple[float, float]] = {}  # with 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "placeholder" and not any(each in self.shapes for each in n.all_input_nodes):
            self.constants[n] = value
            return value
        self.shapes[n] = None
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape[1:])
            low, high = self.ranges.get(n, (0.0, 0.0))
            self.ranges[n] = min(low, float(value.min())), max(high, float(value.max()))
        return value


class _Converter:
    """The conversion of one network, node by node."""

    def __init__(self, source: fx.GraphModule, images: Tensor, largest_factor: int) -> None:
        self.source, self.largest_factor = source, largest_factor
        recorder = _Recorder(source)
        for batch in torch.split(images, _BATCH):
            recorder.run(batch)
        self.constants, self.observed = recorder.constants, recorder.ranges
        self.shapes = {node: shape for node, shape in recorder.shapes.items() if shape is not None}
        dtype, form = str(images.dtype).removeprefix("torch."), tuple(images.shape[1:])
        self.images = TensorSpec("images", dtype, form)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.ranges: dict[fx.Node, Interval] = {}
        self.values: dict[fx.Node, _Whole | _Layer] = {}

    def convert(self) -> fx.GraphModule:
        """Return the exact network; raise CheckFailedError for what cannot be converted."""
        nodes = list(self.shapes)
        last = max((i for i, node in enumerate(nodes) if _name(node) in _LAYERS), default=0)
        while last + 1 < len(nodes) and _name(nodes[last + 1]) in _SHAPES | _UNCHANGED:
            last += 1
        for node in nodes[: last + 1]:
            self.values[node] = self.convert_node(node, *self.read_arguments(node))
        value = self.values[nodes[last]]
        scores = self.round(nodes[last], value, 0, 0) if isinstance(value, _Layer) else value
        if scores.scale.ndim != 2:
            raise _refusal(nodes[last], "the last layer must have a score for each class")
        integers = (scores.node, torch.int32)
        cast = torch.ops.aten.to.dtype
        whole = self.graph.create_node("call_function", cast, integers, name=SCORES)
        tail = self.graph.call_function(operator.mul, (scores.node, self.keep(scores.scale)))
        if scores.offset.any():
            tail = self.graph.call_function(operator.add, (tail, self.keep(scores.offset)))
        copies = {nodes[last]: tail}

        def copy(node: fx.Node) -> Any:
            if node not in copies and node not in self.constants:
                raise _refusal(node, "what follows the last layer must follow from it alone")
            return copies.get(node) or self.keep(self.constants[node])

        for node in nodes[last + 1 :]:
            copies[node] = self.graph.node_copy(node, copy)
        results: Any = self.source.graph.output_node().args[0]
        self.graph.output((copies[results[0]], whole))
        return fx.GraphModule(self.root, self.graph)

    def read_arguments(self, node: fx.Node) -> list[Any]:
        """Return a node's arguments: values of constants, and of the others what they became."""
        known = {**self.constants, **self.values}
        return list(fx.map_arg(node.args, known.get))

    def convert_node(self, node: fx.Node, x: Any = None, *more: Any) -> Any:
        """Convert one operation of the trained network, on `x` and more arguments."""
        name, shape = _name(node), self.shapes[node]
        if node.op == "placeholder":
            return self.take_images(node)
        if name in _UNCHANGED:
            return x
        if name in ("conv2d", "linear"):
            return self.fold(node, *more)
        if name in ("add", "sub", "mul", "div") and not node.kwargs:
            return self.scale(node, *_read_affine(node, name, x, *more))
        if name == "batch_norm":
            weight, bias, mean, variance, _, _, eps, _ = more
            factor = (1.0 if weight is None else weight) / (variance.double() + eps).sqrt()
            shift = (0.0 if bias is None else bias) - mean * factor
            form = (1, -1, *[1] * (len(shape) - 1))
            return self.scale(node, x, factor.view(form), shift.view(form))
        if name == "relu":
            windows = [math.prod(self.window(user)) for user in node.users]
            high = min([LARGEST_ACTIVATION, *(LARGEST_FACTOR // w for w in windows if w < 17)])
            return self.round(node, self.as_layer(node, x), 0, high)
        if name == "max_pool2d":
            return self.pool_largest(node, *more)
        if name == "avg_pool2d":
            return self.pool_mean(node, *more)
        if name == "mean" and {axis % 4 for axis in more[0]} == {2, 3}:
            return self.pool_mean(node)
        if name == "adaptive_avg_pool2d" and shape[1:] == (1, 1):
            return self.pool_mean(node)
        if name == "cat":
            return self.move(node, torch.cat, *more)
        if name in ("permute", "transpose"):
            return self.move(node, node.target, *more)
        if name in _SHAPES:
            return self.move(node, torch.reshape, (-1, *shape))
        raise _refusal(node)

    def take_images(self, node: fx.Node) -> _Whole:
        """Begin with the images as whole numbers."""
        is_byte = self.images.dtype in ("uint8", "int8")
        largest = max(map(abs, self.observed[node])) or 1.0
        step = 1.0 if is_byte else 2.0 ** math.ceil(math.log2(largest / LARGEST_FACTOR))
        images = self.graph.placeholder(self.images.name)
        self.ranges[images] = _propagate(self.root, images, self.ranges, self.images)
        scale = torch.full((1, *self.shapes[node]), step, dtype=torch.float64)
        return _Whole(self.add(Pixels(step, is_byte), images), scale, torch.zeros_like(scale))

    def add(self, step: Step, x: fx.Node) -> fx.Node:
        """Add a step on `x` to the new network."""
        name = f"{type(step).__name__.lower()}_{len(list(self.root.children())) + 1}"
        self.root.add_module(name, step)
        new = self.graph.call_module(name, (x,))
        self.ranges[new] = _propagate(self.root, new, self.ranges, self.images)
        return new

    def call(self, function: Any, *args: Any) -> fx.Node:
        """Add a function that moves or selects whole numbers to the new network."""
        new = self.graph.call_function(function, args)
        self.ranges[new] = _propagate(self.root, new, self.ranges, self.images)
        return new

    def keep(self, value: Any) -> Any:
        """Return a node for a constant of the part that is not exact."""
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(self.root._buffers) + 1}"
        self.root.register_buffer(name, value.float() if value.is_floating_point() else value)
        return self.graph.get_attr(name)

    def close(self, node: fx.Node) -> _Whole:
        """Return what a node became as whole numbers: signed 8 bits if it is a layer's sums."""
        value = self.values.get(node)
        if isinstance(value, _Layer):
            least = -(LARGEST_ACTIVATION // 2)
            value = self.values[node] = self.round(node, value, least, -least)
        if value is None:
            raise _refusal(node, "it does not follow from the images")
        return value

    def fold(
        self,
        node: fx.Node,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = (1, 1),
        padding: Any = (0, 0),
        dilation: Any = (1, 1),
        groups: int = 1,
    ) -> _Layer:
        """Return a layer whose weights are for the whole numbers that it is given."""
        source = self.close(node.args[0])  # type: ignore[arg-type]
        weight, count = weight.double(), len(weight)
        if source.scale.ndim == 2 == weight.ndim:
            how, scale, offset = None, source.scale, source.offset
        elif source.scale.ndim == 4:
            how = (stride, padding, dilation, groups)
            if any(padding) and source.offset.any():
                source = self.centre(node, source)
            scale, offset = (
                self.channels(node, each).view(groups, -1).repeat_interleave(count // groups, 0)
                for each in (source.scale, source.offset)
            )
            scale, offset = scale[:, :, None, None], offset[:, :, None, None]
        else:
            raise _refusal(node)
        constant = torch.zeros(count) if bias is None else bias
        constant = constant.double() + (weight * offset).flatten(1).sum(1)
        ones = torch.ones(count, dtype=torch.float64)
        return _Layer(source, weight * scale, constant, how, ones)

    def centre(self, node: fx.Node, source: _Whole) -> _Whole:
        """Shift whole numbers, so that 0 stands for (almost) zero: a convolution pads with 0."""
        zero = torch.round(-source.offset / source.scale)
        one = self.channels(node, zero).view(1, -1, 1, 1)
        shifted = self.add(Centre(one), source.node)
        return _Whole(shifted, source.scale, source.offset + zero * source.scale)

    def channels(self, node: fx.Node, values: Tensor) -> Tensor:
        """Return the value of each channel (C,); raise CheckFailedError if it has several."""
        values = torch.broadcast_to(values, (1, *values.shape[1:]))
        rows = values[0].flatten(1) if values.ndim > 2 else values[0, :, None]
        if (rows != rows[:, :1]).any():
            raise _refusal(node, "it scales the places of a map differently")
        return rows[:, 0]

    def scale(self, node: fx.Node, value: Any, factor: Any, shift: Any) -> Any:
        """Return factor * value + shift."""
        form = (1, *self.shapes[node])
        factor, shift = (
            torch.broadcast_to(torch.as_tensor(each, dtype=torch.float64), form)
            for each in (factor, shift)
        )
        if isinstance(value, _Whole):
            return replace(value, scale=value.scale * factor, offset=value.offset * factor + shift)
        factor, shift = self.channels(node, factor), self.channels(node, shift)
        size = factor
        if value.pools:
            size, sign = factor.abs(), torch.where(factor < 0, -value.sign, value.sign)
            value, shift = replace(value, sign=sign), shift * sign
        weight = value.weight * size.view(-1, *[1] * (value.weight.ndim - 1))
        return replace(value, weight=weight, bias=value.bias * size + shift)

    def as_layer(self, node: fx.Node, value: Any) -> _Layer:
        """Return a value as a layer: whole numbers as one that scales each channel."""
        if isinstance(value, _Layer):
            return value
        scale, bias = self.channels(node, value.scale), self.channels(node, value.offset)
        ones = torch.ones_like(scale)
        if value.scale.ndim == 2:
            return _Layer(value, torch.diag(scale), bias, None, ones)
        how = ((1, 1), (0, 0), (1, 1), len(scale))
        return _Layer(value, scale.view(-1, 1, 1, 1), bias, how, ones)

    def round(self, node: fx.Node, layer: _Layer, low: int, high: int) -> _Whole:
        """Add a layer with whole weights, and what makes activations of its sums.

        `node` is the trained network's value that they stand for. Without limits, the sums are the
        scores. Each channel's weights have as many bits as its bound and TF32 allow.
        """
        is_last = not high
        mantissa, exponent = math.frexp(max(map(abs, self.observed[node])))
        largest = math.ldexp(math.ceil(mantissa * 256) / 256, exponent) or 1.0
        steps = 1.0 if is_last else high / largest
        weight, bias = layer.weight * steps, layer.bias * steps
        form = (-1, *[1] * (weight.ndim - 1))
        power = torch.log2(self.largest_factor / weight.abs().flatten(1).amax(1)).floor()
        power = torch.where(power.isfinite(), power, 0)
        power = power.min().expand(len(power)) if is_last else power
        while True:
            scale = 2.0**power
            half = 0.0 if is_last else layer.sign * scale / 2  # then rounding down is to nearest
            sums = Sums(
                (weight * scale.view(form)).round(), (bias * scale + half).round(), layer.how
            )
            least, most = sums.bounds(*self.ranges[layer.source.node])
            bound = torch.maximum(-least, most).transpose(0, 1).flatten(1).amax(1)
            too_large = bound >= LARGEST_SUM
            if not too_large.any():
                break
            power = power - (too_large.any() if is_last else too_large).double()
        new = self.add(sums, layer.source.node)
        shape = self.shapes[node]
        form = (1, -1, *[1] * (len(shape) - 1))
        unit = (1 / scale).view(form)
        if not is_last:  # before the pools, so that a runtime can fold it into the weights
            new = self.add(Scale(unit), new)
        for pool in layer.pools:
            new = self.call(torch.ops.aten.max_pool2d.default, new, *pool)
        if (layer.sign < 0).any():
            new = self.add(Scale(layer.sign.view(form)), new)
        if not is_last:
            new = self.add(Round(low, high), new)
            unit = torch.full_like(unit, 1 / steps)
        unit = unit.expand(1, *shape)
        return _Whole(new, unit, torch.zeros_like(unit))

    def window(self, node: fx.Node) -> list[int]:
        """Return the height and width over which a mean pool averages; [] for other operations."""
        arguments: Any = node.args
        if _name(node) == "avg_pool2d":
            return list(arguments[1])
        is_pool = _name(node) in ("mean", "adaptive_avg_pool2d")
        return list(self.shapes[arguments[0]][1:]) if is_pool else []

    def pool_largest(self, node: fx.Node, *how: Any) -> _Whole | _Layer:
        """Return a max-pool; one with a negative scale before it needs other whole numbers."""
        (given,) = node.all_input_nodes
        value = self.values[given]
        if isinstance(value, _Layer) and (value.sign > 0).all():
            return replace(value, pools=(*value.pools, how))
        whole = self.close(given)
        if (whole.scale < 0).any():
            half = LARGEST_ACTIVATION // 2
            whole = self.round(given, self.as_layer(node, whole), -half, half)
        form = (1, *self.shapes[node])
        scale, offset = (
            self.channels(node, each).view(1, -1, 1, 1).expand(form)
            for each in (whole.scale, whole.offset)
        )
        if tuple(how[0]) == self.shapes[given][1:]:  # faster than a pool
            return _Whole(self.call(torch.amax, whole.node, (2, 3), True), scale, offset)
        return _Whole(self.call(node.target, whole.node, *how), scale, offset)

    def pool_mean(
        self,
        node: fx.Node,
        window: Any = None,
        stride: Any = None,
        padding: Any = (0, 0),
        ceil: bool = False,
        *_: Any,
    ) -> _Whole:
        """Return a mean pool as a sum; the count of its window becomes a part of its scale."""
        (given,) = node.all_input_nodes
        whole, (channels, *side) = self.close(given), self.shapes[given]
        window = list(window or side)
        count = math.prod(window)
        largest = count * max(float(bound.abs().max()) for bound in self.ranges[whole.node])
        if any(padding) or ceil or len(_) > 1 or largest >= LARGEST_SUM:
            raise _refusal(node, "only a plain mean pool can be converted")
        scale = 2.0 ** -max(0, math.ceil(math.log2(largest / LARGEST_FACTOR)))
        steps = None if window == side else tuple(stride or window)
        step = PoolSum(torch.ones(channels, 1, *window), steps, scale)
        new, shape = self.add(step, whole.node), self.shapes[node]
        form = (1, -1, *[1] * (len(shape) - 1))
        if len(shape) == 1:
            new = self.call(torch.reshape, new, (-1, *shape))
        unit, offset = (
            self.channels(node, each).view(form).expand(1, *shape)
            for each in (whole.scale / (count * scale), whole.offset)
        )
        return _Whole(new, unit, offset)

    def move(self, node: fx.Node, function: Any, *args: Any) -> _Whole:
        """Return whole numbers at other places, with what they stand for."""
        parts = [self.close(given) for given in node.all_input_nodes]

        def apply(values: list[Any]) -> Any:
            return function(values if function is torch.cat else values[0], *args)

        nodes = [part.node for part in parts]
        new = self.call(function, nodes if function is torch.cat else nodes[0], *args)
        scale, offset = apply([p.scale for p in parts]), apply([p.offset for p in parts])
        if scale.shape != (1, *self.shapes[node]):
            raise _refusal(node, "it moves numbers from one image to another")
        return _Whole(new, scale, offset)


def _name(node: fx.Node) -> str:
    """Return the name of a node's operation, such as conv2d."""
    name = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(name, "__name__", name)).rstrip("_")


def _read_affine(node: fx.Node, name: str, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """Return the value, the factor and the shift of a sum, difference, product or quotient."""
    kinds = (_Whole, _Layer)
    if isinstance(x, kinds) == isinstance(y, kinds) or (name == "div" and isinstance(y, kinds)):
        raise _refusal(node, "it combines two layers")
    value, constant = (x, y) if isinstance(x, kinds) else (y, x)
    if name == "mul":
        return value, constant, 0.0
    if name == "div":
        return value, 1.0 / constant, 0.0
    if name == "add":
        return value, 1.0, constant
    return (value, 1.0, -constant) if value is x else (value, -1.0, constant)


def _refusal(node: fx.Node, why: str = "") -> CheckFailedError:
    """Return the error for an operation that cannot be converted."""
    reason = why or "convolutions, linear layers, ReLU, pooling and batch normalization can be"
    return CheckFailedError(
        f"exact cannot convert {_name(node)} ({node.name}): {reason}. Leave out exact"
    )
