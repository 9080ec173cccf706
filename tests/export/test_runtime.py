import numpy as np
import pytest
import torch

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.export.runtime import PROVIDERS, onnx_predictor, require_provider
from pipeline.validation.compare import probe_images
from tests.conftest import Chain

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


def test_onnx_runtime_that_refuses_a_model_is_a_failed_check() -> None:
    with pytest.raises(CheckFailedError, match="does not load the model"):
        onnx_predictor(b"no model")


def test_every_node_on_the_provider_passes() -> None:
    require_provider("cuda", [CUDA, CPU], [(CUDA, "Conv a"), (CUDA, "Relu b")])
    require_provider("tensorrt", [TENSORRT, CUDA, CPU], [(TENSORRT, "whole")])
    require_provider("cpu", [CPU], [(CPU, "Conv a")])


def test_a_node_that_fell_back_fails_and_is_named() -> None:
    with pytest.raises(CheckFailedError, match=f"1 nodes do not run on {CUDA}: Relu b on {CPU}"):
        require_provider("cuda", [CUDA, CPU], [(CUDA, "Conv a"), (CPU, "Relu b")])
    with pytest.raises(CheckFailedError, match=f"Conv a on {CUDA}"):
        require_provider("tensorrt", [TENSORRT, CUDA, CPU], [(CUDA, "Conv a")])


def test_a_provider_that_was_not_loaded_is_an_error_that_says_what_it_needs() -> None:
    with pytest.raises(PipelineError, match=f"cannot load its {CUDA} here. Install"):
        require_provider("cuda", [CPU], [(CPU, "Conv a")])


def test_tf32_is_off_wherever_cuda_may_compute() -> None:
    for provider in ("cuda", "tensorrt"):
        assert (CUDA, {"use_tf32": "0"}) in PROVIDERS[provider]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_onnx_runtime_runs_every_node_on_the_gpu(made: Chain) -> None:
    content = made.paths.onnx.read_bytes()
    probes = probe_images(np.zeros((1, 1, 28, 28), np.uint8))
    expected = onnx_predictor(content)(probes)
    assert abs(onnx_predictor(content, provider="cuda")(probes) - expected).max() < 1e-3
