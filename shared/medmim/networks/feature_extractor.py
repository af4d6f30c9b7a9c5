"""An encoder as a network that turns an image into a map of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.convvit import ConvViT
from medmim.networks.patches import grid_size
from medmim.networks.swin import swin_feature_size, swin_stride
from medmim.networks.vit import prepare_vit_blocks, vit_patch_size


class FeatureExtractor(nn.Module):
    """Encoder with one tensor as output: the normed tokens of the last block, laid out on their grid.

    The tokens of a ``ConvViT`` are its latents with nothing hidden, the convolutional stages added; of a
    ``SwinTransformer`` the output is that of the last stage, normalised.

    Args:
        encoder: MONAI ``ViT`` without class token, or ``SwinTransformer``, or ``ConvViT`` with ``fusion``. The first
            can be scripted.
        img_size: voxels along each axis.

    Raises:
        ValueError: when the patch does not divide ``img_size``, or the encoder has a class token or no latents.
    """

    __constants__ = ("has_latents", "has_stages")  # TorchScript then leaves the other branches out

    def __init__(self, encoder: ViT | SwinTransformer | ConvViT, img_size: Sequence[int] | int) -> None:
        super().__init__()
        self.has_latents = isinstance(encoder, ConvViT)
        self.has_stages = isinstance(encoder, SwinTransformer)
        if isinstance(encoder, SwinTransformer):
            self.patch_size, self.feature_size = swin_stride(encoder), swin_feature_size(encoder)
        elif isinstance(encoder, ConvViT):
            if encoder.fusion is None:
                raise ValueError("the encoder must be a ConvViT with fusion=True: without there are no latents")
            self.patch_size, self.feature_size = encoder.token_size, encoder.token_embedding.out_features
        else:
            if encoder.classification:
                raise ValueError("the encoder must be a ViT with classification=False: there is no class token")
            self.patch_size, self.feature_size = vit_patch_size(encoder), encoder.norm.normalized_shape[0]
            prepare_vit_blocks(encoder.blocks)
        self.encoder: Any = encoder
        self.img_size = ensure_tuple_rep(img_size, len(self.patch_size))
        self.grid = grid_size(self.img_size, self.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *img_size)`` to ``(B, feature_size, *grid)``."""
        if self.has_stages:
            return self.encoder(image)[-1]
        tokens = self.encoder.encode(image) if self.has_latents else self.encoder(image)[0]
        return tokens.transpose(1, 2).unflatten(2, self.grid)
