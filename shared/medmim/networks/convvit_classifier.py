"""Classification of whole volumes with the hybrid encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medmim.networks.convvit import ConvViT


class ConvViTClassifier(nn.Module):
    """``ConvViT`` with a linear head on the mean of its normed latents.

    Zhuang et al., "MiM" (TMI 2025, arXiv 2404.15580), fine-tune their encoder for a diagnosis from chest CT. The
    latents are those of pre-training, with the convolutional stages added, whose mean MiM aligns between levels: each
    pre-trained tensor is used; the head starts anew, and what changes nothing at its start (layer scale, relative
    positions). (Without the convolutional stages a small network learned
    much more slowly.) Any image size goes in that 16 divides, anisotropic ones too, such as 384 x 384 x 32 voxels.

    Args:
        in_channels: of the image.
        n_outputs: logits.
        img_size: voxels along each axis, needed only for ``relative_position_bias``.
        embed_dims, depths, num_heads: of the encoder.
        layer_scale, relative_position_bias, drop_path_rate: of the encoder.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: when sizes do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        n_outputs: int,
        img_size: Sequence[int] | int | None = None,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 11),
        num_heads: int = 12,
        layer_scale: float | None = 1.0,
        relative_position_bias: bool = False,
        drop_path_rate: float = 0.0,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        self.encoder = ConvViT(
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            fifth_stage=False,
            layer_scale=layer_scale,
            relative_position_bias=relative_position_bias,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
        )
        self.head = nn.Linear(embed_dims[-1], n_outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02)  # about equal probabilities at the start
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)``, each axis divisible by 16, to logits ``(B, n_outputs)``."""
        return self.head(self.encoder.encode(image).mean(dim=1))
