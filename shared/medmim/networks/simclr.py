"""SimCLR around a stock MONAI ViT."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.nets import ViT
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from medmim.networks.patches import grid_size
from medmim.networks.vit import prepare_vit_blocks, set_position_embedding, vit_patch_size


class SimCLR(nn.Module):
    """Embeddings of two views of each sample: encoder, mean of the normed tokens, projector.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020); in 3D Chen et al.
    (WACV 2023). There is no class token. The projector is a plain MLP without batch norm, whose statistics would be
    those of one process's few samples: a sample could be told by its batch, and several processes would compute
    something else than one.

    Args:
        encoder: MONAI ``ViT``, 2D or 3D, with a convolutional patch embedding, without class token and dropout.
        img_size: voxels along each axis.
        projector_hidden_size: features of the projector's hidden layers.
        projector_out_size: F of the embeddings.
        projector_num_layers: linear layers of the projector; with 1 there is no hidden one.
        position_embedding: ``sincos`` (fixed, 3-axis table) or ``learnable``.

    Raises:
        ValueError: when sizes do not divide, or the encoder is no ViT or has a class token or dropout.
    """

    def __init__(
        self,
        encoder: ViT,
        img_size: Sequence[int] | int,
        projector_hidden_size: int = 768,
        projector_out_size: int = 128,
        projector_num_layers: int = 2,
        position_embedding: str = "sincos",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, ViT):
            raise ValueError(f"the encoder must be a MONAI ViT, found {type(encoder).__name__}")
        if encoder.classification:
            raise ValueError("the encoder must be a ViT with classification=False: there is no class token")
        if projector_num_layers < 1:
            raise ValueError(f"projector_num_layers must be 1 or more, found {projector_num_layers}")
        self.encoder = encoder
        self.patch_size = vit_patch_size(encoder)
        self.img_size = ensure_tuple_rep(img_size, len(self.patch_size))
        grid_size(self.img_size, self.patch_size)
        prepare_vit_blocks(encoder.blocks)
        set_position_embedding(encoder, self.img_size, position_embedding)
        sizes = [encoder.norm.normalized_shape[0], *[projector_hidden_size] * (projector_num_layers - 1)]
        layers: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.GELU()]
        self.projector = nn.Sequential(*layers, nn.Linear(sizes[-1], projector_out_size))

    def forward(self, view_1: Tensor, view_2: Tensor) -> Tensor:
        """Embed both views, in one pass.

        Args:
            view_1, view_2: ``(B, C, *img_size)``.

        Returns:
            ``(B, 2, projector_out_size)``, not normalised.

        Raises:
            ValueError: when the views have another size than the network was built for.
        """
        for view in (view_1, view_2):
            if tuple(view.shape[2:]) != self.img_size:
                raise ValueError(f"view of {tuple(view.shape[2:])} voxels, expected {self.img_size}")
        tokens = self.encoder(torch.cat([view_1, view_2]))[0]  # normed
        return torch.stack(self.projector(tokens.mean(dim=1)).chunk(2), dim=1)
