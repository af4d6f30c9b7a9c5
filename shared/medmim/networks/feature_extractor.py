"""An encoder as a network that turns an image into a map of features."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import ViT
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.patches import grid_size
from medmim.networks.vit import prepare_vit_blocks, vit_patch_size


class FeatureExtractor(nn.Module):
    """Encoder with one tensor as output: the normed tokens of the last block, laid out on their grid.

    Args:
        encoder: MONAI ``ViT`` without class token.
        img_size: voxels along each axis.

    Raises:
        ValueError: when the patch does not divide ``img_size``, or the encoder has a class token.
    """

    def __init__(self, encoder: ViT, img_size: Sequence[int] | int) -> None:
        super().__init__()
        if encoder.classification:
            raise ValueError("the encoder must be a ViT with classification=False: there is no class token")
        patch_size = vit_patch_size(encoder)
        self.encoder = encoder
        self.img_size = ensure_tuple_rep(img_size, len(patch_size))
        self.grid = grid_size(self.img_size, patch_size)
        prepare_vit_blocks(encoder.blocks)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *img_size)`` to ``(B, hidden_size, *grid)``."""
        tokens = self.encoder(image)[0]
        return tokens.transpose(1, 2).unflatten(2, self.grid)
