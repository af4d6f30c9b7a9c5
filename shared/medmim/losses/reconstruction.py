"""Reconstruction loss of masked image modelling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmim.networks.patches import grid_size, patch_mean_and_std, patchify, unpatchify


class MaskedReconstructionLoss(nn.Module):
    """Mean error of predicted patches, over the hidden tokens of the whole batch or over all.

    ``normalize_target`` standardises each target patch with its own mean and variance, ``(x - mean) /
    sqrt(variance + eps)`` (MAE's "norm-pix"). MiM and the MAE of He et al. take the unbiased variance, SelfMedMAE
    the biased one. Chen et al. (WACV 2023) use ``norm="l1"`` on raw intensities.

    Args:
        patch_size: voxels along each axis.
        norm: ``l1`` or ``l2``.
        region: ``hidden`` scores hidden tokens only, ``all`` every token.
        normalize_target: whether the target is standardised patch by patch.
        unbiased: variance of the target patch divides by n - 1 (True) or n.
        eps: added to the variance.

    Raises:
        ValueError: when an option is unknown.
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        norm: str = "l2",
        region: str = "hidden",
        normalize_target: bool = True,
        unbiased: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm not in ("l1", "l2"):
            raise ValueError(f"loss_norm must be l1 or l2, found {norm!r}")
        if region not in ("hidden", "all"):
            raise ValueError(f"loss_region must be hidden or all, found {region!r}")
        self.patch_size = tuple(patch_size)
        self.norm = norm
        self.region = region
        self.normalize_target = normalize_target
        self.unbiased = unbiased
        self.eps = eps

    def forward(self, prediction: Tensor, image: Tensor, mask: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mean error over the scored tokens; 0 when none is scored.

        Args:
            prediction: ``(B, N, prod(patch_size) * C)``.
            image: ``(B, C, *spatial)``.
            mask: boolean ``(B, *grid)``, True = hidden.
            padding: boolean ``(B, *grid)``, True = the token holds padding only and is not scored.

        Returns:
            scalar, float32.
        """
        target = self.target(image)
        difference = prediction.float() - target
        error = difference.abs() if self.norm == "l1" else difference.square()
        scored = self.scored(mask, padding).flatten(1)
        return (error.mean(dim=-1) * scored).sum() / scored.sum().clamp(min=1)

    def scored(self, mask: Tensor, padding: Tensor | None = None) -> Tensor:
        """Which tokens are scored: boolean, of the shape of ``mask``, which is that of ``padding``."""
        scored = mask if self.region == "hidden" else torch.ones_like(mask)
        return scored if padding is None else scored & ~padding

    def target(self, image: Tensor) -> Tensor:
        """What the network has to predict: ``(B, N, prod(patch_size) * C)``, float32."""
        patches = patchify(image.float(), self.patch_size)
        if not self.normalize_target:
            return patches
        mean, std = patch_mean_and_std(patches, self.unbiased, self.eps)
        return (patches - mean) / std

    @property
    def target_name(self) -> str:
        """What a picture of a reconstruction must say of its target."""
        return "patches normalised, mean and contrast from the original" if self.normalize_target else "raw intensities"

    def to_image(self, prediction: Tensor, image: Tensor) -> Tensor:
        """Prediction as an image in the intensities of ``image``, ``(B, C, *spatial)``.

        With a normalised target the network does not know mean and contrast of a patch: both are taken from
        ``image``, so only the structure inside the patches is the network's.
        """
        patches = patchify(image.float(), self.patch_size)
        prediction = prediction.float()
        if self.normalize_target:
            mean, std = patch_mean_and_std(patches, self.unbiased, self.eps)
            prediction = prediction * std + mean
        return unpatchify(prediction, self.patch_size, grid_size(image.shape[2:], self.patch_size))
