"""Depthwise convolution of channel-last volumes whose gradients are as fast as its forward pass on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight, conv3d_weight

CPU_TILE = {2: (48, 48), 3: (8, 8, 48)}  # by spatial axes; small enough for the cache, large for the call


def depthwise_convolution(rows: Tensor, weight: Tensor, bias: Tensor, grid: Sequence[int], places: Tensor) -> Tensor:
    """Convolve each channel with its own kernel, zeros around the volume and wherever no row stands.

    Args:
        rows: ``(M, C)``, one row for each place.
        weight: ``(C, 1, *kernel)``, odd sizes.
        bias: ``(C,)``.
        grid: samples, and positions along each axis: ``(B, *spatial)``.
        places: ``(2, M)``, different indices for all rows: where a row stands in the volume ``(B, *spatial)``, and
            where in the volume with a margin of half a kernel on each side of each axis, both in raster order.

    Returns:
        ``(M, C)``, the values at the same places.
    """
    weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)  # autocast knows nothing of the backward pass below
    with torch.autocast(rows.device.type, enabled=False):
        if torch.jit.is_tracing():  # which cannot write down a function with its own backward pass
            return _at_places(_convolve(_with_margin(rows, grid, weight, places), weight, bias), places)
        return _DepthwiseConvolution.apply(rows, weight, bias, tuple(grid), places)


class _DepthwiseConvolution(torch.autograd.Function):
    """Keeps the rows and no volume for the backward pass.

    PyTorch's own input gradient of a depthwise 3D convolution is 20 times slower on a CPU than the same written as a
    convolution with the flipped kernel, and so is its weight gradient beside the one that is written here.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, ...], places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, places)
        ctx.grid = grid
        volume = _with_margin(rows, grid, weight, places)
        return _at_places(_convolve(volume, weight, bias), places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, weight, places = ctx.saved_tensors
        axes = tuple(range(2, weight.ndim))
        volume = _with_margin(gradient, ctx.grid, weight, places)
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = _at_places(_convolve(volume, weight.flip(axes), None), places)
        if ctx.needs_input_grad[1]:
            for axis in axes:
                volume = volume.narrow(axis, weight.shape[axis] // 2, ctx.grid[axis - 1])
            inputs = _with_margin(rows, ctx.grid, weight, places)
            of_weight = weight_gradient(inputs, volume, weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_rows, of_weight, of_bias, None, None


def weight_gradient(inputs: Tensor, gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of a depthwise convolution without padding with respect to its kernels.

    Args:
        inputs: ``(B, C, *spatial)``, the margin included.
        gradient: of the output, ``(B, C, *spatial)``, smaller by the kernel size less one.
        shape: of the kernels, ``(C, 1, *kernel)``.
    """
    if inputs.device.type != "cpu":
        of_weight = conv3d_weight if len(shape) == 5 else conv2d_weight
        return of_weight(inputs, list(shape), gradient, groups=shape[0])
    # a sum over tiles, in which the tile of the output's gradient is the kernel of an ordinary convolution
    total = torch.zeros(tuple(shape), dtype=torch.promote_types(inputs.dtype, torch.float32))
    spatial, kernel = gradient.shape[2:], shape[2:]
    starts = [range(0, size, step) for size, step in zip(spatial, CPU_TILE[len(spatial)], strict=True)]
    for sample, *corner in product(range(len(inputs)), *starts):
        tile, surrounding = gradient[sample, :, None], inputs[sample : sample + 1]
        for axis, start in enumerate(corner):
            size = min(CPU_TILE[len(spatial)][axis], spatial[axis] - start)
            tile = tile.narrow(axis + 2, start, size)
            surrounding = surrounding.narrow(axis + 2, start, size + kernel[axis] - 1)
        total += _convolve(surrounding, tile, None).transpose(0, 1)
    return total


def _convolve(volume: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution without padding."""
    convolve = nn.functional.conv3d if volume.ndim == 5 else nn.functional.conv2d
    return convolve(volume, weight, bias, groups=weight.shape[0])


def _with_margin(rows: Tensor, grid: Sequence[int], weight: Tensor, places: Tensor) -> Tensor:
    """The volume ``(B, C, *spatial)`` with a margin of zeros, channel last in memory."""
    batch, *spatial = grid
    padded = [size + kernel - 1 for size, kernel in zip(spatial, weight.shape[2:], strict=True)]
    volume = rows.new_zeros(batch * torch.Size(padded).numel(), rows.shape[1])
    volume.index_copy_(0, places[1], rows)
    return volume.view(batch, *padded, -1).movedim(-1, 1)


def _at_places(volume: Tensor, places: Tensor) -> Tensor:
    """Rows of a volume ``(B, C, *spatial)`` at their places."""
    return volume.movedim(1, -1).reshape(-1, volume.shape[1]).index_select(0, places[0])
