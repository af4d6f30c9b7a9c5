"""Which tokens hold nothing but padding."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep

from medmim.networks.patches import patchify


class PaddingTokensd(MapTransform):
    """Find the tokens that hold padding only, so that the loss can leave them out, and fill the padding.

    A scan smaller than the region of interest is padded with NaN (``SpatialPadd(..., constant_values=nan)``; NaN
    cannot be a voxel, :class:`CheckScand` refuses it) before it is cropped and flipped. This transform, the last in
    the row, turns NaN into ``fill`` and writes a boolean mask of the token grid's shape, True = padding only.

    Args:
        keys: the image, ``(C, *spatial)``.
        patch_size: voxels of a token along each axis.
        padding_key: where the mask goes.
        fill: value of padded voxels.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        patch_size: Sequence[int] | int,
        padding_key: str = "padding",
        fill: float = 0.0,
    ) -> None:
        super().__init__(keys)
        self.patch_size = patch_size
        self.padding_key = padding_key
        self.fill = fill

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            patch_size = ensure_tuple_rep(self.patch_size, image.ndim - 1)
            empty = torch.isnan(torch.as_tensor(image)).as_subclass(torch.Tensor)
            grid = [n // p for n, p in zip(empty.shape[1:], patch_size, strict=True)]
            result[self.padding_key] = patchify(empty.unsqueeze(0), patch_size).all(dim=-1).reshape(grid)
            result[key] = torch.nan_to_num(image, nan=self.fill)
        return result
