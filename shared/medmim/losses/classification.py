"""Loss of a classification with one label, or several of which some may be unknown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassificationLoss(nn.Module):
    """Cross entropy of a softmax (``multiclass``) or of independent sigmoids (``binary``, ``multilabel``).

    Args:
        task: ``multiclass``, ``binary`` or ``multilabel``.
        weights: one for each output. Of a multiclass task they weigh each image by its class, of the others they
            weigh the images that have the class.
    """

    def __init__(self, task: str, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.softmax = task == "multiclass"
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the images, or over all labels that are known.

        Args:
            logits: ``(B, K)``.
            targets: ``(B, K)``: 0 to 1 (between them where images were mixed); NaN is unknown and adds nothing.
        """
        if self.weights is not None:
            self.weights = self.weights.to(logits.device)  # moves once
        weights, logits = self.weights, logits.float()
        if self.softmax:
            return nn.functional.cross_entropy(logits, targets, weight=weights)
        known = torch.isfinite(targets)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(), reduction="none", pos_weight=weights
        )
        return (losses * known).sum() / known.sum().clamp(min=1)
