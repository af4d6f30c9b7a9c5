"""Tokens of padding, against a loop over tokens."""

from itertools import product

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialPad

from medmim.transforms import PaddingTokensd


@pytest.mark.parametrize(
    ("channels", "size", "full", "patch_size"),
    [
        (1, (5, 9, 3), (8, 12, 8), (4, 4, 4)),
        (2, (4, 4, 8), (12, 4, 8), (4, 2, 8)),
        (1, (5, 16), (16, 16), (4, 8)),
        (3, (8, 8), (8, 8), (4, 4)),
    ],
)
def test_tokens_without_a_real_voxel_are_found(channels, size, full, patch_size):
    image = torch.rand(channels, *size)
    padded = SpatialPad(full, constant_values=float("nan"))(image)
    result = PaddingTokensd("image", patch_size)({"image": padded})
    grid = [n // p for n, p in zip(full, patch_size, strict=True)]
    assert result["padding"].dtype == torch.bool
    assert type(result["padding"]) is torch.Tensor
    assert result["padding"].shape == tuple(grid)
    for cell in product(*map(range, grid)):
        block = padded[(slice(None), *[slice(c * p, c * p + p) for c, p in zip(cell, patch_size, strict=True)])]
        assert bool(result["padding"][cell]) is all(value != value for value in block.flatten().tolist())


def test_padding_is_filled_and_voxels_stay():
    image = torch.rand(1, 4, 4)
    image[0, 2:] = float("nan")
    result = PaddingTokensd("image", 2, fill=-3.0)({"image": image, "case": "a"})
    assert torch.equal(result["image"][0, :2], image[0, :2])
    assert bool((result["image"][0, 2:] == -3).all())
    assert result["padding"].tolist() == [[False, False], [True, True]]
    assert result["case"] == "a"


def test_a_voxel_in_one_channel_is_enough():
    image = torch.full((2, 2, 4), float("nan"))
    image[1, 0, 0] = 1.0
    result = PaddingTokensd("image", 2, padding_key="empty")({"image": image})
    assert result["empty"].tolist() == [[False, True]]


def test_file_name_and_affine_stay():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(1, 4, 4, 4), affine=affine, meta={"filename_or_obj": "a.nii"})
    result = PaddingTokensd("image", 2)({"image": image})["image"]
    assert result.meta["filename_or_obj"] == "a.nii"
    assert torch.equal(result.affine, affine)


def test_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible"):
        PaddingTokensd("image", 4)({"image": torch.rand(1, 6, 8)})
