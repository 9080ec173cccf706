import numpy as np
import pytest
import torch

from pipeline.core.signature import tensors_of
from pipeline.training.networks import MEAN, STD, Net, build, eager_predictor, share_none
from pipeline.training.recipes import RECIPES, default_dataset


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_network_maps_uint8_images_to_log_probabilities(recipe: str) -> None:
    given, answer = tensors_of(default_dataset(recipe), classes=7)
    model = build(RECIPES[recipe], classes=7).eval()
    outputs = model(torch.randint(0, 256, (3, *given.shape), dtype=torch.uint8))
    assert outputs.shape == (3, *answer.shape)
    assert outputs.dtype == torch.float32
    assert torch.allclose(outputs.exp().sum(dim=-1), torch.ones(outputs.shape[:-1]))


def test_the_note_is_784_128_10() -> None:
    model = build(RECIPES["note"], classes=10)
    assert [tuple(p.shape) for p in model.parameters()] == [(128, 784), (128,), (10, 128), (10,)]


def test_the_yardstick_is_the_classic_network() -> None:
    model = build(RECIPES["baseline"], classes=10)
    assert sum(p.numel() for p in model.parameters()) == 1_199_882  # as pytorch/examples has it


def test_normalization_is_part_of_the_model() -> None:
    model = Net(RECIPES["note"], classes=10).eval()
    paper, ink = torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.full((1, 1, 28, 28), 255)
    seen = []
    model.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, 0]))
    model(paper), model(ink.to(torch.uint8))
    assert seen == pytest.approx([-MEAN / STD, (1 - MEAN) / STD], rel=1e-5)


def test_a_float64_copy_computes_in_float64() -> None:
    model = build(RECIPES["quick"], classes=10).eval()
    precise = build(RECIPES["quick"], classes=10).eval()
    precise.load_state_dict(model.state_dict())
    apart = (model(images(8)).double() - precise.double()(images(8))).abs().max()
    assert 0 < apart < 1e-4


def test_what_is_none_of_the_classes_is_shared_out_among_them() -> None:
    scores = torch.tensor([[2.0, 0.5, 1.0, 1.5], [1.0, 3.0, 0.0, -50.0]])  # the last: none of three
    parts = scores.softmax(dim=1)
    expected = (parts[:, :3] + parts[:, 3:] / 3).log()
    assert torch.allclose(share_none(scores), expected, atol=1e-6)
    far = share_none(torch.tensor([[0.0, 300.0, 0.0, 0.0], [0.0, 0.0, 0.0, 300.0]]))
    assert far[0].tolist() == pytest.approx([-300, 0, -300], abs=1.5)
    assert far[1].exp().tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)


def test_only_a_network_trained_beside_other_things_has_a_score_for_them() -> None:
    for name, recipe in RECIPES.items():
        if recipe.network == "cnn":
            scores = build(recipe, classes=10).get_parameter("classifier.bias")
            assert len(scores) == (11 if recipe.outliers else 10), name


def test_the_temperature_flattens_the_probabilities_and_keeps_the_class() -> None:
    model = build(RECIPES["quick"], classes=10).eval()
    sharp = model(images(8))
    model.temperature.fill_(2.0)
    flat = model(images(8))
    assert torch.equal(sharp.argmax(1), flat.argmax(1))
    assert (flat.max(1).values < sharp.max(1).values).all()


def test_a_predictor_takes_and_returns_arrays() -> None:
    predictor = eager_predictor(build(RECIPES["quick"], classes=10).eval())
    outputs = predictor(images(5).numpy())
    assert isinstance(outputs, np.ndarray)
    assert outputs.shape == (5, 10)
    assert outputs.dtype == np.float32
