import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.core.errors import PipelineError
from pipeline.training import device
from pipeline.training.device import Placement, prepare_network
from pipeline.training.networks import build
from pipeline.training.recipes import RECIPES

CPU = torch.device("cpu")


def test_auto_says_why_it_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placement = device.choose_placement("auto")
    assert placement.device.type == "cpu"
    assert "CUDA" in str(placement) or "no GPU" in str(placement)


def test_cuda_that_is_missing_is_an_error_and_never_a_silent_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PipelineError, match="no CUDA device: .*--device cpu"):
        device.choose_placement("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Let torch seem to have a GPU of that compute capability."""

    def seem(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    return seem


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_is_taken_with_tf32_off(gpu: Callable[[tuple[int, int]], None], wanted: str) -> None:
    gpu((8, 0))
    placement = device.choose_placement(wanted)
    assert str(placement) == "cuda (a GPU; bfloat16; TF32 off)"
    assert placement.precision == torch.bfloat16
    assert not torch.backends.cudnn.allow_tf32
    assert device.choose_placement("cpu").device.type == "cpu"


def test_a_gpu_without_bfloat16_trains_in_float32_so_that_no_gradient_needs_scaling(
    gpu: Callable[[tuple[int, int]], None],
) -> None:
    gpu((7, 5))
    placement = device.choose_placement("auto")
    assert placement.precision == torch.float32
    assert str(placement) == "cuda (a GPU; float32; TF32 off)"


def test_each_process_takes_the_gpu_that_torchrun_gave_it(
    gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    placement = device.choose_placement("auto")
    assert placement.device == torch.device("cuda", 1)
    assert (placement.rank, placement.processes, placement.is_first) == (3, 4, False)
    assert "in each of 4 processes" in str(placement)


def test_in_lower_precision_the_convolutions_are_computed_so_and_the_answer_is_float32() -> None:
    torch.manual_seed(0)
    network = build(RECIPES["quick"], 10).eval()  # no statistics of a batch, which amplify rounding
    seen: dict[type[nn.Module], torch.dtype] = {}
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda layer, _, output: seen.update({type(layer): output.dtype})
            )
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    exact = prepare_network(network, Placement(CPU, ""))(images)
    assert seen == {nn.Conv2d: torch.float32, nn.Linear: torch.float32}
    rounded = prepare_network(network, Placement(CPU, "", torch.bfloat16))(images)
    assert seen == {nn.Conv2d: torch.bfloat16, nn.Linear: torch.bfloat16}
    assert rounded.dtype == torch.float32
    assert torch.allclose(exact, rounded, atol=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_a_network_is_trained_in_channels_last() -> None:
    network = build(RECIPES["quick"], 10)
    assert prepare_network(network, Placement(CPU, "")) is network
    weight = network.get_parameter("features.2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compiling_leaves_the_names_of_the_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    network = build(RECIPES["quick"], 10)
    names = list(network.state_dict())
    prepare_network(network, Placement(CPU, ""), compiled=True)
    assert compiled == [network]
    assert list(network.state_dict()) == names


# Page faults of twenty training steps, in a process whose heap nobody has warmed: up to 1,100 on a
# busy machine. Without the call there are more than ten thousand.
COUNT_FAULTS = """
import resource, torch
from pipeline.training.recipes import RECIPES
from pipeline.training.device import Placement, keep_freed_memory, prepare_network
from pipeline.training.networks import build

keep_freed_memory()
network = prepare_network(build(RECIPES["quick"], 10), Placement(torch.device("cpu"), ""))
images = torch.zeros(256, 1, 28, 28, dtype=torch.uint8)
for step in range(23):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(images).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.slow
def test_a_training_step_reuses_the_memory_of_the_one_before() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 5_000


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_network_gives_the_same_classes_on_the_gpu_as_on_the_cpu() -> None:
    import numpy as np

    from pipeline.training.networks import eager_predictor

    torch.manual_seed(0)
    model = build(RECIPES["quick"], 10).eval()
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 28, 28), dtype=np.uint8)
    on_cpu = eager_predictor(model)(images)
    on_gpu = eager_predictor(model, device.choose_placement("cuda").device)(images)
    assert np.abs(on_cpu - on_gpu).max() < 1e-4


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_the_gpu_goes_down_the_same_slope_as_on_the_cpu(compiled: bool) -> None:
    losses = []
    for placement in (device.choose_placement("cpu"), device.choose_placement("cuda")):
        torch.manual_seed(0)
        network = build(RECIPES["quick"], 10)
        model = prepare_network(network, placement, compiled and placement.device.type == "cuda")
        images = torch.randint(0, 256, (128, 1, 28, 28), dtype=torch.uint8).to(placement.device)
        labels = (torch.arange(128) % 10).to(placement.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.gpu
@needs_gpu
def test_the_split_lies_on_the_gpu_and_is_distorted_there() -> None:
    import numpy as np

    from pipeline.data.splits import Split
    from pipeline.training.loop import Batches

    split = Split(np.zeros((128, 1, 28, 28), np.uint8), np.zeros(128, np.int64), ("a", "b"))
    images, labels = Batches(split, RECIPES["standard"], 0, device.choose_placement("cuda")).at(0)
    assert images.device.type == labels.device.type == "cuda"
