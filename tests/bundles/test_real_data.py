"""Both bundles on a handful of real MR scans."""

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

Run = Callable[..., ConfigWorkflow]


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """Knobs that lead to six cases of the Decathlon's Task04."""
    data = os.environ.get("MEDMIM_TEST_DATA")
    if not data:
        pytest.skip("MEDMIM_TEST_DATA is not set: real scans lie there")
    folder = Path(data) / "data" / "Task04_Hippocampus"
    names = [path.name for path in sorted((folder / "imagesTr").glob("hippocampus_*.nii.gz"))[:6]]
    assert len(names) == 6
    path = tmp_path_factory.mktemp("hippocampus") / "six.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "fold"])
        writer.writerows([f"imagesTr/{name}", f"labelsTr/{name}", int(i < 4)] for i, name in enumerate(names))
    return {"dataset": "hippocampus", "dataset_dir": folder, "datalist": path, "roi_size": [32, 48, 32]}


def losses(folder: Path) -> list[float]:
    with (folder / "output" / "scalars.csv").open(newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def pretrained_on_mr(
    hippocampus: dict[str, Path | str], run_bundle: Run, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("mr_pretraining")
    knobs = {"epochs": 8, "learning_rate": 0.003, "val_interval": 8}
    run_bundle("mae_vit_pretraining", "train", folder=folder, **hippocampus, **knobs)
    return folder


def test_pretraining(pretrained_on_mr: Path) -> None:
    values = losses(pretrained_on_mr)
    assert all(math.isfinite(value) for value in values)
    assert values[-1] < 0.9 * values[0]


def test_fine_tuning_and_prediction(
    hippocampus: dict[str, Path | str], pretrained_on_mr: Path, run_bundle: Run, tmp_path: Path
) -> None:
    encoder = pretrained_on_mr / "models" / "encoder.pt"
    knobs = {"epochs": 8, "learning_rate": 0.01, "val_interval": 8, "pretrained_encoder": encoder}
    run_bundle("unetr_segmentation", "train", folder=tmp_path, **hippocampus, **knobs)
    values = losses(tmp_path)
    assert all(math.isfinite(value) for value in values)
    assert values[-1] < 0.9 * values[0]

    scans = tmp_path / "scans"
    scans.mkdir()
    scan = sorted((Path(hippocampus["dataset_dir"]) / "imagesTr").glob("hippocampus_*.nii.gz"))[5]
    (scans / scan.name).write_bytes(scan.read_bytes())
    run_bundle("unetr_segmentation", "inference", folder=tmp_path, dataset_dir=scans)
    prediction = nib.load(tmp_path / "output" / scan.name.replace(".nii.gz", "_seg.nii.gz"))
    assert prediction.shape == nib.load(scan).shape
    np.testing.assert_allclose(prediction.affine, nib.load(scan).affine)
