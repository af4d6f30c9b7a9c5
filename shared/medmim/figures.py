"""Figures as PNG: reconstructions, segmentations and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

PLANES = ("sagittal", "coronal", "axial")


def planes(volume: np.ndarray, at: Sequence[int] | None = None) -> list[np.ndarray]:
    """Slices of a volume in RAS orientation, head up: sagittal, coronal, axial; a 2D image, rows first, as it is.

    Args:
        volume: ``(H, W, D)`` or ``(H, W)``.
        at: index of the slice along each axis; the middle by default.
    """
    if volume.ndim == 2:
        return [volume]
    at = [n // 2 for n in volume.shape] if at is None else at
    return [np.rot90(np.take(volume, index, axis)) for axis, index in enumerate(at)]


def _panels(
    shape: Sequence[int], n_columns: int, spacing: Sequence[float], title: str
) -> tuple[Figure, np.ndarray, list[float]]:
    """Figure with a row of axes for each plane, as high as the plane needs; and the aspect of each plane's voxels."""
    if len(shape) == 2:
        spans, aspects = [(shape[1] * spacing[1], shape[0] * spacing[0])], [spacing[0] / spacing[1]]
    else:
        pairs = [(1, 2), (0, 2), (0, 1)]  # (across, up) of sagittal, coronal, axial
        spans = [(shape[i] * spacing[i], shape[j] * spacing[j]) for i, j in pairs]
        aspects = [spacing[j] / spacing[i] for i, j in pairs]
    width = 2.6  # inches of a column
    heights = [width * up / max(across for across, _ in spans) for across, up in spans]
    figure = Figure(figsize=(width * n_columns + 0.4, sum(heights) + 1.0), layout="constrained")
    axes = figure.subplots(len(spans), n_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if len(shape) == 3:
        for axis, name in zip(axes[:, 0], PLANES, strict=True):
            axis.set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure, axes, aspects


def reconstruction_figure(
    columns: Mapping[str, np.ndarray], title: str, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Figure:
    """One column for each volume, one row for each plane.

    Args:
        columns: title and volume ``(H, W, D)`` or ``(H, W)``; NaN is drawn blue-grey (hidden).
        title: of the figure.
        spacing: mm of a voxel along each axis.
    """
    original = next(iter(columns.values()))
    low, high = np.nanpercentile(original, [0.5, 99.5])
    figure, axes, aspects = _panels(original.shape, len(columns), spacing, title)
    for column, (name, volume) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(name, fontsize=9)
        for axis, image, aspect in zip(column, planes(volume), aspects, strict=True):
            axis.set_facecolor("#5b6c8a")
            shown = np.ma.masked_invalid(image)
            axis.imshow(shown, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=aspect)
    return figure


@dataclass(frozen=True)
class NestedRow:
    """One level of :func:`nested_figure`.

    Attributes:
        label: of the row.
        columns: title and volume ``(H, W, D)`` or ``(H, W)``; NaN is drawn blue-grey (hidden).
        spacing: mm of a voxel along each axis.
        corner, size: box that the next row enlarges, in voxels; slices pass through its middle. Without one they
            pass through the middle of the volume.
    """

    label: str
    columns: Mapping[str, np.ndarray]
    spacing: Sequence[float]
    corner: Sequence[int] | None = None
    size: Sequence[int] | None = None


def nested_figure(rows: Sequence[NestedRow], title: str) -> Figure:
    """One row for each of several nested volumes, and in it for each plane all columns.

    Args:
        rows: from the outermost; a frame shows what the next one looks into.
        title: of the figure.
    """
    dims = next(iter(rows[0].columns.values())).ndim
    pairs = [(1, 2), (0, 2), (0, 1)] if dims == 3 else [(1, 0)]  # (across, up or down)
    names = list(rows[0].columns)
    width = 1.75  # inches of a column
    figure = Figure(figsize=(width * len(pairs) * len(names) + 0.4, (width + 0.1) * len(rows) + 0.7))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(rows), len(pairs) * len(names), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        first = next(iter(row.columns.values()))
        low, high = np.nanpercentile(first, [0.5, 99.5])
        at = [n // 2 for n in first.shape]
        if row.corner is not None and row.size is not None:
            at = [corner + n // 2 for corner, n in zip(row.corner, row.size, strict=True)]
        slices = [planes(volume, at) for volume in row.columns.values()]
        line[0].set_ylabel(row.label, fontsize=8)
        for number, axis in enumerate(line):
            plane, column = divmod(number, len(names))
            i, j = pairs[plane]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_facecolor("#5b6c8a")
            shown = np.ma.masked_invalid(slices[column][plane])
            aspect = row.spacing[j] / row.spacing[i]
            axis.imshow(shown, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=aspect)
            if row.corner is not None and row.size is not None:
                top = row.corner[j] if dims == 2 else first.shape[j] - row.corner[j] - row.size[j]
                place = (row.corner[i] - 0.5, top - 0.5)
                axis.add_patch(Rectangle(place, row.size[i], row.size[j], fill=False, edgecolor="#E69F00"))
    for number, axis in enumerate(axes[0]):
        plane, column = divmod(number, len(names))
        name = f"{PLANES[plane]}\n{names[column]}" if dims == 3 else names[column]
        axis.set_title(name if column == 0 else names[column], fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def segmentation_figure(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    labels: Mapping[int, str],
    title: str = "",
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Class maps laid over a scan, one column for each map, one row for each plane.

    Args:
        image: ``(H, W, D)``.
        maps: title and class map ``(H, W, D)``, for example reference and prediction; slices pass through the middle
            of the first one's foreground.
        labels: value and name of each class.
        title: of the figure.
        spacing: mm of a voxel along each axis.
    """
    first = next(iter(maps.values()))
    where = np.argwhere(first > 0)
    centre = [int(n) for n in (np.median(where, axis=0) if len(where) else np.array(image.shape) // 2)]
    low, high = np.percentile(image, [1, 99])
    colours = ["#00000000", *[_COLOURS[i % len(_COLOURS)] for i in range(max(labels))]]
    figure, axes, aspects = _panels(image.shape, len(maps) + 1, spacing, title)
    for column, (name, overlay) in zip(axes.T, {"scan": np.zeros_like(first), **maps}.items(), strict=True):
        column[0].set_title(name, fontsize=9)
        slices = zip(column, planes(image, centre), planes(overlay, centre), aspects, strict=True)
        for axis, background, classes, aspect in slices:
            axis.imshow(background, cmap="gray", vmin=low, vmax=high, aspect=aspect)
            axis.imshow(
                classes,
                cmap=ListedColormap(colours),
                vmin=-0.5,
                vmax=max(labels) + 0.5,
                alpha=0.6,
                interpolation="nearest",
                aspect=aspect,
            )
    handles = [Patch(color=colours[value], label=label) for value, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
    return figure


def curves_figure(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], xlabel: str = "epoch") -> Figure:
    """One panel for each quantity, four in a row, one line for each run.

    Args:
        curves: panel title → line label → points ``(x, y)``.
        xlabel: of the x axis, whose ticks are whole numbers.
    """
    across = min(len(curves), 4)
    lines_of_panels = ceil(len(curves) / across)
    figure = Figure(figsize=(4.2 * across, 3.2 * lines_of_panels), layout="constrained")
    panels = figure.subplots(lines_of_panels, across, squeeze=False).flat
    for axis in list(panels)[len(curves) :]:
        axis.remove()
    for axis, (name, lines) in zip(figure.axes, curves.items(), strict=True):
        for label, points in lines.items():
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, marker="." if len(points) < 40 else "", label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
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
    "#E69F00", "#0072B2", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#8B4513", "#7FFF00", "#9370DB",
)  # fmt: skip
