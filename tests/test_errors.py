"""Each fault a user can make, through the bundles' own runs: how it ends, and what is said.

The messages themselves are listed at the end of the test report.
"""

import gzip
import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from medmim import checks, commands
from medmim.datalists import load_datalist
from medmim.datasets import get_preset
from medmim.transforms import ScanError

MAE, UNETR = "mae_vit_pretraining", "unetr_segmentation"
Run = Callable[..., ConfigWorkflow]
Ends = Callable[..., list[str]]
both = pytest.mark.parametrize("bundle", [MAE, UNETR])


def of_knobs(knobs: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in knobs.items())


@pytest.fixture
def ends(run_bundle: Run, tmp_path: Path, request: pytest.FixtureRequest) -> Ends:
    """Runs a bundle that must end plainly; returns the lines of the message, without ``error:``."""

    def run(bundle: str, *configs: str, **knobs: Any) -> list[str]:
        with pytest.raises(SystemExit) as ending:
            run_bundle(bundle, *(configs or ["train"]), **{"folder": tmp_path} | knobs)
        message = ending.value.code
        assert isinstance(message, str), "SystemExit with a text prints it and exits with status 1"
        assert message.startswith("error: ")
        request.node.user_properties.append(("error", message))
        return message.removeprefix("error: ").splitlines()

    return run


@pytest.fixture
def one_line(ends: Ends) -> Callable[..., str]:
    def run(bundle: str, *configs: str, **knobs: Any) -> str:
        lines = ends(bundle, *configs, **knobs)
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def data(phantom_dir: Path, tmp_path: Path) -> Path:
    """A copy of the phantom data set, to be spoilt."""
    return shutil.copytree(phantom_dir, tmp_path / "data")


def change_image(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj).astype(np.float32)), image.affine), path)


def models_of(bundle: str, pretrained: Path, finetuned: Path) -> Path:
    return {MAE: pretrained, UNETR: finetuned}[bundle] / "models"


# ------------------------------------------------------------------------------------------------ folders and presets


@both
def test_dataset_folder_missing(one_line: Callable, tmp_path: Path, bundle: str) -> None:
    assert one_line(bundle, dataset_dir=tmp_path / "nowhere") == f"--dataset_dir {tmp_path / 'nowhere'}: no such folder"


@both
def test_dataset_folder_missing_for_inference(
    one_line: Callable, tmp_path: Path, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", dataset_dir=tmp_path / "nowhere", models_dir=models)
    assert message == f"--dataset_dir {tmp_path / 'nowhere'}: no such folder"


@both
def test_dataset_folder_empty(one_line: Callable, tmp_path: Path, bundle: str) -> None:
    (tmp_path / "empty").mkdir()
    message = one_line(bundle, dataset_dir=tmp_path / "empty")
    assert message.startswith(f"--dataset_dir {tmp_path / 'empty'}: no ")
    assert {MAE: "no NIfTI file (.nii, .nii.gz) in it or below", UNETR: "give a --datalist"}[bundle] in message


@both
def test_dataset_folder_empty_for_inference(
    one_line: Callable, tmp_path: Path, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    (tmp_path / "empty").mkdir()
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", dataset_dir=tmp_path / "empty", models_dir=models)
    assert message == f"--dataset_dir {tmp_path / 'empty'}: no NIfTI file (.nii, .nii.gz) in it or below"


@both
def test_unknown_preset(one_line: Callable, bundle: str) -> None:
    message = one_line(bundle, dataset="hipocampus")
    assert message.startswith("--dataset hipocampus: no such preset (did you mean hippocampus?)")
    assert "known are btcv, hippocampus, phantom, or give a .yaml file" in message


@both
def test_preset_file_missing(one_line: Callable, tmp_path: Path, bundle: str) -> None:
    message = one_line(bundle, dataset=tmp_path / "mine.yaml")
    assert message == f"--dataset {tmp_path / 'mine.yaml'}: no such file"


@both
def test_preset_file_faulty(one_line: Callable, tmp_path: Path, bundle: str) -> None:
    (tmp_path / "mine.yaml").write_text("channels: [CT]\nspacings: [1, 1, 1]\nroi_size: [16, 16, 16]\npatch_size: 8\n")
    message = one_line(bundle, dataset=tmp_path / "mine.yaml")
    assert message == "preset mine: unknown field 'spacings' (did you mean spacing?)"


def test_preset_without_labels_for_segmentation(one_line: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("channels: [CT]\nwindow: [0, 1]\nroi_size: [16, 16, 16]\npatch_size: 8\n")
    message = one_line(UNETR, dataset=tmp_path / "mine.yaml")
    assert "mine.yaml: the preset names no labels, so it cannot be used for segmentation" in message


@both
@pytest.mark.parametrize("knob", ["output_dir", "models_dir"])
def test_output_folder_not_writable(one_line: Callable, tmp_path: Path, bundle: str, knob: str) -> None:
    (tmp_path / "file").touch()  # below a file no folder can be made, not even by root
    message = one_line(bundle, **{knob: tmp_path / "file" / "below"})
    assert message.startswith(f"folder {tmp_path / 'file' / 'below'} is not writable (Not a directory)")
    assert f"--{knob}" in message


@both
def test_output_folder_not_writable_for_inference(
    one_line: Callable, tmp_path: Path, phantom_dir: Path, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    (tmp_path / "file").touch()
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", models_dir=models, output_dir=tmp_path / "file" / "below")
    assert message.startswith(f"folder {tmp_path / 'file' / 'below'} is not writable (Not a directory)")
    assert "--output_dir" in message


# ---------------------------------------------------------------------------------------------------- lists of scans


@both
def test_datalist_missing(one_line: Callable, tmp_path: Path, bundle: str) -> None:
    message = one_line(bundle, datalist=tmp_path / "list.csv")
    assert message == f"--datalist {tmp_path / 'list.csv'}: no such file"


@both
def test_listed_image_missing(one_line: Callable, data: Path, bundle: str) -> None:
    (data / "imagesTr" / "phantom_002.nii.gz").unlink()
    assert one_line(bundle, dataset_dir=data) == f"{data}/imagesTr/phantom_002.nii.gz: no such file"


@pytest.mark.parametrize("where", ["dataset.json", "imagesTr without list", "json entry", "csv"])
def test_image_without_its_label(one_line: Callable, data: Path, where: str) -> None:
    image = data / "imagesTr" / "phantom_002.nii.gz"
    label = data / "labelsTr" / "phantom_002.nii.gz"
    knobs = {"dataset_dir": data}
    if where == "json entry":
        content = json.loads((data / "dataset.json").read_text())
        del content["training"][2]["label"]
        (data / "dataset.json").write_text(json.dumps(content))
        expected = f"{data / 'dataset.json'}: entry 2 of 'training' has no 'label'"
    elif where == "csv":
        knobs["datalist"] = data / "list.csv"
        knobs["datalist"].write_text("image,label\nimagesTr/phantom_002.nii.gz,\n")
        expected = f"{data / 'list.csv'}: line 2 has no value in column 'label'"
    else:
        label.unlink()
        if where == "imagesTr without list":
            (data / "dataset.json").unlink()
        expected = f"{image}: its label {label} does not exist"
    assert one_line(UNETR, **knobs).startswith(expected)


@both
@pytest.mark.parametrize("knobs", [{"fold": 5}, {"fold": -1}, {"fold": 0, "folds": 1}], ids=of_knobs)
def test_fold_out_of_range(one_line: Callable, bundle: str, knobs: dict) -> None:
    message = one_line(bundle, **knobs)
    assert message.startswith(f"--fold {knobs['fold']} of --folds {knobs.get('folds', 5)}: fold must lie in 0")


@both
def test_too_few_scans(one_line: Callable, data: Path, bundle: str) -> None:
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(content | {"training": content["training"][:1]}))
    message = one_line(bundle, dataset_dir=data)
    assert "1 scans leave 0 for training and 1 for validation" in message
    assert "add scans or lower folds" in message


@both
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"epochs": 2, "warmup_epochs": 2},
            "--epochs 2 with --warmup_epochs 2: the learning rate would not get beyond its warm-up: "
            "epochs must be larger, and warmup_epochs 0 or more",
        ),
        ({"learning_rate": -0.1}, "--learning_rate -0.1: must not be negative"),
    ],
    ids=["warm-up", "negative rate"],
)
def test_schedule_under_which_nothing_is_learned(one_line: Callable, bundle: str, knobs: dict, message: str) -> None:
    assert one_line(bundle, **knobs) == message


def test_layer_decay_out_of_range(one_line: Callable) -> None:
    assert one_line(UNETR, layer_decay=2) == "--layer_decay 2: must lie in (0, 1]"


def test_label_fraction_out_of_range(one_line: Callable) -> None:
    assert one_line(UNETR, label_fraction=10) == "--label_fraction 10: must lie in (0, 1]"


# ------------------------------------------------------------------------------------------------------------- scans


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "garbage":
        path.write_bytes(b"this is not a scan" * 100)
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")


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


def test_several_bad_scans_are_reported_together(ends: Ends, data: Path) -> None:
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
    run_bundle: Run, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, bundle: str
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
    assert told[0].startswith("2 of 6 scans are smaller than roi_size (16, 24, 16) and will be padded, for example ")
    assert f"{data}/imagesTr/phantom_00" in told[0]
    assert (tmp_path / "models" / "model.pt").is_file()


@both
def test_scans_smaller_than_the_roi_are_told_once_in_inference(
    run_bundle: Run,
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
    assert told[0].startswith("1 of 6 scans are smaller than roi_size (16, 24, 16) and will be padded")
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
def test_label_of_another_orientation(ends: Ends, data: Path, check_scans: bool) -> None:
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
            checks.check_scans(load_datalist(data), get_preset("phantom"), remember)
        told = [record.getMessage() for record in caplog.records if "foreground" in record.getMessage()]
        assert len(told) == 1
        assert told[0].startswith(f"2 of 6 label maps have no foreground, for example {data}/labelsTr/phantom_00")
        caplog.clear()


def test_good_scans_are_remembered_beside_a_faulty_one(data: Path) -> None:
    spoil(data / "imagesTr" / "phantom_003.nii.gz", "truncated")
    remember = data / "checked_scans.json"
    with pytest.raises(ScanError):
        checks.check_scans(load_datalist(data), get_preset("phantom"), remember)
    known = json.loads(remember.read_text())
    assert len(known) == 5
    assert not any("phantom_003" in key for key in known)


@pytest.mark.parametrize("content", [b"", b'{"a": {"sta', b"\xff\xfe", b"[1]", b'{"a": 1, "b": {}}'], ids=repr)
def test_damaged_list_of_checked_scans_is_ignored(data: Path, content: bytes) -> None:
    remember = data / "checked_scans.json"
    remember.write_bytes(content)
    checks.check_scans(load_datalist(data), get_preset("phantom"), remember)
    assert len(json.loads(remember.read_text())) == 6


# ------------------------------------------------------------------------------------------------- sizes and switches


@both
def test_roi_not_divisible_by_the_patch(one_line: Callable, bundle: str) -> None:
    message = one_line(bundle, roi_size=[16, 20, 16])
    assert message.startswith("--roi_size [16, 20, 16] is not divisible by --patch_size 8: change one")


@both
def test_roi_with_too_few_axes(one_line: Callable, bundle: str) -> None:
    assert one_line(bundle, roi_size=[16, 16]).startswith("--roi_size [16, 16]: expected 3 numbers in voxels")


def test_patch_size_unetr_cannot_do(one_line: Callable) -> None:
    message = one_line(UNETR, patch_size=4)
    assert message == "--patch_size 4: this network needs one of 8, 16, 32, the same on each axis"


@pytest.mark.parametrize(
    ("mask_unit", "expected"),
    [
        ([12, 12, 12], "--roi_size [16, 24, 16] is not divisible by --mask_unit [12, 12, 12]"),
        ([4, 8, 8], "--mask_unit [4, 8, 8] is not a multiple of --patch_size 8"),
    ],
    ids=["roi_size", "patch_size"],
)
def test_mask_unit_that_does_not_fit(one_line: Callable, mask_unit: list[int], expected: str) -> None:
    assert one_line(MAE, mask_unit=mask_unit).startswith(expected)


@pytest.mark.parametrize("mask_ratio", [0.99, 1.0, -0.1])
def test_mask_ratio_that_hides_everything(one_line: Callable, mask_ratio: float) -> None:
    message = one_line(MAE, mask_ratio=mask_ratio)
    expected = (
        "hides all 12 units: lower it, or take a smaller mask_unit" if mask_ratio == 0.99 else "must lie in [0, 1)"
    )
    assert "mask_ratio" in message
    assert expected in message


@both
def test_switch_that_is_a_word(one_line: Callable, bundle: str) -> None:
    message = one_line(bundle, check_scans="false")
    assert message == "--check_scans false: a switch must be True or False, with a capital letter"


# ---------------------------------------------------------------------------------------- checkpoints and their presets


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"hidden_size": 96}, "--hidden_size 48"),
        ({"num_layers": 8}, "--num_layers 4"),
        ({"mlp_dim": 192}, "--mlp_dim 96"),
        ({"patch_size": 16, "roi_size": [16, 32, 16]}, "--patch_size 8"),
    ],
    ids=["hidden_size", "num_layers", "mlp_dim", "patch_size"],
)
def test_encoder_of_another_architecture(one_line: Callable, pretrained: Path, knobs: dict, told: str) -> None:
    path = pretrained / "models" / "encoder.pt"
    message = one_line(UNETR, pretrained_encoder=path, **knobs)
    assert message.startswith(f"{path}: another architecture than the network's: ")
    assert message.endswith(f"The file was made with {told}")


def test_encoder_missing(one_line: Callable, tmp_path: Path) -> None:
    message = one_line(UNETR, pretrained_encoder=tmp_path / "encoder.pt")
    assert message.startswith(f"{tmp_path / 'encoder.pt'}: no such file")


def test_encoder_damaged(one_line: Callable, pretrained: Path, tmp_path: Path) -> None:
    path = shutil.copy(pretrained / "models" / "encoder.pt", tmp_path)
    spoil(Path(path), "truncated")
    message = one_line(UNETR, pretrained_encoder=path)
    assert message.startswith(f"{path}: not readable as a checkpoint of plain tensors (")
    assert message.endswith("): get it again")


def test_encoder_that_holds_no_vit(one_line: Callable, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(3, 4).state_dict(), path)
    message = one_line(UNETR, pretrained_encoder=path)
    assert message.startswith(f"{path}: 0 tensors are named …patch_embedding.position_embeddings")


def test_evaluation_with_other_knobs(one_line: Callable, finetuned: Path) -> None:
    models = finetuned / "models"
    message = one_line(UNETR, "train", "evaluate", models_dir=models, feature_size=8)
    assert message == f"{models / 'model.json'}: other knobs than it was trained with: give --feature_size 4"


def test_pretraining_evaluation_with_other_knobs(one_line: Callable, pretrained: Path) -> None:
    checkpoint = pretrained / "output" / "checkpoint.pt"
    message = one_line(MAE, "train", "evaluate", checkpoint=checkpoint, decoder_num_layers=2)
    assert message.startswith(f"{checkpoint}: ")
    assert "tensors do not fit a MaskedAutoencoder, first: " in message


@pytest.mark.parametrize(
    ("bundle", "config", "name"),
    [
        (UNETR, "evaluate", "models/model.json"),
        (MAE, "evaluate", "output/checkpoint.pt"),
        (MAE, "reconstruct", "output/checkpoint.pt"),
    ],
)
def test_no_training_before(one_line: Callable, tmp_path: Path, bundle: str, config: str, name: str) -> None:
    message = one_line(bundle, "train", config)
    assert message.startswith(f"{tmp_path / name}: no such file: train first")


@both
@pytest.mark.parametrize("name", ["model.json", "model.pt"])
def test_no_model_for_inference(
    one_line: Callable, tmp_path: Path, pretrained: Path, finetuned: Path, bundle: str, name: str
) -> None:
    models = shutil.copytree(models_of(bundle, pretrained, finetuned), tmp_path / "models")
    (models / name).unlink()
    assert one_line(bundle, "inference").startswith(f"{models / name}: no such file: train first")


@both
def test_dataset_for_inference_that_is_not_the_models(
    one_line: Callable, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", dataset="hippocampus", models_dir=models)
    assert message == "--dataset hippocampus: the model was trained on coarse: leave --dataset away"


@both
def test_dataset_for_inference_that_is_the_models(
    run_bundle: Run, coarse_preset: Path, pretrained: Path, finetuned: Path, tmp_path: Path, bundle: str
) -> None:
    models = models_of(bundle, pretrained, finetuned)
    run_bundle(bundle, "inference", folder=tmp_path, dataset=coarse_preset, models_dir=models)
    assert list((tmp_path / "output").rglob("*.nii.gz"))


# ---------------------------------------------------------------------------------------------------- while training


@both
def test_loss_that_is_not_finite(one_line: Callable, phantom_dir: Path, bundle: str) -> None:
    message = one_line(bundle, learning_rate=1e30, epochs=3)
    assert message.startswith(("the loss is nan in epoch ", "the loss is inf in epoch "))
    assert ", iteration " in message
    assert message.count(f"{phantom_dir}/imagesTr/phantom_00") == 2  # each scan once
    assert message.endswith("lower --learning_rate, or try --amp False")


# ----------------------------------------------------------------------------------------------- on the command line


def last_line_of(run: subprocess.CompletedProcess) -> str:
    """The message of a command that failed, which must be the last line and no stack trace."""
    assert run.returncode == 1
    assert "Traceback" not in run.stdout + run.stderr
    return run.stderr.rstrip("\n").splitlines()[-1]


def test_command_line_dataset_folder_missing(command_line: Callable, tmp_path: Path) -> None:
    knobs = {"dataset": "hippocampus", "dataset_dir": tmp_path / "nowhere", "output_dir": tmp_path / "output"}
    run = command_line(UNETR, "train", models_dir=tmp_path / "models", **knobs)
    assert last_line_of(run) == f"error: --dataset_dir {tmp_path / 'nowhere'}: no such folder"


def test_command_line_scan_breaks_in_a_worker(
    command_line: Callable, data: Path, coarse_preset: Path, tmp_path: Path
) -> None:
    for path in (data / "imagesTr").iterdir():
        spoil(path, "truncated")
    knobs = {"dataset": coarse_preset, "dataset_dir": data, "output_dir": tmp_path / "output", "num_workers": 2}
    knobs |= {"models_dir": tmp_path / "models", "check_scans": False, "cache_rate": 0.0, "batch_size": 2}
    knobs |= {"hidden_size": 48, "num_layers": 4, "num_heads": 4, "decoder_num_layers": 1}
    message = last_line_of(command_line(MAE, "train", **knobs))
    assert message.startswith(f"error: {data}/imagesTr/phantom_00")
    assert message.endswith("replace or remove the file")


def test_command_line_loss_that_is_not_finite(
    command_line: Callable, phantom_dir: Path, coarse_preset: Path, tmp_path: Path
) -> None:
    knobs = {"dataset": coarse_preset, "dataset_dir": phantom_dir, "output_dir": tmp_path / "output"}
    knobs |= {"models_dir": tmp_path / "models", "num_workers": 0, "learning_rate": 1e30, "epochs": 3}
    knobs |= {"warmup_epochs": 1, "hidden_size": 48, "num_layers": 4, "num_heads": 4, "feature_size": 4}
    message = last_line_of(command_line(UNETR, "train", **knobs))
    assert message.startswith("error: the loss is nan in epoch ")
    assert "--amp False" in message


@both
def test_knobs_of_the_wrong_kind_are_reported_together(ends: Ends, bundle: str) -> None:
    found = ends(bundle, epochs=1.5, batch_size=0, num_heads=5, amp_dtype="float8", roi_size=[16, 24, 16])
    assert found == [
        "--epochs 1.5: expected a whole number of at least 1",
        "--batch_size 0: expected a whole number of at least 1",
        "--amp_dtype float8: expected bfloat16 or float16",
        "--hidden_size 48: expected a multiple of 5",
    ]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"decoder": "cnn"}, "--decoder cnn: expected transformer or mlp or linear"),
        ({"loss_norm": "L1"}, "--loss_norm L1: expected l1 or l2"),
        ({"decoder_hidden_size": 20}, "--decoder_hidden_size 20: expected a multiple of 6"),
        ({"mask_ratio": 0.01}, "--mask_ratio 0.01 hides none of 12 units: there would be nothing to learn"),
    ],
    ids=["decoder", "loss_norm", "decoder_hidden_size", "mask_ratio"],
)
def test_knobs_of_pre_training(one_line: Callable, knobs: dict, message: str) -> None:
    assert one_line(MAE, **knobs) == message


def test_demo_does_not_write_into_other_data(one_line: Callable, data: Path) -> None:
    listed = json.loads((data / "dataset.json").read_text()) | {"name": "mine"}
    (data / "dataset.json").write_text(json.dumps(listed))
    message = one_line(MAE, "train", "demo", dataset_dir=data)
    assert message.startswith(f"--dataset_dir {data}: holds other data, phantom scans are not written into it")
    assert json.loads((data / "dataset.json").read_text()) == listed


def test_evaluation_with_other_knobs_than_training(one_line: Callable, pretrained: Path, finetuned: Path) -> None:
    checkpoint = pretrained / "output" / "checkpoint.pt"
    found = one_line(MAE, "train", "evaluate", checkpoint=checkpoint, num_heads=6)
    assert found == f"{checkpoint}: other knobs than it was trained with: give --num_heads 4"
    models = finetuned / "models"
    found = one_line(UNETR, "train", "evaluate", models_dir=models, num_heads=6)
    assert found == f"{models / 'model.json'}: other knobs than it was trained with: give --num_heads 4"
