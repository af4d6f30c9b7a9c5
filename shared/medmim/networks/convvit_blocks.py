"""Parts of the hybrid encoder: blocks of its convolutional stages and of its transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.networks.layers import Conv, DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmim.networks.depthwise import depthwise_convolution

KERNEL_SIZE = 5  # of the depthwise convolutions
CPU_ROWS = 4096  # positions that pass an MLP at a time on a CPU; what they need fits the cache


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a pointwise function, on a CPU to few positions at a time, and again in the backward pass.

    There the hidden features of an MLP are large, and taking the memory for them costs more than computing them twice.

    Args:
        function: of the last axis, the same for each position, without randomness.
        x: ``(..., F)``.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return function(x)
    parts = x.flatten(0, -2).split(CPU_ROWS)
    results = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(results).view(*x.shape[:-1], -1)


class Mlp(nn.Sequential):
    """Two linear layers with GELU between, on the last axis."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__(nn.Linear(size, hidden_size), nn.GELU(), nn.Linear(hidden_size, size))


class Embedding(nn.Module):
    """Convolution whose stride is its kernel of 2 along each axis, layer norm over channels, GELU.

    Args:
        in_channels, out_channels: features before and after.
        spatial_dims: 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, M * 2^d, in_channels)``, children in nested order, to ``(B, N, M, out_channels)``."""
        weight = self.conv.weight.movedim(1, -1).flatten(1)
        children = x.reshape(*x.shape[:2], -1, weight.shape[1])
        return nn.functional.gelu(self.norm(nn.functional.linear(children, weight, self.conv.bias)))


class ConvBlock(nn.Module):
    """Convolutional block of MCMAE (Gao et al., NeurIPS 2022) on the positions that are visible.

    A depthwise convolution between two pointwise ones, then an MLP, each with a layer norm before and a residual.
    The depthwise convolution sees zeros wherever no row stands.

    Args:
        size: features.
        mlp_dim: features of the MLP's hidden layer.
        spatial_dims: 2 or 3.
        drop_path_rate: share of samples whose residual branches are left out in training.
    """

    def __init__(self, size: int, mlp_dim: int, spatial_dims: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.conv1 = nn.Linear(size, size)
        self.depthwise = Conv[Conv.CONV, spatial_dims](size, size, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=size)
        self.conv2 = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = Mlp(size, mlp_dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, grid: Sequence[int], places: Tensor) -> Tensor:
        """Positions ``(B, N, M, size)`` to the same shape.

        Args:
            x: features of the visible positions.
            grid: samples, and positions along each axis, of the whole volume.
            places: where they stand, see :func:`medmim.networks.depthwise.depthwise_convolution`.
        """
        rows = self.conv1(self.norm1(x)).flatten(0, 2)
        rows = depthwise_convolution(rows, self.depthwise.weight, self.depthwise.bias, grid, places)
        x = x + self.drop_path(self.conv2(rows.view(x.shape)))
        return x + self.drop_path(by_rows(lambda part: self.mlp(self.norm2(part)), x))


class LayerScale(nn.Module):
    """A learned factor for each feature (Touvron et al., "Going Deeper with Image Transformers", ICCV 2021).

    Args:
        size: features.
        value: at the start.
    """

    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((size,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., size)`` to the same shape."""
        return x * self.factor


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each offset between two tokens, zero at the start.

    Args:
        grid: tokens along each axis; for another grid the table is resized linearly.
        num_heads: attention heads.
    """

    def __init__(self, grid: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, *[2 * size - 1 for size in grid]))

    def forward(self, coordinates: Tensor, grid: Sequence[int]) -> Tensor:
        """Coordinates of tokens ``(B, N, d)`` to ``(B, num_heads, N, N)``."""
        sizes = [2 * size - 1 for size in grid]
        table: Tensor = self.table
        if list(table.shape[1:]) != sizes:
            mode = {2: "bilinear", 3: "trilinear"}[len(sizes)]
            table = nn.functional.interpolate(table[None], size=sizes, mode=mode, align_corners=True)[0]
        offsets = coordinates.unsqueeze(2) - coordinates.unsqueeze(1)
        index = offsets.new_zeros(offsets.shape[:-1])
        for axis, size in enumerate(grid):
            index = index * (2 * size - 1) + offsets[..., axis] + size - 1
        return nn.functional.embedding(index, table.flatten(1).t()).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention with PyTorch's fused kernel.

    Args:
        size: features, divisible by ``num_heads``.
        num_heads: attention heads.
        bias_grid: tokens along each axis for a relative position bias; ``None`` builds none.
    """

    def __init__(self, size: int, num_heads: int, bias_grid: Sequence[int] | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)
        self.position_bias = None if bias_grid is None else RelativePositionBias(bias_grid, num_heads)

    def forward(self, x: Tensor, coordinates: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``(B, N, size)`` at ``coordinates`` ``(B, N, d)`` of a ``grid`` to the same shape."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if self.position_bias is None else self.position_bias(coordinates, grid).to(query.dtype)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block.

    Args:
        size: features.
        mlp_dim: features of the MLP's hidden layer.
        num_heads: attention heads.
        bias_grid: tokens along each axis for a relative position bias; ``None`` builds none.
        layer_scale: factor of the residual branches at the start; ``None`` builds none.
        drop_path_rate: share of samples whose residual branches are left out in training.
    """

    def __init__(
        self,
        size: int,
        mlp_dim: int,
        num_heads: int,
        bias_grid: Sequence[int] | None = None,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size, eps=1e-6)
        self.attn = Attention(size, num_heads, bias_grid)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(size, layer_scale)
        self.norm2 = nn.LayerNorm(size, eps=1e-6)
        self.mlp = Mlp(size, mlp_dim)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(size, layer_scale)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, coordinates: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``(B, N, size)`` at ``coordinates`` ``(B, N, d)`` of a ``grid`` to the same shape."""
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), coordinates, grid)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
