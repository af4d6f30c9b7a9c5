"""Scores of a classification: for each class, and their means, with bootstrap intervals."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.metrics.calibration import calibration_binning
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score

from medmim.classes import Classification
from medmim.classification import to_probabilities

ECE_BINS = 15
COLUMNS = (
    "class", "images", "positives", "auc", "auc_low", "auc_high", "average_precision", "average_precision_low",
    "average_precision_high", "accuracy", "accuracy_low", "accuracy_high", "threshold", "f1", "sensitivity",
    "specificity", "ece",
)  # fmt: skip


class ClassificationScores(Metric):
    """Mean area under the ROC curve over the classes that can be scored; the other scores on request.

    A class can be scored when there are images with it and images without it; the others are reported, and no mean
    takes them for 0 or NaN. Unknown labels (NaN) are left out class by class.

    Args:
        classification: classes and task.
        thresholds: of each class, above which it counts as found; ``None`` takes those with the best F1 on these
            images.
    """

    def __init__(self, classification: Classification, thresholds: Mapping[str, float] | None = None) -> None:
        self.classification = classification
        self.given = thresholds
        super().__init__()

    def reset(self) -> None:
        """Forget all images."""
        self.cases: dict[str, tuple[list[float], list[float], str]] = {}

    def iteration_completed(self, engine: Engine) -> None:
        """Take over a batch: its logits and labels, and from MONAI's batch the names of files and patients."""
        state: Any = engine.state
        output = state.output[0] if isinstance(state.output, list) else state.output
        self.update((output["pred"], output["label"], state.batch["file"], state.batch["patient"]))

    def update(self, output: tuple[torch.Tensor, torch.Tensor, Sequence[str], Sequence[str]]) -> None:
        """Logits and labels ``(B, K)``, and the names of files and patients."""
        logits, labels, files, patients = output
        probabilities = to_probabilities(logits.detach(), self.classification.task).cpu().tolist()
        for file, *case in zip(files, probabilities, labels.cpu().tolist(), patients, strict=True):
            self.cases[file] = tuple(case)

    def compute(self) -> float:
        """Mean AUC over all images of all ranks.

        Raises:
            NotComputableError: when no class can be scored.
        """
        if idist.get_world_size() > 1:
            ranks: Any = idist.all_gather(self.cases)
            self.cases = {file: case for cases in ranks for file, case in cases.items()}
        aucs = [area(*self.column(i)) for i in range(len(self.classification.outputs))]
        found = [auc for auc in aucs if auc is not None]
        if not found:
            raise NotComputableError("no class has images with it and images without it: there is nothing to score")
        return float(np.mean(found))

    @property
    def files(self) -> list[str]:
        """Names of the images, sorted."""
        return sorted(self.cases)

    @property
    def probabilities(self) -> np.ndarray:
        """``(images, K)``, in the order of ``files``."""
        return np.array([self.cases[file][0] for file in self.files])

    @property
    def labels(self) -> np.ndarray:
        """``(images, K)``, NaN where unknown, in the order of ``files``."""
        return np.array([self.cases[file][1] for file in self.files])

    def column(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and probabilities of one class, where its label is known."""
        labels, probabilities = self.labels[:, i], self.probabilities[:, i]
        known = ~np.isnan(labels)
        return labels[known], probabilities[known]

    def thresholds(self) -> dict[str, float]:
        """For each class the probability from which on it counts as found; 0.5 where none can be chosen."""
        outputs = self.classification.outputs
        if self.given is not None:
            return {name: float(self.given.get(name, 0.5)) for name in outputs}
        return {name: best_threshold(*self.column(i)) for i, name in enumerate(outputs)}

    def predicted(self) -> np.ndarray:
        """``(images, K)``, 1 for what counts as found: the likeliest class, or those above their threshold."""
        probabilities = self.probabilities
        if self.classification.task == "multiclass":
            return np.eye(probabilities.shape[1])[probabilities.argmax(axis=1)]
        return (probabilities >= np.array(list(self.thresholds().values()))).astype(float)

    def table(self, n_bootstrap: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
        """A row for each class, then their mean; what cannot be scored is empty.

        AUC, average precision, F1, sensitivity and specificity tell a class from all others, the latter three at its
        threshold. Accuracy is that of the class; in the last row that of the likeliest class (multiclass), else the
        mean. ECE has 15 bins; in the last row, of the likeliest class. Intervals are 95 % percentiles of a bootstrap
        over patients.
        """
        outputs, thresholds = self.classification.outputs, self.thresholds()
        draws = self._draws(n_bootstrap, seed)
        rows: list[dict[str, Any]] = []
        drawn: dict[str, list[np.ndarray]] = {"auc": [], "average_precision": [], "accuracy": []}
        for i, name in enumerate(outputs):
            labels, probabilities = self.column(i)
            known = ~np.isnan(self.labels[:, i])
            row: dict[str, Any] = {"class": name, "images": len(labels), "positives": int(labels.sum())}
            row |= _at_threshold(labels, probabilities, thresholds[name])
            shares = drawn_shares(labels == (probabilities >= thresholds[name]), draws[:, known])
            if "accuracy" in row:
                row |= _with_interval("accuracy", row["accuracy"], shares)
            auc, precision = area(labels, probabilities), precision_area(labels, probabilities)
            if auc is not None:
                areas = drawn_areas(labels, probabilities, draws[:, known])
                row |= _with_interval("auc", auc, areas[0])
                row |= _with_interval("average_precision", precision, areas[1])
                for samples, found in zip(drawn.values(), (*areas, shares), strict=True):
                    samples.append(found)
            rows.append(row)
        rows.append(self._mean_row(rows, drawn, draws))
        return rows

    def _mean_row(
        self, rows: Sequence[Mapping[str, Any]], drawn: Mapping[str, list[np.ndarray]], draws: np.ndarray
    ) -> dict[str, Any]:
        scored = [row for row in rows if "auc" in row]
        names = ("accuracy", "f1", "sensitivity", "specificity", "ece")
        row: dict[str, Any] = {"class": f"mean of {len(scored)}", "images": len(self.cases)}
        row |= {name: float(np.mean([r[name] for r in scored if name in r])) for name in names if scored}
        if scored:
            for name, samples in drawn.items():
                columns = np.array(samples).T  # NaN where a draw lacks one side of a class: the mean is over the others
                means = np.array(
                    [column[np.isfinite(column)].mean() for column in columns if np.isfinite(column).any()]
                )
                row |= _with_interval(name, float(np.mean([r[name] for r in scored])), means)
        if self.classification.task == "multiclass":
            right = self.predicted().argmax(1) == self.labels.argmax(1)
            row |= {"ece": calibration_error(right, self.probabilities.max(1))}
            row |= _with_interval("accuracy", float(right.mean()), drawn_shares(right, draws))
        return row

    def _draws(self, n: int, seed: int) -> np.ndarray:
        """How often each image is drawn, ``(draws, images)``, when patients are drawn with replacement."""
        names = [self.cases[file][2] for file in self.files]
        patients, of_image = np.unique(names, return_inverse=True)
        random = np.random.default_rng(seed)
        return random.multinomial(len(patients), [1 / len(patients)] * len(patients), size=n)[:, of_image]

    def confusion(self) -> np.ndarray:
        """Reference (rows) against prediction (columns): ``(classes, classes)``, ``(K, 2, 2)`` for several labels."""
        predicted = self.predicted()
        if self.classification.task == "multiclass":
            numbers = range(len(self.classification.classes))
            return confusion_matrix(self.labels.argmax(1), predicted.argmax(1), labels=list(numbers))
        matrices = []
        for i in range(predicted.shape[1]):
            known = ~np.isnan(self.labels[:, i])
            matrices.append(_matrix(self.labels[known, i], predicted[known, i]))
        return matrices[0] if self.classification.task == "binary" else np.stack(matrices)

    def write_table(self, path: Path) -> list[dict[str, Any]]:
        """Write :meth:`table` as CSV, and return it."""
        rows = self.table()
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def write_cases(self, path: Path) -> None:
        """Write one row for each image: file, patient, labels (empty where unknown) and probabilities."""
        outputs = self.classification.outputs
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "patient", *outputs, *[f"p({name})" for name in outputs]])
            for name in self.files:
                probabilities, labels, patient = self.cases[name]
                shown = ["" if np.isnan(label) else f"{label:g}" for label in labels]
                writer.writerow([name, patient, *shown, *[f"{p:.6f}" for p in probabilities]])


def area(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Area under the ROC curve; None without images of both sides."""
    return float(roc_auc_score(labels, probabilities)) if _both(labels) else None


def precision_area(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Average precision; None without images of both sides."""
    return float(average_precision_score(labels, probabilities)) if _both(labels) else None


def drawn_areas(labels: np.ndarray, probabilities: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve and average precision of each draw, NaN without images of both sides.

    What scikit-learn computes with the draws as sample weights, sorting once for all of them.

    Args:
        labels, probabilities: ``(images,)``.
        draws: ``(draws, images)``, how often each image is drawn.
    """
    order = np.argsort(-probabilities, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)  # of each run of equal ones
    areas, precisions = [], []
    for weights in draws[:, order]:
        true = np.append(0.0, np.cumsum(weights * labels[order])[ends])
        false = np.append(0.0, np.cumsum(weights * (1 - labels[order]))[ends])
        if true[-1] == 0 or false[-1] == 0:
            areas.append(np.nan)
            precisions.append(np.nan)
            continue
        areas.append(np.trapezoid(true, false) / (true[-1] * false[-1]))
        precisions.append((np.diff(true) * true[1:] / np.maximum(true[1:] + false[1:], 1)).sum() / true[-1])
    return np.array(areas), np.array(precisions)


def drawn_shares(right: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Share of each draw ``(draws, images)`` that is right ``(images,)``; NaN where a draw has none of the images."""
    counts = draws.sum(axis=1)
    return np.where(counts > 0, draws @ right.astype(float) / np.maximum(counts, 1), np.nan)


def _both(labels: np.ndarray) -> bool:
    return bool((labels == 1).any() and (labels == 0).any())


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Probability with the best F1; 0.5 without images of both sides."""
    if not _both(labels):
        return 0.5
    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def calibration_error(right: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error (Guo et al., ICML 2017), in bins of equal width."""
    found, truth = (torch.as_tensor(np.asarray(v, dtype=np.float64))[None, None] for v in (probabilities, right))
    predicted, observed, counts = calibration_binning(found, truth, num_bins=ECE_BINS)
    gaps = (predicted - observed).abs().nan_to_num()
    return float((gaps * counts).sum() / counts.sum())


def _matrix(labels: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Reference (rows) against prediction (columns), no and yes; of no image too."""
    return confusion_matrix(labels, found, labels=[0, 1]) if len(labels) else np.zeros((2, 2), dtype=int)


def _at_threshold(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float]:
    if not len(labels):
        return {}
    found = probabilities >= threshold
    (tn, fp), (fn, tp) = _matrix(labels, found)
    row = {"threshold": threshold, "accuracy": (tp + tn) / len(labels), "ece": calibration_error(labels, probabilities)}
    if tp + fn:
        row |= {"f1": 2 * tp / (2 * tp + fp + fn), "sensitivity": tp / (tp + fn)}
    return row | ({"specificity": tn / (tn + fp)} if tn + fp else {})


def _with_interval(name: str, value: float | None, samples: np.ndarray) -> dict[str, Any]:
    drawn = samples[np.isfinite(samples)]
    if not len(drawn):  # so few images of a class that no draw has both sides
        return {name: value, f"{name}_low": None, f"{name}_high": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
