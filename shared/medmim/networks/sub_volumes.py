"""Cutting, resizing and pooling the regions of a volume, batched and on its device."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from medmim.networks.patches import grid_size

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def cut_sub_volumes(volumes: Tensor, grid: Sequence[int], regions: Tensor, parents: Tensor) -> Tensor:
    """Cut regions out of volumes: exact copies of their voxels.

    Args:
        volumes: ``(P, C, *spatial)``, of any type.
        grid: regions along each axis; each axis of the volume divides by it.
        regions: ``(M,)``, index of a region in raster order of the grid.
        parents: ``(M,)``, index of the volume that it is cut from.

    Returns:
        ``(M, C, *region)``.

    Raises:
        ValueError: when an axis does not divide.

    Example::

        octants = cut_sub_volumes(scans, (2, 2, 2), torch.tensor([0, 7]), torch.tensor([1, 1]))  # of the second scan
    """
    region_size = _region_size(volumes.shape[2:], grid)
    split = [n for pair in zip(grid, region_size, strict=True) for n in pair]
    blocks = volumes.reshape(*volumes.shape[:2], *split)
    place: list[Tensor | slice] = [parents.to(volumes.device, non_blocking=True), slice(None)]
    for index in torch.unravel_index(regions, tuple(grid)):
        place += [index.to(volumes.device, non_blocking=True), slice(None)]
    return blocks[tuple(place)]  # indexed axes come first


def resize_sub_volumes(volumes: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(M, C, *spatial)`` to ``(M, C, *size)``, linear along each axis; as it is when it has that size.

    Corners are not aligned: a voxel is a cell of the volume, so halving the size averages pairs of voxels.
    """
    if tuple(volumes.shape[2:]) == tuple(size):
        return volumes
    return nn.functional.interpolate(volumes, tuple(size), mode=_MODES[len(size)], align_corners=False)


def resize_reach(n_voxels: int, n_resized: int, n_tokens: int) -> Tensor:
    """Which voxels of an axis can enter each token after :func:`resize_sub_volumes`: boolean ``(n_tokens, n_voxels)``.

    From the first to the last voxel that the token's own voxels are interpolated from.
    """
    centre = ((torch.arange(n_resized) + 0.5).double() * n_voxels / n_resized - 0.5).clamp(min=0)
    first = centre.floor().reshape(n_tokens, -1).amin(1, keepdim=True)
    last = centre.ceil().clamp(max=n_voxels - 1).reshape(n_tokens, -1).amax(1, keepdim=True)
    voxels = torch.arange(n_voxels)
    return (voxels >= first) & (voxels <= last)


def pool_regions(features: Tensor, grid: Sequence[int], region_tokens: Sequence[int]) -> Tensor:
    """Mean feature of the tokens of each region.

    Args:
        features: ``(M, N, F)``, tokens in raster order of ``grid``.
        grid: tokens along each axis.
        region_tokens: tokens of a region along each axis; it divides the grid.

    Returns:
        ``(M, R, F)``, regions in raster order.

    Raises:
        ValueError: when an axis does not divide.
    """
    regions = grid_size(grid, region_tokens)
    dims = len(grid)
    split = [n for pair in zip(regions, region_tokens, strict=True) for n in pair]
    blocks = features.reshape(features.shape[0], *split, features.shape[-1])
    return blocks.mean(dim=[2 + 2 * i for i in range(dims)]).reshape(features.shape[0], prod(regions), -1)


def _region_size(spatial: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    if len(spatial) != len(grid) or any(s % g for s, g in zip(spatial, grid, strict=False)):
        raise ValueError(
            f"a volume of {tuple(spatial)} voxels does not divide into {tuple(grid)} regions: change its size"
        )
    return tuple(s // g for s, g in zip(spatial, grid, strict=True))
