"""Figures of a study: Dice against labels and against epochs, and maps of two knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medmim.figures import save_figure
from tools.study_plan import Study
from tools.study_results import mean_and_sd

if TYPE_CHECKING:
    from tools.study_report import Group, Result

# Okabe and Ito's palette, readable with colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B4513")
MARKERS = "osD^vP*X"
Series = dict[str, dict[int, list["Result"]]]  # label of a line -> labelled scans -> one result for each seed


def draw_figures(study: Study, groups: Sequence[Group], out: Path) -> list[str]:
    """Write the figures for which there are results.

    Returns:
        their names, below the study's folder.
    """
    panels = _panels(study, groups)
    if not panels:
        return []
    figures = {"dice_labels.png": labels_figure(panels), "dice_epochs.png": epochs_figure(panels)}
    for arm in study.arms:
        figure = map_figure([group for group in groups if group[0].arm == arm.name and group[1]], arm.name)
        if figure is not None:
            figures[f"map_{arm.name}.png"] = figure
    for name, figure in figures.items():
        save_figure(figure, out / name)
    return list(figures)


def _panels(study: Study, groups: Sequence[Group]) -> dict[str, Series]:
    """Lines by panel: one panel with a line for each arm, or with a grid a panel for each arm, its points as lines."""
    varied = any(cell.point for cell, own in groups if own)
    panels: dict[str, Series] = {}
    for cell, own in groups:
        if own:
            line = ", ".join(f"{knob} {value}" for knob, value in cell.point.items()) or cell.arm
            panel, line = (cell.arm, line) if varied else ("", cell.arm)
            panels.setdefault(panel, {}).setdefault(line, {})[cell.scans] = own
    return panels


def labels_figure(panels: Mapping[str, Series]) -> Figure:
    """Best Dice against the number of labelled scans, with standard deviations over the seeds; dots are single runs."""
    figure, axes = _grid_of_axes(1, len(panels), 4.0)
    counts = sorted({scans for series in panels.values() for by_scans in series.values() for scans in by_scans})
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        for number, (line, by_scans) in enumerate(series.items()):
            shift = 0.4 * (
                (number + 0.5) / len(series) - 0.5
            )  # beside each other, so that bars do not hide one another
            xs = [counts.index(scans) + shift for scans in sorted(by_scans)]
            spreads = [_spread(by_scans[scans]) for scans in sorted(by_scans)]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            means, sds = [mean for mean, _ in spreads], [sd or 0.0 for _, sd in spreads]
            axis.errorbar(xs, means, sds, label=line, color=colour, marker=marker, capsize=3, markersize=5, linewidth=1)
            for x, scans in zip(xs, sorted(by_scans), strict=True):
                dice = [result.numbers["best_dice"] for result in by_scans[scans]]
                axis.plot([x] * len(dice), dice, ".", color=colour, alpha=0.35, markersize=6)
        axis.set_xlim(-0.5, len(counts) - 0.5)
        axis.set_xticks(range(len(counts)), [str(scans) for scans in counts])
        _finish(axis, title, "labelled scans", "best Dice, mean ± sd over seeds")
    return figure


def epochs_figure(panels: Mapping[str, Series]) -> Figure:
    """Dice against the epoch, mean over the seeds and their range; columns are numbers of labelled scans."""
    counts = sorted({scans for series in panels.values() for by_scans in series.values() for scans in by_scans})
    figure, axes = _grid_of_axes(len(panels), len(counts), 4.0)
    for row, (title, series) in zip(axes, panels.items(), strict=True):
        for axis, scans in zip(row, counts, strict=True):
            for number, (line, by_scans) in enumerate(series.items()):
                curves = [dict(zip(r.curve.epochs, r.curve.dice, strict=True)) for r in by_scans.get(scans, [])]
                epochs = sorted(set.intersection(*map(set, curves))) if curves else []
                if not epochs:
                    continue
                values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
                colour = COLOURS[number % len(COLOURS)]
                marker = MARKERS[number % len(MARKERS)] if len(epochs) < 30 else ""
                axis.plot(
                    epochs, values.mean(0), marker=marker, markersize=3.5, linewidth=1.2, color=colour, label=line
                )
                axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
            name = f"{title}, {scans} labelled scans" if title else f"{scans} labelled scans"
            _finish(axis, name, "epoch", "Dice, mean and range over seeds")
    return figure


def map_figure(groups: Sequence[Group], arm: str) -> Figure | None:
    """Mean best Dice of an arm over two knobs of the grid, or over one knob and the labelled scans.

    Further knobs, and the labelled scans where two knobs are varied, have a panel for each value.
    """
    knobs = list(dict.fromkeys(knob for cell, _ in groups for knob in cell.point))
    knobs = [knob for knob in knobs if len({repr(cell.point[knob]) for cell, _ in groups}) > 1]
    if not knobs:
        return None
    down, across = (knobs[0], knobs[1]) if len(knobs) > 1 else (knobs[0], "labelled scans")
    panels: dict[str, dict[tuple[str, str], float]] = {}
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    for cell, own in groups:
        values: dict[str, Any] = {**cell.point, "labelled scans": cell.scans}
        others = [name for name in (*knobs[2:], "labelled scans") if name not in (down, across)]
        panel = ", ".join(f"{name} {values[name]}" for name in others)
        row, column = str(values[down]), str(values[across])
        rows[row] = columns[column] = None
        panels.setdefault(panel, {})[row, column] = _spread(own)[0]
    wide = min(len(panels), 4)
    high = ceil(len(panels) / wide)
    width, height = 1.6 + 0.75 * len(columns), 1.3 + 0.45 * len(rows)
    figure = Figure(figsize=(max(3.6, width * wide) + 0.8, height * high + 0.4), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False)
    every = [value for cells in panels.values() for value in cells.values()]
    middle, half = (max(every) + min(every)) / 2, max(max(every) - min(every), 0.01) / 2
    shades = Normalize(middle - half, middle + half)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, cells) in zip(axes.flat, panels.items(), strict=False):
        table = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
        image = axis.imshow(table, cmap="viridis", norm=shades, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            text = f"{value:.3f}" if np.isfinite(value) else "–"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value < middle else "black")
        axis.set_xticks(range(len(columns)), list(columns), fontsize=8)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.set_xlabel(across, fontsize=9)
        axis.set_ylabel(down, fontsize=9)
        axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="best Dice, mean over seeds")
    figure.suptitle(arm, fontsize=10)
    return figure


def _grid_of_axes(rows: int, columns: int, width: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(5.0, width * columns) + 0.4, 3.7 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=True)


def _finish(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    axis.tick_params(labelsize=8, labelleft=True)
    axis.grid(alpha=0.3)
    lines = axis.get_legend_handles_labels()[1]
    across = 4 if max(map(len, lines), default=0) < 10 else 1 + (len(lines) > 4)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=across, frameon=False)


def _spread(own: Sequence[Result]) -> tuple[float, float | None]:
    return mean_and_sd([result.numbers["best_dice"] for result in own])
