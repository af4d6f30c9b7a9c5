"""Checks of the nested levels of Mask in Mask and of the sizes of a ConvViT, before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from medmim.checks import are_sizes, is_number, is_whole
from medmim.losses.curricula import CURRICULA, curriculum_factors
from medmim.transforms import RandNestedMaskd, hidden_count


def check_levels(
    levels: Any,
    roi_size: Sequence[int],
    crop_size: Sequence[int],
    patch_size: int = 16,
    level_weights: Any = None,
    alignment_weights: Any = None,
    curriculum: str = "concurrent",
    spatial_dims: int = 3,
) -> None:
    """Check the nested levels of Mask in Mask, and that the numbers of weights fit them.

    Args:
        levels: see :func:`medmim.networks.nested_levels`.
        roi_size: voxels of the network's input, at each level.
        crop_size: voxels of the first level's crop.
        patch_size: voxels of a token along each axis.
        level_weights: of the levels; ``None`` stands for good ones.
        alignment_weights: of the adjacent pairs of levels; ``None`` stands for good ones.
        curriculum: over the levels.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: one line for each fault, naming the knobs and the numbers.
    """
    faults = [
        f'--{knob} {size}: expected {spatial_dims} numbers in voxels, as in "[96, 96, 96]"'
        for knob, size in (("roi_size", roi_size), ("crop_size", crop_size))
        if not isinstance(size, list | tuple) or not are_sizes(size, spatial_dims)
    ]
    if not isinstance(levels, list | tuple) or not levels or not all(isinstance(level, Mapping) for level in levels):
        faults.append(f"--levels {levels}: expected a list with the entries of each level")
    if faults:
        raise ValueError("\n".join(faults))
    try:
        complete = RandNestedMaskd("image", levels, patch_size, spatial_dims).levels
    except (ValueError, TypeError) as error:
        faults.append(f"--levels: {error}")
    else:
        for number, level in enumerate(complete, 1):
            scored = not isinstance(level_weights, list | tuple) or any(level_weights[number - 1 : number])
            if scored and hidden_count(level.mask_ratio, prod(level.regions)) == 0:
                faults.append(
                    f"--levels: level {number} hides none of its {prod(level.regions)} regions (mask_ratio "
                    f"{level.mask_ratio}), so its reconstruction has nothing to learn: raise mask_ratio"
                )
            if level.img_size != tuple(roi_size):
                faults.append(
                    f"--levels: level {number} has img_size {level.img_size}, but --roi_size is {list(roi_size)}: "
                    "all levels share one network: give both the same"
                )
        if complete[0].crop_size != tuple(crop_size):
            faults.append(
                f"--levels: level 1 has crop_size {complete[0].crop_size}, but --crop_size is {list(crop_size)}: "
                "give both the same"
            )
    for knob, weights, n in (
        ("level_weights", level_weights, len(levels)),
        ("alignment_weights", alignment_weights, len(levels) - 1),
    ):
        values = weights if isinstance(weights, list | tuple) else ()
        good = len(values) == n and all(is_number(value) and value >= 0 for value in values)
        if weights is not None and not good:
            faults.append(f"--{knob} {weights}: expected {n} numbers of 0 or more, for {len(levels)} levels")
    if curriculum != "concurrent" and len(levels) < 2:
        faults.append(f"--curriculum {curriculum}: needs two levels or more, found {len(levels)}: take concurrent")
    if not faults and level_weights is not None and not any(alignment_weights or [0.1]):
        factors = curriculum_factors(curriculum, 0, 1, len(levels)) if curriculum in CURRICULA else [1.0] * len(levels)
        if not any(level_weights):
            faults.append("--level_weights and --alignment_weights are all 0: there would be nothing to learn")
        elif not any(weight * factor for weight, factor in zip(level_weights, factors, strict=True)):
            faults.append(
                f"--curriculum {curriculum} begins with weight 0 for the one level that learns (--level_weights "
                f"{list(level_weights)}, --alignment_weights all 0): give another level a weight, or take concurrent"
            )
    if faults:
        raise ValueError("\n".join(faults))


def check_convvit(embed_dims: Any, depths: Any, num_heads: Any, spatial_dims: int = 3) -> None:
    """Check the sizes of a ConvViT.

    Raises:
        ValueError: one line for each fault, naming the knob and the numbers.
    """
    faults = [
        f"--{knob} {values}: expected 4 whole numbers of at least 1, for the three stages and the transformer"
        for knob, values in (("embed_dims", embed_dims), ("depths", depths))
        if not isinstance(values, list | tuple) or not are_sizes(values, 4)
    ]
    if not faults:
        for divisor, reason in ((num_heads, "--num_heads"), (2 * spatial_dims, "needed by the positions")):
            if is_whole(divisor) and divisor > 0 and embed_dims[3] % divisor:
                faults.append(f"--embed_dims {embed_dims}: the last must be a multiple of {divisor} ({reason})")
    if faults:
        raise ValueError("\n".join(faults))
