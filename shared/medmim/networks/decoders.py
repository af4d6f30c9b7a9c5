"""Decoders of a masked autoencoder: latents of the visible tokens in, voxels of all tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn

from medmim.networks.patches import gather_tokens
from medmim.networks.positions import sincos_position_embedding
from medmim.networks.vit import prepare_vit_blocks


def _positions(kind: str, grid: Sequence[int], hidden_size: int) -> nn.Parameter:
    if kind == "sincos":
        return nn.Parameter(sincos_position_embedding(grid, hidden_size), requires_grad=False)
    if kind == "learnable":
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prod(grid), hidden_size), std=0.02))
    raise ValueError(f"position_embedding must be learnable or sincos, found {kind!r}")


def _raster_order(visible: Tensor, hidden: Tensor) -> Tensor:
    """Indices that bring the sequence ``[visible, hidden]`` back to raster order."""
    return torch.cat([visible, hidden], dim=1).argsort(dim=1)


class TransformerDecoder(nn.Module):
    """Transformer decoder of MAE (He et al., CVPR 2022).

    A learned mask token stands at each hidden position; all tokens get their position and pass the blocks.

    Args:
        encoder_size: features of a latent.
        out_size: values to predict for each token, ``prod(patch_size) * C``.
        grid: tokens along each axis.
        hidden_size, num_layers, num_heads, mlp_dim: of the transformer blocks.
        position_embedding: ``sincos`` (fixed) or ``learnable``.
    """

    def __init__(
        self,
        encoder_size: int,
        out_size: int,
        grid: Sequence[int],
        hidden_size: int = 384,
        num_layers: int = 8,
        num_heads: int = 12,
        mlp_dim: int | None = None,
        position_embedding: str = "sincos",
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_size, hidden_size)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, hidden_size), std=0.02))
        self.position_embeddings = _positions(position_embedding, grid, hidden_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, mlp_dim or 4 * hidden_size, num_heads, qkv_bias=True)
            for _ in range(num_layers)
        )
        prepare_vit_blocks(self.blocks)
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, out_size)

    def forward(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """``(B, N_visible, encoder_size)`` and the token indices give ``(B, N, out_size)`` in raster order."""
        return self.head(self.features(latent, visible, hidden))

    def features(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """What the head predicts from: the normed tokens of the last block, ``(B, N, hidden_size)``."""
        mask_tokens = self.mask_token.expand(*hidden.shape, -1)
        tokens = torch.cat([self.embed(latent), mask_tokens], dim=1)
        tokens = gather_tokens(tokens, _raster_order(visible, hidden)) + self.position_embeddings
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class TokenwiseDecoder(nn.Module):
    """Light decoder: one linear layer, or an MLP, applied to each token alone (Chen et al., WACV 2023).

    Such a decoder cannot move information between tokens, and a masked autoencoder encodes visible tokens only. So
    the latent at a hidden position is the mean of the visible latents, weighted by a Gaussian of the distance on the
    token grid; the position and a learned mask token are added.

    Args:
        encoder_size: features of a latent.
        out_size: values to predict for each token, ``prod(patch_size) * C``.
        grid: tokens along each axis.
        hidden_size: width of the MLP's hidden layer; ``None`` gives the linear decoder.
        position_embedding: ``sincos`` (fixed) or ``learnable``.
        sigma: width of the Gaussian in tokens.
    """

    def __init__(
        self,
        encoder_size: int,
        out_size: int,
        grid: Sequence[int],
        hidden_size: int | None = None,
        position_embedding: str = "sincos",
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        self.affinity: Tensor
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, encoder_size), std=0.02))
        self.position_embeddings = _positions(position_embedding, grid, encoder_size)
        cells = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in grid]).reshape(prod(grid), -1)
        self.register_buffer("affinity", -torch.cdist(cells, cells).square() / (2 * sigma**2), persistent=False)
        if hidden_size is None:
            self.head: nn.Module = nn.Linear(encoder_size, out_size)
        else:
            self.head = nn.Sequential(nn.Linear(encoder_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size))

    def forward(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """``(B, N_visible, encoder_size)`` and the token indices give ``(B, N, out_size)`` in raster order."""
        affinity = self.affinity[hidden.unsqueeze(2), visible.unsqueeze(1)]
        filled = affinity.softmax(dim=-1).to(latent.dtype) @ latent + self.mask_token
        tokens = gather_tokens(torch.cat([latent, filled], dim=1), _raster_order(visible, hidden))
        return self.head(tokens + self.position_embeddings)


def build_decoder(
    kind: str,
    encoder_size: int,
    out_size: int,
    grid: Sequence[int],
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    position_embedding: str,
) -> nn.Module:
    """Decoder by name: ``transformer``, ``mlp`` or ``linear``; what a kind has no use for is ignored.

    Raises:
        ValueError: when the name is unknown.
    """
    if kind == "transformer":
        return TransformerDecoder(
            encoder_size, out_size, grid, hidden_size, num_layers, num_heads, position_embedding=position_embedding
        )
    if kind == "mlp":
        return TokenwiseDecoder(encoder_size, out_size, grid, hidden_size, position_embedding)
    if kind == "linear":
        return TokenwiseDecoder(encoder_size, out_size, grid, None, position_embedding)
    raise ValueError(f"decoder must be transformer, mlp or linear, found {kind!r}")
