"""What the package needs to know about MONAI's ``SwinTransformer`` without changing it."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor


def swin_patch_size(swin: SwinTransformer) -> tuple[int, ...]:
    """Voxels of a token of the first stage along each axis."""
    stem: Any = swin.patch_embed.proj
    return tuple(stem.kernel_size)


def swin_stride(swin: SwinTransformer) -> tuple[int, ...]:
    """Voxels that one position of the last stage stands for, along each axis: each of the four stages halves."""
    return tuple(size * 2**swin.num_layers for size in swin_patch_size(swin))


def swin_feature_size(swin: SwinTransformer) -> int:
    """Channels of the last stage."""
    return swin.embed_dim * 2**swin.num_layers


def swin_channels(swin: SwinTransformer) -> int:
    """Channels of the image that a Swin takes."""
    stem: Any = swin.patch_embed.proj
    return int(stem.in_channels)


def encode_tokens(swin: SwinTransformer, tokens: Tensor) -> Tensor:
    """What all stages make of the embedded patches; the last of the features that the Swin itself returns.

    Args:
        swin: a stock MONAI Swin, with or without the convolutions of its second version.
        tokens: output of ``swin.patch_embed``, ``(B, embed_dim, *grid)``.

    Returns:
        ``(B, 16 * embed_dim, *(grid / 16))``, normalised over the channels.
    """
    x = swin.pos_drop(tokens)
    for number in range(1, swin.num_layers + 1):
        if swin.use_v2:
            x = getattr(swin, f"layers{number}c")[0](x.contiguous())
        x = getattr(swin, f"layers{number}")[0](x.contiguous())
    return swin.proj_out(x, normalize=True)
