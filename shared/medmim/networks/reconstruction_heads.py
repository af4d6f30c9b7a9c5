"""Heads that turn the features of an encoder which sees the whole grid into voxels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from medmim.networks.patches import unpatchify
from medmim.networks.positions import sincos_position_embedding
from medmim.networks.vit import prepare_vit_blocks

HEADS = ("linear", "mlp", "upsampling", "transformer")


class TokenHead(nn.Module):
    """Each token predicts the voxels it stands for: by a linear layer, an MLP, or after transformer blocks.

    The linear head is that of SimMIM (Xie et al., CVPR 2022): a 1x1 convolution with pixel shuffle.

    Args:
        in_size: features of a token.
        channels: of the image.
        stride: voxels of a token along each axis.
        grid: tokens along each axis.
        hidden_size: width of the MLP's hidden layer, or of the blocks; ``None`` gives the linear head.
        num_layers: transformer blocks; 0 gives the MLP.
        num_heads: attention heads of a block.
    """

    def __init__(
        self,
        in_size: int,
        channels: int,
        stride: Sequence[int],
        grid: Sequence[int],
        hidden_size: int | None = None,
        num_layers: int = 0,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        self.stride, self.grid = tuple(stride), tuple(grid)
        out_size = prod(stride) * channels
        if hidden_size is None:
            self.layers: nn.Module = nn.Linear(in_size, out_size)
        elif not num_layers:
            self.layers = nn.Sequential(nn.Linear(in_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size))
        else:
            blocks = [
                TransformerBlock(hidden_size, 4 * hidden_size, num_heads, qkv_bias=True) for _ in range(num_layers)
            ]
            prepare_vit_blocks(nn.ModuleList(blocks))
            embed = nn.Sequential(nn.Linear(in_size, hidden_size), Positions(grid, hidden_size))
            self.layers = nn.Sequential(embed, *blocks, nn.LayerNorm(hidden_size), nn.Linear(hidden_size, out_size))

    def forward(self, features: Tensor) -> Tensor:
        """``(B, in_size, *grid)`` to the image ``(B, C, *(grid * stride))``."""
        voxels = self.layers(features.flatten(2).transpose(1, 2))
        return unpatchify(voxels, self.stride, self.grid)


class Positions(nn.Module):
    """Adds the fixed sine-cosine positions of a grid to its tokens, ``(B, N, hidden_size)``."""

    def __init__(self, grid: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", sincos_position_embedding(grid, hidden_size), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens with their positions."""
        return tokens + self.table


class UpsamplingHead(nn.Sequential):
    """Convolutions with doubling of the grid between them, down to single voxels.

    Each step halves the channels, convolves at the coarse size, and doubles the grid by interpolation.

    Args:
        in_size: channels of the features.
        channels: of the image.
        stride: voxels of a position along each axis, powers of two.

    Raises:
        ValueError: when a stride is no power of two, or not the same along each axis.
    """

    def __init__(self, in_size: int, channels: int, stride: Sequence[int]) -> None:
        dims, side = len(stride), stride[0]
        if len(set(stride)) > 1 or side & (side - 1):
            raise ValueError(f"an upsampling head needs a token of a power of two voxels, found {tuple(stride)}")
        convolution = nn.Conv3d if dims == 3 else nn.Conv2d
        layers: list[nn.Module] = []
        size = in_size
        for _ in range(side.bit_length() - 1):
            smaller = max(size // 2, 16)
            layers += [
                convolution(size, smaller, 3, padding=1),
                nn.GroupNorm(1, smaller),
                nn.GELU(),
                nn.Upsample(scale_factor=2, mode="trilinear" if dims == 3 else "bilinear"),
            ]
            size = smaller
        super().__init__(*layers, convolution(size, channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        """``(B, in_size, *grid)`` to the image ``(B, C, *(grid * stride))``."""
        return super().forward(features)


def build_head(
    kind: str,
    in_size: int,
    channels: int,
    stride: Sequence[int],
    grid: Sequence[int],
    hidden_size: int,
    num_layers: int,
    num_heads: int,
) -> nn.Module:
    """Head by name, one of ``HEADS``; what a kind has no use for is ignored.

    Raises:
        ValueError: when the name is unknown, or the sizes do not suit the head.
    """
    if kind == "linear":
        return TokenHead(in_size, channels, stride, grid)
    if kind == "mlp":
        return TokenHead(in_size, channels, stride, grid, hidden_size)
    if kind == "transformer":
        return TokenHead(in_size, channels, stride, grid, hidden_size, num_layers, num_heads)
    if kind == "upsampling":
        return UpsamplingHead(in_size, channels, stride)
    raise ValueError(f"decoder must be one of {', '.join(HEADS)}, found {kind!r}")
