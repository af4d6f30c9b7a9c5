"""Rotation of scans that were resized as a whole, so that their voxels are not cubes."""

from __future__ import annotations

from collections.abc import Sequence


def rotation_ranges(rotation: float, size: Sequence[int]) -> list[float]:
    """Largest angle about each axis for MONAI's ``RandAffined``, which turns as if voxels were cubes.

    A scan resized to 384 x 384 x 32 voxels is taken to be equally long along each axis: its slices are thick. There the
    plain angle would move voxels across most of the slices. So the angle about an axis is multiplied by the ratio of
    the shorter to the longer side, in voxels, of the plane that turns. This moves the ends of the scan by about as many
    slices as a rotation of the body does. In a plane of equal sides the angle stays.

    Args:
        rotation: radians.
        size: voxels along each axis, 2 or 3.

    Returns:
        Radians: one for each axis of a volume, one for an image.
    """
    planes = [(1, 2), (0, 2), (0, 1)] if len(size) == 3 else [(0, 1)]
    return [rotation * min(size[i], size[j]) / max(size[i], size[j]) for i, j in planes]
