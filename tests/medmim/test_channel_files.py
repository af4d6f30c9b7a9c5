"""Cases of several files, one for each channel."""

import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medmim.channel_files import CaseName
from medmim.datalists import find_items, load_datalist
from medmim.datasets import get_preset
from medmim.scan_checks import check_scans
from medmim.splits import load_split
from medmim.transforms.scans import ScanError, load_scan

PRESET = get_preset("brats21")
ENDINGS = list(PRESET.channel_files)


def write(path: Path, value: float = 1, size: tuple = (4, 5, 6), affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.arange(np.prod(size), dtype=np.float32).reshape(size) + value
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def write_case(
    folder: Path, name: str, labels: Path | None = None, label: str = "_seg", suffix: str = ".nii.gz"
) -> None:
    for number, ending in enumerate(ENDINGS):
        write(folder / f"{name}{ending}{suffix}", 10 * number + 1)
    path = (labels or folder) / f"{name}{label}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = np.zeros((4, 5, 6), np.uint8)
    classes[1:3, 1:3, 1:4] = 2
    nib.save(nib.Nifti1Image(classes, np.eye(4)), path)


def channels(folder: Path, name: str, suffix: str = ".nii.gz") -> list[str]:
    return [str(folder / f"{name}{ending}{suffix}") for ending in ENDINGS]


def test_a_folder_for_each_case_as_brats_has_it(tmp_path: Path) -> None:
    for name in ("case_1", "case_2", "case_3"):
        write_case(tmp_path / name, name, suffix=".nii" if name == "case_3" else ".nii.gz")
    items = find_items(tmp_path, ENDINGS)
    assert items[0] == {"image": channels(tmp_path / "case_1", "case_1")}
    assert items[2] == {"image": channels(tmp_path / "case_3", "case_3", ".nii")}
    labelled, plain = (load_split(tmp_path, PRESET, labelled=labelled, folds=3) for labelled in (True, False))
    for split in (labelled, plain):
        assert len(split.training) == 2
        assert len(split.validation) == 1
        check_scans(split, PRESET)
    item = labelled.validation[0]
    assert item["label"] == item["image"][0].replace("_flair.", "_seg.")
    assert "label" not in plain.validation[0]
    for part in ("training", "validation"):  # the same scans stay apart with and without labels
        assert [i["image"] for i in getattr(labelled, part)] == [i["image"] for i in getattr(plain, part)]
    assert len(load_datalist(tmp_path, labelled=False, folds=3).training) == 10  # without a preset each is a scan


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("imagesTr", "labelsTr")])
def test_labels_in_a_folder_beside(tmp_path: Path, images: str, labels: str) -> None:
    for name in ("a", "b"):
        write_case(tmp_path / images / "site", name, tmp_path / labels / "site", label="")
    preset = replace(PRESET, label_file="")
    split = load_split(tmp_path, preset, folds=2)
    for item in split.training + split.validation:
        case = Path(item["image"][0]).name.removesuffix("_flair.nii.gz")
        assert item["label"] == str(tmp_path / labels / "site" / f"{case}.nii.gz")
    assert len(find_items(tmp_path, ENDINGS)) == 2


def test_the_longest_ending_counts(tmp_path: Path) -> None:
    for name in ("x_t1", "x_c_t1"):
        write(tmp_path / f"{name}.nii.gz")
    assert find_items(tmp_path, ["_c_t1", "_t1"]) == [
        {"image": [str(tmp_path / "x_c_t1.nii.gz"), str(tmp_path / "x_t1.nii.gz")]}
    ]


def test_what_is_missing_or_there_twice_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_case(tmp_path, name)
    (tmp_path / "a_t1ce.nii.gz").unlink()
    write(tmp_path / "b_t2.nii")
    (tmp_path / "c_seg.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}/a: no a_t1ce.nii.gz: add it, or move") as error:
        find_items(tmp_path, ENDINGS)
    lines = str(error.value).split("; ")
    assert lines[1:] == [
        f"{tmp_path}/b: {tmp_path}/b_t2.nii and {tmp_path}/b_t2.nii.gz are one channel twice: keep one of them",
        f"names are expected to end in {', '.join(map(repr, ENDINGS))} (channel_files and label_file of the preset, in "
        "inference --channel_files): give the endings of yours if they are others",
    ]
    with pytest.raises(ValueError, match=f"; {tmp_path}/c: no label map c_seg.nii.gz: add it, or"):
        load_split(tmp_path, PRESET)
    assert "\n" not in str(error.value)


def test_a_label_map_in_two_places(tmp_path: Path) -> None:
    write_case(tmp_path / "images", "a")
    write_case(tmp_path / "images", "b")
    write(tmp_path / "labels" / "b_seg.nii.gz")
    with pytest.raises(
        ValueError, match=r"images/b: .*images/b_seg.nii.gz and .*labels/b_seg.nii.gz are one label map"
    ):
        load_split(tmp_path, PRESET, folds=2)


def test_no_file_with_these_endings(tmp_path: Path) -> None:
    write(tmp_path / "a_flair.nii.gz")
    with pytest.raises(
        ValueError,
        match=r"no NIfTI file whose name is that of a case and then _fla or _t1 in it or below: give the endings",
    ):
        find_items(tmp_path, ["_fla", "_t1"])


def test_channels_are_stacked_in_order_on_the_grid_of_the_first(tmp_path: Path) -> None:
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    paths = [write(tmp_path / f"{n}.nii", 100.0 * n, affine=affine) for n in range(4)]
    scan = load_scan(list(map(str, paths)))
    assert scan.shape == (4, 4, 5, 6)
    assert scan[:, 0, 0, 0].tolist() == [0, 100, 200, 300]
    assert torch.equal(torch.as_tensor(scan.affine), torch.as_tensor(affine))
    assert scan.meta["filename_or_obj"] == str(paths[0])
    write(paths[2], affine=affine + 1e-6)  # rounding of a header
    assert load_scan(paths).shape == (4, 4, 5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"size": (4, 5, 7)},
            r"\(4, 5, 7\) voxels, but .*0\.nii, a channel of the same scan, has \(4, 5, 6\): resample",
        ),
        ({"affine": np.diag([-1.0, 1, 1, 1])}, r"its voxels lie up to 6 mm from those of .*0\.nii, .* 0\.5 mm at most"),
    ],
)
def test_channels_on_other_grids(tmp_path: Path, change: dict, message: str) -> None:
    paths = [write(tmp_path / f"{n}.nii") for n in range(3)]
    write(paths[1], **change)
    with pytest.raises(ScanError, match=f"^{re.escape(str(paths[1]))}: {message}") as error:
        load_scan(paths)
    assert "\n" not in str(error.value)
    paths[1].write_bytes(b"nothing")
    with pytest.raises(ScanError, match=f"^{re.escape(str(paths[1]))}: not readable"):
        load_scan(paths)


@pytest.mark.parametrize(
    ("name", "endings", "expected"),
    [
        ("/d/a_t1.nii.gz", ["_t1", "_t2"], "/d/a.nii.gz"),
        ("/d/a_c_t1.nii", ["_t1", "_c_t1"], "/d/a.nii"),
        ("/d/a.nii.gz", ["_t1"], "/d/a.nii.gz"),
        ("/d/a_t1.nii.gz", [], "/d/a_t1.nii.gz"),
        ("/d/_t1.nii.gz", ["_t1"], "/d/_t1.nii.gz"),
    ],
)
def test_results_have_the_name_of_the_case(name: str, endings: list[str], expected: str) -> None:
    assert CaseName(endings)({"filename_or_obj": name}, None) == {"subject": expected, "idx": None}
