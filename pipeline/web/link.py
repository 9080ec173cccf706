"""The gateway's connection to Triton: to the server that runs now, and later to its successor."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np

from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Prediction
from pipeline.core.errors import ServerError, SlowError
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.repository.running import find_server, load_server


def find_url(paths: Paths) -> str:
    """Return the URL of the server of this model that runs now; ServerError if there is none."""
    if server := find_server(paths):
        return server.grpc_url
    other = load_server(paths)
    if other and paths.name not in other.models:
        models = ", ".join(other.models) or "no model"
        raise ServerError(f"the server has {models}, not {paths.name}: choose another --name")
    raise ServerError(
        f"no server of {paths.name} is running: start one with 'pipeline serve --detach'"
    )


@dataclass
class _Connection:
    client: AsyncClient
    url: str
    users: int = 0
    is_retired: bool = False


class Link:
    """A connection about one model to the server whose URL `find` returns at each request."""

    def __init__(self, find: Callable[[], str], name: str, timeout: float) -> None:
        self.name = name
        self._find, self._timeout = find, timeout
        self._current: _Connection | None = None
        self._version = ""  # of the last answer

    async def config(self) -> config_pbtxt.ModelConfig:
        """Return the served model's configuration."""
        async with self._connection() as client:
            return await client.config()

    async def ask(self, image: np.ndarray, top: int) -> Prediction:
        """Return the prediction for an image, uint8 (1, 28, 28), with its `top` best labels."""
        async with self._connection() as client:
            (prediction,) = await client.classify([image], top=top)
        if self._version not in ("", prediction.version):
            self._retire(self._current)  # its config may be the previous version's
        self._version = prediction.version
        return prediction

    async def close(self) -> None:
        """Close the open connection, if there is one."""
        connection, self._current = self._current, None
        if connection:
            await connection.client.close()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncClient]:
        url = self._find()
        if self._current is None or self._current.url != url:
            self._retire(self._current)
            self._current = _Connection(AsyncClient(url, self.name, self._timeout), url)
        connection = self._current
        connection.users += 1
        try:
            yield connection.client
        except SlowError:
            raise
        except ServerError:
            self._retire(connection)  # what it knows of the model may be out of date
            raise
        finally:
            connection.users -= 1
            if connection.is_retired and not connection.users:
                await connection.client.close()

    def _retire(self, connection: _Connection | None) -> None:
        """Make the next request open another connection; the last user of this one closes it."""
        if connection:
            connection.is_retired = True
            if self._current is connection:
                self._current = None
