"""Figures: what stands where."""

import numpy as np
import pytest
from PIL import Image

from medmim.figures import (
    curves_figure,
    figure_pixels,
    planes,
    reconstruction_figure,
    save_figure,
    segmentation_figure,
)


def test_planes_are_middle_slices_with_the_head_up():
    volume = np.arange(4 * 6 * 2).reshape(4, 6, 2)
    sagittal, coronal, axial = planes(volume)
    assert sagittal.shape == (2, 6)
    assert coronal.shape == (2, 4)
    assert axial.shape == (6, 4)
    assert sagittal[0, 0] == volume[2, 0, 1]  # top row is the last (highest) slice
    assert coronal[1, 3] == volume[3, 3, 0]
    assert axial[0, 1] == volume[1, 5, 1]
    chosen = planes(volume, (0, 1, 0))
    assert chosen[0][1, 2] == volume[0, 2, 0]
    assert chosen[2][5, 3] == volume[3, 0, 0]


def test_a_picture_is_its_only_plane_and_is_not_turned():
    picture = np.arange(6).reshape(2, 3)
    assert len(planes(picture)) == 1
    assert np.array_equal(planes(picture)[0], picture)


@pytest.mark.parametrize("size", [(8, 10, 6), (8, 10)])
def test_reconstruction_has_a_column_for_each_volume(size):
    volume = np.random.default_rng(0).random(size)
    figure = reconstruction_figure({"original": volume, "reconstruction": volume}, "a title")
    assert len(figure.axes) == 2 * (3 if len(size) == 3 else 1)
    assert {"original", "reconstruction"} <= {axis.get_title() for axis in figure.axes}
    assert figure.get_suptitle() == "a title"
    scales = {axis.images[0].get_clim() for axis in figure.axes}
    assert len(scales) == 1


def test_segmentation_shows_each_map_over_the_scan():
    rng = np.random.default_rng(0)
    maps = {"reference": rng.integers(0, 3, (8, 10, 6)), "prediction": np.zeros((8, 10, 6), int)}
    figure = segmentation_figure(rng.random((8, 10, 6)), maps, {1: "liver", 2: "spleen"})
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["scan", "reference", "prediction"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["liver", "spleen"]


def test_curves():
    figure = curves_figure({"loss": {"": [(1, 2.0), (2, 1.0)]}, "dice": {"a": [(1, 0.5)], "b": []}})
    assert [axis.get_title() for axis in figure.axes] == ["loss", "dice"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert figure.axes[0].get_legend() is None
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("last", [1, 2, 3, 8, 24, 500])
def test_epochs_are_whole_numbers(last):
    figure = curves_figure({"loss": {"": [(epoch, 1.0 / epoch) for epoch in range(1, last + 1)]}})
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    ticks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert not any("." in label for label in labels)


def test_pixels_and_file(tmp_path):
    figure = curves_figure({"loss": {"": [(1, 2.0)]}})
    pixels = figure_pixels(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    save_figure(figure, tmp_path / "deep" / "a.png")
    with Image.open(tmp_path / "deep" / "a.png") as picture:
        assert picture.format == "PNG"
