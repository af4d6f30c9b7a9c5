"""Random masks of patch tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from math import prod
from typing import Any
from zlib import crc32

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable
from monai.utils import ensure_tuple_rep

from medmim.networks.patches import grid_size


def hidden_count(mask_ratio: float, n_units: int) -> int:
    """``round(mask_ratio * n_units)``, halves up: how many of ``n_units`` are hidden.

    Raises:
        ValueError: when the ratio lies outside [0, 1), or no unit would stay visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), found {mask_ratio}")
    # decimal, because 0.145 * 100 is 14.499999999999998 in binary
    count = int((Decimal(str(mask_ratio)) * n_units).quantize(Decimal(1), ROUND_HALF_UP))
    if count >= n_units:
        raise ValueError(f"mask_ratio {mask_ratio} hides all {n_units} units: lower it, or take a smaller mask_unit")
    return count


def random_state_of_file(seed: int, image: Any) -> np.random.RandomState:
    """Random state that depends on a number and the name of the image's file (without folders) only."""
    name = str(getattr(image, "meta", {}).get("filename_or_obj", ""))
    return np.random.RandomState([seed, crc32(name.rsplit("/", 1)[-1].encode())])


class RandPatchMaskd(Randomizable, MapTransform):
    """Draw a random mask over the patch grid of an image.

    Exactly ``round(mask_ratio * N)`` of the ``N`` mask units are hidden (halves round up), each set of units with
    the same probability. The mask is a boolean tensor of the token grid's shape, True = hidden.

    Args:
        keys: the image that the mask is for, ``(C, *spatial)``; with several keys they share the mask.
        patch_size: voxels of a token along each axis.
        mask_ratio: share of hidden units, in [0, 1).
        mask_unit: voxels of a unit that is hidden as a whole, along each axis, a multiple of ``patch_size``;
            ``None`` hides single tokens.
        mask_key: where the mask goes.
        fixed_seed: when given, the mask depends on this number and the name of the image file only, so that
            validation always sees the same mask. Otherwise each call draws anew.

    Raises:
        ValueError: when sizes do not divide, or no unit would stay visible.

    Example::

        RandPatchMaskd("image", patch_size=16, mask_ratio=0.75)({"image": torch.rand(1, 96, 96, 64)})["mask"]
        # boolean (6, 6, 4), 108 of 144 True
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        patch_size: Sequence[int] | int,
        mask_ratio: float,
        mask_unit: Sequence[int] | int | None = None,
        mask_key: str = "mask",
        fixed_seed: int | None = None,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.mask_unit = mask_unit
        self.mask_key = mask_key
        self.fixed_seed = fixed_seed
        hidden_count(mask_ratio, 10**6)  # a bad ratio is refused here, not at the first scan

    def randomize(self, data: tuple[int, ...]) -> None:
        """Draw which units of the grid ``data`` are hidden: sets ``self.hidden_units``, boolean, of that shape."""
        n_units = prod(data)
        chosen = self.R.permutation(n_units)[: hidden_count(self.mask_ratio, n_units)]
        hidden = np.zeros(n_units, dtype=bool)
        hidden[chosen] = True
        self.hidden_units = hidden.reshape(data)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        image = result[self.first_key(result)]
        spatial = tuple(image.shape[1:])
        patch_size = ensure_tuple_rep(self.patch_size, len(spatial))
        mask_unit = patch_size if self.mask_unit is None else ensure_tuple_rep(self.mask_unit, len(spatial))
        if any(u < p or u % p for u, p in zip(mask_unit, patch_size, strict=True)):
            raise ValueError(f"mask_unit {mask_unit} must be a multiple of patch_size {patch_size} along each axis")
        grid_size(spatial, patch_size)
        if self.fixed_seed is not None:
            self.R = random_state_of_file(self.fixed_seed, image)
        self.randomize(grid_size(spatial, mask_unit))
        tokens = np.kron(self.hidden_units, np.ones([u // p for u, p in zip(mask_unit, patch_size, strict=True)]))
        result[self.mask_key] = torch.from_numpy(tokens.astype(bool))
        return result
