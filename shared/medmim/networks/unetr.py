"""UNETR for more patch sizes and depths than MONAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.nets import ViT
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.patches import grid_size
from medmim.networks.vit import prepare_vit_blocks


class UNETR(nn.Module):
    """UNETR (Hatamizadeh et al., WACV 2022) for patch sizes 8, 16 and 32 and any depth of the ViT.

    Made of MONAI's blocks. With patch size 16 and 12 layers the state dict equals that of
    ``monai.networks.nets.UNETR`` name by name, and so do the outputs. The skips come from the blocks with index
    ``k * num_layers // 4``, k = 1, 2, 3. Other patch sizes change the first upsampling step only: its factor is
    ``patch_size / 8``, so that the convolutional part works at the same resolutions.

    Args:
        in_channels, out_channels: of image and logits.
        img_size: voxels along each axis, divisible by ``patch_size``, more than one patch in all.
        patch_size: 8, 16 or 32, the same along each axis.
        feature_size: channels at full resolution.
        hidden_size, mlp_dim, num_layers, num_heads, qkv_bias: of the ViT.
        norm_name: normalisation of the convolutional blocks.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: when a size is not supported.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int = 16,
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        qkv_bias: bool = False,
        norm_name: tuple | str = "instance",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        img_size = ensure_tuple_rep(img_size, spatial_dims)
        patch_sizes = set(ensure_tuple_rep(patch_size, spatial_dims))
        if len(patch_sizes) != 1 or not patch_sizes <= {8, 16, 32}:
            raise ValueError(f"UNETR needs a patch_size of 8, 16 or 32, the same on each axis, found {patch_size}")
        patch = patch_sizes.pop()
        self.grid = grid_size(img_size, (patch,) * spatial_dims)
        if max(self.grid) < 2:
            raise ValueError(f"roi_size {img_size} holds one patch of {patch} voxels: enlarge it, or take smaller ones")
        if num_layers < 4:
            raise ValueError(f"UNETR takes skips from three depths of the ViT: num_layers {num_layers} is below 4")
        self.norm_name = norm_name
        self.skip_ids = [k * num_layers // 4 for k in (1, 2, 3)]
        self.vit = ViT(
            in_channels=in_channels,
            img_size=img_size,
            patch_size=patch,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            spatial_dims=spatial_dims,
        )
        prepare_vit_blocks(self.vit.blocks)

        doublings = {8: 0, 16: 1, 32: 2}[patch]  # of the first step; the three that follow double once each
        common: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "kernel_size": 3,
            "norm_name": norm_name,
            "res_block": True,
        }

        def project_up(out_channels: int, times: int) -> nn.Module:
            """Tokens (hidden_size) to ``out_channels``, ``times`` doublings of the resolution."""
            if times == 0:
                return UnetrBasicBlock(in_channels=hidden_size, out_channels=out_channels, stride=1, **common)
            return UnetrPrUpBlock(
                in_channels=hidden_size,
                out_channels=out_channels,
                num_layer=times - 1,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **common,
            )

        def up(in_channels: int, out_channels: int, factor: int = 2) -> UnetrUpBlock:
            return UnetrUpBlock(
                in_channels=in_channels, out_channels=out_channels, upsample_kernel_size=factor, **common
            )

        size = feature_size
        self.encoder1 = UnetrBasicBlock(in_channels=in_channels, out_channels=size, stride=1, **common)
        self.encoder2 = project_up(2 * size, doublings + 2)
        self.encoder3 = project_up(4 * size, doublings + 1)
        self.encoder4 = project_up(8 * size, doublings)
        self.decoder5 = up(hidden_size, 8 * size, factor=2**doublings)
        self.decoder4 = up(8 * size, 4 * size)
        self.decoder3 = up(4 * size, 2 * size)
        self.decoder2 = up(2 * size, size)
        self.out = UnetOutBlock(spatial_dims=spatial_dims, in_channels=size, out_channels=out_channels)

    def to_map(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, F)`` to a map ``(B, F, *grid)``."""
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *img_size)`` to logits ``(B, out_channels, *img_size)``."""
        tokens, hidden_states = self.vit(image)
        skip1, skip2, skip3 = [self.to_map(hidden_states[i]) for i in self.skip_ids]
        x = self.decoder5(self.to_map(tokens), self.encoder4(skip3))
        x = self.decoder4(x, self.encoder3(skip2))
        x = self.decoder3(x, self.encoder2(skip1))
        x = self.decoder2(x, self.encoder1(image))
        return self.out(x)
