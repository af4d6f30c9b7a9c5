"""What a classification needs besides its network: class weights, batches, probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from monai.transforms import MixUp
from torch import Tensor

from medmim.classes import Classification
from medmim.datalists import Item
from medmim.engines import as_plain_tensor


def class_weights(
    items: Sequence[Item], classification: Classification, how: str | Sequence[float] | None
) -> list[float] | None:
    """Weights for :class:`medmim.losses.ClassificationLoss`.

    Args:
        items: for training, with labels.
        classification: what they are to be told apart into.
        how: ``None`` for equal weights; ``balanced``: of a multiclass task ``images / (classes * images of the
            class)``, else ``images without / images with the class``, so that both sides weigh the same; or one
            number for each output. A class without images keeps 1.

    Raises:
        ValueError: when it is something else.
    """
    if how is None or how == "null":
        return None
    outputs = classification.outputs
    if how != "balanced":
        numbers = how if isinstance(how, list | tuple) else []
        good = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < inf for n in numbers)
        if len(numbers) != len(outputs) or not good:
            numbers_of = f"{len(outputs)} number{'s' * (len(outputs) > 1)} above 0, for {', '.join(outputs)}"
            raise ValueError(f"--class_weights {how}: expected null, balanced, or {numbers_of}")
        return [float(number) for number in numbers]
    labels = torch.tensor([item["label"] for item in items])
    present, absent = (labels == 1).sum(0), (labels == 0).sum(0)
    ratio = len(items) / (len(outputs) * present) if classification.task == "multiclass" else absent / present
    return [float(r) if n > 0 and r > 0 else 1.0 for r, n in zip(ratio, present, strict=True)]


def to_probabilities(logits: Tensor, task: str) -> Tensor:
    """Logits ``(B, K)`` to probabilities, which add up to 1 for a multiclass task."""
    return logits.float().softmax(dim=1) if task == "multiclass" else logits.float().sigmoid()


class LabelledBatch:
    """``prepare_batch`` of MONAI's engines: image and label on the device; in training perhaps mixed.

    Args:
        mixup_alpha: of mixup (Zhang et al., ICLR 2018), MONAI's transform; 0 mixes nothing. A label that is unknown in
            one of two images is unknown in their mixture.
    """

    def __init__(self, mixup_alpha: float = 0.0) -> None:
        self.mixup_alpha = mixup_alpha

    def __call__(
        self, batch: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Image ``(B, C, *spatial)`` and label ``(B, K)``."""
        image, label = as_plain_tensor(batch["image"]), as_plain_tensor(batch["label"])
        if self.mixup_alpha > 0:  # before the move: MONAI's weights are on the host
            mix = MixUp(batch_size=len(image), alpha=self.mixup_alpha)
            mix.set_random_state(
                int(torch.randint(2**31, ()))
            )  # of the epoch's seed, so a resumed training draws alike
            mixed, labels = mix(image, label[:, :, None, None])
            image, label = as_plain_tensor(mixed), as_plain_tensor(labels)[:, :, 0, 0]
        return (
            image.to(device=device, non_blocking=non_blocking, **kwargs),
            label.to(device=device, non_blocking=non_blocking),
        )
