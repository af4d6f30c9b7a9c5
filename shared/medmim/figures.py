"""Figures as PNG: reconstructions, segmentations and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

PLANES = ("sagittal", "coronal", "axial")


def planes(volume: np.ndarray, at: Sequence[int] | None = None) -> list[np.ndarray]:
    """Slices of a volume in RAS orientation, head up: sagittal, coronal, axial; a 2D image as its only slice.

    Args:
        volume: ``(H, W, D)`` or ``(H, W)``.
        at: index of the slice along each axis; the middle by default.
    """
    if volume.ndim == 2:
        return [np.rot90(volume)]
    at = [n // 2 for n in volume.shape] if at is None else at
    return [np.rot90(np.take(volume, index, axis)) for axis, index in enumerate(at)]


def reconstruction_figure(columns: Mapping[str, np.ndarray], title: str) -> Figure:
    """One column for each volume, one row for each plane.

    Args:
        columns: title and volume ``(H, W, D)`` or ``(H, W)``; NaN is drawn grey-blue (hidden).
        title: of the figure.
    """
    original = next(iter(columns.values()))
    low, high = np.nanpercentile(original, [0.5, 99.5])
    rows = len(planes(original))
    figure = Figure(figsize=(2.6 * len(columns), 2.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, (name, volume) in enumerate(columns.items()):
        for i, image in enumerate(planes(volume)):
            axes[i, j].set_facecolor("#5b6c8a")
            axes[i, j].imshow(np.ma.masked_invalid(image), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
            if i == 0:
                axes[i, j].set_title(name, fontsize=9)
            if j == 0 and rows == 3:
                axes[i, j].set_ylabel(PLANES[i], fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure


def segmentation_figure(
    image: np.ndarray, maps: Mapping[str, np.ndarray], labels: Mapping[int, str], title: str = ""
) -> Figure:
    """Class maps laid over a scan, one column for each map, one row for each plane.

    Args:
        image: ``(H, W, D)``.
        maps: title and class map ``(H, W, D)``, for example reference and prediction.
        labels: value and name of each class.
        title: of the figure.
    """
    first = next(iter(maps.values()))
    where = np.argwhere(first > 0)
    centre = [int(n) for n in (np.median(where, axis=0) if len(where) else np.array(image.shape) // 2)]
    low, high = np.percentile(image, [1, 99])
    palette = ["#00000000", *[_COLOURS[i % len(_COLOURS)] for i in range(max(labels))]]
    figure = Figure(figsize=(2.8 * (len(maps) + 1), 8.0), layout="constrained")
    axes = figure.subplots(3, len(maps) + 1)
    for j, (name, overlay) in enumerate({"scan": np.zeros_like(first), **maps}.items()):
        for i, (background, classes) in enumerate(zip(planes(image, centre), planes(overlay, centre), strict=True)):
            axes[i, j].imshow(background, cmap="gray", vmin=low, vmax=high)
            axes[i, j].imshow(
                classes, cmap=ListedColormap(palette), vmin=0, vmax=max(labels), alpha=0.55, interpolation="nearest"
            )
            axes[i, j].set_axis_off()
            if i == 0:
                axes[i, j].set_title(name, fontsize=9)
    handles = [Patch(color=palette[value], label=label) for value, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def curves_figure(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], xlabel: str = "epoch") -> Figure:
    """One panel for each quantity, one line for each run.

    Args:
        curves: panel title → line label → points ``(x, y)``.
        xlabel: of the x axis.
    """
    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (name, lines) in zip(axes, curves.items(), strict=True):
        for label, points in lines.items():
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, marker="." if len(points) < 40 else "", label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.grid(alpha=0.3)
        if len(lines) > 1 or next(iter(lines), ""):
            axis.legend(fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def figure_pixels(figure: Figure) -> np.ndarray:
    """Pixels ``(height, width, 3)`` of a figure, uint8, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# Okabe and Ito's palette, readable with colour blindness, then three more
_COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8B4513", "#7FFF00", "#9370DB",
)  # fmt: skip
