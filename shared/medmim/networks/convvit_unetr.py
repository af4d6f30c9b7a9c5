"""Segmentation network around the hybrid encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn

from medmim.networks.convvit import ConvViT

COARSEST = 32  # voxels along each axis of a position in the fifth feature map


class ConvViTUNETR(nn.Module):
    """``ConvViT`` with the convolutional decoder of Swin UNETR (Hatamizadeh et al., 2022), made of MONAI's blocks.

    Zhuang et al., "MiM" (TMI 2025, arXiv 2404.15580). The decoder takes the image and the five feature maps, each
    normed over its channels. Any image size goes in: it is padded with zeros on both sides of an axis to a multiple
    of 32 (and to two positions in the fifth map at least, which its norms need), and the logits are cropped.

    Args:
        in_channels, out_channels: of image and logits.
        img_size: voxels along each axis, needed only for ``relative_position_bias``.
        embed_dims, depths, num_heads: of the encoder; ``embed_dims[0]`` is also the width of the decoder's last block.
        layer_scale, relative_position_bias, drop_path_rate: of the encoder.
        norm_name: normalisation of the decoder's blocks.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: when sizes do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int] | int | None = None,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 11),
        num_heads: int = 12,
        layer_scale: float | None = 1.0,
        relative_position_bias: bool = False,
        drop_path_rate: float = 0.0,
        norm_name: tuple | str = "instance",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        self.norm_name = norm_name
        self.encoder = ConvViT(
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            fusion=False,
            fifth_stage=True,
            layer_scale=layer_scale,
            relative_position_bias=relative_position_bias,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
        )
        common: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "kernel_size": 3,
            "norm_name": norm_name,
            "res_block": True,
        }

        def basic(in_channels: int, out_channels: int) -> UnetrBasicBlock:
            return UnetrBasicBlock(in_channels=in_channels, out_channels=out_channels, stride=1, **common)

        def up(in_channels: int, out_channels: int) -> UnetrUpBlock:
            return UnetrUpBlock(in_channels=in_channels, out_channels=out_channels, upsample_kernel_size=2, **common)

        first, second, third, fourth = embed_dims
        self.encoder1 = basic(in_channels, first)
        self.encoder2 = basic(first, first)
        self.encoder3 = basic(second, second)
        self.encoder4 = basic(third, third)
        self.encoder5 = basic(2 * fourth, 2 * fourth)
        self.decoder5 = up(2 * fourth, fourth)
        self.decoder4 = up(fourth, third)
        self.decoder3 = up(third, second)
        self.decoder2 = up(second, first)
        self.decoder1 = up(first, first)
        self.out = UnetOutBlock(spatial_dims=spatial_dims, in_channels=first, out_channels=out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)`` to logits ``(B, out_channels, *spatial)``."""
        margins = _margins(image.shape[2:])
        padded = nn.functional.pad(image, [n for pair in reversed(margins) for n in pair])
        half, quarter, eighth, sixteenth, bottom = [_norm(x) for x in self.encoder(padded)]
        x = self.decoder5(self.encoder5(bottom), sixteenth)
        x = self.decoder4(x, self.encoder4(eighth))
        x = self.decoder3(x, self.encoder3(quarter))
        x = self.decoder2(x, self.encoder2(half))
        x = self.decoder1(x, self.encoder1(padded))
        inside = [slice(before, before + n) for (before, _), n in zip(margins, image.shape[2:], strict=True)]
        return self.out(x[..., *inside])


def _norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of a map, without learned factors."""
    return nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def _margins(spatial: Sequence[int]) -> list[tuple[int, int]]:
    """Voxels to add before and after each axis."""
    spatial = [int(size) for size in spatial]  # tensors in torch.jit.trace
    sizes = [-(-size // COARSEST) * COARSEST for size in spatial]
    if max(sizes) == COARSEST:
        sizes[-1] *= 2
    missing = [padded - size for padded, size in zip(sizes, spatial, strict=True)]
    return [(n // 2, n - n // 2) for n in missing]
