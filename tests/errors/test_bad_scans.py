"""Scans that cannot be used, found by the check before training."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmim import commands, scan_checks
from medmim.datalists import load_datalist
from medmim.datasets import get_preset
from medmim.transforms import ScanError
from tests.common import MAE, UNETR, both, change_image, models_of, spoil


@both
@pytest.mark.parametrize("how", ["garbage", "truncated", "empty"])
def test_unreadable_image(one_line: Callable, data: Path, bundle: str, how: str) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    spoil(path, how)
    message = one_line(bundle, dataset_dir=data)
    assert message.startswith(f"{path}: not readable (")
    assert message.endswith("): replace or remove the file")


def test_truncated_uncompressed_image(one_line: Callable, data: Path) -> None:
    (data / "scans").mkdir()
    for path in (data / "imagesTr").iterdir():
        (data / "scans" / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    spoil(data / "scans" / "phantom_003.nii", "truncated")
    message = one_line(MAE, dataset_dir=data / "scans")
    assert message.startswith(f"{data}/scans/phantom_003.nii: not readable (")


@pytest.mark.parametrize("how", ["garbage", "truncated"])
def test_unreadable_label(one_line: Callable, data: Path, how: str) -> None:
    path = data / "labelsTr" / "phantom_003.nii.gz"
    spoil(path, how)
    assert one_line(UNETR, dataset_dir=data).startswith(f"{path}: not readable (")


@both
def test_unreadable_image_for_inference(
    one_line: Callable, data: Path, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    spoil(path, "truncated")
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", dataset_dir=data / "imagesTr", models_dir=models)
    assert message.startswith(f"{path}: not readable (")


def test_several_bad_scans_are_reported_together(ends: Callable, data: Path) -> None:
    spoil(data / "imagesTr" / "phantom_001.nii.gz", "truncated")
    spoil(data / "imagesTr" / "phantom_003.nii.gz", "garbage")
    change_image(data / "imagesTr" / "phantom_005.nii.gz", np.zeros_like)
    lines = ends(MAE, dataset_dir=data)
    assert lines.pop() == "3 of 6 scans cannot be used"
    named = {number for number in range(6) for line in lines if line.startswith(f"{data}/imagesTr/phantom_00{number}.")}
    assert named == {1, 3, 5}
    assert len(lines) == 3


@pytest.mark.parametrize("values", [[6], [-1], [1.5], [7, 200]], ids=str)
def test_label_values_outside_the_preset(one_line: Callable, data: Path, values: list[float]) -> None:
    def mark(label: np.ndarray) -> np.ndarray:
        label[: len(values), 0, 0] = values
        return label

    path = data / "labelsTr" / "phantom_003.nii.gz"
    change_image(path, mark)
    message = one_line(UNETR, dataset_dir=data)
    found = ", ".join(f"{value:g}" for value in values)
    assert message.startswith(f"{path}: label values {found} are not in the preset ([0, 1, 2, 3, 4, 5])")
    assert "--dataset my_preset.yaml" in message


def test_shapes_of_image_and_label_differ(one_line: Callable, data: Path) -> None:
    path = data / "labelsTr" / "phantom_003.nii.gz"
    change_image(path, lambda label: label[:-2])
    message = one_line(UNETR, dataset_dir=data)
    assert message.startswith(f"{path}: label map of (94, 76, 40) voxels for an image of (96, 76, 40)")
    assert message.endswith("export the label map on the image's grid")


@both
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_infinite_voxels(one_line: Callable, data: Path, bundle: str, value: float) -> None:
    def mark(image: np.ndarray) -> np.ndarray:
        image[3, 4, 5:8] = value
        return image

    path = data / "imagesTr" / "phantom_003.nii.gz"
    change_image(path, mark)
    expected = f"{path}: 3 voxels are NaN or infinite: repair or remove the file"
    assert one_line(bundle, dataset_dir=data) == expected


@both
def test_constant_image(one_line: Callable, data: Path, bundle: str) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    change_image(path, lambda image: np.full_like(image, 7))
    assert one_line(bundle, dataset_dir=data) == f"{path}: constant image, each voxel is 7: remove the file"


@both
def test_wrong_channel_count(one_line: Callable, data: Path, bundle: str) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    change_image(path, lambda image: np.stack([image, image], axis=-1))
    message = one_line(bundle, dataset_dir=data)
    assert message.startswith(f"{path}: 2 channels, expected 1: choose a preset (--dataset) with as many channels")


@both
def test_wrong_channel_count_for_inference(
    one_line: Callable, data: Path, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    change_image(path, lambda image: np.stack([image, image], axis=-1))
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", dataset_dir=data / "imagesTr", models_dir=models)
    assert message.startswith(f"{path}: 2 channels, expected 1")


@both
def test_scans_smaller_than_the_roi_are_padded_and_told_once(
    run_bundle: Callable, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, bundle: str
) -> None:
    for number in (1, 3):
        for sub in ("imagesTr", "labelsTr"):
            path = data / sub / f"phantom_00{number}.nii.gz"
            image = nib.load(path)
            nib.save(image.slicer[20:50, 20:50, 5:25], path)  # about 12 x 12 x 13 voxels of 8 mm
    with caplog.at_level(logging.INFO, "medmim"):
        run_bundle(bundle, "train", folder=tmp_path, dataset_dir=data)
    told = [record.getMessage() for record in caplog.records if "padded" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("2 of 6 scans are smaller than a crop of (16, 24, 16) voxels and will be padded")
    assert f", for example {data}/imagesTr/phantom_00" in told[0]
    assert (tmp_path / "models" / "model.pt").is_file()


@both
def test_scans_smaller_than_the_roi_are_told_once_in_inference(
    run_bundle: Callable,
    data: Path,
    tmp_path: Path,
    pretrained: Path,
    finetuned: Path,
    caplog: pytest.LogCaptureFixture,
    bundle: str,
) -> None:
    path = data / "imagesTr" / "phantom_001.nii.gz"
    nib.save(nib.load(path).slicer[20:50, 20:50, 5:25], path)
    knobs = {"dataset_dir": data / "imagesTr", "models_dir": models_of(bundle, pretrained, finetuned)}
    with caplog.at_level(logging.INFO, "medmim"):
        run_bundle(bundle, "inference", folder=tmp_path, **knobs)
    told = [record.getMessage() for record in caplog.records if "padded" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("1 of 6 scans are smaller than a crop of (16, 24, 16) voxels and will be padded")
    assert len(list((tmp_path / "output").glob("*.nii.gz"))) == 6


@both
@pytest.mark.parametrize(
    ("cache_rate", "num_workers"), [(1.0, 0), (0.0, 0), (0.0, 2)], ids=["cache", "loader", "worker of the loader"]
)
def test_scan_breaks_after_the_check(
    one_line: Callable,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle: str,
    cache_rate: float,
    num_workers: int,
) -> None:
    broken = []

    def check_then_break(items: Any, **arguments: Any) -> None:
        check(items, **arguments)
        broken.append(items.training[0]["image"])
        spoil(Path(broken[0]), "truncated")

    check = commands.check_scans
    monkeypatch.setattr(commands, "check_scans", check_then_break)
    message = one_line(bundle, dataset_dir=data, cache_rate=cache_rate, num_workers=num_workers)
    assert message.startswith(f"{broken[0]}: not readable (EOFError")


@both
def test_bad_scan_without_check(one_line: Callable, data: Path, bundle: str) -> None:
    for path in (data / "imagesTr").iterdir():
        change_image(path, lambda image: np.where(image > 300, np.nan, image))
    message = one_line(bundle, dataset_dir=data, check_scans=False)
    assert message.endswith("voxels are NaN or infinite: repair or remove the file")
    assert message.startswith(f"{data}/imagesTr/phantom_00")


@pytest.mark.parametrize("check_scans", [True, False])
def test_label_of_another_orientation(ends: Callable, data: Path, check_scans: bool) -> None:
    for path in (data / "labelsTr").iterdir():
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(label.dataobj), np.diag([-1, 1, 1, 1]) @ label.affine), path)
    message = ends(UNETR, dataset_dir=data, check_scans=check_scans)[0]
    assert message.startswith(f"{data}/labelsTr/phantom_00")
    assert ": the label map's voxels lie up to " in message


@pytest.mark.parametrize("axes", [2, 4], ids=["2D", "5D"])
def test_wrong_number_of_axes(one_line: Callable, data: Path, axes: int) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    change_image(path, lambda image: image[:, :, 20] if axes == 2 else np.stack([image, image], -1)[..., None])
    message = one_line(MAE, dataset_dir=data)
    size = (96, 76) if axes == 2 else (96, 76, 40, 2)
    assert message.startswith(f"{path}: {axes} spatial axes {size}, expected 3 as in the preset's roi_size: convert")


def test_label_of_several_channels(one_line: Callable, data: Path) -> None:
    path = data / "labelsTr" / "phantom_003.nii.gz"
    change_image(path, lambda label: np.stack([label, label], -1))
    assert one_line(UNETR, dataset_dir=data).startswith(f"{path}: label map of 2 channels, expected 1")


@both
@pytest.mark.parametrize("value", [-1000, 250])
def test_image_outside_the_window(one_line: Callable, data: Path, bundle: str, value: int) -> None:
    path = data / "imagesTr" / "phantom_003.nii.gz"
    change_image(path, lambda image: np.sign(value) * abs(image) + value * 10)
    message = one_line(bundle, dataset_dir=data)
    assert message.startswith(f"{path}: constant image after the preset's window [-175.0, 250.0], voxels lie in [")


def test_no_label_map_has_any_foreground(one_line: Callable, data: Path) -> None:
    for path in (data / "labelsTr").iterdir():
        change_image(path, np.zeros_like)
    message = one_line(UNETR, dataset_dir=data)
    assert message.startswith(f"{data}/labelsTr/phantom_00")
    assert ": no foreground, as in all 4 label maps for training: nothing could be learned" in message


def test_label_maps_without_foreground_are_told_once(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 3):
        change_image(data / "labelsTr" / f"phantom_00{number}.nii.gz", np.zeros_like)
    remember = data / "checked_scans.json"
    for _ in range(2):
        with caplog.at_level(logging.INFO, "medmim"):
            scan_checks.check_scans(load_datalist(data), get_preset("phantom"), remember)
        told = [record.getMessage() for record in caplog.records if "foreground" in record.getMessage()]
        assert len(told) == 1
        assert told[0].startswith(f"2 of 6 label maps have no foreground, for example {data}/labelsTr/phantom_00")
        caplog.clear()


def test_good_scans_are_remembered_beside_a_faulty_one(data: Path) -> None:
    spoil(data / "imagesTr" / "phantom_003.nii.gz", "truncated")
    remember = data / "checked_scans.json"
    with pytest.raises(ScanError):
        scan_checks.check_scans(load_datalist(data), get_preset("phantom"), remember)
    known = json.loads(remember.read_text())
    assert len(known) == 5
    assert not any("phantom_003" in key for key in known)


@pytest.mark.parametrize("content", [b"", b'{"a": {"sta', b"\xff\xfe", b"[1]", b'{"a": 1, "b": {}}'], ids=repr)
def test_damaged_list_of_checked_scans_is_ignored(data: Path, content: bytes) -> None:
    remember = data / "checked_scans.json"
    remember.write_bytes(content)
    scan_checks.check_scans(load_datalist(data), get_preset("phantom"), remember)
    assert len(json.loads(remember.read_text())) == 6
