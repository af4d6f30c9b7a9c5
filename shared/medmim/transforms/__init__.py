"""Dictionary transforms that MONAI does not have: masks, padding of tokens, loading and checks of images."""

from medmim.transforms.grids import FeatureGridd
from medmim.transforms.masks import RandPatchMaskd, hidden_count
from medmim.transforms.nested_masks import RandNestedMaskd
from medmim.transforms.padding import PaddingTokensd
from medmim.transforms.radiographs import LoadRadiographd, ResizeRadiographd
from medmim.transforms.regions import LabelsToRegionsd, RegionsToLabelsd
from medmim.transforms.rotation import rotation_ranges
from medmim.transforms.scans import CheckScand, LoadScand, ScanError

__all__ = [
    "CheckScand",
    "FeatureGridd",
    "LabelsToRegionsd",
    "LoadRadiographd",
    "LoadScand",
    "PaddingTokensd",
    "RandNestedMaskd",
    "RandPatchMaskd",
    "RegionsToLabelsd",
    "ResizeRadiographd",
    "ScanError",
    "hidden_count",
    "rotation_ranges",
]
