"""Images as sequences of patch tokens, in 2D and 3D.

Conventions of the package: images are ``(B, C, *spatial)``, tokens stand in raster order of the patch grid (last
axis fastest), and the voxels of a patch stand in raster order with the channel last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def grid_size(spatial_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Number of patches along each axis.

    Args:
        spatial_size: image size in voxels.
        patch_size: patch size in voxels, one number for each axis.

    Raises:
        ValueError: when the axes differ in number, or a patch does not divide its axis.
    """
    if len(spatial_size) != len(patch_size):
        raise ValueError(f"image size {tuple(spatial_size)} and patch_size {tuple(patch_size)} differ in dimensions")
    if any(p < 1 or s % p for s, p in zip(spatial_size, patch_size, strict=True)):
        raise ValueError(
            f"size {tuple(spatial_size)} is not divisible by {tuple(patch_size)}: "
            "change roi_size or patch_size so that each axis divides"
        )
    # sizes are tensors in torch.jit.trace
    return tuple(int(s) // p for s, p in zip(spatial_size, patch_size, strict=True))


def patchify(image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Cut an image into patch tokens.

    Args:
        image: ``(B, C, *spatial)``.
        patch_size: voxels along each axis.

    Returns:
        ``(B, N, prod(patch_size) * C)``; tokens and voxels in raster order, channel last.
    """
    batch, channels, *spatial = image.shape
    grid = grid_size(spatial, patch_size)
    dims = len(grid)
    split = [n for pair in zip(grid, patch_size, strict=True) for n in pair]
    blocks = image.reshape(batch, channels, *split)
    grid_axes = [2 + 2 * i for i in range(dims)]
    voxel_axes = [3 + 2 * i for i in range(dims)]
    return blocks.permute(0, *grid_axes, *voxel_axes, 1).reshape(batch, prod(grid), prod(patch_size) * channels)


def unpatchify(tokens: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Put patch tokens back together; the inverse of :func:`patchify`.

    Args:
        tokens: ``(B, N, prod(patch_size) * C)``.
        patch_size: voxels along each axis.
        grid: patches along each axis.

    Returns:
        ``(B, C, *spatial)``.
    """
    batch, dims = tokens.shape[0], len(grid)
    channels = tokens.shape[-1] // prod(patch_size)
    blocks = tokens.reshape(batch, *grid, *patch_size, channels)
    interleaved = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
    spatial = [g * p for g, p in zip(grid, patch_size, strict=True)]
    return blocks.permute(0, 1 + 2 * dims, *interleaved).reshape(batch, channels, *spatial)


def token_ids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the visible and of the hidden tokens, each in raster order.

    Args:
        mask: boolean ``(B, *grid)``, True = hidden, the same number hidden in each sample.

    Returns:
        visible ``(B, N_visible)`` and hidden ``(B, N_hidden)``.

    Raises:
        ValueError: when the mask is not boolean, or the samples of the batch hide different numbers of tokens.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be boolean, True where a token is hidden, found {mask.dtype}: mask.bool()")
    hidden = mask.flatten(1)
    counts = hidden.sum(1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"each sample of a batch must hide the same number of tokens, found {counts}")
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    n_visible = hidden.shape[1] - counts[0]
    return order[:, :n_visible], order[:, n_visible:]


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by index: ``(B, N, F)`` and ``(B, M)`` give ``(B, M, F)``."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def hidden_voxels(mask: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Token mask ``(B, *grid)`` as a voxel mask ``(B, 1, *spatial)``."""
    tokens = mask.flatten(1).unsqueeze(-1).expand(-1, -1, prod(patch_size))
    return unpatchify(tokens, patch_size, mask.shape[1:])


def patch_mean_and_std(patches: Tensor, unbiased: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``sqrt(variance + eps)`` of each patch, both ``(B, N, 1)``."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True, unbiased=unbiased)
    return mean, (variance + eps).sqrt()
