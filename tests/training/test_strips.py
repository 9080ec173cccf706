"""Strips to train with, and the loss of their texts."""

import copy

import numpy as np
import pytest
import torch

from pipeline.core.errors import SettingError
from pipeline.core.signature import STEPS
from pipeline.core.strings import sum_alignments
from pipeline.data.splits import Split, load_split
from pipeline.training import strips
from pipeline.training.checkpoint import RunState
from pipeline.training.device import choose_placement
from pipeline.training.loop import Batches, train
from pipeline.training.networks import Network
from pipeline.training.outliers import Outliers
from pipeline.training.recipes import TrainConfig
from pipeline.training.strips import ctc_loss, lay_out, make_strips
from tests.conftest import REPOSITORY

CONFIG = TrainConfig.of("number", batch_size=16)


@pytest.fixture(scope="module")
def digits() -> Split:
    split = load_split("mnist", REPOSITORY / "data" / "mnist", "test")
    return Split(split.images[:2000], split.labels[:2000], split.classes)


@pytest.fixture(scope="module")
def tensors(digits: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(digits.images), torch.from_numpy(digits.labels)


def test_a_batch_of_strips_is_a_function_of_seed_and_step(digits: Split) -> None:
    placement = choose_placement("cpu")
    one, other = (Batches(digits, CONFIG.settings, 3, placement, "numbers") for _ in range(2))
    one.at(0)
    for first, second in zip(one.at(5), other.at(5), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(one.at(5)[0], one.at(6)[0])
    images, texts = one.at(5)
    assert images.shape == (16, 1, 28, 280)
    assert texts.shape == (16, 13)
    ends = (texts < 0).int()
    assert (ends.diff(dim=1) >= 0).all()  # digits first, then nothing
    assert (images.flatten(1).amax(dim=1) > 128).all()


def test_letters_alone_have_no_text_and_among_digits_are_left_out(
    tensors: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    outliers = Outliers(*tensors, seed=0)
    for share, is_read in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(strips, "FOREIGN", share)
        monkeypatch.setattr(strips, "MIXED", 0.0)
        torch.manual_seed(0)
        _, texts = make_strips(*tensors, 32, CONFIG.settings, 1.0, outliers)
        assert bool((texts[:, 0] >= 0).all()) is is_read
        assert bool((texts >= 0).any()) is is_read


def test_what_does_not_fit_on_a_strip_is_not_in_its_text() -> None:
    tiles = torch.zeros(13, 1, 28, 28)
    tiles[:, :, 4:24, 3:25] = 255  # squares: 13 of them are longer than a strip
    torch.manual_seed(1)
    strip, texts = lay_out(tiles, torch.ones(1, 13, dtype=torch.bool), torch.arange(13)[None] % 10)
    fit = int((texts >= 0).sum())
    assert 6 <= fit < 13
    assert texts[0, :fit].tolist() == [index % 10 for index in range(fit)]
    assert strip.shape == (1, 1, 28, 280)


def test_the_loss_is_the_probability_of_the_text() -> None:
    outputs = torch.randn(4, STEPS, 11, dtype=torch.float64).log_softmax(dim=2)
    texts = torch.full((4, 13), -1)
    for row, text in enumerate(("2026", "7", "", "00")):
        texts[row, : len(text)] = torch.tensor([int(digit) for digit in text], dtype=torch.long)
    logs = sum_alignments(outputs.numpy(), np.array(["2026", "7", "", "00"]))
    expected = -np.mean(logs / [4, 1, 1, 2])
    assert float(ctc_loss(outputs, texts)) == pytest.approx(expected)


def test_a_resumed_training_of_strips_gives_the_same_bytes(digits: Split) -> None:
    config = TrainConfig.of("number", batch_size=16, epochs=6 * 16 / 2000)
    validation = Split(np.zeros((4, 1, 28, 280), np.uint8), np.array([""] * 4), digits.classes)
    states: list[RunState] = []

    def keep(state: RunState) -> None:
        states.append(copy.deepcopy(state))  # its tensors are those that are trained

    def run(state: RunState | None = None) -> Network:
        placement = choose_placement("cpu")
        return train(config, digits, validation, placement, state, save=keep, save_every=3)[0]

    whole = run()
    resumed = run(states[0])
    assert states[0].step == 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize(("recipe", "dataset"), [("number", "mnist"), ("quick", "numbers")])
def test_a_recipe_is_refused_for_a_data_set_of_another_kind(recipe: str, dataset: str) -> None:
    with pytest.raises(SettingError, match=f"recipe {recipe} does not train on {dataset}"):
        TrainConfig.of(recipe, dataset)
