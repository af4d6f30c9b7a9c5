"""Mask in Mask bundle from end to end: train, resume, evaluate, features, reconstructions, faults, two processes.

What does not depend on the pretext task is tested with the MAE bundle.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.blocks import TransformerBlock

from medmim import build_encoder
from medmim.description import build_network, read_description
from medmim.networks import ConvViT, ConvViTUNETR
from medmim.networks.convvit_blocks import AttentionBlock
from medmim.resume import Checkpoints
from medmim.weights import load_encoder
from tests.common import BUNDLES, MIM, TINY, TINY_OF, assert_same_end, rows, tensorboard_names

SIZES = {key: TINY_OF[MIM][key] for key in ("embed_dims", "depths", "num_heads")}
SIZE = (32, 32, 32)
RECONSTRUCTION = ["reconstruction_1", "reconstruction_2", "reconstruction_3"]
TERMS = [*RECONSTRUCTION, "alignment_1_2", "alignment_2_3"]
ADDED = ("epoch", "iteration", "seconds", "learning_rate")
Run = Callable[..., ConfigWorkflow]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / "encoder.pt", weights_only=True)["state_dict"]


def scalars(folder: Path) -> list[dict[str, str]]:
    return rows(folder / "output" / "scalars.csv")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def two_levels(**second: Any) -> list[dict[str, Any]]:
    return [
        {"crop_size": SIZE, "img_size": SIZE, "mask_unit": 16, "mask_ratio": 0.5},
        {"img_size": SIZE, "mask_ratio": 0.5, "samples": 1} | second,
    ]


# ------------------------------------------------------------------------------------------------------------- training


def test_training_writes_everything_and_lowers_the_loss(pretrained_mim: Path) -> None:
    output = pretrained_mim / "output"
    for name in ("checkpoint.pt", "curves.png", "checked_scans.json", "previews/epoch_0008.png"):
        assert (output / name).stat().st_size > 0, name
    found = scalars(pretrained_mim)
    assert [int(row["epoch"]) for row in found] == list(range(1, 9))
    train, val = ({f"{kind}_{name}" for name in ["loss", *TERMS]} for kind in ("train", "val"))
    assert set(found[0]) == {*ADDED, *train, *val}
    assert {"learning_rate", *train, *val} <= tensorboard_names(output / "tensorboard")
    assert [row["epoch"] for row in found if row["val_loss"]] == ["4", "8"]
    assert float(found[-1]["train_loss"]) < 0.85 * float(found[0]["train_loss"])
    assert float(found[-1]["val_loss"]) < float(found[3]["val_loss"])
    for row in (found[3], found[7]):  # the loss is the weighted sum of its terms
        for kind in ("train", "val"):
            terms = {name: float(row[f"{kind}_{name}"]) for name in TERMS}
            total = sum((1.0 if name in RECONSTRUCTION else 0.1) * value for name, value in terms.items())
            assert float(row[f"{kind}_loss"]) == pytest.approx(total, rel=1e-5)
    best = torch.load(output / "checkpoint.pt", weights_only=True)["best"]
    assert best == {"metric": pytest.approx(min(float(found[i]["val_loss"]) for i in (3, 7))), "epoch": 8}


def test_encoder_travels(pretrained_mim: Path) -> None:
    assert visible(pretrained_mim / "models") == ["encoder.pt", "model.json", "model.pt"]
    encoder = build_encoder(pretrained_mim / "models" / "encoder.pt").eval()
    assert type(encoder) is ConvViT
    description = read_description(pretrained_mim / "models" / "model.json")
    assert description["network"]["arguments"]["img_size"] == list(SIZE)
    network = build_network(description).eval()
    network.load_state_dict(torch.load(pretrained_mim / "models" / "model.pt", weights_only=True), strict=True)
    image = torch.rand(2, 1, *SIZE)
    features = network(image)
    assert features.shape == (2, 12, 2, 2, 2)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), encoder.encode(image))
    checkpoint = torch.load(pretrained_mim / "output" / "checkpoint.pt", weights_only=True)["network"]
    assert all(torch.equal(checkpoint[f"encoder.{name}"], value) for name, value in encoder.state_dict().items())
    target = ConvViTUNETR(1, 2, **SIZES)
    for path in (pretrained_mim / "models" / "encoder.pt", pretrained_mim / "output" / "checkpoint.pt"):
        report = load_encoder(target, path)
        new = {name.split(".")[0] for name in report.new}
        assert new <= {"fifth_stage", "blocks"}
        assert all("scale" in name for name in report.new if name.startswith("blocks"))


def test_every_tensor_learns(pretrained_mim: Path) -> None:
    before, after = (
        torch.load(pretrained_mim / "output" / f"{name}.pt", weights_only=True)
        for name in ("checkpoint_previous", "checkpoint")
    )
    assert (before["epoch"], after["epoch"]) == (4, 8)
    still = {name for name, value in before["network"].items() if torch.equal(value, after["network"][name])}
    assert still == {name for name in still if name == "decoder.position_embeddings" or "norm_cross_attn" in name}


@pytest.mark.parametrize(
    ("knobs", "terms"),
    [
        ({"alignment": "byol", "curriculum": "coarse_to_fine", "normalize_target": "false", "loss_norm": "l1"}, TERMS),
        (
            {"levels": two_levels(), "level_weights": [0, 1], "alignment_weights": [0], "accumulation_steps": 2},
            ["reconstruction_2"],
        ),
        (
            {
                "roi_size": [32, 64, 32],
                "crop_size": [32, 32, 32],
                "chunk_size": 1,
                "activation_checkpointing": True,
                "amp": "true",
                "cache": "none",
                "crops_per_scan": 2,
            },
            TERMS,
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_train(run_bundle: Run, tmp_path: Path, knobs: dict, terms: list[str]) -> None:
    run_bundle(MIM, "train", folder=tmp_path, learning_rate=0.01, val_interval=2, **knobs)
    first, last = scalars(tmp_path)
    assert {name for name in last if name.startswith("val_")} == {"val_loss", *(f"val_{name}" for name in terms)}
    changes = [float(last[f"train_{name}"]) - float(first[f"train_{name}"]) for name in terms if first[f"train_{name}"]]
    assert min(changes) < 0
    assert weights(tmp_path)


def test_stopped_and_resumed(run_bundle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a curriculum, whose weights depend on the epoch."""
    knobs = {"epochs": 2, "checkpoint_interval": 1, "learning_rate": 0.01, "curriculum": "fine_to_coarse"}
    knobs |= {"val_interval": 2}
    compiled = []
    with monkeypatch.context() as patch:  # compiled or not
        patch.setattr(torch, "compile", lambda function, **options: compiled.append(function.__self__) or function)
        run_bundle(MIM, "train", folder=tmp_path / "undisturbed", compile="true", **knobs)
    assert {type(module) for module in compiled} == {AttentionBlock, TransformerBlock}
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, engine: Any) -> None:
        save(self, engine)
        if engine.state.epoch == 1:
            raise SystemExit("stopped")

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(SystemExit, match="stopped"):
        run_bundle(MIM, "train", folder=tmp_path / "resumed", **knobs)
    monkeypatch.setattr(Checkpoints, "save", save)
    run_bundle(MIM, "train", folder=tmp_path / "resumed", resume="true", num_workers=1, **knobs)
    assert_same_end(MIM, tmp_path / "undisturbed", tmp_path / "resumed")


# ---------------------------------------------------------------------------------- evaluate, reconstruct, inference


def test_evaluation_repeats_the_last_validation(pretrained_mim: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = pretrained_mim / "output" / "checkpoint.pt"
    workflow = run_bundle(MIM, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint)
    found = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
    expected = scalars(pretrained_mim)[-1]
    assert found.keys() == {name for name in expected if name.startswith("val_")}
    for name, value in found.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-5), name


def test_evaluation_with_other_knobs(pretrained_mim: Path, run_bundle: Run, tmp_path: Path, request: Any) -> None:
    checkpoint = pretrained_mim / "output" / "checkpoint.pt"
    with pytest.raises(SystemExit) as ending:
        run_bundle(MIM, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint, temperature=1.0, num_heads=3)
    message = str(ending.value.code)
    request.node.user_properties.append(("error", message))
    assert message.endswith("checkpoint.pt: other knobs than it was trained with: give --temperature 0.1 --num_heads 2")


def test_reconstructions(pretrained_mim: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = pretrained_mim / "output" / "checkpoint.pt"
    run_bundle(MIM, "train", "reconstruct", folder=tmp_path, checkpoint=checkpoint, scans=1)
    folder = tmp_path / "output" / "reconstructions" / "imagesTr"  # as below dataset_dir
    (picture,) = folder.glob("*_reconstruction.png")
    name = picture.name.removesuffix("_reconstruction.png")
    assert {path.name for path in folder.iterdir()} == {
        picture.name,
        *(f"{name}_level_{n}_{what}.nii.gz" for n in (1, 2, 3) for what in ("masked", "reconstruction")),
    }
    for number, spacing in ((1, 8.0), (2, 4.0), (3, 2.0)):  # 32, 16 and 8 voxels of 8 mm
        masked, whole = (nib.load(folder / f"{name}_level_{number}_{w}.nii.gz") for w in ("masked", "reconstruction"))
        assert masked.shape == SIZE
        np.testing.assert_allclose(nib.affines.voxel_sizes(masked.affine), spacing)
        np.testing.assert_allclose(masked.affine, whole.affine)
        changed = (masked.get_fdata() != whole.get_fdata()).reshape(2, 16, 2, 16, 2, 16).any(axis=(1, 3, 5))
        assert 1 <= changed.sum() <= {1: 4, 2: 5, 3: 4}[number]  # the hidden tokens; padding may be reconstructed as 0


def test_features_are_the_encoders(pretrained_mim: Path, run_bundle: Run, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(0, 200, (64, 32, 32)).astype(np.float32)
    volume[[0, -1]] = volume[:, [0, -1]] = volume[..., [0, -1]] = 100.0  # nothing for the foreground crop
    scan = tmp_path / "scans" / "one.nii.gz"
    scan.parent.mkdir()
    nib.save(nib.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0])), scan)
    knobs = {"dataset_dir": tmp_path / "scans", "models_dir": pretrained_mim / "models"}
    run_bundle(MIM, "inference", folder=tmp_path, **knobs)
    features = nib.load(tmp_path / "output" / "one_features.nii.gz")
    np.testing.assert_allclose(features.affine[:3, :3], np.diag([128.0, 128.0, 128.0]), atol=1e-4)
    np.testing.assert_allclose(features.affine[:3, 3], 7.5 * 8.0, atol=1e-4)  # centre of a token
    values = torch.from_numpy(features.get_fdata().reshape(4, 2, 2, 12)).float()
    image = torch.from_numpy(np.clip((volume + 175) / 425, 0, 1))[None, None]
    encoder = build_encoder(pretrained_mim / "models" / "encoder.pt").eval()
    with torch.no_grad():
        for window in range(2):
            tokens = encoder.encode(image[:, :, 32 * window : 32 * (window + 1)])[0]
            found = values[2 * window : 2 * (window + 1)].reshape(8, 12)
            torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)


def test_images_of_two_axes(run_bundle: Run, tmp_path: Path) -> None:
    preset = tmp_path / "flat.yaml"
    preset.write_text(
        "channels: [X]\nspacing: [1, 1]\nz_score: all\ncrop_foreground: false\nroi_size: [32, 64]\npatch_size: 16\n"
        "labels: {}\n"
    )
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(5):
        image = nib.Nifti1Image(generator.normal(size=(64, 110)).astype("float32"), np.eye(4))
        nib.save(image, tmp_path / "images" / f"{number}.nii.gz")
    data = {"dataset": preset, "dataset_dir": tmp_path / "images"}
    knobs = data | {
        "roi_size": "$list(@preset.roi_size)",
        "crop_size": "$[2 * n for n in @roi_size]",
        "embed_dims": [4, 4, 8, 8],
        "decoder_hidden_size": 8,
    }
    run_bundle(MIM, "train", folder=tmp_path, **knobs)
    run_bundle(MIM, "train", "reconstruct", folder=tmp_path, **knobs)
    run_bundle(
        MIM, "inference", folder=tmp_path / "inference", dataset_dir=tmp_path / "images", models_dir=tmp_path / "models"
    )
    assert len(list((tmp_path / "output" / "reconstructions").glob("*_level_3_reconstruction.nii.gz"))) == 1
    assert len(list((tmp_path / "inference" / "output").rglob("*_features.nii.gz"))) == 5


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def ends(run_bundle: Run, tmp_path: Path, record_property: Callable) -> Callable[..., list[str]]:
    """Runs a training that must end plainly; returns the faults, without ``error:``."""

    def run(**knobs: Any) -> list[str]:
        with pytest.raises(SystemExit) as ending:
            run_bundle(MIM, "train", folder=tmp_path, **knobs)
        record_property("error", ending.value.code)
        return [line.removeprefix("error: ") for line in str(ending.value.code).splitlines()]

    return run


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"levels::0::mask_unit": [12, 16, 16]},
            "--levels: level 1: mask_unit (12, 16, 16) is not divisible by patch_size (16, 16, 16): "
            "change mask_unit or patch_size so that each axis divides",
        ),
        (
            {"crop_size": [31, 32, 32]},
            "--levels: level 1: crop_size (31, 32, 32) does not divide into (2, 2, 2) regions "
            "(img_size (32, 32, 32) / mask_unit (16, 16, 16)): change crop_size or mask_unit",
        ),
        (
            {"levels::1::samples": 5},
            "--levels: level 2 asks for 5 samples, but level 1 hides only 4 of 8 regions (mask_ratio 0.5): "
            "lower samples of level 2, or raise mask_ratio of level 1",
        ),
        ({"levels::2::img_size": [64, 64, 64]}, "--levels: level 3 has img_size (64, 64, 64), but --roi_size is "),
        ({"levels::0::crop_size": [64, 64, 64]}, "--levels: level 1 has crop_size (64, 64, 64), but --crop_size is "),
        ({"levels::1::ratio": 0.5}, "--levels: level 2 has unknown entry 'ratio': the entries are crop_size, "),
        ({"levels::1::mask_ratio": 1.5}, "--levels: level 2: mask_ratio "),
        ({"levels::1::mask_ratio": "most"}, "--levels: level 2: mask_ratio "),
        ({"levels": 3}, "--levels 3: expected a list with the entries of each level"),
        ({"levels": []}, "--levels []: expected a list with the entries of each level"),
        ({"levels": two_levels()}, "--level_weights [1.0, 1.0, 1.0]: expected 2 numbers of 0 or more, for 2 levels"),
        ({"alignment_weights": [0.1, -1]}, "--alignment_weights [0.1, -1]: expected 2 numbers of 0 or more"),
        (
            {"level_weights": [0, 0, 0], "alignment_weights": [0, 0]},
            "--level_weights and --alignment_weights are all 0: there would be nothing to learn",
        ),
        (
            {"levels::2::mask_ratio": 0.05},
            "--levels: level 3 hides none of its 8 regions (mask_ratio 0.05), so its reconstruction has ",
        ),
        (
            {"level_weights": [0, 0, 1], "alignment_weights": [0, 0], "curriculum": "coarse_to_fine"},
            "--curriculum coarse_to_fine begins with weight 0 for the one level that learns (--level_weights [0, 0, 1]",
        ),
        (
            {"level_weights": [1, 0, 0], "alignment_weights": [0, 0], "curriculum": "fine_to_coarse"},
            "--curriculum fine_to_coarse begins with weight 0 for the one level that learns (--level_weights [1, 0, 0]",
        ),
        ({"crop_size": 32}, "--crop_size 32: expected 3 numbers in voxels"),
        ({"roi_size": 32}, "--roi_size 32: expected 3 numbers in voxels"),
        ({"roi_size": [32, 40, 32]}, "--roi_size [32, 40, 32] is not divisible by --patch_size 16"),
        ({"embed_dims": [6, 6, 12, 14]}, "--embed_dims [6, 6, 12, 14]: the last must be a multiple of 6"),
        ({"num_heads": 5}, "--embed_dims [6, 6, 12, 12]: the last must be a multiple of 5 (--num_heads)"),
        ({"depths": [1, 1, 1]}, "--depths [1, 1, 1]: expected 4 whole numbers of at least 1"),
        ({"decoder_hidden_size": 16}, "--decoder_hidden_size 16: expected a multiple of 6"),
        ({"patch_size": 8}, "--patch_size 8: expected 16"),
        ({"temperature": 0}, "--temperature 0: expected a number of at least 0.001"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_said_in_one_line(ends: Callable, knobs: dict, message: str) -> None:
    found = ends(**knobs)
    assert any(line.startswith(message) for line in found), found
    assert len(found) == (2 if knobs == {"levels": two_levels()} else 1)  # both kinds of weights are too many


def test_curriculum_of_one_level(ends: Callable) -> None:
    knobs = {"levels": two_levels()[:1], "level_weights": [1], "alignment_weights": []}
    assert ends(curriculum="coarse_to_fine", **knobs) == [
        "--curriculum coarse_to_fine: needs two levels or more, found 1: take concurrent"
    ]


@pytest.mark.parametrize("roi_size", [SIZE, (32, 40, 32)], ids=["good size", "bad size"])
def test_geometry_is_told_among_the_other_faults(ends: Callable, roi_size: tuple) -> None:
    wrong = {
        "epochs": 0.5,
        "alignment": "none",
        "curriculum": "slow",
        "chunk_size": 0,
        "flip_prob": 2,
        "amp": "perhaps",
    }
    found = ends(**wrong, levels=two_levels(mask_unit=24), depths=2, roi_size=list(roi_size), dataset_dir="/nowhere")
    told = {line.split(":")[0].split()[0].removeprefix("--") for line in found}
    geometry = {"levels", "level_weights", "alignment_weights"} if roi_size == SIZE else {"roi_size"}
    assert told == {*wrong, "depths", "dataset_dir"} | geometry
    assert len([line for line in found if line.startswith("--levels")]) == (1 if roi_size == SIZE else 0)


# -------------------------------------------------------------------------------------------------- real command lines


def start(*command: str, folder: Path, knobs: dict[str, Any], configs: tuple[str, ...]) -> str:
    known = {name: TINY[name] for name in ("epochs", "warmup_epochs", "batch_size", "val_interval")}
    knobs = known | TINY_OF[MIM] | {"output_dir": folder / "output", "models_dir": folder / "models"} | knobs
    files = str([f"configs/{name}.yaml" for name in configs])
    line = [sys.executable, *command, "-m", "monai.bundle", "run", "--config_file", files]
    line += [text for name, value in knobs.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        line, cwd=BUNDLES / MIM, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_command_line(phantom_dir: Path, coarse_preset: Path, tmp_path: Path) -> None:
    knobs = {"dataset": coarse_preset, "dataset_dir": phantom_dir, "num_workers": 0, "levels::1::mask_ratio": 0.75}
    output = start(folder=tmp_path, knobs=knobs | {"epochs": 1}, configs=("train",))
    assert "MaskInMask with " in output
    assert "val_alignment_2_3" in output
    assert visible(tmp_path / "models") == ["encoder.pt", "model.json", "model.pt"]
    made_with = torch.load(tmp_path / "output" / "checkpoint.pt", weights_only=True)["made_with"]
    assert made_with["levels"][1] == {"img_size": list(SIZE), "mask_ratio": 0.75, "samples": 2}


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    folder = {"output_dir": tmp_path / "output", "models_dir": tmp_path / "models"}
    files = "['configs/train.yaml','configs/demo.yaml']"
    line = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        files,
        "--epochs",
        "2",
        "--phantom_cases",
        "6",
    ]
    line += ["--warmup_epochs", "0", *[text for name, value in folder.items() for text in (f"--{name}", str(value))]]
    run = subprocess.run(line, cwd=BUNDLES / MIM, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "output" / "previews" / "epoch_0002.png").is_file()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    phantom_dir: Path, coarse_preset: Path, run_bundle: Run, tmp_path: Path
) -> None:
    """Batch 1 in each of two processes is batch 2 in one; no scan is padded at this size."""
    knobs = {"roi_size": [32, 32, 16], "crop_size": [32, 16, 16], "epochs": 3, "learning_rate": 0.003}
    knobs |= {"levels::0::mask_unit": [16, 16, 16], "levels::1::samples": 1, "checkpoint_interval": 1, "num_workers": 0}
    data = {"dataset": coarse_preset, "dataset_dir": phantom_dir}
    output = start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        folder=tmp_path / "two",
        knobs=knobs | data | {"batch_size": 1},
        configs=("train", "multi_gpu_train"),
    )
    assert len(re.findall(r"epoch 3/3: ", output)) == 1
    run_bundle(MIM, "train", folder=tmp_path / "one", **knobs | {"batch_size": 2})
    for two, one in zip(scalars(tmp_path / "two"), scalars(tmp_path / "one"), strict=True):
        for name in one.keys() - {"seconds"}:
            assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4), name
