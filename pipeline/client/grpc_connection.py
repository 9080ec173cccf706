"""The connection over gRPC."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from pipeline.client.connection import Connection
from pipeline.client.endpoint import RemoteModel
from pipeline.client.faults import Fault, of_grpc

OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Notice soon that a server is back: gRPC's default is to wait for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Clients share neither a connection nor the pause after a failed one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # no proxy, as over HTTP
    ("grpc.enable_retries", 0),  # our own retries are within the deadline, and counted
]


def read_credentials(target: RemoteModel) -> grpc.ChannelCredentials | None:
    """Return gRPC's credentials for a channel to the model's server; None without TLS."""
    if not target.endpoint.is_secure:
        return None
    pem = target.certificates
    files = (pem.ca, pem.key, pem.certificate)
    return grpc.ssl_channel_credentials(
        *(Path(file).read_bytes() if file else None for file in files)
    )


class GrpcConnection(Connection):
    """A connection over gRPC, with or without TLS."""

    library = tritonclient.grpc

    def __init__(self, target: RemoteModel) -> None:
        super().__init__(target)
        self.headers = {name.lower(): value for name, value in target.headers.items()}
        self.triton = tritonclient.grpc.aio.InferenceServerClient(
            target.endpoint.address, creds=read_credentials(target), channel_args=OPTIONS
        )

    @contextlib.contextmanager
    def _library_faults(self) -> Iterator[None]:
        try:
            yield
        except InferenceServerException as error:
            code = str(error.status()).removeprefix("StatusCode.")
            raise of_grpc(code, error.message() or "") from error
        except grpc.aio.UsageError as error:  # another task closed the channel
            raise Fault("lost", "the client was closed") from error
