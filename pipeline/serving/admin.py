"""Load and unload models on a running server, with the key that our servers ask for."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

from pipeline.client.client import Client
from pipeline.client.wire import Call
from pipeline.repository import config_pbtxt
from pipeline.serving.tritonserver import KEY_HEADER


class Admin(Client):
    """A client that may load and unload models.

    Over gRPC: over HTTP, a load holds one of the threads that answer, and whoever is connected to
    that one waits for seconds.
    """

    def __init__(self, grpc_url: str, admin_key: str, timeout: float) -> None:
        headers = {f"triton-grpc-protocol-{KEY_HEADER}": admin_key}
        super().__init__(grpc_url, timeout=timeout, headers=headers)

    def load(self, name: str) -> None:
        """Load a model as the repository has it now; what was served until then goes."""
        self._change("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=name))

    def load_files(self, config: config_pbtxt.ModelConfig, files: Mapping[str, bytes]) -> None:
        """Load a model from these files alone, by their paths in a model's folder."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=config.name)
        request.parameters["config"].string_param = config_pbtxt.to_json(config)
        for path, content in files.items():
            request.parameters[f"file:{path}"].bytes_param = content
        self._change("RepositoryModelLoad", request)

    def unload(self, name: str) -> None:
        """Stop serving a model."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=name)
        request.parameters["unload_dependents"].bool_param = False
        self._change("RepositoryModelUnload", request)

    def states(self) -> dict[tuple[str, str], str]:
        """The state of each version that was ever loaded, by name and version.

        READY, LOADING, UNLOADING or UNAVAILABLE.
        """
        index: Any = self._call(Call("RepositoryIndex", service_pb2.RepositoryIndexRequest()))
        return {(entry.name, entry.version): entry.state for entry in index.models}

    def _change(self, method: str, request: Message) -> None:
        self._call(Call(method, request, may_repeat=False))
