"""Train a network on handwriting, export it to ONNX, validate it, and serve it on Triton."""

import os
from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.client.async_client import AsyncClient as AsyncClient
    from pipeline.client.client import Client as Client
    from pipeline.client.endpoint import Certificates as Certificates
    from pipeline.client.prediction import Prediction as Prediction
    from pipeline.core.errors import PipelineError as PipelineError
    from pipeline.core.paths import Paths as Paths
    from pipeline.data.fetch import fetch_data as fetch_data
    from pipeline.export.export import export_run as export_run
    from pipeline.repository.package import package_model as package_model
    from pipeline.training.recipes import TrainConfig as TrainConfig
    from pipeline.training.run import train_run as train_run
    from pipeline.validation.export import validate_export as validate_export

# gRPC reads this when it is imported; without it, gRPC prints a line for each failed handshake.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__getattr__ = lazily(__name__)
