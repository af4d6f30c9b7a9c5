"""Checks of a scan: what is refused, with which words."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medmim.transforms import CheckScand, ScanError
from medmim.transforms.scans import check_image, check_label, load_scan


def named(tensor: torch.Tensor, name: str) -> MetaTensor:
    return MetaTensor(tensor, meta={"filename_or_obj": name})


def test_good_scan_passes_unchanged():
    image, label = torch.rand(2, 4, 5, 6), torch.randint(0, 3, (1, 4, 5, 6)).float()
    data = {"image": image, "label": label}
    result = CheckScand("image", 2, "label", [0, 1, 2])(data)
    assert result["image"] is image
    assert torch.equal(result["label"], label)


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


def test_constant_channel():
    image = torch.rand(3, 3, 3)
    image[1] = 7
    with pytest.raises(ScanError, match=r"^a\.nii: constant channel 1 \(from 0\), each voxel is 7: remove"):
        check_image(image, "a.nii", 3)


def write_channels(folder, change):
    """Three files of one channel each, of which the last is changed."""
    volumes = [np.random.default_rng(i).random((4, 4, 4)).astype(np.float32) for i in range(3)]
    volumes[2] = change(volumes[2])
    paths = [folder / f"case_{i}.nii.gz" for i in range(3)]
    for path, volume in zip(paths, volumes, strict=True):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    return paths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.where(x > x.min(), x, np.nan), "1 voxels are NaN or infinite: repair or remove the file"),
        (np.zeros_like, "constant image, each voxel is 0: remove the file"),
        (
            lambda x: np.stack([x, x + 1], axis=-1),
            "2 channels, expected 1 in the file of one [(]channel_files[)]: split",
        ),
    ],
)
def test_a_fault_in_the_file_of_one_channel_names_that_file(tmp_path, change, message):
    paths = write_channels(tmp_path, change)
    with pytest.raises(ScanError, match=f"^{paths[2]}: {message}"):
        load_scan(paths)


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


def test_wrong_number_of_axes():
    message = r"^a\.nii: 2 spatial axes \(8, 9\), expected 3 as in the preset's roi_size: convert"
    with pytest.raises(ScanError, match=message):
        check_image(torch.rand(1, 8, 9), "a.nii", 1, spatial_dims=3)
    check_image(torch.rand(1, 8, 9), "a.nii", 1, spatial_dims=2)


def test_label_of_several_channels():
    with pytest.raises(ScanError, match=r"^l\.nii: label map of 2 channels, expected 1 "):
        check_label(torch.zeros(2, 3, 3), torch.rand(1, 3, 3), "l.nii", [0])


def test_label_is_rounded():
    label = MetaTensor(torch.tensor([[[0.0, 1.0000153, 1.9999, 254.9995]]]), affine=torch.eye(4))
    data = {"image": torch.rand(1, 1, 4), "label": label}
    result = CheckScand("image", 1, "label", [0, 1, 2, 255])(data)["label"]
    assert result.flatten().tolist() == [0.0, 1.0, 2.0, 255.0]
    assert isinstance(result, MetaTensor)
    with pytest.raises(ScanError, match=r"label values 0\.998 are not in the preset"):
        check_label(torch.tensor([[[0.0, 0.998]]]), torch.rand(1, 1, 2), "l.nii", [0, 1])


def rotated(affine: torch.Tensor, angle: float) -> torch.Tensor:
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn @ affine


AFFINE = torch.diag(torch.tensor([0.7, 0.7, 3.0, 1.0], dtype=torch.float64))
MIRROR = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
SHIFT = torch.zeros(4, 4, dtype=torch.float64).index_put_(
    (torch.tensor(2), torch.tensor(3)), torch.tensor(1.0).double()
)


@pytest.mark.parametrize(
    ("of_label", "same"),
    [
        (AFFINE, True),
        (AFFINE.float(), True),
        (AFFINE + 0.3 * SHIFT, True),
        (AFFINE + 0.4 * SHIFT, False),
        (MIRROR @ AFFINE, False),
        (rotated(AFFINE, 1e-4), True),
        (rotated(AFFINE, 0.1), False),
        (AFFINE * 1.1, False),
    ],
    ids=["same", "float32", "shift", "larger shift", "LAS", "rounding", "rotation", "spacing"],
)
def test_grids_of_image_and_label(of_label, same):
    data = {
        "image": MetaTensor(torch.rand(1, 40, 30, 20), affine=AFFINE),
        "label": MetaTensor(torch.zeros(1, 40, 30, 20), affine=of_label, meta={"filename_or_obj": "l.nii"}),
    }
    check = CheckScand("image", 1, "label", [0])
    if same:
        check(data)
        return
    with pytest.raises(ScanError, match=r"^l\.nii: the label map's voxels lie up to .* mm from .* expected 0\.35 mm"):
        check(data)


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
