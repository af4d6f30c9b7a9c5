"""Check of the region of interest of a Swin UNETR, before a run."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from medmim.checks import are_sizes

COARSEST = 32  # voxels along each axis of a position in the last feature map


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
