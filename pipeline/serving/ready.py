"""Replay a release's golden set on a server that runs."""

import numpy as np

from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import GOLDEN_BATCHES, Agreement, Golden, compare


def replay_golden(client: Client, golden: Golden) -> Agreement:
    """How far a server lies from the golden set's answers, at batch sizes that it takes."""
    largest = max(1, client.config().max_batch_size)
    sizes = tuple(size for size in GOLDEN_BATCHES if size <= largest)
    return compare(golden, triton_predictor(client), sizes)


def served_version(client: Client) -> int:
    """The version of the model that answers, by an inference on one blank image."""
    images = client.config().input[0]
    if any(dim < 1 for dim in images.dims):
        raise PipelineError(f"{client.name} at {client.endpoint} takes images of no fixed shape")
    answer = client.infer(np.zeros((1, *images.dims), config_pbtxt.dtype(images)))[1]
    return int(answer) if answer.isdigit() else 0
