"""The asynchronous client of one served model, for programs that use asyncio."""

# Shape letters: N images, K classes.

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from pipeline.client.calls import BaseClient
from pipeline.client.prediction import Image, Prediction
from pipeline.repository import config_pbtxt


class AsyncClient(BaseClient):
    """A client of one served model, over HTTP or gRPC, that tasks of one event loop may share.

    Otherwise it is like `Client`: see there for URLs, errors, the deadline and retries.
    """

    async def classify(self, images: Image | Iterable[Image], top: int = 3) -> list[Prediction]:
        """Return a prediction for each image, one or many: see `Client.classify`."""
        return await self._classify(images, top)

    async def infer(
        self, images: np.ndarray, timeout: float | None = None, output: str = ""
    ) -> tuple[np.ndarray, str]:
        """Return log-probabilities (N, K) of images (N, ...): see `Client.infer`."""
        return await self._infer(images, timeout, output)

    async def config(self) -> config_pbtxt.ModelConfig:
        """Return the model's configuration, requested once, and again after a lost server."""
        return await self._get_config()

    async def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """Return metadata of the server, or of the model: name, version or versions, and more."""
        return await self._get_metadata(of_model)

    async def close(self) -> None:
        """Close the connections; a further call opens new ones."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._close()
