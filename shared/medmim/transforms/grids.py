"""Geometry of feature maps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep


class FeatureGridd(MapTransform):
    """Give a feature map the affine of its coarser grid, so that viewers lay it over the scan.

    Args:
        keys: feature map, ``(F, *grid)``, with the affine of the image that it was computed from.
        patch_size: voxels of the image that one cell of the map covers, along each axis.
    """

    def __init__(self, keys: Hashable | Sequence[Hashable], patch_size: Sequence[int] | int) -> None:
        super().__init__(keys)
        self.patch_size = patch_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            features = result[key]
            patch_size = ensure_tuple_rep(self.patch_size, features.ndim - 1)
            to_image = torch.eye(4, dtype=torch.float64)
            for axis, size in enumerate(patch_size):
                to_image[axis, axis] = size
                to_image[axis, 3] = (size - 1) / 2  # the centre of the first cell
            affine = features.affine.to(torch.float64) @ to_image
            # a new tensor: the map is not the image, and must not be inverted like one
            result[key] = MetaTensor(features.as_tensor(), affine=affine, meta={**features.meta, "affine": affine})
        return result
