"""Checks of a Swin's sizes and of its region of interest, before a run."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from medmim.checks import are_sizes, is_whole

COARSEST = 32  # voxels along each axis of a position in the last feature map


def check_swin(feature_size: Any, depths: Any, num_heads: Any) -> None:
    """Check the sizes of a Swin: four stages, whose features double and must divide among the attention heads.

    Raises:
        ValueError: one line for each fault, naming the knob and the numbers.
    """
    faults = [
        f"--{knob} {values}: expected 4 whole numbers of at least 1, for the stages"
        for knob, values in (("depths", depths), ("num_heads", num_heads))
        if not isinstance(values, list | tuple) or not are_sizes(values, 4)
    ]
    if not faults and is_whole(feature_size) and feature_size > 0:  # check_knobs says so otherwise
        features = [feature_size * 2**stage for stage in range(4)]
        if any(size % heads for size, heads in zip(features, num_heads, strict=True)):
            faults.append(
                f"--feature_size {feature_size} gives the stages {features} features, which --num_heads {num_heads} "
                "must divide, number by number"
            )
    if faults:
        raise ValueError("\n".join(faults))


def check_swin_roi(roi_size: Sequence[int]) -> None:
    """Check that a Swin's five halvings fit into the region of interest, and leave more than one position.

    Raises:
        ValueError: naming the nearest larger size that fits; sizes that are none are left to ``check_sizes``.
    """
    if not isinstance(roi_size, list | tuple) or not are_sizes(roi_size, len(roi_size)):
        return
    fitting = [-(-size // COARSEST) * COARSEST for size in roi_size]
    if prod(fitting) == COARSEST ** len(fitting):
        fitting[0] *= 2  # the norms of a single position would give zero
    if fitting != list(roi_size):
        raise ValueError(
            f"--roi_size {list(roi_size)}: expected multiples of {COARSEST}, and more than {COARSEST} along one axis: "
            f'give --roi_size "{fitting}"'
        )
