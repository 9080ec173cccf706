"""Doctor's probes of libraries, run in a separate process, so that a crash ends only the probe.

Run as `python -m pipeline.doctor.probes torch` or `... onnxruntime MODEL`; prints one JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError


def torch_facts() -> dict[str, Any]:
    """Return torch's version, CUDA version and usable GPUs; PipelineError if it cannot compute."""
    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if torch.ones(8).sum().item() != 8:
        raise PipelineError("torch computes an incorrect sum")
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def runtime_facts(model: Path) -> dict[str, Any]:
    """Return ONNX Runtime's version and, for each provider in its build, why it fails; "" if not.

    `model` must double its input.
    """
    import numpy as np
    import onnxruntime

    from pipeline.export.runtime import PROVIDERS, onnx_predictor

    built = onnxruntime.get_available_providers()
    failing: dict[str, str] = {}
    for name, chain in PROVIDERS.items():
        first = chain[0] if isinstance(chain[0], str) else chain[0][0]
        if first not in built:
            continue
        failing[name] = ""
        try:
            if onnx_predictor(model.read_bytes(), 1, name)(np.ones((1, 2), np.float32)).sum() != 4:
                failing[name] = "it computes an incorrect result"
        except PipelineError as error:
            failing[name] = str(error)
    return {"version": onnxruntime.__version__, "providers": failing}


if __name__ == "__main__":
    asked, *arguments = sys.argv[1:]
    facts = torch_facts() if asked == "torch" else runtime_facts(Path(arguments[0]))
    print(json.dumps(facts))
