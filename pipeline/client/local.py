"""Answers without a server: ONNX Runtime runs an exported file in this process."""

# Shape letters: N images, K classes.

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.client.async_client import TIMEOUT
from pipeline.client.client import Client
from pipeline.client.connection import Connection
from pipeline.client.endpoint import Endpoint
from pipeline.client.log import PredictionLog
from pipeline.core import files
from pipeline.core.errors import PipelineError
from pipeline.core.paths import PRECISIONS, packaged_name
from pipeline.core.signature import TensorSpec
from pipeline.repository import config_pbtxt
from pipeline.repository.settings import PackageConfig

EXPORT = "Run 'pipeline export' again."


class LocalClient(Client):
    """A client of an ONNX file that `pipeline export` or `package` wrote; it needs no server.

    The file's manifest.json, next to it, states its classes, its threshold and how pictures become
    its images, so that the answers are those of a server. Raises PipelineError if there is none or
    ONNX Runtime is not installed, and CorruptError if the file does not match its digest. `timeout`
    and `prediction_log` are those of `Client`.
    """

    def __init__(
        self,
        onnx: Path | str,
        timeout: float = TIMEOUT,
        *,
        prediction_log: PredictionLog | str | Path | None = None,
    ) -> None:
        model = _LocalModel(Path(onnx).absolute())
        endpoint = Endpoint("file", str(onnx))
        super().__init__(endpoint, model.name, timeout, prediction_log=prediction_log)
        self._client.connect = lambda target: model


class _LocalModel(Connection):
    """The model of one file; it answers as a connection to a server does."""

    def __init__(self, path: Path) -> None:
        manifest_path = path.with_name("manifest.json")
        if not path.is_file() or not manifest_path.is_file():
            missing = manifest_path if path.is_file() else path
            raise PipelineError(
                f"{missing} does not exist: give the ONNX file of an export, which 'pipeline "
                "export' makes, or 'pipeline validate --onnx FILE --module ...' from another's file"
            )
        manifest = files.read_json(manifest_path, EXPORT)
        content = files.check_digest(path, manifest["files"].get(path.name), EXPORT)
        try:
            from pipeline.export.runtime import onnx_predictor
        except ModuleNotFoundError as error:
            raise PipelineError(
                "ONNX Runtime is not installed: run 'pip install onnxruntime'"
            ) from error
        self._predict = onnx_predictor(content)
        precision = next((p for p in PRECISIONS if path.name == f"model.{p}.onnx"), "fp32")
        self.name = packaged_name(manifest["name"], manifest.get("precision", precision))
        self._version = path.parent.name if path.parent.name.isdecimal() else ""
        images, outputs = (TensorSpec.from_record(manifest[key]) for key in ("images", "outputs"))
        self._config = config_pbtxt.describe(self.name, manifest, images, outputs, PackageConfig())
        digest = files.sha256(content)
        config_pbtxt.set_parameter(self._config, f"sha256.{self._version}", digest)
        if threshold := manifest.get("min_probability"):
            key = config_pbtxt.MIN_PROBABILITY
            config_pbtxt.set_parameter(self._config, key, str(threshold))

    async def config(self) -> config_pbtxt.ModelConfig:
        return self._config

    async def metadata(self, of_model: bool) -> dict[str, Any]:
        import onnxruntime

        if of_model:
            return {"name": self.name, "versions": [self._version], "platform": "onnxruntime_onnx"}
        return {"name": "ONNX Runtime", "version": onnxruntime.__version__}

    async def infer(
        self, config: config_pbtxt.ModelConfig, images: np.ndarray, class_count: int = 0
    ) -> tuple[np.ndarray, str]:
        outputs = await asyncio.to_thread(self._predict, images)
        if not class_count:
            return outputs, self._version
        classes = config_pbtxt.classes(config)
        labels = [
            [f"{row[k]}:{k}:{classes[k]}".encode() for k in np.argsort(-row)[:class_count]]
            for row in outputs
        ]
        return np.array(labels, dtype=object), self._version

    async def close(self) -> None:
        """Do nothing: the model is freed with its client."""
