"""The one place that decides where things run."""

from dataclasses import dataclass

import torch

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Placement:
    """A device, and why it was chosen."""

    device: torch.device
    description: str

    def __str__(self) -> str:
        return self.description


def _missing_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch {torch.__version__} sees no GPU (is the driver installed?)"


def choose(wanted: str) -> Placement:
    """The device for `wanted`: auto, cpu or cuda.

    Raises PipelineError when CUDA is demanded and missing: a GPU is never silently left out.
    """
    if wanted != "cpu" and torch.cuda.is_available():
        # Off, so that a GPU's answers differ from a CPU's by rounding only.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        name = torch.cuda.get_device_name()
        return Placement(torch.device("cuda"), f"cuda ({name}; TF32 off)")
    if wanted == "cuda":
        raise PipelineError(
            f"no CUDA device: {_missing_cuda()}. Install a CUDA build of torch "
            "(make .venv TORCH_INDEX=URL), or use --device cpu"
        )
    reason = f"; {_missing_cuda()}" if wanted == "auto" else ""
    return Placement(torch.device("cpu"), f"cpu ({torch.get_num_threads()} threads{reason})")
