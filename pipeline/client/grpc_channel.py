"""What both clients need of gRPC."""

import grpc

from pipeline.client.endpoint import Certificates, Endpoint

OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is noticed soon: gRPC by itself waits for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Clients do not share a connection, nor the pause after one has failed.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # as over HTTP: a server is asked directly
    ("grpc.enable_retries", 0),  # ours are inside the deadline, and counted
]


def credentials(target: Endpoint, certificates: Certificates) -> grpc.ChannelCredentials | None:
    """What a secure channel needs; None for a plain one."""
    if not target.is_secure:
        return None
    return grpc.ssl_channel_credentials(*certificates.contents())
