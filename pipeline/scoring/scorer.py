"""What Ray's workers do: read the images of a shard, answer them, and write that."""

import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import Predictor
from pipeline.core.files import check_digest
from pipeline.export.runtime import onnx_predictor
from pipeline.scoring.parquet import Rows
from pipeline.scoring.settings import ScoreConfig
from pipeline.scoring.source import Cut, read
from pipeline.scoring.worker import Folder, Model, score_rows, write


@dataclass(frozen=True)
class Reader:
    """Reads shards; what Ray carries about are arrays of one length."""

    source: Cut

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        begun = time.time()
        shard = pickle.loads(batch["shard"][0])
        try:
            rows = read(self.source, shard)
        except (PipelineError, OSError) as error:
            return _failed(error, self.source.path)
        return {
            "shard": np.full(shard.rows, shard.index),
            "begun": np.full(shard.rows, begun),
            "id": rows.ids,
            "image": rows.images,
            "reason": rows.reasons,
        }


class Scorer:
    """A worker: a session of one thread, which answers shards and writes them."""

    def __init__(self, model: Model, folder: Folder, config: ScoreConfig) -> None:
        self.model, self.folder, self.config = model, folder, config
        self.predictor = _session(model, config.provider)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the answers to a shard; return how many images it had and when."""
        if "failed" in batch:
            return batch
        if isinstance(self.predictor, PipelineError):
            return _failed(self.predictor, self.model.path)
        index, begun = int(batch["shard"][0]), float(batch["begun"][0])
        rows = Rows(batch["id"], batch["image"], batch["reason"])
        try:
            found = score_rows(rows, self.model, self.predictor, self.config)
            write(self.folder, index, *found)
        except (PipelineError, OSError) as error:
            return _failed(error, str(self.folder.path))
        return _said(len(rows.ids), begun, time.time())


def _session(model: Model, provider: str) -> Predictor | PipelineError:
    """A session of one thread, or why there is none, which the first shard says."""
    try:
        content = check_digest(Path(model.path), model.digest, "run the same command again")
        return onnx_predictor(content, threads=1, provider=provider)
    except PipelineError as error:
        return error


def _failed(error: PipelineError | OSError, path: str) -> dict[str, np.ndarray]:
    """An error of the user's as a row: as an exception it would come back as Ray's own.

    `path` is what was read or written, for an error of the system's that does not name it.
    """
    if isinstance(error, OSError):
        said = f"{error.filename or path} fails a worker ({error.strerror or error})"
        error = PipelineError(f"{said}: check its disk and its rights, and run the command again")
    return _said(0, 0.0, 0.0, pickle.dumps(error))


def _said(images: int, begun: float, ended: float, failed: bytes = b"") -> dict[str, np.ndarray]:
    return {
        "images": np.array([images]),
        "begun": np.array([begun]),
        "ended": np.array([ended]),
        "failed": np.array([failed], object),
    }
