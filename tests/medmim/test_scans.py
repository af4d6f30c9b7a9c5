"""Checks of a scan: what is refused, with which words."""

import pytest
import torch
from monai.data import MetaTensor

from medmim.transforms import CheckScand, ScanError
from medmim.transforms.scans import check_image, check_label


def named(tensor: torch.Tensor, name: str) -> MetaTensor:
    return MetaTensor(tensor, meta={"filename_or_obj": name})


def test_good_scan_passes_unchanged():
    image, label = torch.rand(2, 4, 5, 6), torch.randint(0, 3, (1, 4, 5, 6)).float()
    data = {"image": image, "label": label}
    result = CheckScand("image", 2, "label", [0, 1, 2])(data)
    assert result["image"] is image
    assert result["label"] is label


def test_label_is_not_looked_for_without_a_key():
    CheckScand("image", 1)({"image": torch.rand(1, 4, 4)})


@pytest.mark.parametrize(("found", "expected"), [(3, 1), (1, 4)])
def test_wrong_channel_count(found, expected):
    with pytest.raises(ScanError, match=rf"^a\.nii: {found} channels, expected {expected}: choose a preset"):
        check_image(torch.rand(found, 4, 4), "a.nii", expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_voxels_are_counted(value):
    image = torch.rand(1, 4, 4, 4)
    image[0, 1, 2] = value
    with pytest.raises(ScanError, match=r"^a\.nii: 4 voxels are NaN or infinite: repair or remove"):
        check_image(image, "a.nii", 1)


def test_constant_image():
    with pytest.raises(ScanError, match=r"^a\.nii: constant image, each voxel is -1024: remove"):
        check_image(torch.full((1, 3, 3), -1024.0), "a.nii", 1)


def test_label_of_another_size():
    with pytest.raises(ScanError, match=r"^l\.nii: label map of \(4, 4, 5\) voxels for an image of \(4, 4, 4\)"):
        check_label(torch.zeros(1, 4, 4, 5), torch.rand(1, 4, 4, 4), "l.nii", [0])


def test_label_that_is_not_finite():
    label = torch.zeros(1, 3, 3)
    label[0, 0, 0] = float("nan")
    with pytest.raises(ScanError, match=r"^l\.nii: the label map holds NaN or infinite"):
        check_label(label, torch.rand(1, 3, 3), "l.nii", [0])


def test_label_values_outside_the_preset():
    label = torch.tensor([[[0.0, 1.0, 2.5, 7.0]]])
    with pytest.raises(ScanError, match=r"^l\.nii: label values 2\.5, 7 are not in the preset \(\[0, 1, 2\]\)"):
        check_label(label, torch.rand(1, 1, 4), "l.nii", {2, 0, 1})


def test_transform_names_the_files():
    good = torch.rand(1, 3, 3)
    with pytest.raises(ScanError, match=r"^/data/a\.nii\.gz: 1 channels, expected 2"):
        CheckScand("image", 2)({"image": named(good, "/data/a.nii.gz")})
    data = {"image": named(good, "/data/a.nii.gz"), "label": named(torch.full((1, 3, 3), 9.0), "/data/l.nii.gz")}
    with pytest.raises(ScanError, match=r"^/data/l\.nii\.gz: label values 9 "):
        CheckScand("image", 1, "label", [0, 1])(data)


def test_transform_names_the_key_of_a_tensor_without_a_file():
    with pytest.raises(ScanError, match=r"^image: constant image"):
        CheckScand("image", 1)({"image": torch.zeros(1, 3, 3)})


def test_each_message_is_one_line():
    with pytest.raises(ScanError) as error:
        check_label(torch.arange(100.0).reshape(1, 10, 10), torch.rand(1, 10, 10), "l.nii", [0])
    assert "\n" not in str(error.value)
    assert " 10 are" in str(error.value)
    assert ", 11" not in str(error.value)
