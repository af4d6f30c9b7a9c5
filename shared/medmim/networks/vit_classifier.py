"""Classification of whole images with a stock MONAI ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers import DropPath
from monai.networks.nets import ViT
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.patches import grid_size
from medmim.networks.vit import prepare_vit_blocks

POOLING = ("mean", "class_token")


class ViTClassifier(nn.Module):
    """MONAI ``ViT`` with a linear head on the mean of its normed tokens, or on a class token.

    He et al. (CVPR 2022) and, for radiographs, Zhou et al. (ISBI 2023) fine-tune a masked autoencoder's encoder like
    this. The ViT inside stays a stock one without class token, so that any pre-trained ``encoder.pt`` fits; a class
    token belongs to the head and starts anew.

    Args:
        in_channels: of the image.
        n_outputs: logits.
        img_size: pixels along each axis.
        patch_size: pixels along each axis of a token.
        pooling: ``mean`` or ``class_token``.
        hidden_size, mlp_dim, num_layers, num_heads, qkv_bias, spatial_dims: of the ViT.
        drop_path_rate: probability that the last block is left out for a sample in training (Huang et al., "Deep
            Networks with Stochastic Depth", ECCV 2016); it grows linearly from 0 in the first.

    Raises:
        ValueError: when sizes do not divide, or the pooling is unknown.
    """

    __constants__ = ("has_class_token",)

    def __init__(
        self,
        in_channels: int,
        n_outputs: int,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int,
        pooling: str = "mean",
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        qkv_bias: bool = False,
        spatial_dims: int = 2,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLING:
            raise ValueError(f"pooling must be {' or '.join(POOLING)}, found {pooling!r}")
        img_size = ensure_tuple_rep(img_size, spatial_dims)
        self.grid = grid_size(img_size, ensure_tuple_rep(patch_size, spatial_dims))
        self.vit: Any = ViT(
            in_channels=in_channels,
            img_size=img_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            spatial_dims=spatial_dims,
        )
        prepare_vit_blocks(self.vit.blocks)
        if drop_path_rate > 0:
            _add_drop_path(self.vit.blocks, drop_path_rate)
        self.has_class_token = pooling == "class_token"
        if self.has_class_token:
            self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, hidden_size), std=0.02))
        self.head = nn.Linear(hidden_size, n_outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02)  # about equal probabilities at the start
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *img_size)`` to logits ``(B, n_outputs)``."""
        tokens = self.vit.patch_embedding(image)
        if self.has_class_token:
            tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        for block in self.vit.blocks:
            tokens = block(tokens)
        tokens = self.vit.norm(tokens)
        return self.head(tokens[:, 0] if self.has_class_token else tokens.mean(dim=1))


def _add_drop_path(blocks: nn.ModuleList, rate: float) -> None:
    """Leave out the attention and the MLP of a block at random, sample by sample.

    MONAI's block has no such option. The hooks add nothing to the state dict.
    """
    for i, block in enumerate(blocks):
        drop = DropPath(rate * i / max(len(blocks) - 1, 1))

        def hook(module: nn.Module, inputs: Any, output: Tensor, drop: DropPath = drop) -> Tensor:
            return drop.drop_path(output, drop.drop_prob, module.training, drop.scale_by_keep)

        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(hook)  # type: ignore[union-attr]
