"""Client that loads and unloads models on a running server, with the admin key it requires."""

from collections.abc import Mapping

from pipeline.client.client import Client
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
        self.call_triton("load_model", name, may_repeat=False)

    def load_files(self, config: config_pbtxt.ModelConfig, files: Mapping[str, bytes]) -> None:
        """Load a model from these files only; keys are paths inside the model's folder."""
        named = {f"file:{path}": content for path, content in files.items()}
        options = {"config": config_pbtxt.to_json(config), "files": named}
        self.call_triton("load_model", config.name, may_repeat=False, **options)

    def unload(self, name: str) -> None:
        """Stop serving a model."""
        self.call_triton("unload_model", name, may_repeat=False)

    def states(self) -> dict[tuple[str, str], str]:
        """Return the state of each version that was ever loaded, by name and version.

        A state is READY, LOADING, UNLOADING or UNAVAILABLE.
        """
        index = self.call_triton("get_model_repository_index")
        return {(entry.name, entry.version): entry.state for entry in index.models}
