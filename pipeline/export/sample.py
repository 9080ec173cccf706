"""User-supplied images to validate a third-party module on. Needs numpy only."""

# Shape letters: N images, M calibration images.

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.files import pack_arrays

MAX_SAMPLE_BYTES = 4 * 1024**3
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


@dataclass(frozen=True)
class Sample:
    """Images to validate a module on, with optional labels."""

    images: np.ndarray  # (N, ...), as the module takes them
    labels: np.ndarray | None  # int64 (N,): the true classes, if known
    calibration: np.ndarray  # (M, ...): similar images, or the same; for int8
    is_narrowed: bool = False  # the file has float64, NumPy's default


def read_sample(file: Path, labels: Path | None = None, calibration: Path | None = None) -> Sample:
    """Read the user's images, with labels if given, from .npz or .npy files, without unpickling.

    An .npz has `images`, and may have `labels` and `calibration`; labels may also be a text file
    of whole numbers. float64 becomes float32. Raises PipelineError when a file cannot be read or
    its arrays do not fit.
    """
    arrays = _read_arrays(file, "images")
    taken = arrays["images"]
    truth = _read_arrays(labels, "labels")["labels"] if labels else arrays.get("labels")
    others = _read_arrays(calibration, "images")["images"] if calibration else None
    others = arrays.get("calibration", taken) if others is None else others
    if taken.ndim < 2 or len(taken) < 2 or str(taken.dtype) not in DTYPES:
        needed = f"at least 2 images of one of {', '.join(DTYPES)} are needed"
        raise PipelineError(f"{file} has {taken.dtype} {taken.shape}; {needed}")
    original = taken
    with np.errstate(over="ignore"):
        taken = _to_float32(original)
        others = taken if others is original else _to_float32(others)
    if taken.dtype.kind == "f" and not np.isfinite(taken).all():
        raise PipelineError(f"{file} has values that are not finite in {taken.dtype}")
    if truth is not None:
        if truth.shape != (len(taken),) or truth.dtype.kind not in "iu":
            kind = f"{truth.dtype} {truth.shape}"
            raise PipelineError(f"labels are {kind}, not {len(taken)} whole numbers, one an image")
        truth = truth.astype(np.int64)
    if others.dtype != taken.dtype or others.shape[1:] != taken.shape[1:]:
        raise PipelineError("the calibration images have another type or size than the images")
    is_narrowed = taken is not original
    return Sample(np.ascontiguousarray(taken), truth, np.ascontiguousarray(others), is_narrowed)


def _to_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _read_arrays(path: Path, wanted: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file by name; a file's only array gets the name `wanted`."""
    try:
        if (size := path.stat().st_size) > MAX_SAMPLE_BYTES:
            raise PipelineError(f"{path} has {size} bytes, more than {MAX_SAMPLE_BYTES}")
        if wanted == "labels" and path.suffix not in (".npy", ".npz"):
            return {wanted: np.loadtxt(path, dtype=np.int64, ndmin=1)}
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
        raise PipelineError(f"{path} has no array called {wanted}, only {', '.join(arrays)}")
    return arrays


def pack_sample(sample: Sample, count: int) -> bytes:
    """Return the sample as the bytes of an .npz file, with the first `count` calibration images."""
    arrays = {"images": sample.images}
    if sample.labels is not None:
        arrays["labels"] = sample.labels
    if sample.calibration is not sample.images:
        arrays["calibration"] = sample.calibration[:count]
    return pack_arrays(arrays)
