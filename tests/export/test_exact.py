"""The exact variant: whole numbers whose sums no runtime can round, of networks of many forms."""

import copy
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import find_unequal, hash_scores
from pipeline.core.signature import TensorSpec
from pipeline.export import graph
from pipeline.export.exact import LARGEST_FACTOR, Sums, require_bounds, scores_of, to_exact
from pipeline.export.export import export_program, to_onnx
from pipeline.export.runtime import onnx_predictor
from pipeline.training.networks import build
from pipeline.training.recipes import RECIPES
from pipeline.validation.exact import compare_levels, eager_scores, scores_predictor
from tools.whole_numbers import whole_scores

COLOUR = np.random.default_rng(0).integers(0, 256, (80, 3, 12, 12), dtype=np.uint8)
GRAY = np.random.default_rng(0).integers(0, 256, (80, 1, 28, 28), dtype=np.uint8)


class Scaled(nn.Sequential):
    """Layers on pixels that are scaled as for an RGB network."""

    def forward(self, images: Tensor) -> Tensor:
        mean = torch.tensor([0.49, 0.48, 0.44]).view(1, 3, 1, 1)
        x = (images.float() / 255 - mean) / 0.25
        scores: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch's
        return functional.log_softmax(scores / 1.3, dim=1)


def steady(model: nn.Module, images: np.ndarray = COLOUR) -> nn.Module:
    """The network with weights of a seed, and statistics of its images."""
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.reset_parameters()
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(part.weight, -1.5, 1.5)  # negative scales as well
            nn.init.uniform_(part.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.from_numpy(images))
    return model.eval()


def spec_of(images: np.ndarray) -> TensorSpec:
    return TensorSpec("images", str(images.dtype), images.shape[1:])


def exact_of(model: nn.Module, images: np.ndarray = COLOUR) -> fx.GraphModule:
    network = to_exact(export_program(model, spec_of(images)), images)
    require_bounds(network, spec_of(images))
    return network


def onnx_of(network: fx.GraphModule, images: np.ndarray, classes: int) -> bytes:
    spec, outputs = spec_of(images), TensorSpec("log_probabilities", "float32", (classes,))
    wanted = graph.Signature(spec, outputs, 18, 9, scores_of(network, spec))
    return to_onnx(export_program(network, spec), wanted, {})


def conv(before: int, after: int, **how: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, **how)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: Scaled(
        conv(3, 8, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(288, 5),
    ),
    "a negative scale behind a max-pool, and again": lambda: Scaled(
        conv(3, 8),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    ),
    "a negative scale between ReLU and max-pool": lambda: Scaled(
        conv(3, 8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2),
        conv(8, 6, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ),
    "batch norm first, then ReLU": lambda: Scaled(
        nn.BatchNorm2d(3),
        nn.ReLU(),
        conv(3, 6, groups=3),
        nn.ReLU(),
        nn.AvgPool2d(2, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(150, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 5),
    ),
    "no ReLU": lambda: Scaled(
        conv(3, 8, stride=2), conv(8, 8), nn.Dropout(), nn.Flatten(), nn.Linear(72, 5)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_answers_almost_as_before_and_equally_everywhere(name: str) -> None:
    model = steady(NETWORKS[name]())
    network = exact_of(model)
    with torch.no_grad():
        before = model(torch.from_numpy(COLOUR))
        after, scores = network(torch.from_numpy(COLOUR))
    assert scores.dtype == torch.int32
    spread = float((before - before.mean(dim=0)).abs().max())
    assert float((before - after).abs().max()) < 0.15 * spread
    content = onnx_of(network, COLOUR, 5)
    assert not [*compare_levels(content, COLOUR, eager_scores(network, COLOUR))]
    assert not find_unequal(scores.numpy(), whole_scores(content, COLOUR))


@pytest.mark.parametrize("recipe", ["standard", "best", "quick", "baseline", "note"])
def test_every_recipe_has_an_exact_variant(recipe: str) -> None:
    model = steady(build(RECIPES[recipe], 10), GRAY)
    network = exact_of(model, GRAY)
    scores = eager_scores(network, GRAY[:8])
    assert scores.shape[1] == (11 if recipe == "standard" else 10)
    assert network(torch.from_numpy(GRAY[:2]))[0].shape == (2, 10)


def test_images_of_floats_become_steps_of_a_power_of_two() -> None:
    images = (COLOUR / 255).astype(np.float32)
    model = steady(nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)), images)
    network = exact_of(model, images)
    far = images * 1e9  # clipped, so that no sum can overflow
    content = onnx_of(network, images, 5)
    for rows in (images, far, -far):
        expected = eager_scores(network, rows)
        assert not [*compare_levels(content, rows, expected)]
        assert not find_unequal(expected, whole_scores(content, rows))


class Wrong(nn.Module):
    """A network with one operation that has no exact form."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.linear = conv(3, 3, padding=1), nn.Linear(432, 5)
        self.operation = operation

    def forward(self, images: Tensor) -> Tensor:
        x = self.operation(torch.relu(self.conv(images.float())))
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("sigmoid", torch.sigmoid),
        ("add", lambda x: x + x),
        ("mul", lambda x: x * x),
        ("div", lambda x: torch.ones(3, 1, 1) / (x + 1)),
        ("relu6", functional.relu6),
        ("flip", lambda x: x.flip(3)),
        ("conv2d", lambda x: functional.conv2d(x * torch.rand(12, 12), torch.ones(3, 3, 1, 1))),
        ("mean", lambda x: x + x.mean(1, keepdim=True)),
        ("avg_pool2d", lambda x: functional.avg_pool2d(x, 3, 1, 1)),
        ("permute", lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3)),
    ],
)
def test_what_has_no_exact_form_is_refused_by_name(
    name: str, operation: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(CheckFailedError, match=f"exact cannot convert {name}"):
        exact_of(Wrong(operation).eval())


def test_a_network_whose_answer_needs_the_images_again_is_refused() -> None:
    class Twice(Wrong):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + images.float().amax((1, 2, 3))[:, None]

    with pytest.raises(CheckFailedError, match="must follow from it alone"):
        exact_of(Twice(lambda x: x).eval())


def test_without_images_there_is_no_calibration() -> None:
    with pytest.raises(CheckFailedError, match="needs images for its calibration"):
        to_exact(export_program(Wrong(lambda x: x).eval(), spec_of(COLOUR)), COLOUR[:0])


@pytest.fixture(scope="module")
def network() -> fx.GraphModule:
    return exact_of(steady(NETWORKS["padded"]()))


def layer(network: fx.GraphModule, number: int = 1) -> Sums:
    part = network.get_submodule(f"layer_{number}")
    assert isinstance(part, Sums)
    return part


def test_both_factors_of_every_product_have_eleven_bits(network: fx.GraphModule) -> None:
    for part in network.children():
        assert isinstance(part, Sums)
        assert 500 < part.weight.abs().max() <= LARGEST_FACTOR
        assert torch.equal(part.weight, part.weight.round())
        assert not (part.weight.view(torch.int32) & 0x1FFF).any()  # the bits that TF32 drops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.bias.add_(2**24), "layer_1: a sum may reach"),
        (lambda part: part.weight.mul_(64), "layer_1: a sum may reach"),
        (lambda part: part.weight[0].add_(0.5), "layer_1: a weight is not a whole number"),
        (lambda part: part.weight[0, 0, 0, 0].fill_(2048), "layer_1: a factor has more than 11"),
    ],
)
def test_a_sum_over_its_bound_is_refused(
    network: fx.GraphModule, change: Callable[[Sums], object], message: str
) -> None:
    changed = copy.deepcopy(network)
    change(layer(changed))
    with pytest.raises(CheckFailedError, match=message):
        require_bounds(changed, spec_of(COLOUR))


def test_the_bound_holds_for_any_part_of_any_sum(network: fx.GraphModule) -> None:
    part = layer(network)
    low, high = torch.full((1, 3, 12, 12), -130.0), torch.full((1, 3, 12, 12), 135.0)
    least, most = part.bounds(low, high)
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randint(-130, 136, (1, 3, 12, 12)).float() * (torch.rand(1, 3, 12, 12) < 0.5)
        sums = part(x)
        assert bool(((least <= sums) & (sums <= most)).all())


def test_one_weight_more_by_one_changes_the_digest(network: fx.GraphModule) -> None:
    changed = copy.deepcopy(network)
    layer(changed).weight[0, 0, 1, 1] += 1
    before, after = (scores_predictor(each)(COLOUR) for each in (network, changed))
    assert hash_scores(before) != hash_scores(after)
    assert "are not equal, the first is image" in find_unequal(before, after)
    content = onnx_of(changed, COLOUR, 5)
    problems = [*compare_levels(content, COLOUR, before)]
    assert len(problems) == 6
    assert problems[0].startswith("ORT_DISABLE_ALL, 1 threads: ")


def test_the_file_has_a_second_output_and_answers_the_first_alone(network: fx.GraphModule) -> None:
    content = onnx_of(network, COLOUR, 5)
    signature = graph.read_signature(graph.parse(content, "it"), "it")
    assert signature.scores == TensorSpec("scores", "int32", (5,))
    assert "and scores (int32 [batch, 5])" in str(signature)
    assert onnx_predictor(content)(COLOUR).shape == (80, 5)
    assert onnx_predictor(content, outputs=(0, 1))(COLOUR).shape == (80, 10)
    weights = [
        numpy_helper.to_array(t) for t in onnx.load_model_from_string(content).graph.initializer
    ]
    assert all((w == w.round()).all() for w in weights if w.ndim == 4 and w.shape[2:] == (3, 3))


def test_float64_that_is_not_equal_is_found(network: fx.GraphModule) -> None:
    changed = copy.deepcopy(network)
    layer(changed, 2).weight *= 1001  # sums above 2^24: float32 rounds
    with pytest.raises(CheckFailedError, match="not equal in float32 and float64"):
        eager_scores(changed, COLOUR)
