"""Classification of volumes, through the real bundle runner."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from PIL import Image

from tests.common import CONVVIT_CT, FILES, MIM, rows

Run = Callable[..., ConfigWorkflow]
CLASSES = ["normal", "cyst", "tumour"]


def test_training_writes_everything(classified_ct: Path) -> None:
    assert {path.name for path in (classified_ct / "models").iterdir()} == set(FILES[CONVVIT_CT])
    table = rows(classified_ct / "output" / "scalars.csv")
    assert [bool(row["mean_auc"]) for row in table] == [False, True] * 2
    assert np.asarray(Image.open(classified_ct / "output" / "previews" / "epoch_0004.png")).std() > 1
    description = json.loads((classified_ct / "models" / "model.json").read_text())
    assert list(description["thresholds"]) == CLASSES
    assert description["network"]["name"] == "ConvViTClassifier"


def test_evaluation_and_inference_agree(
    classified_ct: Path, run_bundle: Run, lesions_dir: Path, tmp_path: Path
) -> None:
    models = classified_ct / "models"
    for part in ("validation", "test"):
        run_bundle(CONVVIT_CT, "train", "evaluate", folder=tmp_path, part=part, models_dir=models, test_fold=1)
        table = rows(tmp_path / "output" / f"scores_{part}" / "scores.csv")
        assert [row["class"] for row in table] == [*CLASSES, "mean of 3"]
        for name in ("roc.png", "precision_recall.png", "confusion.png"):
            assert np.asarray(Image.open(tmp_path / "output" / f"scores_{part}" / name)).std() > 1, name
    knobs = {"models_dir": models, "dataset_dir": lesions_dir}
    run_bundle(CONVVIT_CT, "inference", folder=tmp_path / "i", batch_size=3, **knobs)
    found = {row["image"]: row for row in rows(tmp_path / "i" / "output" / "probabilities.csv")}
    assert found.keys() == {path.relative_to(lesions_dir).as_posix() for path in lesions_dir.rglob("*.nii.gz")}
    for row in rows(tmp_path / "output" / "scores_test" / "predictions.csv"):
        other = found[Path(row["image"]).relative_to(lesions_dir).as_posix()]
        assert sum(float(other[name]) for name in CLASSES) == pytest.approx(1, abs=1e-5)
        for name in CLASSES:
            assert float(other[name]) == pytest.approx(float(row[f"p({name})"]), abs=2e-6)


def test_self_pre_training_keeps_the_same_scans_apart(
    run_bundle: Run, data_of: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of(CONVVIT_CT) | {"test_fold": 1}
    knobs = {"embed_dims": [6, 6, 6, 12], "depths": [1, 1, 1, 2], "num_heads": 2}
    small = {"epochs": 1, "levels::2::samples": 1, "preview_interval": 9}
    pretraining = run_bundle(MIM, "train", folder=tmp_path / "p", **data, **knobs, **small)
    encoder = tmp_path / "p" / "models" / "encoder.pt"
    training = run_bundle(CONVVIT_CT, "train", folder=tmp_path, pretrained_encoder=encoder, epochs=1, **data)
    splits = [workflow.parser.get_parsed_content("split") for workflow in (pretraining, training)]
    for part in ("training", "validation", "test"):
        names = [{item["image"] for item in getattr(split, part)} for split in splits]
        assert names[0] == names[1] != set()
    description = json.loads((tmp_path / "models" / "model.json").read_text())
    assert [seen["name"] for seen in description["pretrained_on"]] == ["phantom_ct"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"dataset": "phantom_cxr"}, "--dataset phantom_cxr: a preset of 2 axes, expected 3 for volumes"),
        ({"dataset": "hippocampus"}, "--dataset hippocampus: the preset names no classes"),
        ({"roi_size": [40, 32, 32]}, "--roi_size [40, 32, 32]: expected multiples of 16"),
        ({"class_weights": [1, 2]}, "--class_weights [1, 2]: expected null, balanced, or 3 numbers above 0"),
        ({"scaling": 2}, "--scaling 2: expected a number from 0 to 0.9"),
        ({"embed_dims": [6, 6, 6]}, "--embed_dims [6, 6, 6]: expected 4 whole numbers"),
    ],
)
def test_wrong_knobs(run_bundle: Run, tmp_path: Path, record_property: Callable, knobs: dict, message: str) -> None:
    with pytest.raises(SystemExit) as end:
        run_bundle(CONVVIT_CT, "train", folder=tmp_path, **knobs)
    record_property("error", str(end.value))
    assert message in str(end.value)
    assert len(str(end.value).splitlines()) == 1
    assert not (tmp_path / "models" / "model.pt").exists()


def test_every_faulty_scan_is_named(
    run_bundle: Run, lesions_dir: Path, tmp_path: Path, record_property: Callable
) -> None:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    paths = sorted(lesions_dir.rglob("*.nii.gz"))
    for path in paths:
        (folder / "images" / path.name).symlink_to(path)
    (folder / "labels.csv").write_text((lesions_dir / "labels.csv").read_text())
    broken, flat = (folder / "images" / path.name for path in paths[:2])
    for path in (broken, flat):
        path.unlink()
    broken.write_bytes(b"this is no scan")
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 5, np.int16), np.eye(4)), flat)
    with pytest.raises(SystemExit) as end:
        run_bundle(CONVVIT_CT, "train", folder=tmp_path, dataset_dir=folder)
    record_property("error", str(end.value))
    *faults, summary = sorted(str(end.value).splitlines(), key=lambda line: "cannot be used" in line)
    assert summary == f"error: 2 of {len(paths)} scans cannot be used"
    assert len(faults) == 2
    assert any(f"{broken}: not readable" in line for line in faults)
    assert any(f"{flat}: constant image" in line for line in faults)
