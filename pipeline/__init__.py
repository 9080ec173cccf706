"""Handwriting data to a served, proven model: train, export, validate, package, serve, query."""

import os

# gRPC reads it when it is loaded; without it, it prints a line for each failed handshake.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
