"""Classification of radiographs, through the real bundle runner."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from tests.common import FILES, VIT_CXR, rows, tensorboard_names

Run = Callable[..., ConfigWorkflow]
FINDINGS = ["effusion", "nodule"]


def write_list(folder: Path, header: list[str], lines: list[list[str]]) -> Path:
    path = folder / "list.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path


@pytest.fixture
def images(radiographs_dir: Path) -> list[dict[str, str]]:
    return rows(radiographs_dir / "labels.csv")


@pytest.fixture
def one_preset(tmp_path: Path) -> Callable[..., Path]:
    """Writes a preset of one's own: ``one_preset(task=..., classes=...)``."""

    def write(**classification: object) -> Path:
        path = tmp_path / "mine.yaml"
        body = {"channels": ["X-ray"], "roi_size": [32, 24], "patch_size": 8, "z_score": "all"}
        path.write_text(json.dumps(body | {"classification": classification}))
        return path

    return write


def test_training_writes_everything(classified: Path) -> None:
    assert {path.name for path in (classified / "models").iterdir()} == set(FILES[VIT_CXR])
    table = rows(classified / "output" / "scalars.csv")
    assert [bool(row["mean_auc"]) for row in table] == [False, False, False, True] * 2
    assert all(0 <= float(row["mean_auc"]) <= 1 for row in table if row["mean_auc"])
    assert np.asarray(Image.open(classified / "output" / "previews" / "epoch_0008.png")).std() > 1
    assert {"train_loss", "mean_auc", "val_loss"} <= tensorboard_names(classified / "output" / "tensorboard")
    description = json.loads((classified / "models" / "model.json").read_text())
    assert list(description["thresholds"]) == FINDINGS
    assert [data["name"] for data in description["pretrained_on"]] == ["phantom_cxr"]
    assert description["network"]["name"] == "ViTClassifier"


def test_evaluation(classified: Path, run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"models_dir": classified / "models", "test_fold": 1}
    best = max(float(row["mean_auc"]) for row in rows(classified / "output" / "scalars.csv") if row["mean_auc"])
    thresholds = json.loads((classified / "models" / "model.json").read_text())["thresholds"]
    files = {}
    for part in ("validation", "test"):
        run_bundle(VIT_CXR, "train", "evaluate", folder=tmp_path, part=part, **knobs)
        folder = tmp_path / "output" / f"scores_{part}"
        table = rows(folder / "scores.csv")
        assert [row["class"] for row in table] == [*FINDINGS, "mean of 2"]
        if part == "validation":
            assert float(table[-1]["auc"]) == pytest.approx(best, abs=1e-6)
        for row in table[:2]:
            assert float(row["auc_low"]) <= float(row["auc"]) <= float(row["auc_high"])
            assert float(row["threshold"]) == pytest.approx(thresholds[row["class"]], abs=1e-6)
        for name in ("roc.png", "precision_recall.png", "confusion.png"):
            assert np.asarray(Image.open(folder / name)).std() > 1, name
        cases = rows(folder / "predictions.csv")
        files[part] = {row["image"] for row in cases}
        assert all(0 <= float(row[f"p({name})"]) <= 1 for row in cases for name in FINDINGS)
    assert files["validation"]
    assert files["test"]
    assert not files["validation"] & files["test"]


def test_inference(classified: Path, run_bundle: Run, radiographs_dir: Path, tmp_path: Path) -> None:
    for name in ("a/one.png", "b/one.png"):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
    first, second = sorted(radiographs_dir.rglob("*.png"))[:2]
    Image.open(first).save(tmp_path / "new" / "a" / "one.png")
    Image.open(second).convert("RGB").resize((70, 51)).save(tmp_path / "new" / "b" / "one.png")
    knobs = {"models_dir": classified / "models", "dataset_dir": tmp_path / "new"}
    run_bundle(VIT_CXR, "inference", folder=tmp_path, overlay="attention", **knobs)
    table = rows(tmp_path / "output" / "probabilities.csv")
    assert [row["image"] for row in table] == ["a/one.png", "b/one.png"]
    assert list(table[0]) == ["image", *FINDINGS, "predicted"]
    for name in ("a/one.png.png", "b/one.png.png"):
        assert np.asarray(Image.open(tmp_path / "output" / "overlays" / name)).std() > 1


def test_probabilities_are_those_of_the_evaluation(
    classified: Path, run_bundle: Run, radiographs_dir: Path, tmp_path: Path
) -> None:
    run_bundle(VIT_CXR, "train", "evaluate", folder=tmp_path / "e", models_dir=classified / "models", test_fold=1)
    knobs = {"models_dir": classified / "models", "dataset_dir": radiographs_dir}
    run_bundle(VIT_CXR, "inference", folder=tmp_path / "i", **knobs)
    found = {row["image"]: row for row in rows(tmp_path / "i" / "output" / "probabilities.csv")}
    for row in rows(tmp_path / "e" / "output" / "scores_validation" / "predictions.csv"):
        other = found[Path(row["image"]).relative_to(radiographs_dir).as_posix()]
        for name in FINDINGS:
            assert float(other[name]) == pytest.approx(float(row[f"p({name})"]), abs=2e-6)


@pytest.mark.parametrize(
    ("task", "classes", "label"),
    [
        ("multiclass", ["clear", "effusion", "nodule"], lambda row: "nodule" if row["nodule"] == "1" else row["e"]),
        ("binary", ["clear", "effusion"], lambda row: row["e"]),
    ],
)
def test_other_tasks(
    run_bundle: Run,
    images: list,
    radiographs_dir: Path,
    one_preset: Callable,
    tmp_path: Path,
    task: str,
    classes: list,
    label: Callable,
) -> None:
    lines = []
    for row in images:
        row["e"] = "effusion" if row["effusion"] == "1" else "clear"
        lines.append([row["image"], label(row), row["patient"]])
    datalist = write_list(tmp_path, ["image", "label", "patient"], lines)
    knobs = {"dataset": one_preset(task=task, classes=classes), "datalist": datalist, "folder": tmp_path}
    more = {"class_weights": "balanced", "mixup_alpha": 0.4, "pooling": "class_token", "drop_path_rate": 0.2}
    run_bundle(VIT_CXR, "train", **knobs, **more)
    run_bundle(VIT_CXR, "train", "evaluate", **knobs, **more)
    table = rows(tmp_path / "output" / "scores_validation" / "scores.csv")
    assert [row["class"] for row in table][:-1] == (classes if task == "multiclass" else classes[1:])
    images_dir = radiographs_dir / "images"
    run_bundle(VIT_CXR, "inference", folder=tmp_path, dataset_dir=images_dir, overlay="occlusion", batch_size=32)
    found = rows(tmp_path / "output" / "probabilities.csv")
    assert {row["predicted"] for row in found} <= set(classes)
    if task == "multiclass":
        assert all(math.isclose(sum(float(row[name]) for name in classes), 1, abs_tol=1e-5) for row in found)


def test_unknown_labels_and_an_absent_class(
    run_bundle: Run, images: list, one_preset: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        [row["image"], row["effusion"], "" if i % 3 else row["nodule"], "0", row["patient"]]
        for i, row in enumerate(images)
    ]
    datalist = write_list(tmp_path, ["image", *FINDINGS, "hernia", "patient"], lines)
    preset = one_preset(task="multilabel", classes=[*FINDINGS, "hernia"])
    knobs = {"dataset": preset, "datalist": datalist, "folder": tmp_path}
    run_bundle(VIT_CXR, "train", **knobs)
    run_bundle(VIT_CXR, "train", "evaluate", **knobs)
    table = {row["class"]: row for row in rows(tmp_path / "output" / "scores_validation" / "scores.csv")}
    assert table["hernia"]["auc"] == ""
    assert "nan" not in {value for row in table.values() for value in row.values()}
    assert int(table["nodule"]["images"]) < int(table["effusion"]["images"])
    assert "no image has hernia" in caplog.text
    assert torch.isfinite(
        torch.tensor([float(row["train_loss"]) for row in rows(tmp_path / "output/scalars.csv")])
    ).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[3].__setitem__(1, "2"), "line 5: '2' in column 'effusion', expected 1, 0, or nothing"),
        (lambda lines: lines.append(lines[0]), "listed 2 times"),
        (lambda lines: lines[3].__setitem__(slice(1, 3), ["", ""]), "no label is known for"),
        (lambda lines: lines[3].__setitem__(0, "images/none.png"), "line 5: images/none.png: no such file in"),
        (lambda lines: lines[3].__setitem__(4, "traning"), "line 5: split 'traning', expected one of train"),
    ],
)
def test_faulty_lists(
    run_bundle: Run, images: list, tmp_path: Path, record_property: Callable, change: Callable, message: str
) -> None:
    lines = [[row["image"], row["effusion"], row["nodule"], row["patient"], ""] for row in images]
    change(lines)
    datalist = write_list(tmp_path, ["image", *FINDINGS, "patient", "split"], lines)
    with pytest.raises(SystemExit) as end:
        run_bundle(VIT_CXR, "train", folder=tmp_path, datalist=datalist)
    record_property("error", str(end.value))
    assert message in str(end.value)
    assert len(str(end.value).splitlines()) == 1
    assert not (tmp_path / "models" / "model.pt").exists()


def test_every_faulty_image_is_named_before_training(
    run_bundle: Run, radiographs_dir: Path, tmp_path: Path, record_property: Callable
) -> None:
    """Nothing is lost: the run ends before the first step, with a line for each file."""
    folder = tmp_path / "data"
    for source in radiographs_dir.rglob("*.png"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.open(source).save(folder / "images" / source.name)
    (folder / "labels.csv").write_text((radiographs_dir / "labels.csv").read_text())
    names = sorted(path.name for path in (folder / "images").iterdir())
    (folder / "images" / names[0]).write_bytes(b"")
    Image.open(folder / "images" / names[1]).convert("CMYK").save(folder / "images" / names[1], format="JPEG")
    colours = Image.open(folder / "images" / names[2]).convert("RGB")
    colours.putpixel((3, 3), (255, 0, 0))
    colours.save(folder / "images" / names[2])
    sixteen = np.asarray(Image.open(folder / "images" / names[3])).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(folder / "images" / names[3])  # is fine
    with pytest.raises(SystemExit) as end:
        run_bundle(VIT_CXR, "train", folder=tmp_path, dataset_dir=folder)
    record_property("error", str(end.value))
    found = str(end.value).splitlines()
    assert len(found) == 4
    for name, reason in zip(names, ("empty file", "CMYK", "colours"), strict=False):
        assert [reason in line for line in found if f"/{name}:" in line] == [True], name
    assert found[3] == f"error: 3 of {len(names)} scans cannot be used"


def test_part_test_without_test_images(
    classified: Path, run_bundle: Run, tmp_path: Path, record_property: Callable
) -> None:
    with pytest.raises(SystemExit, match="--part test: 0 images for testing: give --test_fold") as end:
        run_bundle(VIT_CXR, "train", "evaluate", folder=tmp_path, models_dir=classified / "models", part="test")
    record_property("error", str(end.value))


def test_wrong_knobs_are_all_said(run_bundle: Run, tmp_path: Path, record_property: Callable) -> None:
    knobs = {"pooling": "max", "class_weights": [1.0], "mixup_alpha": -1, "test_fold": 0, "drop_path_rate": 1.5}
    with pytest.raises(SystemExit) as end:
        run_bundle(VIT_CXR, "train", folder=tmp_path, **knobs)
    record_property("error", str(end.value))
    said = str(end.value)
    for knob in ("pooling max", "mixup_alpha -1", "test_fold 0", "drop_path_rate 1.5"):
        assert f"--{knob}: " in said, said
