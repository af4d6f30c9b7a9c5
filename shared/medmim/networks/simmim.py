"""SimMIM around a stock MONAI ViT or SwinTransformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.patches import grid_size, patchify
from medmim.networks.reconstruction_heads import build_head
from medmim.networks.swin import encode_tokens, swin_channels, swin_feature_size, swin_patch_size, swin_stride
from medmim.networks.vit import prepare_vit_blocks, set_position_embedding, vit_channels, vit_patch_size


class SimMIM(nn.Module):
    """SimMIM: a learned token stands in place of each hidden one, all tokens are encoded, a light head predicts voxels.

    Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling" (CVPR 2022); for 3D medical images Chen et al.
    (WACV 2023). The final norm of the encoder is applied.

    Args:
        encoder: MONAI ``ViT`` (convolutional patch embedding, without class token and dropout) or ``SwinTransformer``.
        img_size: voxels along each axis.
        patch_size: voxels of what the mask hides as one, and of a predicted patch; a multiple of the encoder's own
            patch, which it is by default.
        decoder: head: ``linear``, ``mlp`` (one hidden layer), ``upsampling`` (convolutions) or ``transformer``.
        decoder_hidden_size: width of the MLP's hidden layer, or of the transformer blocks.
        decoder_num_layers: transformer blocks.
        decoder_num_heads: attention heads of a block.
        position_embedding: of a ViT, ``sincos`` (fixed, 3-axis table) or ``learnable``; a Swin has none.

    Raises:
        ValueError: when sizes do not divide, or the encoder has a class token or dropout.
    """

    def __init__(
        self,
        encoder: ViT | SwinTransformer,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int | None = None,
        decoder: str = "linear",
        decoder_hidden_size: int = 384,
        decoder_num_layers: int = 1,
        decoder_num_heads: int = 12,
        position_embedding: str = "sincos",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        if isinstance(encoder, SwinTransformer):
            token, stride, channels = swin_patch_size(encoder), swin_stride(encoder), swin_channels(encoder)
            embed_size, feature_size = encoder.embed_dim, swin_feature_size(encoder)
        else:
            if encoder.classification:
                raise ValueError("the encoder must be a ViT with classification=False: there is no class token")
            token = stride = vit_patch_size(encoder)
            channels = vit_channels(encoder)
            embed_size = feature_size = encoder.norm.normalized_shape[0]
            prepare_vit_blocks(encoder.blocks)
        self.img_size = ensure_tuple_rep(img_size, len(token))
        self.patch_size = token if patch_size is None else ensure_tuple_rep(patch_size, len(token))
        self.grid = grid_size(self.img_size, self.patch_size)
        self.tokens_of_patch = grid_size(self.patch_size, token)
        if isinstance(encoder, ViT):
            set_position_embedding(encoder, self.img_size, position_embedding)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, embed_size, *[1] * len(token)), std=0.02))
        self.decoder = build_head(
            decoder,
            in_size=feature_size,
            channels=channels,
            stride=stride,
            grid=grid_size(self.img_size, stride),
            hidden_size=decoder_hidden_size,
            num_layers=decoder_num_layers,
            num_heads=decoder_num_heads,
        )

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predict every patch of an image of which some are hidden.

        Args:
            image: ``(B, C, *img_size)``.
            mask: boolean ``(B, *grid)``, True = hidden; on any device.

        Returns:
            ``(B, N, prod(patch_size) * C)``, patches in raster order, channel last.

        Raises:
            ValueError: when image or mask have another size than the network was built for.
        """
        if tuple(image.shape[2:]) != self.img_size or tuple(mask.shape[1:]) != self.grid:
            raise ValueError(
                f"image of {tuple(image.shape[2:])} voxels with a mask of {tuple(mask.shape[1:])} patches, "
                f"expected {self.img_size} and {self.grid}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask must be boolean, True where a patch is hidden, found {mask.dtype}: mask.bool()")
        hidden = mask.to(image.device, non_blocking=True).unsqueeze(1)
        for axis, times in enumerate(self.tokens_of_patch, start=2):
            hidden = hidden.repeat_interleave(times, dim=axis)
        return patchify(self.decoder(self._encode(image, hidden)), self.patch_size)

    def _encode(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Features on the encoder's last grid, ``(B, F, *grid)``; ``hidden`` is ``(B, 1, *token grid)``."""
        encoder = self.encoder
        if isinstance(encoder, SwinTransformer):
            tokens = encoder.patch_embed(image)
            return encode_tokens(encoder, torch.where(hidden, self.mask_token.to(tokens.dtype), tokens))
        embedded = encoder.patch_embedding.patch_embeddings(image)
        embedded = torch.where(hidden, self.mask_token.to(embedded.dtype), embedded)
        tokens = embedded.flatten(2).transpose(1, 2) + encoder.patch_embedding.position_embeddings
        for block in encoder.blocks:
            tokens = block(tokens)
        return encoder.norm(tokens).transpose(1, 2).unflatten(2, embedded.shape[2:])
