"""Pre-training bundle from end to end: train, evaluate, features, reconstructions, and data sets in each form."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import ViT

from medmim import build_encoder
from medmim.description import build_network, read_description
from tests.common import rows, tensorboard_names

BUNDLE = "mae_vit_pretraining"
WINDOW = (16, 24, 16)  # voxels, the tiny network's region of interest
PATCH = 8
Run = Callable[..., ConfigWorkflow]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / "encoder.pt", weights_only=True)["state_dict"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_writes_everything_and_lowers_the_loss(pretrained: Path) -> None:
    output = pretrained / "output"
    for name in ("checkpoint.pt", "curves.png", "checked_scans.json", "previews/epoch_0008.png"):
        assert (output / name).stat().st_size > 0, name
    assert {"train_loss", "learning_rate", "val_loss"} <= tensorboard_names(output / "tensorboard")
    assert tensorboard_names(output / "tensorboard", "images") == {"reconstruction"}
    assert sorted(path.name for path in (pretrained / "models").iterdir()) == ["encoder.pt", "model.json", "model.pt"]
    scalars = rows(output / "scalars.csv")
    assert [int(row["epoch"]) for row in scalars] == list(range(1, 9))
    assert [row["epoch"] for row in scalars if row["val_loss"]] == ["4", "8"]
    assert float(scalars[-1]["train_loss"]) < 0.85 * float(scalars[0]["train_loss"])
    assert float(scalars[-1]["val_loss"]) < float(scalars[3]["val_loss"])


def test_encoder_is_a_stock_vit(pretrained: Path) -> None:
    content = torch.load(pretrained / "models" / "encoder.pt", weights_only=True)
    arguments = content["description"]["network"]["arguments"]
    assert arguments["img_size"] == list(WINDOW)
    assert (arguments["hidden_size"], arguments["mlp_dim"], arguments["num_layers"]) == (48, 96, 4)
    assert content["description"]["preset"]["name"] == "coarse"
    assert content["description"]["preset"]["spacing"] == [8.0, 8.0, 8.0]
    vit = ViT(**arguments)
    vit.load_state_dict(content["state_dict"], strict=True)
    image = torch.rand(1, 1, *WINDOW)
    ours = build_encoder(pretrained / "models" / "encoder.pt")
    torch.testing.assert_close(vit.eval()(image)[0], ours.eval()(image)[0])


def test_description_builds_the_model(pretrained: Path) -> None:
    state_dict = torch.load(pretrained / "models" / "model.pt", weights_only=True)
    network = build_network(read_description(pretrained / "models" / "model.json"))
    network.load_state_dict(state_dict, strict=True)
    assert network(torch.rand(2, 1, *WINDOW)).shape == (2, 48, 2, 3, 2)
    assert same({name.removeprefix("encoder."): value for name, value in state_dict.items()}, weights(pretrained))


def test_training_changed_the_encoder(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1, learning_rate=0.0)
    start = weights(tmp_path)
    trained = weights(pretrained)
    fixed = {name for name, value in start.items() if torch.equal(value, trained[name])}
    unused = {name for name in start if "norm_cross_attn" in name}
    assert fixed == unused | {"patch_embedding.position_embeddings"}


def test_evaluation_repeats_the_last_validation(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = pretrained / "output" / "checkpoint.pt"
    workflow = run_bundle(BUNDLE, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint)
    found = workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_loss"]
    assert found == pytest.approx(float(rows(pretrained / "output" / "scalars.csv")[-1]["val_loss"]), rel=1e-5)


def test_features_are_the_encoders(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    # 30 voxels get one voxel of padding on each side; two windows along the first axis
    volume = np.random.default_rng(0).normal(0, 200, (30, 24, 16)).astype(np.float32)
    volume[[0, -1]] = volume[:, [0, -1]] = volume[..., [0, -1]] = 100.0  # nothing for the foreground crop
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = [-100.0, 20.0, 7.0]
    scan = tmp_path / "scans" / "site_a" / "one.nii.gz"
    scan.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(volume, affine), scan)
    run_bundle(BUNDLE, "inference", folder=tmp_path, dataset_dir=tmp_path / "scans", models_dir=pretrained / "models")
    features = nib.load(tmp_path / "output" / "site_a" / "one_features.nii.gz")
    values = features.get_fdata().reshape(4, 3, 2, 48)

    expected = affine @ np.array([-1 + (PATCH - 1) / 2, (PATCH - 1) / 2, (PATCH - 1) / 2, 1])  # centre of a patch
    np.testing.assert_allclose(features.affine[:3, 3], expected[:3], atol=1e-4)
    np.testing.assert_allclose(features.affine[:3, :3], np.diag([64.0, 64.0, 64.0]), atol=1e-4)

    image = np.clip((volume + 175) / 425, 0, 1)
    image = torch.from_numpy(np.pad(image, ((1, 1), (0, 0), (0, 0)))).float()[None, None]
    encoder = build_encoder(pretrained / "models" / "encoder.pt").eval()
    with torch.no_grad():
        for window in range(2):
            tokens = encoder(image[:, :, 16 * window : 16 * (window + 1)])[0]
            found = values[2 * window : 2 * (window + 1)].reshape(12, 48)
            np.testing.assert_allclose(found, tokens[0].numpy(), atol=1e-4)


def test_features_of_each_scan(pretrained: Path, run_bundle: Run, phantom_dir: Path, tmp_path: Path) -> None:
    images = phantom_dir / "imagesTr"
    run_bundle(BUNDLE, "inference", folder=tmp_path, dataset_dir=images, models_dir=pretrained / "models")
    for scan in images.iterdir():
        name = scan.name.removesuffix(".nii.gz")
        features = nib.load(tmp_path / "output" / f"{name}_features.nii.gz")
        assert features.shape[-1] == 48
        assert np.isfinite(features.get_fdata()).all()
        image = nib.load(scan)
        corners = np.array([[0, 0, 0, 1], [*np.array(features.shape[:3]) - 1, 1]]) @ features.affine.T
        bounds = np.array([[-0.5, -0.5, -0.5, 1], [*np.array(image.shape) - 0.5, 1]]) @ image.affine.T
        window = 8.0 * np.array(WINDOW)  # mm; padding to whole windows may reach over the edge
        assert (corners[0, :3] > bounds[0, :3] - window).all()
        assert (corners[1, :3] < bounds[1, :3] + window).all()


def test_reconstructions(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = pretrained / "output" / "checkpoint.pt"
    run_bundle(BUNDLE, "train", "reconstruct", folder=tmp_path, checkpoint=checkpoint)
    folder = tmp_path / "output" / "reconstructions" / "imagesTr"  # as below dataset_dir
    names = {path.name.split("_masked")[0] for path in folder.glob("*_masked.nii.gz")}
    assert len(names) == 2  # the validation scans
    for name in names:
        assert (folder / f"{name}_reconstruction.png").stat().st_size > 0
        masked = nib.load(folder / f"{name}_masked.nii.gz")
        reconstruction = nib.load(folder / f"{name}_reconstruction.nii.gz")
        np.testing.assert_allclose(masked.affine, reconstruction.affine)
        np.testing.assert_allclose(nib.affines.voxel_sizes(masked.affine), 8.0)
        changed = masked.get_fdata() != reconstruction.get_fdata()
        assert all(n % w == 0 for n, w in zip(changed.shape, WINDOW, strict=True))
        grid = [n // PATCH for n in changed.shape]
        blocks = changed.reshape(grid[0], PATCH, grid[1], PATCH, grid[2], PATCH)
        hidden = blocks.any(axis=(1, 3, 5))
        windows = hidden.reshape(grid[0] // 2, 2, grid[1] // 3, 3, grid[2] // 2, 2).sum(axis=(1, 3, 5))
        assert (windows == 9).all()  # three quarters of the twelve tokens of a window
        # hidden as a whole
        assert (masked.get_fdata().reshape(blocks.shape).transpose(0, 2, 4, 1, 3, 5)[hidden] == 0).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_seed_fixes_the_weights(run_bundle: Run, tmp_path: Path, num_workers: int) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        run_bundle(BUNDLE, "train", folder=tmp_path / name, seed=seed, num_workers=num_workers)
    assert same(weights(tmp_path / "first"), weights(tmp_path / "again"))
    assert not same(weights(tmp_path / "first"), weights(tmp_path / "other"))
    first, again, other = (
        torch.load(tmp_path / name / "output" / "checkpoint.pt", weights_only=True)["network"]
        for name in ("first", "again", "other")
    )
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize(
    "knobs",
    [
        {"decoder": "mlp"},
        {"decoder": "linear"},
        {"position_embedding": "learnable"},
        {"loss_norm": "l1", "normalize_target": False, "loss_region": "all"},
        {"mask_unit": [16, 8, 8], "mask_ratio": 0.5},
        {"cache_rate": 0.0},
    ],
    ids=lambda knobs: next(iter(knobs)) + "=" + str(next(iter(knobs.values()))),
)
def test_options_train(run_bundle: Run, tmp_path: Path, knobs: dict) -> None:
    run_bundle(BUNDLE, "train", folder=tmp_path, learning_rate=0.003, epochs=3, **knobs)
    losses = [float(row["train_loss"]) for row in rows(tmp_path / "output" / "scalars.csv")]
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------------------------------------- labels, data sets


@pytest.mark.parametrize("labels", ["missing", "garbage"])
def test_labels_are_never_read(run_bundle: Run, phantom_dir: Path, tmp_path: Path, labels: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir / "imagesTr", folder / "imagesTr")
    shutil.copy(phantom_dir / "dataset.json", folder)
    if labels == "garbage":
        (folder / "labelsTr").mkdir()
        for image in (folder / "imagesTr").iterdir():
            (folder / "labelsTr" / image.name).write_bytes(b"not a label map")
    run_bundle(BUNDLE, "train", folder=tmp_path / "without", dataset_dir=folder)
    run_bundle(BUNDLE, "train", folder=tmp_path / "with")
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))


def data_set_in_form(form: str, phantom_dir: Path, folder: Path) -> dict[str, Path]:
    """The six phantom images once more, in another form; the knobs that lead to them."""
    images = sorted((phantom_dir / "imagesTr").iterdir())
    folder.mkdir()
    if form == "nested folder":
        for i, image in enumerate(images):
            (folder / f"patient_{i}").mkdir()
            shutil.copy(image, folder / f"patient_{i}" / "ct.nii.gz")
            (folder / f"patient_{i}" / "._ct.nii.gz").write_bytes(b"companion of macOS")
        return {"dataset_dir": folder}
    if form == "uncompressed":
        for image in images:
            nib.save(nib.load(image), folder / image.name.removesuffix(".gz"))
        return {"dataset_dir": folder}
    if form == "imagesTr without list":
        shutil.copytree(phantom_dir / "imagesTr", folder / "imagesTr")
        return {"dataset_dir": folder}
    if form == "json of names":
        entries = [f"imagesTr/{image.name}" for image in images]
        content = {"training": entries[:4], "validation": entries[4:]}
        (folder / "list.json").write_text(json.dumps(content))
        return {"dataset_dir": phantom_dir, "datalist": folder / "list.json"}
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "fold"])
        writer.writerows([image, 0 if i > 3 else 1] for i, image in enumerate(images))
    return {"dataset_dir": phantom_dir, "datalist": folder / "list.csv"}


@pytest.mark.parametrize("form", ["nested folder", "uncompressed", "imagesTr without list", "json of names", "csv"])
def test_data_set_forms(
    run_bundle: Run, phantom_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    knobs = data_set_in_form(form, phantom_dir, tmp_path / "data")
    with caplog.at_level(logging.INFO, "medmim"):
        workflow = run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1, **knobs)
    assert ": 4 scans for training, 2 for validation (fold 0 of 5) from " in caplog.text
    assert weights(tmp_path)
    if form in ("json of names", "csv"):
        validation = [Path(item["image"]).name for item in workflow.parser.get_parsed_content("split").validation]
        assert validation == ["phantom_004.nii.gz", "phantom_005.nii.gz"]


def test_several_channels_in_several_files(run_bundle: Run, phantom_dir: Path, tmp_path: Path) -> None:
    preset = tmp_path / "two.yaml"
    preset.write_text(
        "channels: [first, second]\nspacing: [8, 8, 8]\nz_score: nonzero\nroi_size: [16, 24, 16]\npatch_size: 8\n"
    )
    images = [f"imagesTr/phantom_00{i}.nii.gz" for i in range(6)]
    pairs = [{"image": [image, images[i - 1]]} for i, image in enumerate(images)]
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs}))
    run_bundle(
        BUNDLE, "train", folder=tmp_path, dataset=preset, dataset_dir=phantom_dir, datalist=tmp_path / "list.json"
    )
    encoder = build_encoder(tmp_path / "models" / "encoder.pt")
    assert encoder(torch.rand(1, 2, *WINDOW))[0].shape == (1, 12, 48)


def test_preset_of_the_package(run_bundle: Run, tmp_path: Path) -> None:
    run_bundle(BUNDLE, "train", folder=tmp_path, dataset="phantom", epochs=1)
    description = torch.load(tmp_path / "models" / "encoder.pt", weights_only=True)["description"]
    assert description["preset"]["name"] == "phantom"
    assert description["preset"]["spacing"] == [4.0, 4.0, 4.0]


def test_scans_found_good_are_not_read_again(run_bundle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1)

    def refuse(path: str) -> None:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("medmim.scan_checks.load_scan", refuse)
    run_bundle(BUNDLE, "train", folder=tmp_path, epochs=1, resume=True)
