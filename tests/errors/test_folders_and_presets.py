"""Folders and presets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medmim.datasets import preset_table
from tests.common import MAE, UNETR, both, models_of


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
    assert f"known are {', '.join(sorted(preset_table()))}, or give a .yaml file" in message


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
    assert message == "--dataset mine: the preset names no labels, so it cannot be used for segmentation"


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


def test_demo_does_not_write_into_other_data(one_line: Callable, data: Path) -> None:
    listed = json.loads((data / "dataset.json").read_text()) | {"name": "mine"}
    (data / "dataset.json").write_text(json.dumps(listed))
    message = one_line(MAE, "train", "demo", dataset_dir=data)
    assert message.startswith(f"--dataset_dir {data}: holds other data, phantom data are not written into it")
    assert json.loads((data / "dataset.json").read_text()) == listed
