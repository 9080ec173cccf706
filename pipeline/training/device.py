"""Placement of training: the device, its precision, and the processes that share the work.

Several processes (started by torchrun) may train one network: all continue, or none.
"""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.errors import LostError, PipelineError
from pipeline.core.machine import cores, quota_cores
from pipeline.core.paths import format_make

# mallopt's parameters and their values: freed memory stays with the process.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_KEEP = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 1 << 26}  # bytes


@dataclass(frozen=True)
class Placement:
    """A device, the precision of training on it, and this process's rank among those of the job."""

    device: torch.device
    description: str
    precision: torch.dtype = torch.float32  # of the forward pass in training; weights are float32
    rank: int = 0
    processes: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return self.description


class _Precise(nn.Module):
    """A network whose forward pass runs in a lower precision where torch's autocast allows it."""

    def __init__(self, network: nn.Module, device: torch.device, precision: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.place, self.precision = device.type, precision

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.place, self.precision):
            outputs: Tensor = self.network(images)
        return outputs.float()


def prepare_network(network: nn.Module, placement: Placement, compiled: bool = False) -> nn.Module:
    """Move `network` to its device in place and return the module that the training loop calls.

    It runs in channels_last, under autocast if the precision is lower, compiled if `compiled`, and
    with gradients averaged over all processes. Each process has its own statistics of batch
    normalization; those of the first are kept.
    """
    device = placement.device
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub
    model = network
    if placement.precision != torch.float32:
        model = _Precise(model, device, placement.precision)
    if compiled:
        model.compile()
    if placement.processes > 1:
        with warnings.catch_warnings():
            # Earlier versions of torch do not have the new name that torch 2.13 asks for.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model = DistributedDataParallel(model, broadcast_buffers=False)
    return model


def keep_freed_memory() -> None:
    """Let the C library keep memory that torch frees, instead of returning it after each batch.

    Otherwise the kernel allocates and clears the same pages at every step, which takes a quarter of
    a small network's time. Does nothing without glibc.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            for parameter, value in _KEEP.items():
                library.mallopt(parameter, value)


def describe_instructions() -> str:
    """Return the vector instructions that torch uses here, and oneDNN's limit if one is set.

    They decide the last bits of trained weights.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    used: str = torch.backends.cpu.get_cpu_capability()
    return f"{used}, oneDNN at most {limit}" if limit else used


def _explain_missing_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch {torch.__version__} finds no GPU (is the driver installed?)"


def choose_placement(wanted: str) -> Placement:
    """Choose the placement for `wanted` (auto, cpu or cuda); torchrun's variables give the rank.

    Raises PipelineError when CUDA is requested and missing: there is no silent fallback to the CPU.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and sys.platform == "win32":
        raise PipelineError("several processes need Linux or macOS: train without torchrun")
    shared = f" in each of {processes} processes" if processes > 1 else ""
    if wanted != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # Off, so that a GPU's answers differ from a CPU's by rounding only.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        # bfloat16 has float32's range: gradients do not underflow, so no loss scaling is needed.
        # A GPU without it trains in float32.
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        precision = torch.bfloat16 if has_bfloat16 else torch.float32
        kind = f"{torch.cuda.get_device_name(device)}; {str(precision).removeprefix('torch.')}"
        return Placement(device, f"cuda ({kind}; TF32 off){shared}", precision, rank, processes)
    if wanted == "cuda":
        raise PipelineError(
            f"no CUDA device: {_explain_missing_cuda()}. Install a CUDA build of torch "
            f"({format_make('.venv TORCH_INDEX=URL')}), or use --device cpu"
        )
    keep_freed_memory()
    reason = f"; {_explain_missing_cuda()}" if wanted == "auto" else ""
    if "OMP_NUM_THREADS" not in os.environ and quota_cores() and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())  # torch does not know a container's quota
    threads = torch.get_num_threads()
    description = f"cpu ({threads} thread{'s' * (threads > 1)}{shared}{reason})"
    return Placement(torch.device("cpu"), description, rank=rank, processes=processes)


# While a process writes a checkpoint or scores a split the others wait, at most this long.
PATIENCE = timedelta(minutes=10)


_SIGNS = ("gloo", "connection", "nccl", "process group", "timed out", "store")


@contextlib.contextmanager
def process_group(placement: Placement) -> Iterator[None]:
    """Join the job's process group, if it has several processes, and leave it at the end.

    Raises LostError when another process of the job is lost.
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
            f"process {placement.rank} of {placement.processes} lost another process (killed, out "
            "of memory?). Start the same command with --resume: it continues after the last "
            "checkpoint, or from the start"
        ) from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def synchronize(placement: Placement, loss: float, must_stop: bool) -> tuple[float, bool]:
    """Return the mean loss of all processes, and whether any must stop: equal in all of them."""
    if placement.processes == 1:
        return loss, must_stop
    sums = torch.tensor([loss, float(must_stop)], dtype=torch.float64, device=placement.device)
    distributed.all_reduce(sums)
    return sums[0].item() / placement.processes, bool(sums[1].item())
