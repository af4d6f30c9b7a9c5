"""Label maps with nested regions, such as a tumour's core inside the whole tumour, and the way back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor


def in_regions(label: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Which voxels of a label map lie in each region.

    Args:
        label: ``(1, *spatial)``.
        regions: R lists of values.

    Returns:
        ``(R, *spatial)``, boolean.
    """
    values = label.as_subclass(Tensor)[0]
    return torch.stack([torch.isin(values, torch.tensor(list(inside), device=values.device)) for inside in regions])


class LabelsToRegionsd(MapTransform):
    """Turn a label map into one map for each region, the target of a network with a sigmoid for each.

    Args:
        keys: label maps ``(1, *spatial)``; each becomes ``(R, *spatial)``, float32, 1 in the region and 0 outside.
        regions: name and values of each region, see ``presets.yaml``; their order is that of the channels.
    """

    def __init__(self, keys: Hashable | Sequence[Hashable], regions: Mapping[str, Sequence[int]]) -> None:
        super().__init__(keys)
        self.regions = list(regions.values())

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = _like(result[key], in_regions(result[key], self.regions).float())
        return result


class RegionsToLabelsd(MapTransform):
    """Turn probabilities of nested regions into a label map with the values of the data set.

    Regions are painted from the largest to the smallest, each with the value that the next smaller one does not have.
    So a voxel of the smallest region gets its value, and thereby belongs to all larger regions too, even where these
    were less probable than the threshold.

    Args:
        keys: probabilities ``(R, *spatial)``; each becomes ``(1, *spatial)``, float32.
        regions: name and values of each region, see ``presets.yaml``; each holds the next smaller one and one value
            more.
        threshold: above which a voxel lies in a region.
    """

    def __init__(
        self, keys: Hashable | Sequence[Hashable], regions: Mapping[str, Sequence[int]], threshold: float = 0.5
    ) -> None:
        super().__init__(keys)
        self.threshold = threshold
        smaller: set[int] = set()
        self.paint: list[tuple[int, int]] = []  # channel and value, from the largest region
        inside = [set(values) for values in regions.values()]
        for channel in sorted(range(len(inside)), key=lambda number: len(inside[number])):
            (value,) = inside[channel] - smaller
            self.paint.insert(0, (channel, value))
            smaller = inside[channel]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            probabilities = torch.as_tensor(result[key]).as_subclass(Tensor)
            label = torch.zeros_like(probabilities[:1], dtype=torch.float32)
            for channel, value in self.paint:
                label[0][probabilities[channel] > self.threshold] = value
            result[key] = _like(result[key], label)
        return result


def _like(before: Any, after: Tensor) -> Tensor:
    """A tensor on the same grid, with the metadata of the one before, if it has any."""
    if not isinstance(before, MetaTensor):
        return after
    return MetaTensor(after, meta=before.meta, applied_operations=before.applied_operations)
