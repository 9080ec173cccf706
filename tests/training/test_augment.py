from typing import Any

import pytest
import torch

from pipeline.training.augment import augment
from pipeline.training.recipes import RECIPES, make_recipe

STILL: dict[str, Any] = {"rotate": 0, "stretch": 0, "shear": 0, "shift": 0, "elastic": 0}


def stroke() -> torch.Tensor:
    """A batch of the same upright stroke, four pixels wide."""
    images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 6:22, 12:16] = 255
    return images


def test_a_recipe_that_distorts_nothing_leaves_the_bytes_alone() -> None:
    images = stroke()
    assert augment(images, RECIPES["quick"]) is images


@pytest.mark.parametrize("kind", ["rotate", "stretch", "shear", "shift", "elastic"])
def test_each_distortion_changes_each_image_and_keeps_it_a_stroke_on_paper(kind: str) -> None:
    torch.manual_seed(0)
    images = stroke()
    distorted = augment(images, make_recipe("quick", **{**STILL, kind: 0.15}))
    assert distorted.dtype == torch.float32
    assert distorted.shape == images.shape
    assert 0 <= distorted.min() <= distorted.max() <= 255.01
    changed = (distorted - images).abs().amax(dim=(1, 2, 3))
    assert (changed > 1).float().mean() > 0.9
    assert distorted[:, :, :2].max() == 0  # paper stays paper
    mass = distorted.sum(dim=(1, 2, 3)) / images[0].sum()
    assert 0.6 < mass.min() <= mass.max() < 1.6


def test_a_picture_of_a_folder_is_distorted_on_its_own_paper() -> None:
    papers = torch.tensor([0, 90, 200, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    images = torch.where(stroke()[:4] > 0, 128, papers)
    for is_folder in (True, False):
        torch.manual_seed(0)
        distorted = augment(images, make_recipe("standard", shift=0.5), has_own_paper=is_folder)
        corners = distorted[..., [0, 0, -1, -1], [0, -1, 0, -1]]
        is_black = (corners == 0).any(dim=-1).flatten()
        assert is_black.tolist() == [True, *[not is_folder] * 3]


def test_the_same_seed_distorts_the_same_way() -> None:
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(augment(stroke(), RECIPES["standard"]))
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_a_shift_alone_moves_the_centre_of_mass_by_at_most_that() -> None:
    torch.manual_seed(0)
    moved = augment(stroke(), make_recipe("quick", **{**STILL, "shift": 0.2}))
    columns = torch.arange(28.0)
    centre = (moved.sum(dim=(1, 2)) * columns).sum(dim=1) / moved.sum(dim=(1, 2, 3))
    away = (centre - 13.5).abs()  # in pixels; 0.2 of half the side is 2.8
    assert 2.0 < away.max() <= 2.81


def test_strokes_become_thicker_and_thinner_and_stay_where_they_are() -> None:
    torch.manual_seed(0)
    images = stroke()
    redrawn = augment(images, make_recipe("quick", **{**STILL, "stroke": 0.9}))
    ink = redrawn.sum(dim=(1, 2, 3)) / images.float().sum(dim=(1, 2, 3))
    assert ink.min() < 0.75
    assert ink.max() > 1.25
    columns = torch.arange(28.0)
    centre = (redrawn.sum(dim=(1, 2)) * columns).sum(dim=1) / redrawn.sum(dim=(1, 2, 3))
    assert (centre - 13.5).abs().max() < 0.01
