"""Scores of a segmentation, for each case and class, on the scan's own grid."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.data.utils import affine_to_spacing
from monai.handlers import from_engine
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from medmim.transforms.regions import in_regions

ABSENT = {"dice": 1.0, "hd95_mm": 0.0, "surface_dice": 1.0}  # of a region that is rightly not found
COLUMNS = ["case", "class", "dice", "hd95_mm", "surface_dice", "reference_ml", "predicted_ml"]


class SegmentationScores(Metric):
    """Mean foreground Dice; for each case and class Dice, and on request 95 % Hausdorff distance and surface Dice.

    The mean is over the classes of a case first, then over the cases. A class that neither the reference nor the
    prediction holds is left out; one that only the prediction holds, or misses altogether, has Dice and surface Dice
    0, and as distance the diagonal of the scan (leaving such cases out would flatter).

    With ``regions`` these take the place of the classes, and one that neither holds counts as right, Dice and surface
    Dice 1 and distance 0: whether a tumour has an enhancing part is a question too. So the BraTS challenge does it:
    nnU-Net's authors say so of Dice (github.com/MIC-DKFZ/nnUNet/issues/134), and their code for BraTS 2020 gives
    distances 0, and 373.13 mm where one of both is empty, which is the diagonal of its scans (374 in 2023,
    synapse.org/Synapse:syn51156910/discussion/threadId=10357).

    Args:
        labels: value and name of each foreground class.
        surface_tolerance: mm within which a surface counts as right; ``None`` computes Dice only, which is fast.
        output_transform: picks predictions and references, lists of class maps ``(1, *spatial)`` with affine;
            by default the keys ``pred`` and ``label`` of the engine's output.
        regions: name and values of each nested region, which are scored instead of the classes if there are any.
    """

    def __init__(
        self,
        labels: Mapping[int, str],
        surface_tolerance: float | None = None,
        output_transform: Callable | None = None,
        regions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        found = regions.items() if regions else [(name, [value]) for value, name in sorted(labels.items())]
        self.names, self.values = [name for name, _ in found], [values for _, values in found]
        self.absent_counts = bool(regions)
        self.surface_tolerance = surface_tolerance
        self.rows: list[dict[str, Any]] = []
        super().__init__(output_transform=output_transform or from_engine(["pred", "label"]))

    def reset(self) -> None:
        """Forget all cases."""
        self.rows = []

    def update(self, output: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        """Score a batch of cases."""
        for prediction, reference in zip(*output, strict=True):
            self.rows += self._score(prediction, reference)

    def compute(self) -> float:
        """Mean foreground Dice over all cases of all ranks.

        Raises:
            NotComputableError: when there was no case.
        """
        if idist.get_world_size() > 1:
            ranks: Any = idist.all_gather(self.rows)
            gathered = [row for rows in ranks for row in rows]
            self.rows = list({(row["case"], row["class"]): row for row in gathered}.values())
        if not self.rows:
            raise NotComputableError("there was no case to score")
        return case_mean(self.rows, "dice")

    def summary(self) -> dict[str, float]:
        """Means over the cases: of each score over the classes, and of Dice for each class."""
        scores = ["dice"] if self.surface_tolerance is None else ["dice", "hd95_mm", "surface_dice"]
        means = {f"mean_{score}": case_mean(self.rows, score) for score in scores}
        for name in self.names:
            means[f"dice {name}"] = _mean([row["dice"] for row in self.rows if row["class"] == name])
        return means

    def write_csv(self, path: str | Path) -> None:
        """Write one row for each case and class."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(self.rows, key=lambda row: row["case"]))

    def _score(self, prediction: torch.Tensor, reference: torch.Tensor) -> list[dict[str, Any]]:
        meta = getattr(prediction, "meta", {}) or getattr(reference, "meta", {})
        name = str(meta.get("filename_or_obj", "?"))  # the scan's, which the prediction has from the image
        if prediction.shape != reference.shape:
            raise ValueError(f"{name}: prediction {tuple(prediction.shape)}, reference {tuple(reference.shape)}")
        affine = getattr(reference, "affine", torch.eye(4))
        spacing = affine_to_spacing(affine, r=reference.ndim - 1).tolist()
        diagonal = float(np.linalg.norm(np.array(reference.shape[1:]) * spacing))
        voxel_ml = float(np.prod(spacing)) / 1000
        found, truth = (
            in_regions(torch.as_tensor(label), self.values).float().unsqueeze(0) for label in (prediction, reference)
        )
        dice = compute_dice(found, truth, ignore_empty=False)[0].tolist()
        counts = [
            (int(of_truth.sum()), int(of_found.sum())) for of_truth, of_found in zip(truth[0], found[0], strict=True)
        ]
        surfaces = self._surface_scores(found, truth, spacing)
        rows = []
        for i, (label, (n_truth, n_found)) in enumerate(zip(self.names, counts, strict=True)):
            row: dict[str, Any] = {"case": name, "class": label, "dice": dice[i], "hd95_mm": "", "surface_dice": ""}
            row |= {"reference_ml": n_truth * voxel_ml, "predicted_ml": n_found * voxel_ml}
            if self.surface_tolerance is not None:
                row["hd95_mm"], row["surface_dice"] = surfaces.get(i, (diagonal, 0.0))  # one misses it
            if n_truth == 0 and n_found == 0:
                right = ABSENT if self.absent_counts else dict.fromkeys(ABSENT, float("nan"))
                row |= {score: value for score, value in right.items() if row[score] != ""}
            rows.append(row)
        return rows

    def _surface_scores(
        self, found: torch.Tensor, truth: torch.Tensor, spacing: Sequence[float]
    ) -> dict[int, tuple[float, float]]:
        """HD95 and surface Dice of each region that both ``(1, R, *spatial)`` hold, by its number."""
        both = (found.flatten(2).any(2) & truth.flatten(2).any(2))[0].nonzero()[:, 0].tolist()
        if self.surface_tolerance is None or not both:
            return {}
        pair = found[:, both], truth[:, both]
        distances = compute_hausdorff_distance(*pair, True, percentile=95, spacing=spacing)[0].tolist()
        shares = compute_surface_dice(*pair, [self.surface_tolerance] * len(both), True, spacing=spacing)[0].tolist()
        return dict(zip(both, zip(distances, shares, strict=True), strict=True))


def case_mean(rows: Sequence[Mapping[str, Any]], score: str) -> float:
    """Mean over the classes of each case, then over the cases; NaN is left out."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row[score])
    return _mean([_mean(values) for values in cases.values()])


def _mean(values: Sequence[float]) -> float:
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")
