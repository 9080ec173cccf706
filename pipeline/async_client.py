"""The same client for programs that await."""

# Shape letters: N images, K classes.

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from pipeline import triton
from pipeline.client import TIMEOUT, Client, Prediction


class AsyncClient:
    """A client of one served model, over HTTP or gRPC, that tasks may share.

    Every failure is a PipelineError: a ServerError when no answer came in `timeout` seconds.
    """

    def __init__(self, url: str, name: str = "handwriting", timeout: float = TIMEOUT) -> None:
        self._client = Client(url, name, timeout)
        self.endpoint, self.name, self.timeout = self._client.endpoint, name, timeout

    async def classify(
        self, images: Sequence[Path | bytes | np.ndarray], top: int = 3
    ) -> list[Prediction]:
        """A prediction for each image: a file, its bytes, or an array of the model's shape."""
        return await asyncio.to_thread(self._client.classify, images, top)

    async def infer(
        self, images: np.ndarray, timeout: float | None = None
    ) -> tuple[np.ndarray, str]:
        """Log-probabilities (N, K) of images (N, ...), and the version that answered last."""
        return await asyncio.to_thread(self._client.infer, images, timeout)

    async def config(self) -> triton.ModelConfig:
        """The served model's configuration, asked for once."""
        return await asyncio.to_thread(self._client.config)

    async def close(self) -> None:
        """Close its connections."""
        self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
