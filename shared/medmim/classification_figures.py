"""Figures of a classification: ROC and precision-recall curves, confusion matrix, examples, overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from medmim.classification_scores import ClassificationScores


def roc_figure(scores: ClassificationScores, rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """ROC curve of each class that can be scored; ``rows`` are those of :meth:`ClassificationScores.table`."""
    figure, axis = _square(title, "1 - specificity", "sensitivity")
    for i, row in enumerate(rows[:-1]):
        if "auc" in row:
            false, true, _ = roc_curve(*scores.column(i))
            axis.plot(false, true, label=_label(row, "auc", "AUC"))
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    _place_legend(figure)
    return figure


def precision_recall_figure(scores: ClassificationScores, rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Precision-recall curve of each class that can be scored; dotted: the share of images that have it."""
    figure, axis = _square(title, "recall (sensitivity)", "precision")
    for i, row in enumerate(rows[:-1]):
        if "auc" in row:
            precision, recall, _ = precision_recall_curve(*scores.column(i))
            (line,) = axis.plot(recall, precision, label=_label(row, "average_precision", "AP"))
            axis.axhline(row["positives"] / row["images"], color=line.get_color(), linestyle=":", linewidth=0.8)
    _place_legend(figure)
    return figure


def _square(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.set_box_aspect(1)
    axis.grid(alpha=0.3)
    return figure, axis


def _label(row: Mapping[str, Any], key: str, short: str) -> str:
    return f"{row['class']}: {short} {with_interval(row, key, 3)}"


def with_interval(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A score of a row of :meth:`ClassificationScores.table` and its interval, as text."""
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    interval = "no interval" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{row[key]:.{digits}f} {interval}"


def _place_legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize=7, loc="outside right upper")


def confusion_figure(scores: ClassificationScores, title: str) -> Figure:
    """Confusion matrix; one for each class where an image can have several."""
    matrices = scores.confusion()
    classification = scores.classification
    if classification.task == "multilabel":
        panels = [(name, matrix, ["no", "yes"]) for name, matrix in zip(classification.classes, matrices, strict=True)]
    else:
        panels = [("", matrices, list(classification.classes))]
    across = min(len(panels), 5)
    down = ceil(len(panels) / across)
    size = 2.4 if len(panels) > 1 else 1.6 + 0.8 * len(panels[0][2])
    figure = Figure(figsize=(size * across, size * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    for axis, (name, matrix, names) in zip(figure.axes, panels, strict=True):
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(matrix):
            colour = "white" if shares[i, j] > 0.6 else "black"
            axis.text(j, i, f"{count}\n{shares[i, j]:.0%}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8, rotation=90, va="center")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_ylabel("reference", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def examples_figure(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """Images ``(rows, columns)`` or ``(rows, columns, 3)``, four in a line, each under its caption."""
    across = min(len(images), 4)
    down = ceil(len(images) / across)
    figure = Figure(figsize=(2.7 * across, 3.1 * down + 0.3), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(images) :]:
        axis.remove()
    for axis, image, caption in zip(axes[: len(images)], images, captions, strict=True):
        axis.imshow(image, cmap="gray", interpolation="nearest")
        axis.set_title(caption, fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=9)
    return figure
