"""Nested random masks: what is hidden at one level is what the next level looks into."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

from medmim.networks.nested_levels import DEFAULT_LEVELS, Level, nested_levels
from medmim.networks.sub_volumes import cut_sub_volumes, resize_reach
from medmim.transforms.masks import hidden_count, random_state_of_file


class RandNestedMaskd(Randomizable, MapTransform):
    """Draw the masks of all levels, and which hidden regions go down to the next level.

    Of Mask in Mask (Zhuang et al., TMI 2025, arXiv 2404.15580). At each level exactly ``round(mask_ratio * R)`` of
    the ``R`` regions of a sub-volume are hidden, each set with the same probability; of these, the next level's
    ``samples`` are drawn without replacement. A region that stayed visible never goes down. With the default levels a
    192 x 192 x 192 crop, seen at half resolution, hides 4 of its 8 octants; these are looked at in full resolution and
    hide 130 of their 216 tokens; of these, 4 are enlarged six times and hide half of their tokens.

    The image itself is not cut here: :class:`medmim.networks.MaskInMask` does that on its device. For one image and
    levels 1 … n the transform writes (S2 sub-volumes at level 2 from each image, S3 at level 3 from each of those, …)

    ============== ======================= ==================================================================
    ``mask_1``     ``(*grid)``             boolean, True = hidden
    ``mask_2``     ``(S2, *grid)``         boolean
    ``mask_3``     ``(S2 * S3, *grid)``    boolean; sub-volume ``i`` lies in sub-volume ``i // S3`` of level 2
    ``region_2``   ``(S2,)``               which regions of the image, in raster order; ascending
    ``region_3``   ``(S2 * S3,)``          which regions of the sub-volume of level 2; ascending in each of them
    ``padding_l``  as ``mask_l``           boolean, True = the token holds padding only
    ============== ======================= ==================================================================

    so that batches have one more axis in front.

    A scan smaller than the crop is padded with NaN, as for :class:`medmim.transforms.PaddingTokensd`; this transform,
    the last in the row, takes its place: it finds the padding of each level and writes ``fill`` there. Hidden regions
    that hold nothing but padding go down only where too few others are hidden.

    Args:
        keys: the image, ``(C, *crop_size)``, with the ``crop_size`` of the first level; several keys share masks,
            regions and the padding of the first.
        levels: see :func:`medmim.networks.nested_levels`.
        patch_size: voxels of a token along each axis.
        spatial_dims: 2 or 3, for sizes that are one number.
        fixed_seed: when given, masks and regions depend on this number and the name of the image file only, so that
            validation always sees the same ones. Otherwise each call draws anew.
        fill: value of padded voxels.

    Raises:
        ValueError: when a geometry does not divide, no region would stay visible, or fewer are hidden than samples
            are asked for.

    Example::

        draws = RandNestedMaskd("image")({"image": torch.rand(1, 192, 192, 192)})
        draws["mask_3"].shape, draws["region_3"].shape  # (16, 6, 6, 6) and (16,)
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        levels: Sequence[Mapping[str, Any] | Level] = DEFAULT_LEVELS,
        patch_size: Sequence[int] | int = 16,
        spatial_dims: int = 3,
        fixed_seed: int | None = None,
        fill: float = 0.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.levels = nested_levels(levels, patch_size, spatial_dims)
        self.fixed_seed = fixed_seed
        self.fill = fill
        self.n_hidden = [_hidden_regions(level, number) for number, level in enumerate(self.levels, 1)]
        for number, level in enumerate(self.levels[1:], 2):
            if level.samples > self.n_hidden[number - 2]:
                parent = self.levels[number - 2]
                raise ValueError(
                    f"level {number} asks for {level.samples} samples, but level {number - 1} hides only "
                    f"{self.n_hidden[number - 2]} of {prod(parent.regions)} regions (mask_ratio {parent.mask_ratio}): "
                    f"lower samples of level {number}, or raise mask_ratio of level {number - 1}"
                )

    def randomize(self, data: Tensor | None = None) -> None:
        """Draw masks and regions.

        Sets ``self.hidden``, for each level the hidden regions ``(n, R)``, boolean; ``self.regions``, for each level
        the regions of the parents ``(n,)`` (empty at the first); ``self.content``, for each level which voxels of the
        ``n`` sub-volumes are no padding, boolean ``(n, 1, *crop_size)``, or ``None`` where there is no padding.

        Args:
            data: ``content`` of the first level.
        """
        self.hidden: list[np.ndarray] = []
        self.regions: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self.content: list[Tensor | None] = [data]
        for i, level in enumerate(self.levels):
            n = len(self.regions[i]) if i else 1
            self.hidden.append(self._draw_hidden(n, i))
            if i + 1 < len(self.levels):
                self._draw_regions(level, self.levels[i + 1].samples)

    def _draw_hidden(self, n: int, i: int) -> np.ndarray:
        hidden = np.zeros((n, prod(self.levels[i].regions)), dtype=bool)
        for row in hidden:
            row[self.R.permutation(len(row))[: self.n_hidden[i]]] = True
        return hidden

    def _draw_regions(self, parent: Level, samples: int) -> None:
        hidden, content = self.hidden[-1], self.content[-1]
        n_parents, n_regions = hidden.shape
        cells: Tensor | None = None
        empty = np.zeros(hidden.shape, dtype=bool)
        if content is not None:
            every = torch.arange(n_regions).repeat(n_parents)
            cells = cut_sub_volumes(
                content, parent.regions, every, torch.arange(n_parents).repeat_interleave(n_regions)
            )
            empty = ~cells.flatten(1).any(1).reshape(hidden.shape).numpy()
        chosen = np.empty((n_parents, samples), dtype=np.int64)
        for i in range(n_parents):
            candidates = self.R.permutation(np.flatnonzero(hidden[i]))
            candidates = candidates[np.argsort(empty[i][candidates], kind="stable")]  # padding last
            chosen[i] = np.sort(candidates[:samples])
        self.regions.append(chosen.reshape(-1))
        if cells is not None:
            cells = cells[torch.from_numpy((chosen + n_regions * np.arange(n_parents)[:, None]).reshape(-1))]
        self.content.append(cells)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        image = result[self.first_key(result)]
        if tuple(image.shape[1:]) != self.levels[0].crop_size:
            raise ValueError(
                f"an image of {tuple(image.shape[1:])} voxels, but level 1 has crop_size {self.levels[0].crop_size}: "
                "pad and crop to that size first, or change crop_size"
            )
        padding = torch.isnan(torch.as_tensor(image)).as_subclass(torch.Tensor)
        if self.fixed_seed is not None:
            self.R = random_state_of_file(self.fixed_seed, image)
        if padding.any():
            self.randomize(~padding.all(0)[None, None])
            for each in self.key_iterator(result):
                result[each] = torch.nan_to_num(result[each], nan=self.fill)
        else:
            self.randomize()
        for i, level in enumerate(self.levels):
            mask = self._tokens(torch.from_numpy(self.hidden[i]), level)
            content = self.content[i]
            empty = torch.zeros_like(mask) if content is None else ~_tokens_with_content(content, level)
            result[f"mask_{i + 1}"] = mask if i else mask[0]
            result[f"padding_{i + 1}"] = empty if i else empty[0]
            if i:
                result[f"region_{i + 1}"] = torch.from_numpy(self.regions[i])
        return result

    @staticmethod
    def _tokens(hidden: Tensor, level: Level) -> Tensor:
        mask = hidden.reshape(len(hidden), *level.regions)
        for axis, repeats in enumerate(level.region_tokens, 1):
            mask = mask.repeat_interleave(repeats, dim=axis)
        return mask


def _hidden_regions(level: Level, number: int) -> int:
    try:
        return hidden_count(level.mask_ratio, prod(level.regions))
    except ValueError as error:
        raise ValueError(f"level {number}: {error}") from None


def _tokens_with_content(content: Tensor, level: Level) -> Tensor:
    """``(n, *grid)``: the tokens that a voxel of content ``(n, 1, *crop_size)`` enters."""
    count = content[:, 0].float()
    for axis, (crop, size, tokens) in enumerate(zip(level.crop_size, level.img_size, level.grid, strict=True), 1):
        reach = resize_reach(crop, size, tokens).float()
        count = torch.tensordot(count, reach, dims=([axis], [1])).movedim(-1, axis)
    return count > 0
