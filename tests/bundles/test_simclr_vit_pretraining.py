"""SimCLR bundle from end to end: views, training, evaluation, features, and the encoder's way on."""

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import ViT

from medmim import build_encoder
from medmim.description import build_network, read_description
from tests.common import SIMCLR, UNETR, rows, tensorboard_names

WINDOW = (16, 24, 16)  # voxels, the tiny network's region of interest
SCORES = ("loss", "accuracy", "alignment", "spread")
Run = Callable[..., ConfigWorkflow]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / "encoder.pt", weights_only=True)["state_dict"]


def changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


# ---------------------------------------------------------------------------------------------------- views


@pytest.fixture
def datasets(phantom_dir: Path, coarse_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Builds the data sets of training and validation, with some knobs, without running anything."""

    def make(**knobs: Any) -> tuple[Any, Any]:
        monkeypatch.chdir(Path(__file__).resolve().parents[2] / "bundles" / SIMCLR)
        settings = {"dataset": str(coarse_preset), "dataset_dir": str(phantom_dir), "output_dir": str(tmp_path)}
        settings |= {"num_workers": 0, "crops_per_scan": 2, "cache": "none"} | knobs
        workflow = ConfigWorkflow("configs/train.yaml", logging_file=False, workflow_type="train", **settings)
        workflow.initialize()
        return tuple(workflow.parser.get_parsed_content(f"{part}#dataset") for part in ("train", "validate"))

    return make


def plain(view: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(view).as_subclass(torch.Tensor)


def test_views_differ_and_come_again(datasets: Callable) -> None:
    """Within a pair, between crops, between epochs and seeds; the same for the same (seed, epoch, sample)."""
    training, validation = datasets(crop_scale=0.5, intensity_prob=1.0, cutout_prob=1.0)
    training.set_epoch(3)
    crops = training[1]
    views = [plain(crop[key]) for crop in crops for key in ("image", "image_2")]
    assert len(views) == 4
    assert all(view.shape == (1, *WINDOW) for view in views)
    assert all(torch.isfinite(view).all() for view in views)
    for index, view in enumerate(views):
        assert not any(torch.equal(view, other) for other in views[:index])
    training[0]  # whatever was drawn in between
    again = [plain(crop[key]) for crop in training[1] for key in ("image", "image_2")]
    assert all(torch.equal(*pair) for pair in zip(views, again, strict=True))
    training.set_epoch(4)
    assert not torch.equal(plain(training[1][0]["image"]), views[0])
    other_seed = datasets(crop_scale=0.5, intensity_prob=1.0, cutout_prob=1.0, seed=1)[0]
    other_seed.set_epoch(3)
    assert not torch.equal(plain(other_seed[1][0]["image"]), views[0])
    first, second = (validation[0] for _ in range(2))
    assert torch.equal(plain(first["image"]), plain(second["image"]))
    assert not torch.equal(plain(first["image"]), plain(first["image_2"]))


def test_every_change_can_be_left_out(datasets: Callable) -> None:
    """Then both views are the crop itself."""
    training, _ = datasets(crop_scale=1.0, intensity_prob=0.0, cutout_prob=0.0, flip_prob=0.0)
    crop = training[0][0]
    assert torch.equal(plain(crop["image"]), plain(crop["image_2"]))


@pytest.mark.parametrize(
    "knobs", [{"crop_scale": 0.5}, {"intensity_prob": 1.0}, {"cutout_prob": 1.0}, {"flip_prob": 0.5}], ids=str
)
def test_each_change_is_drawn_for_each_view(datasets: Callable, knobs: dict) -> None:
    off = {"crop_scale": 1.0, "intensity_prob": 0.0, "cutout_prob": 0.0, "flip_prob": 0.0}
    training, _ = datasets(**off | knobs)
    crops = [crop for index in range(4) for crop in training[index]]
    assert sum(not torch.equal(plain(crop["image"]), plain(crop["image_2"])) for crop in crops) > 4


def test_small_scans_are_padded_with_zeros(datasets: Callable) -> None:
    _, validation = datasets(roi_size=[16, 24, 48], crop_scale=1.0, intensity_prob=0.0, cutout_prob=0.0, flip_prob=0.0)
    view = plain(validation[0]["image"])
    assert view.shape == (1, 16, 24, 48)
    assert torch.equal(view[..., [0, -1]], torch.zeros(1, 16, 24, 2))
    assert float(view.max()) > 0


# ---------------------------------------------------------------------------------------------------- training


def test_training_writes_everything(pretrained_simclr: Path) -> None:
    output = pretrained_simclr / "output"
    for name in ("checkpoint.pt", "curves.png", "checked_scans.json", "previews/epoch_0008.png"):
        assert (output / name).stat().st_size > 0, name
    wanted = {f"{part}_{name}" for part in ("train", "val") for name in SCORES}
    assert wanted | {"learning_rate"} <= tensorboard_names(output / "tensorboard")
    assert tensorboard_names(output / "tensorboard", "images") == {"views"}
    models = pretrained_simclr / "models"
    assert sorted(path.name for path in models.iterdir()) == ["encoder.pt", "model.json", "model.pt"]
    scalars = rows(output / "scalars.csv")
    assert [int(row["epoch"]) for row in scalars] == list(range(1, 9))
    assert [row["epoch"] for row in scalars if row["val_loss"]] == ["4", "8"]
    for row in scalars:
        assert 0 <= float(row["train_accuracy"]) <= 1
        assert -1 <= float(row["train_alignment"]) <= 1
        assert 0 <= float(row["train_spread"]) <= 1.5


def test_it_finds_the_other_view(run_bundle: Run, tmp_path: Path) -> None:
    """Where only noise and cutout tell the views apart."""
    knobs = {"crop_scale": 1.0, "intensity_prob": 0.2, "batch_size": 4, "temperature": 0.2, "learning_rate": 0.003}
    run_bundle(SIMCLR, "train", folder=tmp_path, epochs=20, warmup_epochs=5, val_interval=20, **knobs)
    scalars = rows(tmp_path / "output" / "scalars.csv")
    assert float(scalars[-1]["train_loss"]) < 0.9 * float(scalars[0]["train_loss"])
    assert float(scalars[-1]["train_accuracy"]) > 2 / 15  # chance: 8 pairs


def test_encoder_is_a_stock_vit(pretrained_simclr: Path) -> None:
    content = torch.load(pretrained_simclr / "models" / "encoder.pt", weights_only=True)
    arguments = content["description"]["network"]["arguments"]
    assert arguments["img_size"] == list(WINDOW)
    vit = ViT(**arguments)
    vit.load_state_dict(content["state_dict"], strict=True)
    image = torch.rand(1, 1, *WINDOW)
    ours = build_encoder(pretrained_simclr / "models" / "encoder.pt")
    torch.testing.assert_close(vit.eval()(image)[0], ours.eval()(image)[0])
    network = build_network(read_description(pretrained_simclr / "models" / "model.json"))
    state_dict = torch.load(pretrained_simclr / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state_dict, strict=True)
    assert network(torch.rand(2, 1, *WINDOW)).shape == (2, 48, 2, 3, 2)


def test_training_changed_the_encoder(pretrained_simclr: Path, run_bundle: Run, tmp_path: Path) -> None:
    run_bundle(SIMCLR, "train", folder=tmp_path, epochs=1, learning_rate=0.0)
    start = weights(tmp_path)
    unused = {name for name in start if "norm_cross_attn" in name}
    fixed = unused | {"patch_embedding.position_embeddings"}
    assert changed(start, weights(pretrained_simclr)) == start.keys() - fixed


def test_evaluation_repeats_the_last_validation(pretrained_simclr: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Whatever the batch size; and a single pair in a batch is no matter here."""
    checkpoint = pretrained_simclr / "output" / "checkpoint.pt"
    last = rows(pretrained_simclr / "output" / "scalars.csv")[-1]
    for batch_size in (2, 1):
        knobs = {"checkpoint": checkpoint, "batch_size": batch_size, "crops_per_scan": 1}
        workflow = run_bundle(SIMCLR, "train", "evaluate", folder=tmp_path, **knobs)
        found = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
        for name in SCORES:
            assert found[f"val_{name}"] == pytest.approx(float(last[f"val_{name}"]), rel=1e-4, abs=1e-6), name


def test_evaluation_with_another_temperature_is_refused(
    pretrained_simclr: Path, run_bundle: Run, tmp_path: Path
) -> None:
    checkpoint = pretrained_simclr / "output" / "checkpoint.pt"
    with pytest.raises(SystemExit, match=r"other knobs than it was trained with: give --temperature 0\.5"):
        run_bundle(SIMCLR, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint, temperature=0.1)


def test_features_are_the_encoders(pretrained_simclr: Path, run_bundle: Run, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(0, 200, (32, 24, 16)).astype(np.float32)
    volume[[0, -1]] = volume[:, [0, -1]] = volume[..., [0, -1]] = 100.0  # nothing for the foreground crop
    scan = tmp_path / "scans" / "one.nii.gz"
    scan.parent.mkdir()
    nib.save(nib.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0])), scan)
    models = pretrained_simclr / "models"
    run_bundle(SIMCLR, "inference", folder=tmp_path, dataset_dir=scan.parent, models_dir=models)
    values = nib.load(tmp_path / "output" / "one_features.nii.gz").get_fdata().reshape(4, 3, 2, 48)
    image = torch.from_numpy(np.clip((volume + 175) / 425, 0, 1)).float()[None, None]
    encoder = build_encoder(models / "encoder.pt").eval()
    with torch.no_grad():
        for window in range(2):
            tokens = encoder(image[:, :, 16 * window : 16 * (window + 1)])[0]
            found = values[2 * window : 2 * (window + 1)].reshape(12, 48)
            np.testing.assert_allclose(found, tokens[0].numpy(), atol=1e-4)


def test_encoder_gets_into_a_segmentation(pretrained_simclr: Path, run_bundle: Run, tmp_path: Path) -> None:
    encoder = pretrained_simclr / "models" / "encoder.pt"
    run_bundle(UNETR, "train", folder=tmp_path, pretrained_encoder=encoder, epochs=1, learning_rate=0.0)
    network = torch.load(tmp_path / "output" / "checkpoint.pt", weights_only=True)["network"]
    loaded = {name.removeprefix("vit."): value for name, value in network.items() if name.startswith("vit.")}
    assert changed(weights(pretrained_simclr), loaded) == set()


@pytest.mark.parametrize(
    "knobs",
    [
        {"position_embedding": "learnable"},
        {"standardize": "false", "temperature": 0.1},
        {"projector_num_layers": 3, "projector_out_size": 8},
        {"accumulation_steps": 2, "activation_checkpointing": "true"},
        {"amp": "true", "amp_dtype": "bfloat16"},
        {"flip_prob": 0.5, "cutout_holes": 2, "crop_scale": 0.3},
        {"cache": "disk", "num_workers": 2},
    ],
    ids=lambda knobs: next(iter(knobs)),
)
def test_options_train(run_bundle: Run, tmp_path: Path, knobs: dict) -> None:
    run_bundle(SIMCLR, "train", folder=tmp_path, **knobs)
    scalars = rows(tmp_path / "output" / "scalars.csv")
    assert all(
        np.isfinite(float(row[f"{part}_{name}"])) for row in scalars for part in ("train", "val") for name in SCORES
    )


def test_collapse_is_said(run_bundle: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Views of nothing but zeros are embedded alike."""
    knobs = {"cutout_prob": 1.0, "cutout_holes": 999, "intensity_prob": 0.0, "epochs": 3}
    with caplog.at_level(logging.WARNING, "medmim.contrastive"):
        run_bundle(SIMCLR, "train", folder=tmp_path, **knobs)
    said = [message for message in caplog.messages if "they have collapsed" in message]
    assert len(said) == 1
    assert said[0].startswith("epoch 1: spread of the embeddings 0.0")


def test_weights_of_workers_and_seeds(run_bundle: Run, tmp_path: Path) -> None:
    runs = {"first": {}, "again": {"num_workers": 2}, "other": {"seed": 4}}
    for name, knobs in runs.items():
        run_bundle(SIMCLR, "train", folder=tmp_path / name, **knobs)
    found = [weights(tmp_path / name) for name in runs]
    assert [bool(changed(*pair)) for pair in pairwise(found)] == [False, True]


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"temperature": 0}, "--temperature 0: expected a number of at least 0.001"),
        ({"standardize": "perhaps"}, "--standardize perhaps: expected true or false"),
        ({"crop_scale": 0}, "--crop_scale 0: expected a number from 0.1 to 1"),
        ({"intensity_prob": 2}, "--intensity_prob 2: expected a number from 0 to 1"),
        ({"cutout_prob": "often"}, "--cutout_prob often: expected a number from 0 to 1"),
        ({"cutout_holes": 0}, "--cutout_holes 0: expected a whole number of at least 1"),
        ({"projector_num_layers": 0}, "--projector_num_layers 0: expected a whole number of at least 1"),
        ({"num_heads": 5}, "--hidden_size 48: expected a multiple of 5"),
        ({"hidden_size": 52}, "--hidden_size 52: expected a multiple of 6"),
        ({"roi_size": [16, 20, 16]}, "--roi_size [16, 20, 16] is not divisible by --patch_size 8"),
        (
            {"batch_size": 1, "crops_per_scan": 1},
            "--batch_size 1: with 4 scans for training and --crops_per_scan 1 a batch would be one pair of views, "
            "which has no negatives: change batch_size, or raise crops_per_scan",
        ),
        ({"batch_size": 3, "crops_per_scan": 1}, "--batch_size 3: with 4 scans for training"),
        ({"folds": 6}, "1 scans for validation: one pair of views has no negatives, two are needed: lower --folds"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_knobs_that_cannot_be(
    run_bundle: Run, tmp_path: Path, record_property: Callable, knobs: dict, message: str
) -> None:
    with pytest.raises(SystemExit) as ending:
        run_bundle(SIMCLR, "train", folder=tmp_path, **knobs)
    record_property("error", str(ending.value.code))
    assert str(ending.value.code).startswith(f"error: {message}")
    assert "\n" not in str(ending.value.code)
    assert not (tmp_path / "models" / "encoder.pt").exists()
