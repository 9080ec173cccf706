"""The interfaces of a running tritonserver that only the holder of its admin key may use."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import tritonclient.http
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from greenlet import error as GreenletError
from tritonclient.utils import InferenceServerException

from pipeline.errors import PipelineError, ServerError

KEY_HEADER = "triton-admin-key"
POLL_SECONDS = 0.02
_LOST = (OSError, HTTPConnectionClosed, HTTPParseError, GreenletError, ValueError)


@dataclass(frozen=True)
class Admin:
    """The model repository's interface of the server at `address`, over HTTP."""

    address: str  # host:port
    key: str

    def states(self, seconds: float = 5.0) -> dict[tuple[str, str], str]:
        """The state of each version that was ever loaded: READY, LOADING, UNLOADING, UNAVAILABLE.

        Keys are name and version; ServerError when no answer comes in `seconds`.
        """
        with self._client(seconds) as client:
            index = client.get_model_repository_index(headers=self._headers())
        return {(e["name"], e.get("version", "")): e.get("state", "UNAVAILABLE") for e in index}

    def load(
        self,
        name: str,
        seconds: float,
        config: str | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load a model anew, from the repository or, with `config` as JSON, from `files`.

        Returns when it serves. Raises PipelineError with Triton's reason when it is refused, and
        ServerError when that takes longer than `seconds`.
        """
        with self._client(seconds) as client:
            client.load_model(name, headers=self._headers(), config=config, files=files)

    def unload(self, name: str, seconds: float = 5.0) -> None:
        """Take a model away: what it has accepted is answered, what is new is refused."""
        with self._client(seconds) as client:
            client.unload_model(name, headers=self._headers())

    def await_unloaded(self, names: set[str], seconds: float) -> bool:
        """Wait until nothing of these models runs any more; False when `seconds` were too few."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = self.states(max(0.1, deadline - time.monotonic()))
            if all(state == "UNAVAILABLE" for (name, _), state in states.items() if name in names):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _headers(self) -> dict[str, str]:
        return {KEY_HEADER: self.key}

    @contextlib.contextmanager
    def _client(self, seconds: float) -> Iterator[tritonclient.http.InferenceServerClient]:
        client = tritonclient.http.InferenceServerClient(
            self.address, connection_timeout=seconds, network_timeout=seconds
        )
        try:
            yield client
        except InferenceServerException as error:
            raise PipelineError(f"http://{self.address} refuses: {error.message()}") from error
        except _LOST as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"no answer from http://{self.address} ({reason})") from error
        finally:
            client.close()
