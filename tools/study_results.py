"""Numbers of a study: what a fine-tuning reached, when, and how arms compare."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from medmim.metrics import case_mean

SCORES = ("dice", "hd95_mm", "surface_dice")
LATE = 0.9  # a best epoch after this share of all is called late: the training might still have improved


@dataclass(frozen=True)
class Curve:
    """Validations of a fine-tuning: epoch, seconds since its start, mean foreground Dice."""

    epochs: list[int]
    seconds: list[float]
    dice: list[float]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_curve(folder: Path) -> Curve:
    """The validations in a run's ``scalars.csv``; those without a finite Dice are left out."""
    rows = [row for row in read_rows(folder / "scalars.csv") if row.get("mean_dice")]
    rows = [row for row in rows if math.isfinite(float(row["mean_dice"]))]
    return Curve(
        [int(row["epoch"]) for row in rows],
        [float(row["seconds"]) for row in rows],
        [float(row["mean_dice"]) for row in rows],
    )


def epochs_done(folder: Path) -> int:
    """Epochs that a run's ``scalars.csv`` holds."""
    rows = read_rows(folder / "scalars.csv")
    return int(rows[-1]["epoch"]) if rows else 0


def training_results(folder: Path, epochs: int) -> dict[str, Any]:
    """Best and last validation of a fine-tuning.

    Returns:
        ``best_dice`` (the first, where several are equal) and ``best_epoch``; ``last_dice``; ``late_gain``, by how much
        the best of all is above the best of the first 90 % of the epochs, and ``still_improving``, whether that is
        above 0; ``train_seconds``.

    Raises:
        ValueError: when no validation was recorded.
    """
    curve = read_curve(folder)
    if not curve.dice:
        raise ValueError(f"{folder / 'scalars.csv'}: no validation with a Dice in it")
    best = int(np.argmax(curve.dice))
    early = [dice for epoch, dice in zip(curve.epochs, curve.dice, strict=True) if epoch <= LATE * epochs]
    gain = curve.dice[best] - max(early) if early else None
    return {
        "best_dice": curve.dice[best],
        "best_epoch": curve.epochs[best],
        "last_dice": curve.dice[-1],
        "late_gain": gain,
        "still_improving": curve.epochs[best] > LATE * epochs,
        "train_seconds": float(read_rows(folder / "scalars.csv")[-1]["seconds"]),
    }


def evaluation_results(folder: Path) -> dict[str, Any]:
    """Means over the cases of ``scores.csv``, and ``cases``, the mean over the classes for each of them.

    Raises:
        ValueError: when there are no scores.
    """
    rows = read_rows(folder / "scores.csv")
    if not rows:
        raise ValueError(f"{folder / 'scores.csv'}: no scores in it")
    numbers = [{"case": Path(row["case"]).name} | {score: float(row[score]) for score in SCORES} for row in rows]
    cases: dict[str, list[dict]] = {}
    for row in numbers:
        cases.setdefault(str(row["case"]), []).append(row)
    means: dict[str, Any] = {score: case_mean(numbers, score) for score in SCORES}
    return means | {"cases": {case: {s: case_mean(own, s) for s in SCORES} for case, own in cases.items()}}


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), which one value does not have."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Interval of Student's t for the mean of independent values; one value has none."""
    mean, sd = mean_and_sd(values)
    if sd is None:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean - half, mean + half


def time_to(curve: Curve, threshold: float) -> tuple[int, float] | None:
    """Epoch and seconds of the first validation at or above a Dice; ``None`` when there is none."""
    for epoch, seconds, dice in zip(curve.epochs, curve.seconds, curve.dice, strict=True):
        if dice >= threshold:
            return epoch, seconds
    return None


def convergence(curve: Curve, reference: Curve, share: float) -> dict[str, Any]:
    """How fast a run reaches a share of the best Dice of its reference (Chen et al., WACV 2023).

    Returns:
        ``epochs`` and ``seconds`` until then, ``None`` when it was never reached; ``reference_epochs``; ``speed_up``,
        the reference's epochs over the run's.
    """
    threshold = share * max(reference.dice)
    own, other = time_to(curve, threshold), time_to(reference, threshold)
    assert other is not None  # its best is above a share of it
    found = {"epochs": None, "seconds": None, "reference_epochs": other[0], "speed_up": None}
    return found if own is None else found | {"epochs": own[0], "seconds": own[1], "speed_up": other[0] / own[0]}
