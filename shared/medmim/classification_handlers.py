"""Handlers of a classification: pictures while it trains, files of an evaluation, predictions of new images."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from torch import nn

from medmim.classes import Classification
from medmim.classification import to_probabilities
from medmim.classification_figures import (
    confusion_figure,
    examples_figure,
    precision_recall_figure,
    roc_figure,
    with_interval,
)
from medmim.classification_scores import ClassificationScores
from medmim.figures import planes, save_figure
from medmim.overlays import draw_overlay, relevance
from medmim.previews import ValidationPreview

logger = logging.getLogger(__name__)

SHOWN = 8  # images of a preview


class ClassificationPreview(ValidationPreview):
    """Draw the first validation images as the network sees them, with their labels and probabilities.

    With several processes they are the first images of rank 0.

    Args:
        classification: classes and task.
        output_dir, interval, val_interval, epochs: see :class:`medmim.previews.ValidationPreview`.
    """

    tag = "predictions"

    def __init__(self, classification: Classification, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classification = classification

    def draw(self, state: Any) -> Figure:
        """Figure of the first batch."""
        names = self.classification.outputs
        probabilities = to_probabilities(state.output["pred"], self.classification.task).cpu().numpy()[:SHOWN]
        images = torch.as_tensor(state.output["image"])[:SHOWN, 0].float().cpu().numpy()
        labels = state.output["label"].cpu().numpy()[:SHOWN]
        truths = [" | ".join(names[i] for i in np.flatnonzero(row == 1)) or "none" for row in labels]
        captions = [f"{truth}\n{_told(p, names)}" for truth, p in zip(truths, probabilities, strict=True)]
        shown = [planes(image)[-1] for image in images]  # of a volume the middle axial slice
        return examples_figure(shown, captions, f"epoch {state.epoch}: reference, and the likeliest")


def _told(probabilities: np.ndarray, names: list[str]) -> str:
    """The two likeliest classes."""
    order = np.argsort(-probabilities)[:2]
    return ", ".join(f"{names[i]} {probabilities[i]:.2f}" for i in order)


class SaveClassificationScores:
    """Write the scores of an evaluation: ``scores.csv`` (class), ``predictions.csv`` (image), curves, confusion matrix.

    Args:
        scores: the metric that is attached to the evaluator.
        output_dir: where the files go.
        title: of the figures.
    """

    def __init__(self, scores: ClassificationScores, output_dir: str, title: str) -> None:
        self.scores = scores
        self.output_dir = Path(output_dir)
        self.title = title

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = self.scores.write_table(self.output_dir / "scores.csv")
        self.scores.write_cases(self.output_dir / "predictions.csv")
        for name, figure in (
            ("roc.png", roc_figure(self.scores, rows, self.title)),
            ("precision_recall.png", precision_recall_figure(self.scores, rows, self.title)),
            ("confusion.png", confusion_figure(self.scores, self.title)),
        ):
            save_figure(figure, self.output_dir / name)
        for row in rows:
            if "auc" not in row:
                logger.warning(f"{row['class']}: {row['images']} images, {row['positives']} with it: no AUC")
                continue
            numbers = [f"AUC {with_interval(row, 'auc', 4)}"]
            numbers += [f"{name} {row[name]:.4f}" for name in ("average_precision", "accuracy", "f1", "ece")]
            logger.info(f"{row['class']}: {', '.join(numbers)}")
        logger.info(f"wrote {self.output_dir}")


class SavePredictions:
    """Write the probabilities of new images as CSV, a row for each, and perhaps overlays that show what mattered.

    Args:
        description: of the model: its classes, and the thresholds that were best in validation.
        dataset_dir: folder that the names in the file are relative to.
        output_dir: folder of ``probabilities.csv`` and ``overlays``.
        network: whose overlays are drawn.
        overlay: ``attention``, ``occlusion``, or None for none.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        dataset_dir: str,
        output_dir: str,
        network: nn.Module | None = None,
        overlay: str | None = None,
    ) -> None:
        self.classification = Classification.from_dict(description["preset"]["classification"])
        self.thresholds = description.get("thresholds", {})
        self.dataset_dir = Path(dataset_dir)
        self.output_dir = Path(output_dir)
        self.network = network
        self.overlay = overlay

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator whose batches hold ``image`` and ``file``."""
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def begin(self, engine: Engine) -> None:
        """Write the head of the file; rows follow batch by batch, so that a break loses none that is done."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.write("w", [["image", *self.classification.outputs, "predicted"]])

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        names = self.classification.outputs
        probabilities = to_probabilities(state.output["pred"], self.classification.task).cpu().numpy()
        rows = []
        for i, (file, p) in enumerate(zip(state.batch["file"], probabilities, strict=True)):
            below = Path(file).relative_to(self.dataset_dir)
            rows.append([below.as_posix(), *[f"{value:.6f}" for value in p], "|".join(self.found(p))])
            if self.overlay is not None and self.network is not None:
                image = torch.as_tensor(state.output["image"])[i : i + 1].to(state.device)
                shown = int(p.argmax())
                score = relevance(self.network, image, self.overlay, shown, self.classification.task)
                what = "attention, to its maximum"
                if self.overlay == "occlusion":
                    what = f"{names[shown]}: p falls by up to {max(score.max(), 0):.3f}"
                figure = draw_overlay(
                    image[0, 0].float().cpu().numpy(), score, f"{below.name}: {_told(p, names)}", what
                )
                save_figure(figure, self.output_dir / "overlays" / below.with_name(f"{below.name}.png"))

        self.write("a", rows)

    def found(self, probabilities: np.ndarray) -> list[str]:
        """Classes that an image is said to have."""
        classification = self.classification
        if classification.task == "multiclass":
            return [classification.classes[int(probabilities.argmax())]]
        names = zip(classification.outputs, probabilities, strict=True)
        found = [name for name, p in names if p >= self.thresholds.get(name, 0.5)]
        return found or ([classification.classes[0]] if classification.task == "binary" else [classification.nothing])

    def write(self, mode: str, rows: list[list[str]]) -> None:
        """Write or append rows."""
        with (self.output_dir / "probabilities.csv").open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
