"""How pretext batches pass through MONAI's trainer and evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def prepare_pretext_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor], dict[str, Any]]:
    """``prepare_batch`` of a masked pretext task: the network is called as ``network(image, mask)``.

    Args:
        batch: ``image`` ``(B, C, *spatial)``, ``mask`` ``(B, *grid)`` and, optionally, ``padding`` ``(B, *grid)``.

    Returns:
        image; the targets ``{"image", "mask", "padding"}`` that :class:`PretextLoss` takes apart; further arguments.
    """
    moved = {
        key: batch[key].to(device=device, non_blocking=non_blocking, **kwargs if key == "image" else {})
        for key in ("image", "mask", "padding")
        if key in batch
    }
    image = moved["image"].as_tensor() if hasattr(moved["image"], "as_tensor") else moved["image"]
    moved["image"] = image
    return image, moved, (moved["mask"],), {}


class PretextLoss(nn.Module):
    """Calls ``loss(prediction, image, mask, padding)`` where MONAI's engines call ``loss(prediction, targets)``."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, prediction: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Scalar loss; ``targets`` come from :func:`prepare_pretext_batch`."""
        return self.loss(prediction, **targets)


def prediction_and_targets(output: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """``output_transform`` for ``ignite.metrics.Loss`` on an engine that uses :func:`prepare_pretext_batch`."""
    return output["pred"], output["label"]


def batch_length(targets: Mapping[str, Tensor]) -> int:
    """Number of samples in the targets of a pretext batch."""
    return len(targets["image"])
