import torch

from pipeline.training.outliers import (
    GRID,
    STROKES,
    WAYS,
    Stroke,
    _draw_letters,
    read_letters,
    read_strokes,
)


def test_every_way_to_write_a_letter_has_as_many_strokes_on_the_grid() -> None:
    found = read_letters()
    assert len(found) == 2 * len(WAYS)
    assert {len(strokes) for strokes in found} == {STROKES}
    assert all(-2 < place < GRID for way in found for s in way for point in s for place in point)


def test_a_line_bends_towards_its_own_middle_and_a_curve_towards_the_point_in_brackets() -> None:
    expected: list[Stroke] = [((0, 0), (0, 4), (0, 8)), ((0, 8), (4, 8), (4, 2)), ((1, 1),) * 3]
    assert read_strokes("00-08(48)42 11-11") == expected


def test_serifs_stand_where_one_stroke_alone_ends_at_the_top_or_the_bottom() -> None:
    assert WAYS[0] == "08-30-68 15-55"  # an A: its feet, not its tip
    added = read_letters()[len(WAYS)][3:5]
    assert [middle for _, middle, _ in added] == [(0, 8), (6, 8)]


def test_letters_are_drawn_upright_whole_and_each_in_another_way() -> None:
    torch.manual_seed(0)
    drawn = _draw_letters(256, torch.device("cpu"))
    assert drawn.shape == (256, 1, 28, 28)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert (drawn.amax(dim=(1, 2, 3)) > 0.4).all()
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 256
    high = (drawn.amax(dim=3) > 0.3).sum(dim=2).float().mean()
    wide = (drawn.amax(dim=2) > 0.3).sum(dim=2).float().mean()
    assert high > wide + 2  # letters are higher than wide
    border = torch.cat([drawn[..., 0], drawn[..., -1], drawn[..., 0, :], drawn[..., -1, :]])
    assert (border > 0.5).float().mean() < 0.01
