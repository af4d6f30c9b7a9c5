"""Masked autoencoder (MAE) around a stock MONAI ViT."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from monai.networks.nets import ViT
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.decoders import build_decoder
from medmim.networks.patches import gather_tokens, grid_size, patchify, token_ids
from medmim.networks.vit import encode_patches, prepare_vit_blocks, set_position_embedding, vit_channels, vit_patch_size


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder: only visible patches are embedded and encoded, a light decoder predicts all of them.

    He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); for 3D medical images Chen et al.
    (WACV 2023) and Zhou et al. (ISBI 2023). There is no class token, and the encoder's final norm is applied.

    Args:
        encoder: MONAI ``ViT``, 2D or 3D, with a convolutional patch embedding, without class token and dropout.
        img_size: voxels along each axis.
        decoder: ``transformer``, ``mlp`` (one hidden layer) or ``linear``.
        decoder_hidden_size: features of the decoder.
        decoder_num_layers: blocks of the transformer decoder.
        decoder_num_heads: attention heads of the transformer decoder.
        position_embedding: ``sincos`` (fixed, 3-axis table) or ``learnable``, for encoder and decoder.

    Raises:
        ValueError: when sizes do not divide, or the encoder has a class token or dropout.
    """

    def __init__(
        self,
        encoder: ViT,
        img_size: Sequence[int] | int,
        decoder: str = "transformer",
        decoder_hidden_size: int = 384,
        decoder_num_layers: int = 8,
        decoder_num_heads: int = 12,
        position_embedding: str = "sincos",
    ) -> None:
        super().__init__()
        if encoder.classification:
            raise ValueError("the encoder must be a ViT with classification=False: there is no class token")
        self.encoder = encoder
        self.patch_size = vit_patch_size(encoder)
        self.img_size = ensure_tuple_rep(img_size, len(self.patch_size))
        self.grid = grid_size(self.img_size, self.patch_size)
        prepare_vit_blocks(encoder.blocks)
        set_position_embedding(encoder, self.img_size, position_embedding)
        self.decoder = build_decoder(
            decoder,
            encoder_size=encoder.norm.normalized_shape[0],
            out_size=prod(self.patch_size) * vit_channels(encoder),
            grid=self.grid,
            hidden_size=decoder_hidden_size,
            num_layers=decoder_num_layers,
            num_heads=decoder_num_heads,
            position_embedding=position_embedding,
        )

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predict every patch of an image from its visible ones.

        Args:
            image: ``(B, C, *img_size)``.
            mask: boolean ``(B, *grid)``, True = hidden, the same number hidden in each sample; on any device.

        Returns:
            ``(B, N, prod(patch_size) * C)``, tokens in raster order, channel last.

        Raises:
            ValueError: when image or mask have another size than the network was built for.
        """
        if tuple(image.shape[2:]) != self.img_size or tuple(mask.shape[1:]) != self.grid:
            raise ValueError(
                f"image of {tuple(image.shape[2:])} voxels with a mask of {tuple(mask.shape[1:])} tokens, "
                f"expected {self.img_size} and {self.grid}"
            )
        # ids are moved after counting, so that a mask on the host needs no waiting for the device
        visible, hidden = (ids.to(image.device, non_blocking=True) for ids in token_ids(mask))
        patches = gather_tokens(patchify(image, self.patch_size), visible)
        latent = encode_patches(self.encoder, patches, visible)
        return self.decoder(latent, visible, hidden)
