import pytest
import torch

from pipeline import device
from pipeline.errors import PipelineError


def test_auto_says_why_it_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placement = device.choose("auto")
    assert placement.device.type == "cpu"
    assert "CUDA" in str(placement) or "no GPU" in str(placement)


def test_cuda_that_is_missing_is_an_error_and_never_a_silent_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PipelineError, match="no CUDA device: .*--device cpu"):
        device.choose("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_is_taken_with_tf32_off(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    placement = device.choose(wanted)
    assert str(placement) == "cuda (a GPU; TF32 off)"
    assert not torch.backends.cudnn.allow_tf32
    assert device.choose("cpu").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_gives_the_same_classes_on_the_gpu_as_on_the_cpu() -> None:
    import numpy as np

    from pipeline.config import RECIPES
    from pipeline.model import build, eager_predictor

    torch.manual_seed(0)
    model = build(RECIPES["quick"], 10).eval()
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 28, 28), dtype=np.uint8)
    on_cpu = eager_predictor(model)(images)
    on_gpu = eager_predictor(model, device.choose("cuda").device)(images)
    assert np.abs(on_cpu - on_gpu).max() < 1e-4
