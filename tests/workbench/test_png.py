"""Pictures: read back by another program's reader, they are what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from workbench import png


def test_a_picture_is_read_back_pixel_by_pixel(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    grey = np.random.default_rng(0).integers(0, 256, (7, 13)).astype(np.uint8)
    png.write(tmp_path / "a.png", grey)
    with image.open(tmp_path / "a.png") as read:
        assert (read.mode, read.size) == ("L", (13, 7))
        assert np.array_equal(np.asarray(read), grey)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_grid_shows_each_image_enlarged_in_its_place() -> None:
    images = np.stack([np.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0, 7.0, 0.5)])
    panel = png.panel(images, side=12)  # four of them fill a square, by a factor of 2
    assert panel.shape == (12, 12)
    assert [int(panel[y, x]) for y, x in ((0, 0), (0, 6), (6, 0), (6, 6))] == [0, 128, 255, 255]
    assert int(panel[0, 5]) == int(panel[5, 0]) == 64  # between images


def test_a_cloud_has_y_upwards_and_is_brightest_where_most_points_are() -> None:
    points = np.array([[2.0, 2.0]] * 4 + [[-2.0, -2.0]])
    panel = png.panel(points, side=64)
    bright, dim = (panel == 255).nonzero(), ((panel > 0) & (panel < 255)).nonzero()
    assert bright[0].max() < 32 < bright[1].min()
    assert dim[1].max() < 32 < dim[0].min()
    assert set(panel[dim]) == {127, 128} & set(panel[dim])


def test_panels_stand_side_by_side_with_a_gap() -> None:
    one = np.zeros((4, 5), np.uint8)
    both = png.side_by_side([one, one])
    assert both.shape == (4, 5 + 6 + 5)
    assert both[:, 5:11].min() == 255
