"""What the package needs to know about MONAI's ``ViT`` without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmim.networks.convvit_blocks import AttentionBlock, ConvBlock
from medmim.networks.patches import gather_tokens, grid_size
from medmim.networks.positions import sincos_position_embedding


def prepare_vit_blocks(blocks: nn.ModuleList) -> None:
    """Switch MONAI's transformer blocks to PyTorch's fused attention and freeze what they never use.

    MONAI's ``ViT`` and ``UNETR`` take no flash argument, and each block holds a ``norm_cross_attn`` that gets no
    gradient: frozen, ``DistributedDataParallel`` works without ``find_unused_parameters``.

    Raises:
        ValueError: when a block has dropout (the fused path would apply it in ``eval()`` too).
    """
    block: Any
    for block in blocks:
        if block.attn.dropout_rate > 0:
            raise ValueError(f"dropout_rate must be 0 with fused attention, found {block.attn.dropout_rate}")
        if not block.attn.save_attn:
            block.attn.use_flash_attention = True
        block.norm_cross_attn.requires_grad_(False)


def checkpoint_activations(network: nn.Module) -> None:
    """Keep a block's input only, and compute the block again in the backward pass: less memory, more time.

    The result and the names of the state dict stay the same (Chen et al., "Training Deep Nets with Sublinear Memory
    Cost", 2016).

    Raises:
        ValueError: when the network has no blocks of a MONAI ``ViT`` or ``SwinTransformer``, or of a ``ConvViT``.
    """
    kinds = (TransformerBlock, SwinTransformerBlock, AttentionBlock, ConvBlock)
    blocks: list[Any] = [module for module in network.modules() if isinstance(module, kinds)]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no transformer block whose activations could be left out")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def vit_patch_size(vit: ViT) -> tuple[int, ...]:
    """Patch size in voxels along each axis.

    Raises:
        ValueError: when the patch embedding is not a convolution.
    """
    return tuple(_stem(vit).kernel_size)


def vit_channels(vit: ViT) -> int:
    """Channels of the image that a ViT takes."""
    return _stem(vit).in_channels


def _stem(vit: ViT) -> nn.Conv2d | nn.Conv3d:
    stem = vit.patch_embedding.patch_embeddings
    if not isinstance(stem, nn.Conv2d | nn.Conv3d):
        raise ValueError("the ViT must have proj_type 'conv', which computes the same as 'perceptron'")
    return stem


def set_position_embedding(vit: ViT, img_size: Sequence[int], kind: str) -> None:
    """Choose the positions of a ViT: ``learnable`` keeps MONAI's, ``sincos`` sets the fixed 3-axis table.

    Args:
        vit: a stock MONAI ViT.
        img_size: voxels along each axis.
        kind: ``learnable`` or ``sincos``.

    Raises:
        ValueError: when the kind is unknown or ``img_size`` does not fit the ViT.
    """
    if kind not in ("learnable", "sincos"):
        raise ValueError(f"position_embedding must be learnable or sincos, found {kind!r}")
    positions = vit.patch_embedding.position_embeddings
    grid = grid_size(img_size, vit_patch_size(vit))
    if positions.shape[1] != torch.Size(grid).numel():
        raise ValueError(f"img_size {tuple(img_size)} gives {grid} patches, but the ViT has {positions.shape[1]}")
    if kind == "sincos":
        with torch.no_grad():
            positions.copy_(sincos_position_embedding(grid, positions.shape[-1]))
        positions.requires_grad_(False)


def embed_patches(vit: ViT, patches: Tensor) -> Tensor:
    """The ViT's patch embedding, applied to single patches instead of a whole image.

    A convolution whose stride is its kernel is a linear map of each patch, so hidden patches need not be computed.

    Args:
        vit: a stock MONAI ViT with a convolutional patch embedding.
        patches: ``(B, M, prod(patch_size) * C)``, channel last.

    Returns:
        ``(B, M, hidden_size)``, without positions.
    """
    stem = _stem(vit)
    weight = stem.weight.movedim(1, -1).flatten(1)
    return nn.functional.linear(patches, weight, stem.bias)


def encode_patches(vit: ViT, patches: Tensor, ids: Tensor) -> Tensor:
    """Latents of some patches of an image, as if the others were not there: embedding, positions, blocks, norm.

    Args:
        vit: a stock MONAI ViT with a convolutional patch embedding.
        patches: ``(B, M, prod(patch_size) * C)``, channel last.
        ids: ``(B, M)``, where they stand in the grid, in raster order.

    Returns:
        ``(B, M, hidden_size)``.
    """
    positions = vit.patch_embedding.position_embeddings.expand(len(ids), -1, -1)
    tokens = embed_patches(vit, patches) + gather_tokens(positions, ids)
    for block in vit.blocks:
        tokens = block(tokens)
    return vit.norm(tokens)
