"""Rotation of resized scans: against the geometry of a body whose voxels are not cubes."""

import math

import pytest
import torch
from monai.transforms import RandAffine

from medmim.transforms import rotation_ranges

SIZES = [(96, 96, 8), (96, 8, 48), (40, 40, 40), (24, 96, 8), (96, 48), (8, 64)]


@pytest.mark.parametrize(
    ("size", "ranges"),
    [((4, 4, 4), [0.3] * 3), ((4, 4, 1), [0.075, 0.075, 0.3]), ((2, 8, 4), [0.15, 0.15, 0.075]), ((6, 3), [0.15])],
)
def test_values(size, ranges):
    assert rotation_ranges(0.3, size) == pytest.approx(ranges)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rotation", [0.05, 0.15, 0.3])
def test_no_end_moves_further_than_by_turning_the_body(size, rotation):
    """A body of edge 1: about each axis the angle moves either end, as a share of the edge, by rotation / 2 at most;
    in the plane's thin direction it does so by as much."""
    planes = [(1, 2), (0, 2), (0, 1)] if len(size) == 3 else [(0, 1)]
    for angle, (i, j) in zip(rotation_ranges(rotation, size), planes, strict=True):
        by_i, by_j = angle * size[j] / 2 / size[i], angle * size[i] / 2 / size[j]  # voxels, over voxels of the edge
        assert max(by_i, by_j) == pytest.approx(rotation / 2)


@pytest.mark.parametrize("size", SIZES)
def test_slices_stay_near_their_place(size):
    """What ``RandAffine`` does with the ranges, measured on a ramp along each axis."""
    ramps = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in size], indexing="ij"))
    inside = tuple(slice(n // 4, -(n // 4)) for n in size)  # away from the border
    affine = RandAffine(prob=1.0, rotate_range=rotation_ranges(0.15, size), mode="bilinear", padding_mode="border")
    furthest = torch.zeros(len(size))
    for seed in range(20):
        affine.set_random_state(seed)
        shift = (torch.as_tensor(affine(ramps)) - ramps).abs()[(slice(None), *inside)]
        furthest = torch.maximum(furthest, shift.flatten(1).amax(dim=1) / torch.tensor(size))
    turning = len(size) - 1  # axes about which a rotation moves voxels along another
    assert (furthest < 1.1 * turning * math.sin(0.15) / 4).all()  # inside reaches a quarter of the edge from the middle
    assert furthest.max() > 0.02
