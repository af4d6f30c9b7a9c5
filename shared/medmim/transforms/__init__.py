"""Dictionary transforms that MONAI does not have: masks, padding of tokens, checks of a scan."""

from medmim.transforms.grids import FeatureGridd
from medmim.transforms.masks import RandPatchMaskd, hidden_count
from medmim.transforms.nested_masks import RandNestedMaskd
from medmim.transforms.padding import PaddingTokensd
from medmim.transforms.scans import CheckScand, LoadScand, ScanError

__all__ = [
    "CheckScand",
    "FeatureGridd",
    "LoadScand",
    "PaddingTokensd",
    "RandNestedMaskd",
    "RandPatchMaskd",
    "ScanError",
    "hidden_count",
]
