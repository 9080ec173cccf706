"""Subjects of an export and its validation: a run's network, or a third-party module."""

# Shape letters: N images, K classes.

import copy
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.files import check_digest
from pipeline.core.paths import Paths
from pipeline.core.signature import IMAGES, TensorSpec, is_label, tensors_of
from pipeline.core.text import Lines
from pipeline.data.splits import load_scored_split, load_split
from pipeline.data.strips import LENGTHS
from pipeline.export.sample import Sample, read_sample
from pipeline.training.checkpoint import load_checkpoint

EXPORT = "run 'pipeline export' again"


@dataclass(frozen=True)
class Subject:
    """A module in evaluation mode on the CPU, with its signature, classes and origin."""

    model: nn.Module
    images: TensorSpec
    outputs: TensorSpec
    kind: str  # what the outputs are: log_probabilities, probabilities or logits
    classes: tuple[str, ...]
    weights_sha256: str
    origin: dict[str, Any]  # where it comes from, for the manifest


def subject_of_run(paths: Paths) -> Subject:
    """Return the network of a finished run as a subject."""
    checkpoint = load_checkpoint(paths)
    summary = checkpoint.summary
    metrics = ("test_accuracy", "test_loss", "validation_accuracy", "train_seconds")
    machine = ("torch", "python", "system", "processor", "instructions", "device")
    images, outputs = tensors_of(checkpoint.config.dataset, len(checkpoint.classes))
    return Subject(
        model=checkpoint.model,
        images=images,
        outputs=outputs,
        kind=outputs.name,
        classes=checkpoint.classes,
        weights_sha256=summary.weights_sha256,
        origin={
            "run": paths.run,
            "training": checkpoint.config.record(),
            "data_sha256": summary.data_sha256,
            "environment": {
                key: getattr(summary, key) for key in (*machine, "threads", "processes")
            },
            "metrics": {key: getattr(summary, key) for key in metrics},
            "min_probability": summary.min_probability,
            "validation_images": summary.validation_images,
            "notes": list(summary.notes),
        },
    )


def subject_of_module(
    module: str,
    sample: Sample,
    root: Path,
    classes: Sequence[str] = (),
    pictures: str = "arrays",
) -> Subject:
    """Load a third-party module, `package.module:factory`; the sample sets its input signature.

    `pictures` is the text of its picture rule, if it has one. Raises PipelineError when it is not
    an image classifier with one input and one output tensor, or computes as in training.
    """
    model = build_module(module, root)
    digest = weights_digest(model)
    if weights_digest(build_module(module, root)) != digest:
        raise PipelineError(f"{module} makes other weights each time: load them, or set a seed")
    outputs = _score_two(module, model, sample.images)
    in_training = [
        name or type(part).__name__
        for name, part in model.named_modules()
        if part.training or (isinstance(part, _BatchNorm) and part.running_mean is None)
    ]
    if in_training or weights_digest(model) != digest:
        parts = ", ".join(in_training[:5]) or "a call changes its buffers"
        raise PipelineError(
            f"{module} computes as in training even after .eval() ({parts}): with batch statistics "
            "an answer depends on the other images, with dropout on chance. Keep running "
            "statistics, let .eval() reach every part, and do not call train() in forward()"
        )
    if outputs.dtype == torch.float64:
        raise PipelineError(f"{module} answers in float64, which is not served: call .float()")
    answers = outputs.numpy()
    kind, count = detect_kind(answers), answers.shape[1]
    names = tuple(classes) or tuple(map(str, range(count)))
    if len(names) != count:
        raise PipelineError(f"{module} has {count} classes, but {len(names)} names are given")
    if bad := sorted({name for name in names if names.count(name) > 1 or not is_label(name)}):
        problem = "are repeated, empty or have control characters"
        raise PipelineError(f"class names {bad} {problem}: give {count} others with --classes")
    if sample.labels is not None and not 0 <= sample.labels.min() <= sample.labels.max() < count:
        labels = f"{sample.labels.min()} to {sample.labels.max()}"
        raise PipelineError(f"labels are {labels}, but the module's classes are 0 to {count - 1}")
    return Subject(
        model=model,
        images=TensorSpec(IMAGES.name, str(sample.images.dtype), sample.images.shape[1:]),
        outputs=TensorSpec(kind, str(answers.dtype), (count,)),
        kind=kind,
        classes=names,
        weights_sha256=digest,
        origin={"module": module, "pictures": pictures},
    )


def _score_two(module: str, model: nn.Module, images: np.ndarray) -> Tensor:
    """Return the module's answer (2, K) to two images.

    Raises PipelineError if it fails, or if it answers anything else, with a wrapper that takes one
    of several outputs.
    """
    try:
        with torch.inference_mode():
            outputs = model(torch.from_numpy(images[:2]))
    except (RuntimeError, TypeError, ValueError) as error:
        fix = ""
        if any(tensor.dtype == torch.float64 for tensor in model.parameters()):
            fix = ". Its weights are float64, which is not served: call .float() on it"
        elif images.dtype.kind in "iu":
            fix = ". Save them as for its training, such as images.astype(np.float32) / 255"
        shape = f"{images.dtype} {' x '.join(map(str, images.shape))}"
        raise PipelineError(f"{module} does not take images of {shape}: {error}{fix}") from error
    if _is_scores(outputs):
        return cast(Tensor, outputs)
    parts, listed, scores = outputs, _describe(outputs), []
    if isinstance(outputs, tuple | list):
        parts = dict(enumerate(outputs))
    if isinstance(parts, Mapping):  # transformers' ModelOutput is one, too
        listed = ", ".join(f"{key!r} {_describe(part)}" for key, part in parts.items())
        scores = [key for key, part in parts.items() if _is_scores(part)]
    problem = f"{module} answers {listed} to 2 images, not one tensor (2, classes)"
    wrapper = (
        f"{problem}. Let the factory return OneOutput(network):",
        "  class OneOutput(torch.nn.Module):",
        "      def __init__(self, network): super().__init__(); self.network = network",
        f"      def forward(self, images): return self.network(images)[{next(iter(scores), 0)!r}]",
    )
    raise PipelineError(Lines(*wrapper) if scores else problem)


def _is_scores(output: Any) -> bool:
    """Tell whether an output for two images is a tensor of floats (2, K)."""
    is_rows = isinstance(output, Tensor) and output.is_floating_point() and output.ndim == 2
    return is_rows and len(output) == 2 and output.shape[1] > 1


def _describe(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def detect_kind(outputs: np.ndarray) -> str:
    """Return the kind of outputs (N, K): log_probabilities, probabilities or logits."""
    values = outputs.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        return "probabilities"
    is_normalized = (values <= 1e-6).all() and np.allclose(np.exp(values).sum(axis=1), 1, atol=1e-3)
    return "log_probabilities" if is_normalized else "logits"


def build_module(module: str, root: Path) -> nn.Module:
    """Build `package.module:factory` in evaluation mode on the CPU; `root` is searched as well.

    The factory may also be a module itself. Raises PipelineError when the result is not one.
    """
    package, _, name = module.partition(":")
    if not package or not name:
        raise PipelineError(f"{module!r} is not of the form package.module:factory")
    if "/" in package or package.endswith(".py"):
        path = PurePath(package.removesuffix(".py"))
        is_below = not path.is_absolute() and ".." not in path.parts
        dotted = ".".join(path.parts) if is_below else path.name
        where = "" if is_below else f", with {path.parent} in PYTHONPATH"
        raise PipelineError(f"{module!r} names a file: give '{dotted}:{name}'{where}")
    sys.path[:0] = [f for f in (str(Path.cwd()), str(root.resolve())) if f not in sys.path]
    try:
        made = getattr(importlib.import_module(package), name)
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # third-party code may raise anything; the message names it
        reason = f"{type(error).__name__}: {error} (--debug shows where)"
        raise PipelineError(f"{module} cannot be loaded or called: {reason}") from error
    if not isinstance(model, nn.Module):
        raise PipelineError(f"{module} returns a {type(model).__name__}, not a torch.nn.Module")
    return copy.deepcopy(model).cpu().eval()


def weights_digest(model: nn.Module) -> str:
    """Return one SHA-256 over a module's parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_subject(paths: Paths, manifest: dict[str, Any]) -> Subject:
    """Return the module that an export was made from, according to its manifest.

    Raises CheckFailedError when its weights have changed since.
    """
    if module := manifest.get("module"):
        sample = load_sample(paths, manifest)
        subject = subject_of_module(str(module), sample, paths.root, manifest["classes"])
    else:
        subject = subject_of_run(replace(paths, run=str(manifest.get("run"))))
    if manifest.get("weights_sha256") != subject.weights_sha256:
        source = module or f"run {manifest.get('run')}"
        raise CheckFailedError(f"{source} has other weights than {paths.export}: {EXPORT}")
    images, outputs = (TensorSpec.from_record(manifest[key]) for key in ("images", "outputs"))
    return replace(subject, images=images, outputs=outputs, kind=manifest["kind"])


def load_sample(paths: Paths, manifest: dict[str, Any]) -> Sample:
    """Return the images to validate an export on: the run's test split, or the user's sample."""
    if manifest.get("module"):
        check_digest(paths.images, manifest.get("images_sha256"), EXPORT)
        return read_sample(paths.images)
    training, folder = manifest["training"], paths.data(manifest["training"]["dataset"])
    test = load_scored_split(training, manifest["data_sha256"], folder)
    calibration = load_split(training["dataset"], folder, "train").images
    if calibration.shape[1:] != test.images.shape[1:]:  # of strips, single digits are trained on
        strips = load_split(training["dataset"], folder, "validation").images
        calibration = strips[:: len(LENGTHS)]  # they are in the order of their lengths
    return Sample(test.images, test.labels, calibration)
