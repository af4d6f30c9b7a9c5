"""The affine of a feature map: cells lie where their voxels lie."""

from itertools import product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medmim.transforms import FeatureGridd

ROTATED = [[0.0, -2.0, 0.1, 10.0], [1.5, 0.0, 0.2, -20.0], [0.0, 0.3, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("patch_size", [(4, 2, 3), 4, (1, 1, 1)])
def test_each_cell_lies_at_the_mean_of_its_voxels(patch_size):
    affine = torch.tensor(ROTATED, dtype=torch.float64)
    features = MetaTensor(torch.rand(5, 2, 3, 2), affine=affine, meta={"filename_or_obj": "a.nii"})
    result = FeatureGridd("pred", patch_size)({"pred": features})["pred"]
    patch = (patch_size,) * 3 if isinstance(patch_size, int) else patch_size
    for cell in product(range(2), range(3), range(2)):
        voxels = product(*[range(c * p, c * p + p) for c, p in zip(cell, patch, strict=True)])
        expected = np.mean([affine.numpy() @ [*voxel, 1] for voxel in voxels], axis=0)
        np.testing.assert_allclose(result.affine.numpy() @ [*cell, 1], expected, atol=1e-9)


def test_features_and_name_stay_and_the_history_of_the_image_goes():
    features = MetaTensor(torch.rand(5, 2, 3, 2), meta={"filename_or_obj": "a.nii"})
    features.push_applied_operation({"class": "Spacing"})
    data = {"pred": features}
    result = FeatureGridd("pred", 8)(data)["pred"]
    assert torch.equal(result.as_tensor(), features.as_tensor())
    assert result.meta["filename_or_obj"] == "a.nii"
    assert result.applied_operations == []
    assert torch.equal(data["pred"].affine, torch.eye(4, dtype=torch.float64))


def test_two_dimensions():
    features = MetaTensor(torch.rand(5, 2, 3), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    affine = FeatureGridd("pred", (4, 2))({"pred": features})["pred"].affine
    np.testing.assert_allclose(affine[:2] @ np.array([1, 1, 0, 1.0]), [2 * 5.5, 3 * 2.5])
