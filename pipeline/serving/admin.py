"""Client that loads and unloads models on a running server, with the admin key it requires."""

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

    It uses gRPC: over HTTP, a load blocks one of the server's threads, and all clients connected to
    that thread wait for seconds.
    """

    def __init__(self, grpc_url: str, admin_key: str, timeout: float) -> None:
        headers = {f"triton-grpc-protocol-{KEY_HEADER}": admin_key}
        super().__init__(grpc_url, timeout=timeout, headers=headers)

    def load(self, name: str) -> None:
        """Load a model from the current files of the repository, replacing the loaded one."""
        self._change("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=name))

    def load_files(self, config: config_pbtxt.ModelConfig, files: Mapping[str, bytes]) -> None:
        """Load a model from these files only; keys are paths inside the model's folder."""
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
        """Return the state of each version that was ever loaded, by name and version.

        A state is READY, LOADING, UNLOADING or UNAVAILABLE.
        """
        index: Any = self._call(Call("RepositoryIndex", service_pb2.RepositoryIndexRequest()))
        return {(entry.name, entry.version): entry.state for entry in index.models}

    def _change(self, method: str, request: Message) -> None:
        self._call(Call(method, request, may_repeat=False))
