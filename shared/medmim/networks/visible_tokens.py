"""The finer positions inside visible tokens: the only ones that a masked convolutional encoder computes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def nested_order(x: Tensor, leading: int) -> Tensor:
    """Flatten the positions of a block so that neighbours stay together at every scale.

    The ``2^d`` corners of a block stand one after the other, each in the same order itself. So the children of a
    position of the next coarser grid are neighbours in the sequence.

    Args:
        x: ``(*lead, *block, F)``, the block of one power of two along each of its ``d`` axes.
        leading: number of leading axes.

    Returns:
        ``(*lead, prod(block), F)``.
    """
    shape = [int(size) for size in x.shape]  # tensors in torch.jit.trace
    lead, block, features = shape[:leading], shape[leading:-1], shape[-1]
    levels, dims = block[0].bit_length() - 1, len(block)
    halves = x.reshape(*lead, *[2] * (levels * dims), features)
    order = [leading + axis * levels + level for level in range(levels) for axis in range(dims)]
    return halves.permute(*range(leading), *order, halves.ndim - 1).reshape(*lead, prod(block), features)


def token_coordinates(ids: Tensor, grid: Sequence[int]) -> Tensor:
    """Position of each token along each axis: ``(..., N)`` indices in raster order give ``(..., N, d)``."""
    coordinates = []
    for size in reversed(grid):
        coordinates.append(ids % size)
        ids = ids // size
    return torch.stack(coordinates[::-1], dim=-1)


def places(ids: Tensor, grid: Sequence[int], side: int, kernel_size: int) -> Tensor:
    """Where the positions inside tokens stand in a finer volume.

    Args:
        ids: tokens ``(B, N)``, indices in raster order.
        grid: tokens along each axis.
        side: finer positions along each axis of a token, a power of two.
        kernel_size: odd; the second volume has a margin of half of it.

    Returns:
        ``(2, B * N * side^d)``: indices in the volume ``(B, *(grid * side))`` and in the one with a margin; the
        positions of a token in nested order.
    """
    corners = token_coordinates(ids, grid) * side
    inside = torch.cartesian_prod(*[torch.arange(side, device=ids.device)] * len(grid)).view(*[side] * len(grid), -1)
    coordinates = corners.unsqueeze(2) + nested_order(inside, leading=0)
    samples = torch.arange(len(ids), device=ids.device).view(-1, 1, 1)
    found = []
    for margin in (0, kernel_size // 2):
        index = samples
        for axis, size in enumerate(grid):
            index = index * (size * side + 2 * margin) + coordinates[..., axis] + margin
        found.append(index.flatten())
    return torch.stack(found)


def to_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Lay out the positions of all tokens as a map.

    Args:
        x: ``(B, N, side^d, F)``, tokens in raster order, the positions of each in nested order.
        grid: tokens along each axis.

    Returns:
        ``(B, F, *(grid * side))``, channel last in memory.
    """
    dims = len(grid)
    levels = (int(x.shape[2]).bit_length() - 1) // dims
    halves = x.reshape(len(x), *grid, *[2] * (levels * dims), x.shape[-1])
    order = [0]
    for axis in range(dims):
        order += [1 + axis, *[1 + dims + level * dims + axis for level in range(levels)]]
    spatial = [size << levels for size in grid]
    return halves.permute(*order, halves.ndim - 1).reshape(len(x), *spatial, -1).movedim(-1, 1)
