"""What panels and sheets show, pixel by pixel where it matters."""

import numpy as np
import torch

from visft.visualization import drawing

GREY = np.full((60, 60, 3), 128, np.uint8)


def test_each_patch_is_a_flat_square_of_its_colour():
    colours = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]])
    panel = drawing.colour_panel(colours, 20, 20)
    assert (panel[:10, :10] == (255, 0, 0)).all() and (panel[:10, 10:] == (0, 255, 0)).all()
    assert (panel[10:, :10] == (0, 0, 255)).all() and (panel[10:, 10:] == 255).all()


def test_equal_cosines_have_equal_colours_in_any_map_of_one_scale():
    first = drawing.similarity_panel(GREY, torch.full((4, 4), 0.3), (0.0, 1.0))
    second = drawing.similarity_panel(GREY, torch.full((4, 4), 0.3), (0.0, 1.0))
    brighter = drawing.similarity_panel(GREY, torch.full((4, 4), 0.9), (0.0, 1.0))
    assert (first == second).all() and brighter.mean() > first.mean() + 20


def test_masks_are_coloured_by_whether_their_names_are_right():
    masks = [np.zeros((30, 30), bool), np.zeros((30, 30), bool)]
    masks[0][:12, :12], masks[1][18:, 18:] = True, True
    panel = drawing.named_masks(np.tile(GREY, (4, 4, 1)), masks, ["fox", "cake"], [True, False])
    for place, colour in (((8, 8), drawing.RIGHT), ((231, 231), drawing.WRONG)):
        assert np.abs(panel[place] - (0.65 * 128 + 0.35 * np.array(colour))).max() <= 1
    assert (panel[120, 8] == 128).all()


def test_lines_join_the_centres_of_patches():
    panel = drawing.match_panel(GREY, GREY, torch.tensor([[0, 3]]), [(2, 2), (2, 2)])
    other = drawing.match_panel(GREY, GREY, torch.empty(0, 2, dtype=torch.int64), [(2, 2), (2, 2)])
    rows, columns = np.nonzero((panel != other).any(-1))
    shift = 60 + drawing.GAP
    assert abs(rows.min() - 11) <= 1 and abs(columns.min() - 11) <= 1  # (15, 15), a radius of 4
    assert abs(rows.max() - 49) <= 1 and abs(columns.max() - shift - 49) <= 1


def test_sheet_holds_every_panel_under_titles_of_any_length():
    red = np.tile(np.array([255, 0, 0], np.uint8), (40, 50, 1))
    sheet = np.asarray(drawing.sheet([("a row", [GREY, red]), ("", [red])], ["one", "an endless title " * 9]))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 2 * 40 * 50
