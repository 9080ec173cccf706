"""An exact file computed in numpy's int64, operator by operator: no floating point is involved."""

from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper

# Numbers int64, and k: they stand for number * 2^-k, where k may differ from channel to channel.
Whole = tuple[np.ndarray, np.ndarray]
NOTHING = -(2**62)  # what a max-pool is padded with


def whole_scores(content: bytes, images: np.ndarray) -> np.ndarray:
    """Return the scores int32 (N, S) of an exact file, computed in whole numbers.

    Raises ValueError for an operator or a weight that has no place in an exact file. Images of
    floats are made whole numbers as the file does it, in float32.
    """
    model = onnx.load_model_from_string(content)
    values: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values[model.graph.input[0].name] = images
    for node in model.graph.node:
        how = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        args: list[Any] = [values.get(name) for name in node.input]
        if node.output[0] == model.graph.output[1].name:
            return np.asarray(_to_whole(args[0]), np.int32)
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(how["value"])
        elif node.op_type in _OPERATORS:
            values[node.output[0]] = _OPERATORS[node.op_type](*args, **how)
        elif any(isinstance(arg, tuple) for arg in args):
            break  # the part after the scores, unless they come last
    raise ValueError(f"{node.op_type} {node.name} has no place in an exact file")


def _to_whole(value: Whole) -> np.ndarray:
    numbers, power = value
    if power.any():
        raise ValueError("numbers that are not rounded")
    return numbers


def _constant(values: np.ndarray) -> np.ndarray:
    """Return weights as int64."""
    if (values != np.round(values)).any():
        raise ValueError("a weight is not a whole number")
    return values.astype(np.int64)


def _cast(images: Any, to: int) -> Any:
    if isinstance(images, tuple) or images.dtype.kind == "f":
        return images
    return images.astype(np.int64), np.zeros((), np.int64)


def _mul(x: Any, factor: np.ndarray) -> Any:
    if not isinstance(x, tuple):
        return x * factor  # images of floats
    mantissa, exponent = np.frexp(factor)
    if (np.abs(mantissa) != 0.5).any():
        raise ValueError("a factor is not a power of two")
    return x[0] * np.sign(mantissa).astype(np.int64), x[1] + (1 - exponent)


def _add(x: Any, term: np.ndarray, sign: int = 1) -> Any:
    if not isinstance(x, tuple):
        return x + sign * term
    numbers, power = x
    shifted = np.ldexp(term.astype(np.float64), power)
    return numbers + sign * _constant(shifted), power


def _clip(x: Any, low: np.ndarray, high: np.ndarray) -> Any:
    if not isinstance(x, tuple):
        return np.clip(x, low, high)
    numbers, power = x
    limits = (_constant(np.ldexp(limit.astype(np.float64), power)) for limit in (low, high))
    return np.clip(numbers, *limits), power


def _floor(x: Any) -> Whole:
    if not isinstance(x, tuple):
        return np.floor(x).astype(np.int64), np.zeros((), np.int64)
    numbers, power = x
    return (numbers << np.maximum(-power, 0)) >> np.maximum(power, 0), np.zeros((), np.int64)


def _windows(x: np.ndarray, side: Any, how: dict[str, Any], fill: int) -> np.ndarray:
    """Return the windows of maps (N, C, H, W) as (N, C, h, w, *side)."""
    (top, left, bottom, right), dilation = how.get("pads", [0] * 4), how.get("dilations", [1, 1])
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    reach = [(s - 1) * d + 1 for s, d in zip(side, dilation, strict=True)]
    down, along = how.get("strides", [1, 1])
    windows = sliding_window_view(padded, reach, axis=(2, 3))
    return windows[:, :, ::down, ::along, :: dilation[0], :: dilation[1]]


def _conv(x: Whole, weight: np.ndarray, bias: Any = None, **how: Any) -> Whole:
    numbers, whole, groups = _to_whole(x), _constant(weight), how.get("group", 1)
    outputs = []
    for part, rows in zip(np.split(numbers, groups, axis=1), np.split(whole, groups), strict=True):
        windows = _windows(part, weight.shape[2:], how, 0)  # (N, C, h, w, kh, kw)
        columns = windows.transpose(0, 2, 3, 1, 4, 5)
        columns = columns.reshape(*columns.shape[:3], -1)
        outputs.append((columns @ rows.reshape(len(rows), -1).T).transpose(0, 3, 1, 2))
    sums = np.concatenate(outputs, axis=1)
    if bias is not None:
        sums = sums + _constant(bias)[:, None, None]
    return sums, np.zeros((), np.int64)


def _gemm(x: Whole, weight: np.ndarray, bias: np.ndarray, **how: Any) -> Whole:
    whole = _constant(weight).T if how.get("transB") else _constant(weight)
    return _to_whole(x) @ whole + _constant(bias), np.zeros((), np.int64)


def _max_pool(x: Whole, **how: Any) -> Whole:
    windows = _windows(x[0], how["kernel_shape"], how, NOTHING)
    return windows.max(axis=(4, 5)), x[1]


def _reduce(function: Any) -> Any:
    def reduce(x: Whole, axes: np.ndarray, keepdims: int = 1, **how: Any) -> Whole:
        kept = bool(keepdims)
        return function(_to_whole(x), axis=tuple(axes.tolist()), keepdims=kept), x[1]

    return reduce


_OPERATORS = {
    "Cast": _cast,
    "Mul": _mul,
    "Add": _add,
    "Sub": lambda x, term: _add(x, term, -1),
    "Clip": _clip,
    "Floor": _floor,
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "Concat": lambda *parts, axis: (
        np.concatenate([_to_whole(part) for part in parts], axis=axis),
        np.zeros((), np.int64),
    ),
    "Transpose": lambda x, perm: (_to_whole(x).transpose(perm), x[1]),
    "Reshape": lambda x, shape, **how: (_to_whole(x).reshape(shape), x[1]),
}
