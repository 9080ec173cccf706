"""Load and unload models on a running server, with the key that our servers ask for."""

import time
from collections.abc import Mapping

from pipeline import triton
from pipeline.client import Client
from pipeline.tritonserver import KEY_HEADER


class Admin(Client):
    """A client that may load and unload models.

    Over gRPC: over HTTP, a load holds one of the threads that answer, and whoever is connected to
    that one waits for seconds.
    """

    def __init__(self, grpc_url: str, admin_key: str, timeout: float) -> None:
        super().__init__(grpc_url, timeout=timeout)
        self._headers = {f"triton-grpc-protocol-{KEY_HEADER}": admin_key}

    def load(self, name: str) -> None:
        """Load a model as the repository has it now; what was served until then goes."""
        self._ask(
            lambda left: self._grpc().load_model(name, self._headers, client_timeout=left),
            time.monotonic() + self.timeout,
        )

    def load_files(self, config: triton.ModelConfig, files: Mapping[str, bytes]) -> None:
        """Load a model from these files alone, by their paths in a model's folder."""
        text = triton.to_json(config)
        contents = {f"file:{path}": content for path, content in files.items()}
        self._ask(
            lambda left: self._grpc().load_model(
                config.name, self._headers, config=text, files=contents, client_timeout=left
            ),
            time.monotonic() + self.timeout,
        )

    def unload(self, name: str) -> None:
        """Stop serving a model."""
        self._ask(
            lambda left: self._grpc().unload_model(name, self._headers, client_timeout=left),
            time.monotonic() + self.timeout,
        )

    def states(self) -> dict[tuple[str, str], str]:
        """The state of each version that was ever loaded, by name and version.

        READY, LOADING, UNLOADING or UNAVAILABLE.
        """
        index = self._ask(
            lambda left: self._grpc().get_model_repository_index(
                self._headers, client_timeout=left
            ),
            time.monotonic() + self.timeout,
        )
        return {(entry.name, entry.version): entry.state for entry in index.models}
