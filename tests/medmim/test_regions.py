"""Label maps with nested regions, and back, against loops over the voxels."""

from itertools import product

import pytest
import torch
from monai.data import MetaTensor

from medmim.datasets import get_preset
from medmim.transforms import LabelsToRegionsd, RegionsToLabelsd

MSD, BRATS = (get_preset(name).regions for name in ("msd_brain_tumour", "brats21"))
UNSORTED = {"core": [2, 3], "whole": [1, 2, 3], "enhancing": [3]}
VALUES = {"msd": [0, 1, 2, 3], "brats": [0, 1, 2, 4]}
conventions = pytest.mark.parametrize(
    ("regions", "values"), [(MSD, VALUES["msd"]), (BRATS, VALUES["brats"]), (UNSORTED, VALUES["msd"])]
)
sizes = pytest.mark.parametrize("size", [(5, 3, 7), (6, 5), (1, 1, 2)])


def on_a_grid(tensor: torch.Tensor) -> MetaTensor:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    return MetaTensor(tensor, affine=affine, meta={"filename_or_obj": "/data/case.nii.gz"})


def random_labels(values: list[int], size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(values)[torch.randint(len(values), (1, *size), generator=generator)].float()


def naive_regions(label: torch.Tensor, regions: dict) -> torch.Tensor:
    expected = torch.zeros(len(regions), *label.shape[1:])
    for voxel in product(*map(range, label.shape[1:])):
        for channel, inside in enumerate(regions.values()):
            if int(label[(0, *voxel)]) in inside:
                expected[(channel, *voxel)] = 1
    return expected


def naive_labels(probabilities: torch.Tensor, regions: dict) -> torch.Tensor:
    """The value of the smallest region that a voxel was found in: the one that no smaller region has."""
    expected = torch.zeros(1, *probabilities.shape[1:])
    names = list(regions)
    for voxel in product(*map(range, probabilities.shape[1:])):
        found = [name for channel, name in enumerate(names) if probabilities[(channel, *voxel)] > 0.5]
        if found:
            smallest = min(found, key=lambda name: len(regions[name]))
            inner = [value for name in names if len(regions[name]) < len(regions[smallest]) for value in regions[name]]
            (expected[(0, *voxel)],) = set(regions[smallest]) - set(inner)
    return expected


@conventions
@sizes
def test_regions_of_a_label_map(regions, values, size):
    label = on_a_grid(random_labels(values, size))
    result = LabelsToRegionsd("label", regions)({"label": label})["label"]
    assert result.shape == (3, *size)
    assert result.dtype == torch.float32
    assert torch.equal(result.as_tensor(), naive_regions(label.as_tensor(), regions))
    assert torch.equal(result.affine, label.affine)
    assert result.meta["filename_or_obj"] == "/data/case.nii.gz"


def test_a_map_by_hand():
    label = torch.tensor([[[0, 1, 2, 4]]]).float()
    whole, core, enhancing = LabelsToRegionsd("label", BRATS)({"label": label})["label"].tolist()
    assert (whole, core, enhancing) == ([[0, 1, 1, 1]], [[0, 1, 0, 1]], [[0, 0, 0, 1]])
    label[label == 4] = 3
    maps = LabelsToRegionsd("label", UNSORTED)({"label": label})["label"]
    assert maps.tolist() == [[[0, 0, 1, 1]], [[0, 1, 1, 1]], [[0, 0, 0, 1]]]


@conventions
@sizes
def test_label_map_of_probabilities(regions, values, size):
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(3, *size, generator=generator)  # nested or not, as a network may find them
    probabilities[0].view(-1)[0] = 0.5  # not above it
    result = RegionsToLabelsd("pred", regions)({"pred": on_a_grid(probabilities)})["pred"]
    assert torch.equal(result.as_tensor(), naive_labels(probabilities, regions))
    assert result.shape == (1, *size)
    assert set(result.unique().tolist()) <= set(values)
    assert torch.equal(result.affine, on_a_grid(probabilities).affine)
    assert result.meta["filename_or_obj"] == "/data/case.nii.gz"


@conventions
@pytest.mark.parametrize("seed", range(3))
def test_there_and_back(regions, values, seed):
    label = random_labels(values, (7, 6, 5), seed)
    as_regions = LabelsToRegionsd("x", regions)({"x": label})["x"]
    again = RegionsToLabelsd("x", regions)({"x": as_regions})["x"]
    assert torch.equal(again, label)
    # regions of a prediction that is not nested: each holds what the smaller ones do, and nothing is lost
    found = (torch.rand(3, 7, 6, 5, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    after = LabelsToRegionsd("x", regions)(RegionsToLabelsd("x", regions)({"x": found}))["x"]
    names = list(regions)
    for channel, name in enumerate(names):
        smaller = [number for number, other in enumerate(names) if set(regions[other]) <= set(regions[name])]
        assert torch.equal(after[channel], found[smaller].amax(0))
