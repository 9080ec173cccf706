from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.core.errors import PipelineError
from pipeline.data.splits import Split
from pipeline.training import outliers
from pipeline.training.device import choose_placement
from pipeline.training.loop import Batches
from pipeline.training.networks import DigitNorm
from pipeline.training.outliers import TURNS, Outliers, PictureOutliers, _turn
from pipeline.training.recipes import RECIPES, TrainConfig, make_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few() -> Split:
    """256 images of noise, of every class."""
    images = np.random.default_rng(0).integers(0, 256, (256, 1, 28, 28), np.uint8)
    return Split(images, np.arange(256) % 10, tuple("0123456789"))


@pytest.fixture
def small_stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An eighth of the stock, where it is made for each seed again."""
    monkeypatch.setattr(outliers, "STOCK", outliers.STOCK // 8)
    outliers._draw.cache_clear()
    yield
    outliers._draw.cache_clear()


def things(split: Split, seed: int) -> torch.Tensor:
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    stock = Outliers(images, labels, seed)
    return torch.cat([stock.draw_written(20), stock.draw_painted(12)])


@pytest.mark.slow
def test_some_of_what_is_painted_is_a_spot_of_nothing_but_full_ink(few: Split) -> None:
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
    painted = Outliers(images, labels, 0).draw_painted(200)
    is_full = ((painted == 0) | (painted == 255)).all(dim=(1, 2, 3))
    share = painted.count_nonzero(dim=(1, 2, 3)) / 28**2
    spots = painted[is_full & (share > 0.15) & (share < 0.9)]
    assert 20 < len(spots) < 60


@pytest.mark.slow
def test_things_are_images_with_ink_and_their_seed_decides_them(
    few: Split, small_stock: None
) -> None:
    first, again, other = (things(few, seed) for seed in (1, 1, 2))
    assert first.shape == (32, 1, 28, 28)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.unique(first.flatten(1), dim=0)) > 28


def test_a_digit_is_turned_only_in_the_ways_that_make_no_digit() -> None:
    corner = torch.arange(28 * 28, dtype=torch.float32).view(1, 1, 28, 28)  # no turn is another
    for digit, ways in TURNS.items():
        labels = torch.tensor([0, 1, digit])  # a 0 and a 1 are never taken
        torch.manual_seed(0)
        turned = _turn(torch.cat([corner * 0, corner * 0, corner]), labels, 200)
        allowed = []
        for way in ways:
            thing = corner.mT if way & 4 else corner
            thing = thing.flip(-1) if way & 2 else thing
            allowed.append(thing.flip(-2) if way & 1 else thing)
        found = torch.unique(turned.flatten(1), dim=0)
        wanted = torch.unique(torch.cat(allowed).flatten(1), dim=0)
        assert torch.equal(found, wanted), digit
        assert 0 not in ways  # not at all


@pytest.mark.slow
def test_things_follow_the_digits_of_a_batch_and_could_be_any_class(few: Split) -> None:
    batches = Batches(few, make_recipe("standard", outliers=0.25), 0, choose_placement("cpu"))
    images, targets = batches.at(0)
    assert images.shape == (160, 1, 28, 28)
    assert 0 <= images.min() <= images.max() <= 255.01
    labels = torch.from_numpy(few.labels)
    plain, expected = Batches(
        few, make_recipe("standard", outliers=0), 0, choose_placement("cpu")
    ).at(0)
    assert plain.shape == (128, 1, 28, 28)
    assert expected.dtype == labels.dtype
    assert torch.equal(targets[:128].argmax(dim=1), expected)
    assert torch.equal(targets[:128].sum(dim=1), torch.ones(128))
    assert torch.equal(targets[128:], torch.full((32, 10), 0.1))


def test_what_is_no_digit_leaves_the_statistics_of_the_digits_alone() -> None:
    torch.manual_seed(0)
    digits, others = torch.randn(20, 3, 4, 4), 100 * torch.randn(5, 3, 4, 4)
    plain, norm = torch.nn.BatchNorm2d(3, momentum=0.5), DigitNorm(3, 0.5, 0.25)
    together = norm(torch.cat([digits, others]))
    assert torch.allclose(together[:20], plain(digits), atol=1e-6)
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.get_buffer(name), plain.get_buffer(name))
    # The others are normalized by the same numbers, with which a digit stays what it became.
    twice = DigitNorm(3, 0.5, 1.0)(torch.cat([digits, digits]))
    assert torch.allclose(twice[:20], twice[20:], atol=1e-5)
    plain.eval()
    norm.eval()
    assert torch.equal(norm(others), plain(others))


def test_gradients_go_through_the_statistics_of_the_digits() -> None:
    torch.manual_seed(0)
    norm = DigitNorm(3, 0.5, 0.5).double()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(
            norm, {"weight": weight, "bias": bias}, (x,)
        ),
        [
            torch.randn(*size, dtype=torch.double, requires_grad=True)
            for size in ((6, 3, 2, 2), (3,), (3,))
        ],
    )


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """30 dark bars on light paper, of two classes: upright (most of them) and level."""
    images = torch.full((30, 1, 28, 28), 240, dtype=torch.uint8)
    images[:20, :, 4:24, 12:16] = 30
    images[20:, :, 12:16, 4:24] = 30
    return images, torch.tensor([0] * 20 + [1] * 10)


def test_outliers_of_a_folder_are_altered_pictures_strokes_noise_and_plain_paper(
    pictures: tuple[torch.Tensor, torch.Tensor],
) -> None:
    stock = PictureOutliers(*pictures, seed=0)
    written, painted = stock.draw_written(2000), stock.draw_painted(2000)
    for drawn in (written, painted):
        assert drawn.dtype == torch.uint8
        assert drawn.shape == (2000, 1, 28, 28)
    known = {image.numpy().tobytes() for image in pictures[0]}
    assert not known & {image.numpy().tobytes() for image in written}
    paper = (written == 240).float().mean(dim=(1, 2, 3))
    assert 0.6 < (paper > 0.5).float().mean() < 0.95  # on the paper of the set's own pictures
    levels = painted.float().std(dim=(1, 2, 3))
    assert (levels == 0).float().mean() > 0.2  # plain paper
    assert ((painted == 240).all(dim=3).all(dim=2)).float().mean() > 0.05  # that of the pictures
    rough = (painted[..., 1:].float() - painted[..., :-1].float()).abs().mean(dim=(1, 2, 3))
    assert (rough > 20).float().mean() > 0.1  # noise


def test_the_seed_decides_the_outliers_of_a_folder(
    pictures: tuple[torch.Tensor, torch.Tensor], small_stock: None
) -> None:
    first, again, other = (PictureOutliers(*pictures, seed).draw_written(9) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_of_a_folder_has_pictures_of_no_class_that_could_be_any(
    pictures: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, labels = pictures
    split = Split(images.numpy(), labels.numpy(), ("upright", "level"))
    recipe = make_recipe("standard", "folder:bars", batch_size=20)
    seen, targets = Batches(split, recipe, 0, choose_placement("cpu"), "folder:bars").at(0)
    assert seen.shape == (27, 1, 28, 28)
    assert torch.equal(targets[20:], torch.full((7, 2), 0.5))
    assert seen[:20, :, 0].min() > 200  # distorted on their own paper


def test_digits_and_folders_are_trained_with_outliers_and_other_sets_are_not() -> None:
    assert RECIPES["standard"].outliers > 0
    assert make_recipe("standard", "folder:pictures").outliers == RECIPES["standard"].outliers
    assert make_recipe("standard", "fashion-mnist").outliers == 0
    with pytest.raises(PipelineError, match="fashion-mnist is trained without"):
        TrainConfig(settings=RECIPES["standard"], dataset="fashion-mnist")
    assert make_recipe("standard", outliers=0.5).outliers == 0.5
    with pytest.raises(PipelineError, match="outliers must be in the range 0<=x<1"):
        make_recipe("standard", outliers=1.5)
