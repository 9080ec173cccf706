"""What a finished run said of every test image, kept so that nobody needs a second look."""

# Shape letters: N images, K classes.

import io
import zipfile
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import CorruptError
from pipeline.core.evaluate import tempered
from pipeline.core.files import check_digest, write_bytes
from pipeline.core.paths import Paths

RETRAIN = "run 'pipeline train' again"
_ARRAYS = ("log_probabilities", "labels")


@dataclass(frozen=True)
class Predictions:
    """The final network's answers to the test split, in its order."""

    log_probabilities: np.ndarray  # float32 (N, K), after the temperature
    labels: np.ndarray  # int64 (N,)

    def untempered(self, temperature: float) -> np.ndarray:
        """Log-probabilities (N, K) as they were before the network got its temperature."""
        return tempered(self.log_probabilities, 1 / temperature)


def save_predictions(paths: Paths, outputs: np.ndarray, labels: np.ndarray) -> str:
    """Write log-probabilities (N, K) with labels (N,); return the file's SHA-256.

    The bytes depend on nothing but the values.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, log_probabilities=outputs.astype(np.float32), labels=labels)
    return write_bytes(paths.predictions, buffer.getvalue())


def load_predictions(paths: Paths, digest: str) -> Predictions:
    """The run's predictions, whose SHA-256 is `digest`; nothing in them is unpickled.

    Raises PipelineError when the file is missing and CorruptError when its bytes changed.
    """
    content = check_digest(paths.predictions, digest, RETRAIN)
    try:
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        outputs, labels = (arrays[name] for name in _ARRAYS)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{paths.predictions} holds no predictions: {RETRAIN}") from error
    if outputs.ndim != 2 or labels.shape != (len(outputs),):
        raise CorruptError(f"{paths.predictions} holds arrays that do not belong together")
    return Predictions(outputs, labels)
