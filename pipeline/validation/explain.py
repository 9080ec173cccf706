"""Explanations of why a file does not answer as its module does: known causes are tried in turn.

Also lists where the constants of an ONNX graph differ from the expected ones.
"""

# Shape letters: B batch, K classes.

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, judge

IMAGES = 64  # images that the causes are tried on
# A cause is recognized when reversing it leaves at most this share of the median difference.
REMAINS = 0.02
ROUNDING = 1e-5  # of the largest output: smaller differences need no cause
MOVED = 0.01  # of the median difference: how far a row alone may differ from it in a batch
Change = Callable[[np.ndarray], np.ndarray]


def _log_softmax(outputs: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(outputs), dim=-1).numpy()


def _softmax(outputs: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(outputs), dim=-1).numpy()


# Changes of the images that would make the file's answers the expected ones.
IMAGE_CHANGES: dict[str, Change] = {
    "the ink is inverted": lambda x: 255 - x if x.dtype == np.uint8 else x.max() + x.min() - x,
    "images are transposed: rows and columns are swapped": lambda images: images.swapaxes(-1, -2),
    "images are mirrored from left to right": lambda images: images[..., ::-1],
    "images are upside down": lambda images: images[..., ::-1, :],
    "the colour channels are in reverse order": lambda images: images[:, ::-1],
}
# Changes of the file's answers that would make them the expected ones.
ANSWER_CHANGES: dict[str, Change] = {
    "the final log-softmax is missing": _log_softmax,
    "the final softmax is missing": _softmax,
    "it answers probabilities, not their logarithms": lambda y: np.log(np.maximum(y, 1e-300)),
    "it answers logarithms, not probabilities": lambda y: np.exp(np.minimum(y, 700)),
    "the steps are in reverse order": lambda y: y[:, ::-1] if y.ndim == 3 else y,
}
# Changes of the expected answers that would make them the file's.
ADDITIONS: dict[str, Change] = {
    "a softmax was added at the end": _softmax,
    "a log-softmax was added at the end": _log_softmax,
}


def diagnose(
    candidate: Predictor, images: np.ndarray, expected: np.ndarray, classes: Sequence[str]
) -> list[str]:
    """Return the cause that explains why answers (B, ...) to images (B, ...) are not as expected.

    The list is empty when no known cause explains it.
    """
    images = images[:IMAGES]
    expected = expected[: len(images)]
    together = _ask(candidate, images, expected)
    if together is None:
        return []
    usual = _median_error(expected, together)
    one_by_one = (_ask(candidate, images[row : row + 1], expected[:1]) for row in range(8))
    alone = [answer for answer in one_by_one if answer is not None]
    is_wrong = usual > ROUNDING * max(1, float(np.abs(expected).max())) and len(alone) == 8
    if is_wrong and judge(np.concatenate(alone), together[:8]).errors.max() > MOVED * usual:
        return [
            "a row's answer depends on its batch or place: a reshape mixes rows, or something "
            "normalizes over the batch. Keep the batch axis first and separate"
        ]
    left = {}
    for cause, change in IMAGE_CHANGES.items() if images.ndim == 4 else ():
        answer = _ask(candidate, np.ascontiguousarray(change(images)), expected)
        left[cause] = np.inf if answer is None else _median_error(expected, answer)
    outputs = together.astype(np.float64)
    for cause, change in ANSWER_CHANGES.items():
        left[cause] = _median_error(expected, change(outputs))
    added = {name: _median_error(change(expected), outputs) for name, change in ADDITIONS.items()}
    for causes in (left, added):
        best = min(causes, key=lambda cause: causes[cause])
        if causes[best] < REMAINS * usual:
            return [best]
    # The classes that were swapped, if that explains the difference.
    ours, theirs = (values.reshape(-1, values.shape[-1]) for values in (expected, outputs))
    distances = np.abs(ours[:, :, np.newaxis] - theirs[:, np.newaxis]).mean(axis=0)  # (K, K)
    order = distances.argmin(axis=1)  # the column that has each class's answer
    swapped = np.flatnonzero(order != np.arange(len(order)))
    is_explained = _median_error(expected, outputs[..., order]) < REMAINS * usual
    if not len(swapped) or len(set(order)) < len(order) or not is_explained:
        return []
    names = [*classes, "the blank"]  # which only strings have
    pairs = ", ".join(f"{names[order[index]]} for {names[index]}" for index in swapped[:6])
    return [f"labels are swapped: it answers {pairs}"]


def _median_error(expected: np.ndarray, outputs: np.ndarray) -> float:
    """Return the median of the rows' largest differences."""
    return float(np.median(judge(expected, outputs).errors))


def _ask(candidate: Predictor, images: np.ndarray, like: np.ndarray) -> np.ndarray | None:
    """Return the answers, or None if they have the wrong shape or are not finite."""
    try:
        outputs = candidate(images)
    except CheckFailedError:
        return None
    is_whole = outputs.shape == (len(images), *like.shape[1:]) and np.isfinite(outputs).all()
    return outputs if is_whole else None


FEW = 4  # values: so small a tensor is reported even if all of it changed


def compare_weights(
    weights: Mapping[str, np.ndarray], model: onnx.ModelProto, few: int = FEW
) -> list[str]:
    """List where constants of `model` differ from the module's weights of the same name.

    A tensor of more than `few` values is skipped if half of its nonzero values changed: an exporter
    may have fused it, which leaves zeros as they are.
    """
    constants = _read_constants(model)
    differences = [
        _describe_change(name, wanted, constant)
        for name, wanted in weights.items()
        if (constant := constants.get(name)) is not None and constant.shape == wanted.shape
        if wanted.size <= few or (wanted != constant).sum() < 0.5 * np.count_nonzero(wanted)
    ]
    return sorted(filter(None, differences))


def compare_graphs(wanted: onnx.ModelProto, model: onnx.ModelProto) -> list[str]:
    """List where the graph of `model` differs from the expected one, `wanted`."""
    before, after = _read_constants(wanted), _read_constants(model)
    both = before.keys() & after.keys()
    differences = [_describe_change(name, before[name], after[name]) for name in both]
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    if len(gone) + len(new) > FEW:
        differences.append(f"{len(gone)} tensors are missing and {len(new)} are new")
    else:
        differences += [f"{name} is missing" for name in gone] + [f"{name} is new" for name in new]
    if [node.op_type for node in wanted.graph.node] != [node.op_type for node in model.graph.node]:
        differences.append("it has other operators")
    return sorted(filter(None, differences))


def _read_constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _describe_change(name: str, wanted: np.ndarray, value: np.ndarray) -> str:
    """Describe how a tensor differs from the wanted one; empty if it does not."""
    if wanted.shape != value.shape or wanted.dtype != value.dtype:
        return f"{name} is {value.dtype} {value.shape} instead of {wanted.dtype} {wanted.shape}"
    changed = np.flatnonzero(wanted != value)
    if not len(changed):
        return ""
    numbers = f"{value.flat[changed[0]]:.6g} instead of {wanted.flat[changed[0]]:.6g}"
    if wanted.size == 1:
        return f"{name} is {numbers}"
    return f"{name} differs in {len(changed):,} of {wanted.size:,} values, the first {numbers}"
