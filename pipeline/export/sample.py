"""User-supplied images to validate a third-party module on. Needs numpy only."""

# Shape letters: N images, M calibration images.

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError

MAX_SAMPLE_BYTES = 4 * 1024**3
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


@dataclass(frozen=True)
class Sample:
    """Images to validate a module on, with optional labels."""

    images: np.ndarray  # (N, ...), as the module takes them
    labels: np.ndarray | None  # int64 (N,): the true classes, if known
    calibration: np.ndarray  # (M, ...): similar images, or the same; for int8


def read_sample(
    images: Path, labels: Path | None = None, calibration: Path | None = None
) -> Sample:
    """Read the user's images, with labels if given, from .npz or .npy files, without unpickling.

    An .npz has `images`, and may have `labels` and `calibration`; labels may also be a text file
    of whole numbers. Raises PipelineError when a file cannot be read or its arrays do not fit.
    """
    given = _arrays(images, "images")
    taken = given["images"]
    if labels:
        given["labels"] = _labels(labels)
    if calibration:
        given["calibration"] = _arrays(calibration, "images")["images"]
    if taken.ndim < 2 or len(taken) < 2 or str(taken.dtype) not in DTYPES:
        raise PipelineError(
            f"{images} holds {taken.dtype} {taken.shape}; wanted are 2 images at least, of one of "
            f"{', '.join(DTYPES)}"
        )
    if taken.dtype.kind == "f" and not np.isfinite(taken).all():
        raise PipelineError(f"{images} holds values that are not finite")
    truth = given.get("labels")
    if truth is not None and (truth.shape != (len(taken),) or truth.dtype.kind not in "iu"):
        kind, count = f"{truth.dtype} {truth.shape}", len(taken)
        raise PipelineError(f"labels are {kind}, not a whole number for each of {count} images")
    others = given.get("calibration", taken)
    if others.dtype != taken.dtype or others.shape[1:] != taken.shape[1:]:
        raise PipelineError("the calibration images are not of the type and size of the others")
    return Sample(
        np.ascontiguousarray(taken),
        None if truth is None else truth.astype(np.int64),
        np.ascontiguousarray(others),
    )


def _labels(path: Path) -> np.ndarray:
    if path.suffix in (".npy", ".npz"):
        return _arrays(path, "labels")["labels"]
    try:
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} holds no labels, a whole number a line: {error}") from error


def _arrays(path: Path, wanted: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file by name; a file's only array gets the name `wanted`."""
    try:
        size = path.stat().st_size
        if size > MAX_SAMPLE_BYTES:
            raise PipelineError(f"{path} has {size} bytes, more than {MAX_SAMPLE_BYTES}")
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {wanted: loaded}
        with loaded:
            unpacked = sum(info.file_size for info in loaded.zip.infolist())
            if unpacked > MAX_SAMPLE_BYTES:
                raise PipelineError(f"{path} unpacks to {unpacked} bytes")
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PipelineError(f"cannot read {path}: {error}; write it with numpy.savez") from error
    if len(arrays) == 1:
        return {wanted: next(iter(arrays.values()))}
    if wanted not in arrays:
        raise PipelineError(f"{path} has {', '.join(arrays)}, and no array called {wanted}")
    return arrays


def pack_sample(sample: Sample, count: int) -> bytes:
    """Return the sample as the bytes of an .npz file, with the first `count` calibration images."""
    arrays = {"images": sample.images}
    if sample.labels is not None:
        arrays["labels"] = sample.labels
    if sample.calibration is not sample.images:
        arrays["calibration"] = sample.calibration[:count]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes an option
    return buffer.getvalue()


def require_labels(sample: Sample, classes: Sequence[str]) -> None:
    """Raise PipelineError when a label is not the index of a class."""
    labels = sample.labels
    if labels is not None and (labels.min() < 0 or labels.max() >= len(classes)):
        found = f"{labels.min()} to {labels.max()}"
        raise PipelineError(f"labels go from {found}, the module's classes to {len(classes) - 1}")
