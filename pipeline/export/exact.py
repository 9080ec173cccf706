"""The exact variant: a network of whole numbers, whose answers are equal on every runtime.

A float32 holds every whole number up to 2^24. Where weights and activations are whole numbers and
no sum can reach 2^24, no addition rounds, so the order in which a runtime adds does not matter.
`to_exact` makes such a network of a trained one, without training (see docs/exact.md):

- Scaling and batch normalization are folded into the weights of the layer before or after them.
- `Sums` is a convolution or linear layer. Its weights and what it is given have at most 11 bits:
  TF32, to which GPUs round the factors of a product, keeps as many.
- Its sums are brought back to 8 bits: times a power of two for each channel, clipped, rounded down.
  What one step of them stands for follows from calibration images.
- The sums of the last layer are the scores. What the trained network makes of them, such as
  log-probabilities, is computed as before, in floating point: that part is not exact.
"""

# Shape letters: N images, C channels or features, H height, W width.

import math
import operator
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
SIGNED = LARGEST_ACTIVATION // 2  # where an activation may be negative
_BATCH = 64  # images in a calibration step
_STEPS = 2**8  # of a largest value, which is rounded up: its last bits may differ between runs
_AFFINE = {"add", "sub", "mul", "div", "neg", "batch_norm"}
_UNCHANGED = {"to", "dropout", "feature_dropout", "clone", "contiguous", "detach", "alias"}
_RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}
_MOVES = {*_UNCHANGED, *_RESHAPES, "permute", "transpose", "cat"}
_MEANS = {"avg_pool2d", "adaptive_avg_pool2d", "mean"}
_LAYERS = {"conv2d", "linear", "batch_norm", "max_pool2d", *_MEANS}


class Sums(nn.Module):
    """A convolution, or a linear layer, whose weights and bias are whole numbers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, how: tuple[Any, ...]) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.how = how  # stride, padding, dilation and groups; empty for a linear layer

    def forward(self, x: Tensor) -> Tensor:
        return self.add_products(x.to(self.weight.dtype), self.weight, self.bias)

    def add_products(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's sums with these weights instead of its own."""
        if self.how:
            return functional.conv2d(x, weight, bias, *self.how)
        return functional.linear(x, weight, bias)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return what no part of a sum can leave, in whatever order its products are added."""
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        weight, bias = self.weight.double(), self.bias.double()
        rising, falling = weight.clamp(min=0), weight.clamp(max=0)
        least = self.add_products(high, falling, bias.clamp(max=0))
        most = self.add_products(high, rising, bias.clamp(min=0))
        return least + self.add_products(low, rising), most + self.add_products(low, falling)


class _Bounds(fx.Interpreter):
    """A run of an exact network on intervals: the least and largest value of each number."""

    def __init__(self, network: nn.Module, graph: fx.Graph, images: TensorSpec) -> None:
        super().__init__(network, graph=graph)
        dtype = np.dtype(images.dtype)
        limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        ones = torch.ones(1, *images.shape, dtype=torch.float64)
        self.images = ones * float(limits.min), ones * float(limits.max)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.images
        if n.op == "get_attr":
            return (getattr(self.module, str(n.target)),) * 2
        sides: list[Any] = [
            fx.map_arg(n.args, lambda given: self.env[given][side])  # noqa: B023
            for side in (0, 1)
        ]
        if n.op == "call_module":
            layer: Any = self.module.get_submodule(str(n.target))
            return layer.bounds(sides[0][0], sides[1][0])
        function: Any = n.target
        low, high = (function(*arguments) for arguments in sides)
        return torch.minimum(low, high), torch.maximum(low, high)


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
    how: tuple[Any, ...]  # as in Sums
    sign: Tensor  # float64 (C,), 1 or -1: a negative scale turns a maximum into a minimum
    pools: tuple[tuple[Any, ...], ...] = ()  # the arguments of the max-pools after it


def to_exact(program: torch.export.ExportedProgram, images: np.ndarray) -> fx.GraphModule:
    """Convert a classifier to whole numbers; the result answers (outputs, int32 scores).

    The sizes of activations are measured on calibration `images` (N, ...). Raises CheckFailedError
    without images, and for the first operation that cannot be converted, by its name.
    """
    if not len(images):
        raise CheckFailedError("exact needs images for its calibration: there are none")
    source = program.module()
    assert isinstance(source, fx.GraphModule)
    with torch.no_grad():
        return _Converter(source, torch.from_numpy(images)).convert()


def scores_of(network: fx.GraphModule, images: TensorSpec) -> TensorSpec:
    """Return the second output of an exact network."""
    blank = torch.zeros(1, *images.shape, dtype=getattr(torch, images.dtype))
    return TensorSpec(SCORES, "int32", tuple(network(blank)[1].shape[1:]))


def require_bounds(network: fx.GraphModule, images: TensorSpec) -> int:
    """Return the largest magnitude that a sum of an exact network can reach, for any images.

    Computed from the weights. Raises CheckFailedError, with the layer's name, if it is 2^24 or
    more, or if a weight is not a whole number, or a factor of a product has more than 11 bits.
    """
    bounds, largest = _Bounds(network, network.graph, images), 0
    for node in network.graph.nodes:
        if node.name == SCORES:
            break
        bounds.env[node] = bounds.run_node(node)
        layer = network.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, Sums):
            largest = max(largest, *(int(bound.abs().max()) for bound in bounds.env[node]))
            factors = (layer.weight, *bounds.env[node.args[0]])
            if largest >= LARGEST_SUM:
                raise CheckFailedError(f"{node.name}: a sum may reach {largest:,}, which is 2^24")
            if any((value != value.round()).any() for value in (*factors, layer.bias)):
                raise CheckFailedError(f"{node.name}: a weight is not a whole number")
            if max(float(factor.abs().max()) for factor in factors) > LARGEST_FACTOR:
                raise CheckFailedError(f"{node.name}: a factor has more than 11 bits")
    return largest


class _Recorder(fx.Interpreter):
    """Runs of the trained network: its constants, and the shape and size of all other values."""

    def __init__(self, network: fx.GraphModule, images: Tensor) -> None:
        super().__init__(network)
        self.constants: dict[fx.Node, Any] = {}
        self.moving: set[fx.Node] = set()  # the others: they follow from the images
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}  # of tensors, without the batch
        self.largest: dict[fx.Node, float] = {}  # magnitude
        for batch in torch.split(images, _BATCH):
            self.run(batch)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "placeholder" and self.moving.isdisjoint(n.all_input_nodes):
            self.constants[n] = value
            return value
        self.moving.add(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape[1:])
            self.largest[n] = max(float(value.abs().max()), self.largest.get(n, 0.0))
        return value


class _Converter:
    """The conversion of one network, node by node."""

    def __init__(self, source: fx.GraphModule, images: Tensor) -> None:
        self.source, self.seen = source, _Recorder(source, images)
        dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape[1:])
        self.root, self.graph = nn.Module(), fx.Graph()
        self.bounds = _Bounds(self.root, self.graph, TensorSpec("images", dtype, shape))
        self.values: dict[fx.Node, _Whole | _Layer] = {}

    def convert(self) -> fx.GraphModule:
        """Return the exact network; raise CheckFailedError for what cannot be converted."""
        nodes = list(self.seen.shapes)
        last = max((i for i, node in enumerate(nodes) if _name(node) in _LAYERS), default=0)
        while _name(follower := nodes[min(last + 1, len(nodes) - 1)]) in _MOVES:
            if nodes[last] not in follower.all_input_nodes:
                break
            last += 1
        for node in nodes[: last + 1]:
            self.values[node] = self.convert_node(node)
        value = self.values[nodes[last]]
        scores = self.round(nodes[last], value) if isinstance(value, _Layer) else value
        if scores.scale.ndim != 2:
            raise _refusal(nodes[last], "the last layer must have a score for each class")
        cast, integers = torch.ops.aten.to.dtype, (scores.node, torch.int32)
        whole = self.graph.create_node("call_function", cast, integers, name=SCORES)
        tail = self.graph.call_function(operator.mul, (scores.node, self.keep(scores.scale)))
        if scores.offset.any():
            tail = self.graph.call_function(operator.add, (tail, self.keep(scores.offset)))
        copies = {nodes[last]: tail}

        def copy(node: fx.Node) -> Any:
            if node in self.seen.moving and node not in copies:
                raise _refusal(node, "what follows the last layer must follow from it alone")
            return copies.get(node) or self.keep(self.seen.constants[node])

        for node in nodes[last + 1 :]:
            copies[node] = self.graph.node_copy(node, copy)
        results: Any = self.source.graph.output_node().args[0]
        self.graph.output((copies[results[0]], whole))
        return fx.GraphModule(self.root, self.graph)

    def convert_node(self, node: fx.Node) -> Any:
        """Convert one operation of the trained network."""
        if node.op == "placeholder":
            return self.take_images(node)
        name, known = _name(node), {**self.seen.constants, **self.values}
        args: Any = fx.map_arg(node.args, known.get)
        x, *more = args
        if name in _UNCHANGED:
            return x
        if name in _AFFINE:
            return self.scale(node, x, *more)
        if name in ("conv2d", "linear"):
            return self.fold(node, *more)
        if name == "relu":
            # The sum over a small window has 11 bits as well, if the activations have fewer.
            counts = [math.prod(self.window(user)) for user in node.users if _name(user) in _MEANS]
            limits = [LARGEST_FACTOR // count for count in counts if count <= 16]
            return self.round(node, self.as_layer(node, x), 0, min([LARGEST_ACTIVATION, *limits]))
        if name == "max_pool2d":
            return self.pool_largest(node, *more)
        if name in _MEANS:
            return self.pool_mean(node, *(more[1:] if name == "avg_pool2d" else ()))
        if name in ("cat", "permute", "transpose"):
            return self.move(node, torch.cat if name == "cat" else node.target, *more)
        if name in _RESHAPES:
            return self.move(node, torch.reshape, (-1, *self.seen.shapes[node]))
        raise _refusal(node)

    def take_images(self, node: fx.Node) -> _Whole:
        """Begin with the images as whole numbers: bytes, or steps of a power of two."""
        images = self.graph.placeholder("images")
        self.bounds.env[images] = self.bounds.images
        x, step = self.call(torch.ops.aten.to.dtype, images, torch.float32), 1.0
        if float(self.bounds.images[1].max()) > LARGEST_ACTIVATION:
            largest = self.seen.largest[node] or 1.0
            step = 2.0 ** math.ceil(math.log2(largest / LARGEST_FACTOR))
            x = self.call(operator.add, self.call(operator.mul, x, 1 / step), 0.5)
            x = self.call(torch.floor, self.call(torch.clamp, x, -LARGEST_FACTOR, LARGEST_FACTOR))
        scale = torch.full((1, *self.seen.shapes[node]), step, dtype=torch.float64)
        return _Whole(x, scale, torch.zeros_like(scale))

    def call(self, function: Any, *args: Any) -> fx.Node:
        """Add an operation on whole numbers to the new network: a layer, or a function."""
        if isinstance(function, Sums):
            name = f"layer_{len(list(self.root.children())) + 1}"
            self.root.add_module(name, function)
            new = self.graph.call_module(name, args)
        else:
            new = self.graph.call_function(function, args)
        self.bounds.env[new] = self.bounds.run_node(new)
        return new

    def keep(self, value: Any) -> Any:
        """Return a node for a tensor of the new network; another constant is itself."""
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(list(self.root.buffers(recurse=False))) + 1}"
        self.root.register_buffer(name, value.float() if value.is_floating_point() else value)
        node = self.graph.get_attr(name)
        self.bounds.env[node] = self.bounds.run_node(node)
        return node

    def spread(self, node: fx.Node, channels: Tensor) -> Tensor:
        """Return the value of each channel (C,) for each number of a node, (1, C, H, W)."""
        shape = self.seen.shapes[node]
        return channels.view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)

    def close(self, node: fx.Node) -> _Whole:
        """Return what a node became as whole numbers: signed 8 bits if it is a layer's sums."""
        value = self.values[node]
        if isinstance(value, _Layer):
            value = self.values[node] = self.round(node, value, -SIGNED, SIGNED)
        return value

    def fold(self, node: fx.Node, weight: Tensor, bias: Any = None, *how: Any) -> _Layer:
        """Return a convolution or linear layer on the whole numbers that it is given."""
        source = self.close(node.all_input_nodes[0])
        weight, count = weight.double(), len(weight)
        if weight.ndim != source.scale.ndim:
            raise _refusal(node)
        scale, offset = source.scale, source.offset
        if weight.ndim == 4:
            how = (*how, *((1, 1), (0, 0), (1, 1), 1)[len(how) :])
            if any(how[1]) and offset.any():  # it pads with 0, which must stand for zero
                zero = torch.round(-offset / scale)
                moved = self.keep(_channels(node, zero).view(1, -1, 1, 1))
                offset = offset + scale * zero
                source = _Whole(self.call(operator.sub, source.node, moved), scale, offset)
            scale, offset = (
                _channels(node, each).view(how[3], -1).repeat_interleave(count // how[3], 0)
                for each in (scale, offset)
            )
            scale, offset = scale[:, :, None, None], offset[:, :, None, None]
        constant = (weight * offset).flatten(1).sum(1)
        constant = constant if bias is None else constant + bias
        return _Layer(source, weight * scale, constant, how, torch.ones_like(constant))

    def scale(self, node: fx.Node, *args: Any) -> _Whole | _Layer:
        """Return factor * value + shift, as an operation on a value and constants computes it."""
        kinds = (_Whole, _Layer)
        values = [each for each in args if isinstance(each, kinds)]
        zeros = torch.zeros(1, *self.seen.shapes[node], dtype=torch.float64)

        def compute(number: float) -> Tensor:
            parts = [zeros + number if isinstance(each, kinds) else each for each in args]
            parts = [p.double() if isinstance(p, Tensor) else p for p in parts]
            return node.target(*parts, **node.kwargs)  # type: ignore[no-any-return, operator]

        if len(values) != 1 or any(given in self.seen.moving for given in node.all_input_nodes[1:]):
            raise _refusal(node, "it does not combine a value with constants")
        shift = compute(0.0)
        factor, (value,) = compute(1.0) - shift, values
        if not (factor + shift).isfinite().all():
            raise _refusal(node, "it divides by a value")
        if isinstance(value, _Whole):
            return replace(value, scale=value.scale * factor, offset=value.offset * factor + shift)
        size, constant, sign = _channels(node, factor), _channels(node, shift), value.sign
        if value.pools:
            sign = torch.where(size < 0, -sign, sign)
            size, constant = size.abs(), constant * sign
        weight = value.weight * size.view(-1, *[1] * (value.weight.ndim - 1))
        return replace(value, weight=weight, bias=value.bias * size + constant, sign=sign)

    def as_layer(self, node: fx.Node, value: Any) -> _Layer:
        """Return a value as a layer; whole numbers become one that scales each channel."""
        if isinstance(value, _Layer):
            return value
        scale, bias = (_channels(node, each) for each in (value.scale, value.offset))
        weight, how = torch.diag(scale), tuple[Any, ...]()
        if value.scale.ndim == 4:
            weight, how = scale.view(-1, 1, 1, 1), ((1, 1), (0, 0), (1, 1), len(scale))
        return _Layer(value, weight, bias, how, torch.ones_like(scale))

    def round(self, node: fx.Node, layer: _Layer, low: int = 0, high: int = 0) -> _Whole:
        """Add a layer with whole weights, and what makes activations of its sums.

        `node` is the trained network's value that they stand for. Without limits, the sums are the
        scores. Each channel's weights have as many bits as its bound and TF32 allow.
        """
        mantissa, exponent = math.frexp(self.seen.largest[node])
        largest = math.ldexp(math.ceil(mantissa * _STEPS) / _STEPS, exponent) or 1.0
        steps = high / largest or 1.0
        weight, bias = layer.weight * steps, layer.bias * steps
        power = torch.log2(LARGEST_FACTOR / weight.abs().flatten(1).amax(1)).floor()
        power = torch.where(power.isfinite(), power, 0.0)  # a channel of zeros has none
        while True:
            power = power if high else power.min().expand(len(power))
            scale = 2.0**power
            half = layer.sign * scale / 2 if high else 0.0  # then rounding down is to the nearest
            rows = scale.view(-1, *[1] * (weight.ndim - 1))
            sums = Sums((weight * rows).round(), (bias * scale + half).round(), layer.how)
            least, most = sums.bounds(*self.bounds.env[layer.source.node])
            is_over = torch.maximum(-least, most).transpose(0, 1).flatten(1).amax(1) >= LARGEST_SUM
            if not is_over.any():
                break
            power = power - is_over.double()
        new, form = self.call(sums, layer.source.node), (1, -1, *[1] * (weight.ndim - 2))
        if high:  # before the pools, so that a runtime can fold it into the weights
            new = self.call(operator.mul, new, self.keep((1 / scale).view(form)))
        for pool in layer.pools:
            new = self.call(torch.ops.aten.max_pool2d.default, new, *pool)
        if (layer.sign < 0).any():
            new = self.call(operator.mul, new, self.keep(layer.sign.view(form)))
        if high:
            new = self.call(torch.floor, self.call(torch.clamp, new, low, high))
            scale = torch.full_like(scale, steps)
        unit = self.spread(node, 1 / scale)
        return _Whole(new, unit, torch.zeros_like(unit))

    def pool_largest(self, node: fx.Node, window: Any, *how: Any) -> _Whole | _Layer:
        """Return a max-pool; the numbers that it is given must rise with what they stand for."""
        (given,) = node.all_input_nodes
        value = self.values[given]
        if isinstance(value, _Layer) and (value.sign > 0).all():
            return replace(value, pools=(*value.pools, (window, *how)))
        whole = self.close(given)
        if (whole.scale < 0).any():
            whole = self.round(given, self.as_layer(node, whole), -SIGNED, SIGNED)
        is_whole = tuple(window) == self.seen.shapes[given][1:]
        if is_whole and self.seen.shapes[node][1:] == (1, 1):  # faster than a pool
            new = self.call(torch.amax, whole.node, (2, 3), True)
        else:
            new = self.call(node.target, whole.node, window, *how)
        scale, offset = (_channels(node, each) for each in (whole.scale, whole.offset))
        return _Whole(new, self.spread(node, scale), self.spread(node, offset))

    def window(self, node: fx.Node) -> list[int]:
        """Return the height and width over which a mean pool averages."""
        shape, args = self.seen.shapes[node], list[Any](node.args)
        side = list(self.seen.shapes[args[0]][1:])
        if _name(node) == "avg_pool2d":
            return list(args[1])
        axes = [2, 3] if _name(node) == "adaptive_avg_pool2d" else [axis % 4 for axis in args[1]]
        if len(side) != 2 or sorted(axes) != [2, 3] or math.prod(shape[1:]) > 1:
            raise _refusal(node, "only a mean over a window or over the whole map can be")
        return side

    def pool_mean(self, node: fx.Node, stride: Any = (), padding: Any = (), *how: Any) -> _Whole:
        """Return a mean pool as a sum: the count of its window becomes a part of the scale."""
        (given,) = node.all_input_nodes
        whole, window = self.close(given), self.window(node)
        (channels, *side), count = self.seen.shapes[given], math.prod(window)
        largest = count * max(float(bound.abs().max()) for bound in self.bounds.env[whole.node])
        if any(padding) or any(how[:1]) or how[2:] or largest >= LARGEST_SUM:
            raise _refusal(node, "only a plain mean pool can be")
        if window == side:
            new = self.call(torch.sum, whole.node, (2, 3), len(self.seen.shapes[node]) > 1)
        else:
            how = (tuple(stride or window), (0, 0), (1, 1), channels)
            ones = torch.ones(channels, 1, *window)
            new = self.call(Sums(ones, torch.zeros(channels), how), whole.node)
        scale = 2.0 ** -max(0, math.ceil(math.log2(largest / LARGEST_FACTOR)))
        if scale < 1:
            new = self.call(operator.add, self.call(operator.mul, new, scale), 0.5)
            new = self.call(torch.floor, new)
        unit, offset = (_channels(node, each) for each in (whole.scale, whole.offset))
        return _Whole(new, self.spread(node, unit / (count * scale)), self.spread(node, offset))

    def move(self, node: fx.Node, function: Any, *args: Any) -> _Whole:
        """Return whole numbers at other places, with what they stand for."""
        is_cat = function is torch.cat
        given = [each for each in node.all_input_nodes if each in self.values]
        parts = [self.close(each) for each in (given if is_cat else given[:1])]
        nodes, scales, offsets = (
            [getattr(part, name) for part in parts] if is_cat else getattr(parts[0], name)
            for name in ("node", "scale", "offset")
        )
        new, scale = self.call(function, nodes, *args), function(scales, *args)
        if scale.shape != (1, *self.seen.shapes[node]):
            raise _refusal(node, "it moves numbers from one image to another")
        return _Whole(new, scale, function(offsets, *args))


def _name(node: fx.Node) -> str:
    """Return the name of a node's operation, such as conv2d."""
    name = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(name, "__name__", name)).rstrip("_")


def _channels(node: fx.Node, values: Tensor) -> Tensor:
    """Return the value of each channel (C,) of (1, C, H, W); raise CheckFailedError if several."""
    rows = values[0].flatten(1) if values.ndim > 2 else values[0, :, None]
    if (rows != rows[:, :1]).any():
        raise _refusal(node, "the places of a map are scaled differently")
    return rows[:, 0]


def _refusal(node: fx.Node, why: str = "") -> CheckFailedError:
    """Return the error for an operation that cannot be converted."""
    reason = why or "convolutions, linear layers, ReLU, pooling and batch normalization can be"
    name = f"{_name(node)} ({node.name})"
    return CheckFailedError(f"exact cannot convert {name}: {reason}. Leave out exact")
