"""ConvViT: the hybrid encoder of MiM, convolutional stages that see visible voxels only, then a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from monai.networks.layers import Conv
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.convvit_blocks import KERNEL_SIZE, AttentionBlock, ConvBlock, Embedding
from medmim.networks.patches import gather_tokens, grid_size, patchify, token_ids
from medmim.networks.positions import sincos_position_embedding
from medmim.networks.visible_tokens import nested_order, places, to_map, token_coordinates

TOKEN_SIZE = 16  # voxels along each axis of a token: four embeddings halve the resolution
SIDES = (8, 4, 2)  # positions along each axis of a token in the three convolutional stages
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dims": (12, 24, 48, 96), "num_heads": 3},
    "base": {"embed_dims": (48, 96, 192, 384), "num_heads": 12},
}


class ConvViT(nn.Module):
    """Hybrid convolutional and transformer encoder for pre-training with a mask and for dense tasks without.

    Zhuang et al., "MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image Analysis" (TMI 2025, arXiv
    2404.15580), after Gao et al., "MCMAE: Masked Convolution Meets Masked Autoencoders" (NeurIPS 2022). Three
    convolutional stages work at 1/2, 1/4 and 1/8 of the resolution, a transformer on tokens of 16 voxels along each
    axis. With a mask, all layers compute visible positions only, and the depthwise convolutions see zeros at hidden
    ones, so nothing of a hidden voxel reaches a latent. Positions are the fixed sine-cosine table of the input's own
    grid: any size that 16 divides goes in.

    Called with a mask it returns the latents of the visible tokens, in raster order: the last block's output, to which
    the three convolutional stages are added (``fusion``), normed. Called on an image alone it returns feature maps,
    finest first, at 1/2, 1/4, 1/8, 1/16 and, with ``fifth_stage``, 1/32 of the resolution (rounded up), neither fused
    nor normed. Build only the part that is used, and every parameter gets a gradient.

    Args:
        in_channels: of the image.
        spatial_dims: 2 or 3.
        embed_dims: features of the three convolutional stages and of the transformer.
        depths: blocks of each.
        num_heads: attention heads.
        mlp_ratio: hidden features of an MLP, as a multiple of its input's.
        fusion: build what latents need beyond the blocks (call with a mask, ``encode``).
        fifth_stage: build the fifth feature map, of ``2 * embed_dims[3]`` features.
        layer_scale: start of a learned factor on the transformer's residual branches; ``None`` builds none.
        relative_position_bias: learn a bias for each head and offset in each transformer block; needs ``img_size``.
        img_size: voxels along each axis; only the tables of the relative position bias have this size (and are
            resized for other inputs).
        drop_path_rate: of the last block, rising linearly from 0 over all blocks.

    Raises:
        ValueError: when sizes do not divide.
    """

    def __init__(
        self,
        in_channels: int = 1,
        spatial_dims: int = 3,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        fusion: bool = True,
        fifth_stage: bool = True,
        layer_scale: float | None = None,
        relative_position_bias: bool = False,
        img_size: Sequence[int] | int | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(spatial_dims, embed_dims, depths, num_heads)
        size = embed_dims[-1]
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.token_size = (TOKEN_SIZE,) * spatial_dims
        bias_grid = self._bias_grid(img_size) if relative_position_bias else None
        drop_path_rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])

        channels = [in_channels, *embed_dims]
        self.embeddings = nn.ModuleList(Embedding(channels[i], channels[i + 1], spatial_dims) for i in range(4))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(dim, int(mlp_ratio * dim), spatial_dims, next(drop_path_rates)) for _ in range(depth)
            )
            for dim, depth in zip(embed_dims[:3], depths[:3], strict=True)
        )
        self.token_embedding = nn.Linear(size, size)
        self.blocks = nn.ModuleList(
            AttentionBlock(size, int(mlp_ratio * size), num_heads, bias_grid, layer_scale, next(drop_path_rates))
            for _ in range(depths[3])
        )
        convolution: Any = Conv[Conv.CONV, spatial_dims]
        if fusion:
            self.fusion: nn.ModuleList | None = nn.ModuleList(
                convolution(dim, size, kernel_size=side, stride=side)
                for dim, side in zip(embed_dims[:3], SIDES, strict=True)
            )
            self.norm: nn.LayerNorm | None = nn.LayerNorm(size, eps=1e-6)
        else:
            self.fusion = self.norm = None
        if fifth_stage:
            norm = nn.BatchNorm3d if spatial_dims == 3 else nn.BatchNorm2d
            halve = convolution(size, 2 * size, kernel_size=2, stride=2)
            self.fifth_stage: nn.Sequential | None = nn.Sequential(halve, norm(2 * size), nn.GELU())
        else:
            self.fifth_stage = None
        self._table: tuple[Any, Tensor] | None = None
        self.apply(_initialise)

    @classmethod
    def tiny(cls, **options: Any) -> ConvViT:
        """Features 12, 24, 48 and 96, 3 heads; ``options`` are those of the constructor."""
        return cls(**{**SIZES["tiny"], **options})

    @classmethod
    def base(cls, **options: Any) -> ConvViT:
        """Features 48, 96, 192 and 384, 12 heads; ``options`` are those of the constructor."""
        return cls(**{**SIZES["base"], **options})

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Any:
        """Latents of what a mask leaves visible or, without a mask, feature maps.

        Args:
            image: ``(B, in_channels, *spatial)``, each axis divisible by 16.
            mask: boolean ``(B, *spatial / 16)``, True = hidden, the same number hidden in each sample; on any device.

        Returns:
            With a mask ``(B, N_visible, embed_dims[3])``; without one the list of maps ``(B, F, *spatial / 2^k)``.

        Raises:
            ValueError: when image, mask and network do not fit, or the part that this call needs was not built.
        """
        if mask is None:
            return self.feature_maps(image)
        grid = self.grid(image)
        if tuple(mask.shape) != (len(image), *grid):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} for an image with {len(image)} samples of {grid} tokens: "
                "a mask has one entry for each token of 16 voxels along each axis"
            )
        visible = token_ids(mask)[0]
        if visible.shape[1] == 0:
            raise ValueError("the mask hides every token: lower mask_ratio")
        return self.encode(image, visible.to(image.device, non_blocking=True))

    def encode(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        """Latents ``(B, M, embed_dims[3])`` of the tokens ``visible`` ``(B, M)``, in that order; of all without.

        Raises:
            ValueError: when the image does not fit, or ``fusion`` was not built.
        """
        if self.fusion is None or self.norm is None:
            raise ValueError("this ConvViT was built with fusion=False, so it has feature maps but no latents")
        *stages, latent = self._compute(image, self.all_tokens(image) if visible is None else visible)
        convolution: Any
        for convolution, positions in zip(self.fusion, stages, strict=True):
            weight = nested_order(convolution.weight.movedim(1, -1), leading=1).flatten(1)
            latent = latent + nn.functional.linear(positions.flatten(2), weight, convolution.bias)
        return self.norm(latent)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages ``(B, F, *spatial / 2^k)``, k = 1 … 4, and of the fifth stage if it was built."""
        grid = self.grid(image)
        *stages, tokens = self._compute(image, self.all_tokens(image))
        maps = [to_map(x, grid) for x in [*stages, tokens.unsqueeze(2)]]
        if self.fifth_stage is not None:
            odd = [n for size in reversed(grid) for n in (0, size % 2)]
            maps.append(self.fifth_stage(nn.functional.pad(maps[-1], odd) if any(odd) else maps[-1]))
        return maps

    def grid(self, image: Tensor) -> tuple[int, ...]:
        """Tokens along each axis of an image.

        Raises:
            ValueError: when the image has other axes or channels, or 16 does not divide it.
        """
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"image of shape {tuple(image.shape)}, expected (B, {self.in_channels}) "
                f"and {self.spatial_dims} spatial axes"
            )
        return grid_size(image.shape[2:], self.token_size)

    def all_tokens(self, image: Tensor) -> Tensor:
        """Indices of all tokens ``(B, N)``."""
        return torch.arange(prod(self.grid(image)), device=image.device).expand(len(image), -1)

    def _compute(self, image: Tensor, ids: Tensor) -> list[Tensor]:
        """Positions ``(B, M, side^d, F)`` of the three stages in nested order, and tokens ``(B, M, F)``."""
        grid = self.grid(image)
        patches = gather_tokens(patchify(image, self.token_size), ids)
        x = nested_order(patches.unflatten(-1, (*self.token_size, self.in_channels)), leading=2)
        found = []
        for embedding, stage, side in zip(self.embeddings, self.stages, SIDES, strict=False):
            x = embedding(x)
            where = places(ids, grid, side, KERNEL_SIZE)
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, (len(x), *[side * size for size in grid]), where)
            found.append(x)
        positions = self._positions(grid, x)
        tokens = self.token_embedding(self.embeddings[-1](x).squeeze(2)) + positions[0, ids]
        coordinates = token_coordinates(ids, grid)
        for block in self.blocks:
            tokens = block(tokens, coordinates, grid)
        return [*found, tokens]

    def _positions(self, grid: tuple[int, ...], x: Tensor) -> Tensor:
        """Sine-cosine table ``(1, N, F)`` where ``x`` is; the latest is kept, because a GPU waits for the copy."""
        key = (grid, x.device, x.dtype)
        exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()  # whose tensors must not be kept
        if not exporting and self._table is not None and self._table[0] == key:
            return self._table[1]
        with torch.inference_mode(False):
            table = sincos_position_embedding(grid, self.token_embedding.out_features).to(x, non_blocking=True)
        if not exporting:
            self._table = (key, table)
        return table

    def _bias_grid(self, img_size: Sequence[int] | int | None) -> tuple[int, ...]:
        if img_size is None:
            raise ValueError("relative_position_bias needs img_size, the voxels along each axis")
        return grid_size(ensure_tuple_rep(img_size, self.spatial_dims), self.token_size)


def _check_sizes(spatial_dims: int, embed_dims: Sequence[int], depths: Sequence[int], num_heads: int) -> None:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, found {spatial_dims}")
    if len(embed_dims) != 4 or len(depths) != 4:
        raise ValueError(f"embed_dims and depths need 4 numbers each, found {tuple(embed_dims)} and {tuple(depths)}")
    for divisor, reason in ((num_heads, "attention heads"), (2 * spatial_dims, "needed by the position embedding")):
        if embed_dims[3] % divisor:
            raise ValueError(f"embed_dims[3] {embed_dims[3]} is not divisible by {divisor} ({reason})")


def _initialise(module: nn.Module) -> None:
    """As MAE does it: Xavier for matrices, and for convolutions whose stride is their kernel, which are matrices.

    A convolution's bias stays as PyTorch draws it: were it 0, air and padding would be zero vectors before the norm,
    whose gradient there is its input's times 300, at each stage.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.Conv3d) and module.stride == module.kernel_size:
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
