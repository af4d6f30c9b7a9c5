"""Segmentation bundle from end to end: train, fine-tune, freeze, evaluate, predict."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from medmim.description import build_network, read_description
from tests.common import rows, tensorboard_names

BUNDLE = "unetr_segmentation"
CLASSES = ["liver", "spleen", "left kidney", "right kidney", "spine"]
Run = Callable[..., ConfigWorkflow]
Tensors = dict[str, torch.Tensor]


def final_weights(folder: Path) -> Tensors:
    """Weights after the last step (``model.pt`` holds the best ones)."""
    return torch.load(folder / "output" / "checkpoint.pt", weights_only=True)["network"]


def encoder_weights(pretrained: Path) -> Tensors:
    content = torch.load(pretrained / "models" / "encoder.pt", weights_only=True)
    return {f"vit.{name}": value for name, value in content["state_dict"].items()}


def changed(before: Tensors, after: Tensors) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_training_writes_everything_and_lowers_the_loss(finetuned: Path) -> None:
    output = finetuned / "output"
    for name in ("checkpoint.pt", "curves.png", "checked_scans.json", "previews/epoch_0020.png"):
        assert (output / name).stat().st_size > 0, name
    assert {"train_loss", "learning_rate", "mean_dice"} <= tensorboard_names(output / "tensorboard")
    assert tensorboard_names(output / "tensorboard", "images") == {"segmentation"}
    assert sorted(path.name for path in (finetuned / "models").iterdir()) == ["model.json", "model.pt"]
    scalars = rows(output / "scalars.csv")
    assert [int(row["epoch"]) for row in scalars] == list(range(1, 21))
    assert [row["epoch"] for row in scalars if row["mean_dice"]] == ["10", "20"]
    assert float(scalars[-1]["train_loss"]) < 0.75 * float(scalars[0]["train_loss"])
    assert float(scalars[-1]["mean_dice"]) > 0.1


def test_description_builds_the_model(finetuned: Path) -> None:
    state_dict = torch.load(finetuned / "models" / "model.pt", weights_only=True)
    description = read_description(finetuned / "models" / "model.json")
    network = build_network(description)
    network.load_state_dict(state_dict, strict=True)
    assert network(torch.rand(1, 1, 16, 24, 16)).shape == (1, 6, 16, 24, 16)
    assert list(description["preset"]["labels"].values()) == CLASSES


def test_the_best_model_is_kept(run_bundle: Run, tmp_path: Path) -> None:
    # one step in an epoch: the first at the warm-up's rate 0, the second so large that it spoils the network
    run_bundle(BUNDLE, "train", folder=tmp_path, batch_size=4, learning_rate=1.0, warmup_epochs=1)
    run_bundle(BUNDLE, "train", folder=tmp_path / "start", batch_size=4, learning_rate=0.0)
    scores = [float(row["mean_dice"]) for row in rows(tmp_path / "output" / "scalars.csv")]
    weights = [final_weights(tmp_path / "start"), final_weights(tmp_path)]  # after each epoch
    kept = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    best = scores.index(max(scores))
    assert changed(kept, weights[best]) == set()
    assert changed(kept, weights[1 - best])


# -------------------------------------------------------------------------------------------------- the encoder's way


def test_pretrained_encoder_gets_in(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"epochs": 1, "learning_rate": 0.0}  # the weights stay those of the start
    encoder = pretrained / "models" / "encoder.pt"
    run_bundle(BUNDLE, "train", folder=tmp_path / "with", pretrained_encoder=encoder, **knobs)
    run_bundle(BUNDLE, "train", folder=tmp_path / "without", **knobs)
    loaded = encoder_weights(pretrained)
    assert changed(loaded, final_weights(tmp_path / "with")) == set()
    assert "vit.blocks.0.attn.qkv.weight" in changed(loaded, final_weights(tmp_path / "without"))
    # nothing but the encoder differs between the two
    start = final_weights(tmp_path / "with")
    assert changed(start, final_weights(tmp_path / "without")) <= loaded.keys()


def test_fine_tuning_trains_the_encoder(pretrained: Path, finetuned: Path) -> None:
    before = encoder_weights(pretrained)
    assert changed(before, final_weights(finetuned)) == {name for name in before if "norm_cross_attn" not in name}


def test_frozen_encoder_stays_as_it_is(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    encoder = pretrained / "models" / "encoder.pt"
    knobs = {"pretrained_encoder": encoder, "freeze_encoder": True}
    run_bundle(BUNDLE, "train", folder=tmp_path / "trained", learning_rate=0.01, **knobs)
    run_bundle(BUNDLE, "train", folder=tmp_path / "start", learning_rate=0.0, **knobs)
    start, trained = final_weights(tmp_path / "start"), final_weights(tmp_path / "trained")
    frozen = encoder_weights(pretrained)
    assert changed(frozen, trained) == set()
    assert changed(start, trained) == start.keys() - frozen.keys()


def test_encoder_of_another_region_and_channel_count(
    pretrained: Path, run_bundle: Run, phantom_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = [f"imagesTr/phantom_00{i}.nii.gz" for i in range(6)]
    items = [{"image": [image, image], "label": image.replace("images", "labels")} for image in images]
    (tmp_path / "list.json").write_text(json.dumps({"training": items}))
    preset = tmp_path / "two.yaml"
    preset.write_text(
        "channels: [first, second]\nspacing: [8, 8, 8]\nz_score: all\nroi_size: [24, 16, 16]\npatch_size: 8\n"
        "labels: {1: liver, 2: spleen, 3: left kidney, 4: right kidney, 5: spine}\n"
    )
    run_bundle(
        BUNDLE,
        "train",
        folder=tmp_path,
        dataset=preset,
        dataset_dir=phantom_dir,
        datalist=tmp_path / "list.json",
        roi_size=[24, 16, 16],
        learning_rate=0.0,
        epochs=1,
        pretrained_encoder=pretrained / "models" / "encoder.pt",
        allow_other_preset="true",
    )
    report = capsys.readouterr().out
    assert "57 of 57 encoder tensors loaded, 1 resized (patch_embedding.position_embeddings), 1 adapted" in report
    stem = "vit.patch_embedding.patch_embeddings.weight"
    torch.testing.assert_close(final_weights(tmp_path)[stem].sum(1, keepdim=True), encoder_weights(pretrained)[stem])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_seed_fixes_the_weights(run_bundle: Run, tmp_path: Path, num_workers: int) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        run_bundle(BUNDLE, "train", folder=tmp_path / name, seed=seed, num_workers=num_workers)
    first = final_weights(tmp_path / "first")
    assert changed(first, final_weights(tmp_path / "again")) == set()
    assert "vit.blocks.0.attn.qkv.weight" in changed(first, final_weights(tmp_path / "other"))
    best, again = (
        torch.load(tmp_path / name / "models" / "model.pt", weights_only=True) for name in ("first", "again")
    )
    assert changed(best, again) == set()


# ------------------------------------------------------------------------------------------------------- data set forms


@pytest.mark.parametrize("form", ["pairs without list", "csv", "json with validation"])
def test_data_set_forms(run_bundle: Run, phantom_dir: Path, tmp_path: Path, form: str) -> None:
    knobs = {"dataset_dir": phantom_dir}
    names = [f"phantom_00{i}.nii.gz" for i in range(6)]
    if form == "pairs without list":
        shutil.copytree(phantom_dir, tmp_path / "data")
        (tmp_path / "data" / "dataset.json").unlink()
        knobs["dataset_dir"] = tmp_path / "data"
    elif form == "csv":
        lines = ["image,label,fold", *[f"imagesTr/{name},labelsTr/{name},{int(i < 4)}" for i, name in enumerate(names)]]
        (tmp_path / "list.csv").write_text("\n".join(lines))
        knobs["datalist"] = tmp_path / "list.csv"
    else:
        items = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names]
        (tmp_path / "list.json").write_text(json.dumps({"training": items[:4], "validation": items[4:]}))
        knobs["datalist"] = tmp_path / "list.json"
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1, **knobs)
    split = workflow.parser.get_parsed_content("split")
    assert (len(split.training), len(split.validation)) == (4, 2)
    if form != "pairs without list":
        assert [Path(item["image"]).name for item in split.validation] == names[4:]
    assert (tmp_path / "models" / "model.pt").is_file()


def test_label_fraction(run_bundle: Run, tmp_path: Path) -> None:
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1, label_fraction=0.5)
    assert len(workflow.parser.get_parsed_content("train#dataset")) == 2
    assert len(workflow.parser.get_parsed_content("validate#dataset")) == 2


# -------------------------------------------------------------------------------------------- scores and predictions


@pytest.fixture(scope="module")
def evaluated(finetuned: Path, run_bundle: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    run_bundle(BUNDLE, "train", "evaluate", folder=folder, models_dir=finetuned / "models")
    return folder


@pytest.fixture(scope="module")
def predictions(finetuned: Path, run_bundle: Run, phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictions")
    knobs = {"dataset_dir": phantom_dir / "imagesTr", "models_dir": finetuned / "models", "overlap": 0.25}
    run_bundle(BUNDLE, "inference", folder=folder, **knobs)
    return folder / "output"


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_scores_of_each_case_and_class(evaluated: Path, phantom_dir: Path) -> None:
    scores = rows(evaluated / "output" / "scores.csv")
    cases = sorted({row["case"] for row in scores})
    assert [(row["case"], row["class"]) for row in scores] == [(case, name) for case in cases for name in CLASSES]
    assert len(cases) == 2
    for row in scores:
        label = nib.load(phantom_dir / "labelsTr" / Path(row["case"]).name)
        volume = (np.asarray(label.dataobj) == CLASSES.index(row["class"]) + 1).sum() * 0.045  # 3 x 3 x 5 mm
        assert float(row["reference_ml"]) == pytest.approx(volume)
        assert 0 <= float(row["dice"]) <= 1
        assert 0 <= float(row["surface_dice"]) <= 1
        assert float(row["hd95_mm"]) > 0


def test_scores_are_those_of_the_predicted_files(evaluated: Path, predictions: Path, phantom_dir: Path) -> None:
    for row in rows(evaluated / "output" / "scores.csv"):
        name = Path(row["case"]).name
        value = CLASSES.index(row["class"]) + 1
        prediction = np.asarray(nib.load(predictions / name.replace(".nii.gz", "_seg.nii.gz")).dataobj)
        label = np.asarray(nib.load(phantom_dir / "labelsTr" / name).dataobj)
        assert dice(prediction == value, label == value) == pytest.approx(float(row["dice"]), abs=1e-6)


def test_evaluation_repeats_the_best_validation(finetuned: Path, evaluated: Path) -> None:
    scores = rows(evaluated / "output" / "scores.csv")
    by_case = {
        case: [float(row["dice"]) for row in scores if row["case"] == case] for case in {r["case"] for r in scores}
    }
    best = max(float(row["mean_dice"]) for row in rows(finetuned / "output" / "scalars.csv") if row["mean_dice"])
    assert np.mean([np.mean(values) for values in by_case.values()]) == pytest.approx(best, abs=1e-6)


def test_predictions_lie_on_the_scans_own_grid(predictions: Path, phantom_dir: Path) -> None:
    images = sorted((phantom_dir / "imagesTr").iterdir())
    assert len(list(predictions.glob("*_seg.nii.gz"))) == len(images) == 6
    for path in images:
        image, prediction = nib.load(path), nib.load(predictions / path.name.replace(".nii.gz", "_seg.nii.gz"))
        assert prediction.shape == image.shape
        np.testing.assert_allclose(prediction.affine, image.affine, atol=1e-5)
        assert prediction.get_data_dtype() == np.uint8
        assert set(np.unique(prediction.dataobj)) <= set(range(6))
    assert (
        dice(np.asarray(prediction.dataobj) > 0, np.asarray(nib.load(phantom_dir / "labelsTr" / path.name).dataobj) > 0)
        > 0.3
    )


def test_predictions_do_not_depend_on_how_a_scan_is_stored(
    finetuned: Path, predictions: Path, run_bundle: Run, phantom_dir: Path, tmp_path: Path
) -> None:
    image = nib.load(phantom_dir / "imagesTr" / "phantom_000.nii.gz")
    folder = tmp_path / "scans" / "below"
    folder.mkdir(parents=True)
    for axes in ("LPS", "SRA", "PIR"):
        target = nib.orientations.axcodes2ornt(axes)
        nib.save(
            image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target)),
            folder / f"{axes}.nii",
        )
    knobs = {"dataset_dir": tmp_path / "scans", "models_dir": finetuned / "models", "overlap": 0.25}
    run_bundle(BUNDLE, "inference", folder=tmp_path, **knobs)
    reference = np.asarray(nib.load(predictions / "phantom_000_seg.nii.gz").dataobj)
    assert (reference > 0).sum() > 1000
    for axes in ("LPS", "SRA", "PIR"):
        scan = nib.load(folder / f"{axes}.nii")
        prediction = nib.load(tmp_path / "output" / "below" / f"{axes}_seg.nii.gz")
        assert prediction.shape == scan.shape
        np.testing.assert_allclose(prediction.affine, scan.affine, atol=1e-4)
        same = np.asarray(nib.as_closest_canonical(prediction).dataobj) == reference
        assert same.mean() > 0.999


def test_scan_smaller_than_a_window_is_predicted(
    finetuned: Path, run_bundle: Run, phantom_dir: Path, tmp_path: Path
) -> None:
    image = nib.load(phantom_dir / "imagesTr" / "phantom_001.nii.gz")
    (tmp_path / "scans").mkdir()
    nib.save(image.slicer[30:60, 20:50, 10:17], tmp_path / "scans" / "small.nii.gz")  # 12 x 12 x 5 voxels of 8 mm
    run_bundle(BUNDLE, "inference", folder=tmp_path, dataset_dir=tmp_path / "scans", models_dir=finetuned / "models")
    prediction = nib.load(tmp_path / "output" / "small_seg.nii.gz")
    assert prediction.shape == (30, 30, 7)


def test_learning_rates_fall_towards_the_input(run_bundle: Run, tmp_path: Path) -> None:
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1, layer_decay=0.5, learning_rate=0.01)
    optimizer = workflow.parser.get_parsed_content("optimizer")
    network = workflow.parser.get_parsed_content("network_def")
    rate = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [rate[id(block.attn.qkv.weight)] for block in network.vit.blocks]
    np.testing.assert_allclose(blocks, [0.01 * 0.5**k for k in (4, 3, 2, 1)])
    assert rate[id(network.vit.patch_embedding.patch_embeddings.weight)] == pytest.approx(0.01 * 0.5**5)
    assert rate[id(network.out.conv.conv.weight)] == 0.01
    assert not math.isnan(float(rows(tmp_path / "output" / "scalars.csv")[0]["train_loss"]))
