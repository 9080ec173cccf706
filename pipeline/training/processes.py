"""Several processes that train one network, as torchrun starts them: all go on, or none."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed

from pipeline.core.errors import LostError
from pipeline.training.device import Placement

# A process that writes a checkpoint or scores a split lets the others wait, but not for ever.
PATIENCE = timedelta(minutes=10)
_SIGNS = ("gloo", "connection", "nccl", "process group", "timed out", "store")


@contextlib.contextmanager
def together(placement: Placement) -> Iterator[None]:
    """Join the job's other processes, if it has any, and leave them in order.

    Raises LostError when one of them is lost.
    """
    if placement.processes == 1:
        yield
        return
    backend = "nccl" if placement.device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
        yield
        distributed.barrier()
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise LostError(
            f"process {placement.rank} of {placement.processes} lost another one of its job "
            "(killed, out of memory?): the last checkpoint is kept, start the same command with "
            "--resume"
        ) from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def agreed(placement: Placement, loss: float, must_stop: bool) -> tuple[float, bool]:
    """The mean loss of all processes, and whether any of them was told to stop: the same in all."""
    if placement.processes == 1:
        return loss, must_stop
    votes = torch.tensor([loss, float(must_stop)], dtype=torch.float64, device=placement.device)
    distributed.all_reduce(votes)
    return votes[0].item() / placement.processes, bool(votes[1].item())
