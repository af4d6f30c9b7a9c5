"""Segmentation bundle of Swin UNETR from end to end: train, fine-tune, freeze, resume, evaluate, predict; spacing.

What does not depend on the network is tested with the UNETR bundle.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformer

from medmim.datasets import get_preset
from medmim.description import build_network, read_description
from medmim.resume import Checkpoints
from medmim.weights import save_encoder
from tests.common import SWIN_UNETR, TINY_OF, assert_same_end, rows

BUNDLE = SWIN_UNETR
SIZES = {key: TINY_OF[BUNDLE][key] for key in ("feature_size", "depths", "num_heads", "window_size")}
FOUR = "expected 4 whole numbers of at least 1, for the stages"
Run = Callable[..., ConfigWorkflow]
Tensors = dict[str, torch.Tensor]


def final_weights(folder: Path) -> Tensors:
    """Weights after the last step (``model.pt`` holds the best ones)."""
    return torch.load(folder / "output" / "checkpoint.pt", weights_only=True)["network"]


def changed(before: Tensors, after: Tensors) -> set[str]:
    """Names of tensors that have changed, by more than the smallest learning rate does."""
    return {name for name, value in before.items() if not torch.allclose(value, after[name], rtol=0, atol=1e-9)}


@pytest.fixture(scope="module")
def encoder(coarse_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``encoder.pt`` as a pre-training bundle writes it."""
    torch.manual_seed(1)
    swin = SwinTransformer(1, 12, (3, 3, 3), (2, 2, 2), SIZES["depths"], SIZES["num_heads"])
    for parameter in swin.parameters():  # so that each tensor differs from a fresh network's
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_encoder(path, swin, [64, 64, 64], get_preset(str(coarse_preset)))
    return path


@pytest.fixture(scope="module")
def loaded(encoder: Path) -> Tensors:
    """Parameters of ``encoder.pt``, under the network's names."""
    tensors = torch.load(encoder, weights_only=True)["state_dict"]
    return {f"swinViT.{name}": value for name, value in tensors.items() if not name.endswith("position_index")}


@pytest.fixture
def scratch(swin_from_scratch: Path) -> Path:
    return swin_from_scratch


def test_training_from_scratch_lowers_the_loss(scratch: Path) -> None:
    assert sorted(path.name for path in (scratch / "models").glob("[!.]*")) == ["model.json", "model.pt"]
    scalars = rows(scratch / "output" / "scalars.csv")
    assert [row["epoch"] for row in scalars if row["mean_dice"]] == ["4", "8"]
    assert float(scalars[-1]["train_loss"]) < 0.8 * float(scalars[0]["train_loss"])


def test_description_builds_the_model_of_monai(scratch: Path) -> None:
    description = read_description(scratch / "models" / "model.json")
    assert description["network"]["name"] == "SwinUNETR"
    assert description["network"]["arguments"].items() >= (SIZES | {"img_size": [64, 32, 32]}).items()
    stock = SwinUNETR(in_channels=1, out_channels=6, **SIZES)
    for network in (stock, build_network(description)):
        network.load_state_dict(torch.load(scratch / "models" / "model.pt", weights_only=True), strict=True)
        assert network(torch.rand(1, 1, 64, 32, 32)).shape == (1, 6, 64, 32, 32)


@pytest.mark.slow
def test_switches_of_the_network(run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"use_v2": "true", "activation_checkpointing": True, "drop_path_rate": 0.2, "epochs": 1}
    run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    assert [name for name in final_weights(tmp_path) if "layers4c" in name]
    assert read_description(tmp_path / "models" / "model.json")["network"]["arguments"]["use_v2"] is True


# -------------------------------------------------------------------------------------------------- the encoder's way


def test_frozen_pretrained_encoder_gets_in_and_stays(
    encoder: Path, loaded: Tensors, run_bundle: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, pretrained_encoder=encoder, freeze_encoder=True, epochs=1)
    assert f"{len(loaded) + 4} of {len(loaded) + 4} encoder tensors loaded" in capsys.readouterr().out
    assert changed(loaded, final_weights(tmp_path)) == set()
    groups = workflow.parser.get_parsed_content("optimizer").param_groups
    learning = {id(p) for group in groups for p in group["params"]}
    network = workflow.parser.get_parsed_content("network_def")
    names = [name for name, p in network.named_parameters() if id(p) in learning]
    assert names == [name for name, _ in network.named_parameters() if not name.startswith("swinViT.")]
    seen = read_description(tmp_path / "models" / "model.json")["pretrained_on"]
    assert [data["name"] for data in seen] == ["coarse"]


def test_fine_tuning_trains_the_encoder(encoder: Path, loaded: Tensors, run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"pretrained_encoder": encoder, "learning_rate": 0.01, "layer_decay": 0.5, "epochs": 1}
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    assert changed(loaded, final_weights(tmp_path)) == loaded.keys()
    optimizer = workflow.parser.get_parsed_content("optimizer")
    network = workflow.parser.get_parsed_content("network_def")
    rate = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    stages = [getattr(network.swinViT, f"layers{number}")[0] for number in (1, 2, 3, 4)]
    expected = [0.01 * 0.5**k for k in (4, 3, 2, 1)]
    np.testing.assert_allclose([rate[id(stage.blocks[0].attn.qkv.weight)] for stage in stages], expected)
    np.testing.assert_allclose([rate[id(stage.downsample.reduction.weight)] for stage in stages], expected)
    assert rate[id(network.out.conv.conv.weight)] == 0.01


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_weights(
    run_bundle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"epochs": 2, "checkpoint_interval": 1, "learning_rate": 0.003, "drop_path_rate": 0.2}
    run_bundle(BUNDLE, "train", folder=tmp_path / "whole", **knobs)
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, engine: Any) -> None:
        save(self, engine)
        raise SystemExit("stopped")

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(SystemExit, match="stopped"):
        run_bundle(BUNDLE, "train", folder=tmp_path / "stopped", **knobs)
    monkeypatch.setattr(Checkpoints, "save", save)
    run_bundle(BUNDLE, "train", folder=tmp_path / "stopped", resume=True, **knobs)
    assert_same_end(BUNDLE, tmp_path / "whole", tmp_path / "stopped")


# ---------------------------------------------------------------------------------------------- scores and predictions


def test_evaluation_repeats_the_best_validation(scratch: Path, run_bundle: Run, tmp_path: Path) -> None:
    run_bundle(BUNDLE, "train", "evaluate", folder=tmp_path, models_dir=scratch / "models", overlap=0.0)
    scores = rows(tmp_path / "output" / "scores.csv")
    assert len(scores) == 2 * 5
    assert {"dice", "hd95_mm", "surface_dice"} <= scores[0].keys()
    cases = {row["case"] for row in scores}
    means = [np.mean([float(row["dice"]) for row in scores if row["case"] == case]) for case in cases]
    best = max(float(row["mean_dice"]) for row in rows(scratch / "output" / "scalars.csv") if row["mean_dice"])
    assert np.mean(means) == pytest.approx(best, abs=1e-6)


def test_predictions_lie_on_the_scans_own_grid(
    scratch: Path, run_bundle: Run, phantom_dir: Path, tmp_path: Path
) -> None:
    image = nib.load(phantom_dir / "imagesTr" / "phantom_001.nii.gz")
    (tmp_path / "scans").mkdir()
    nib.save(image, tmp_path / "scans" / "whole.nii.gz")
    nib.save(image.slicer[30:60, 20:50, 10:17], tmp_path / "scans" / "small.nii.gz")
    run_bundle(BUNDLE, "inference", folder=tmp_path, dataset_dir=tmp_path / "scans", models_dir=scratch / "models")
    for name in ("whole", "small"):
        scan = nib.load(tmp_path / "scans" / f"{name}.nii.gz")
        prediction = nib.load(tmp_path / "output" / f"{name}_seg.nii.gz")
        assert prediction.shape == scan.shape
        np.testing.assert_allclose(prediction.affine, scan.affine, atol=1e-4)
        assert set(np.unique(prediction.dataobj)) <= set(range(6))


def test_a_coarser_spacing_is_remembered(
    run_bundle: Run, encoder: Path, phantom_dir: Path, tmp_path: Path, record_property: Callable
) -> None:
    """Of training, by inference and by the comparison with an encoder that was pre-trained at the preset's own."""
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, spacing_factor=2, epochs=1)
    affine = workflow.parser.get_parsed_content("validate#dataset")[0]["image"].affine
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), 16)
    assert read_description(tmp_path / "models" / "model.json")["preset"]["spacing"] == [16, 16, 16]
    knobs = {"dataset_dir": phantom_dir / "imagesTr", "models_dir": tmp_path / "models"}
    workflow = run_bundle(BUNDLE, "inference", folder=tmp_path / "predicted", **knobs)
    affine = workflow.parser.get_parsed_content("scans")[0]["image"].affine
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), 16)
    for name, factor, told in (
        ("evaluate", 1, r"spacing \[16.0, 16.0, 16.0\], here \[8.0, 8.0, 8.0\]\): give the preset"),
        ("train", 2, r"spacing \[8.0, 8.0, 8.0\] \(this run \[16.0, 16.0, 16.0\]\): prepare .* --spacing_factor"),
    ):
        configs = ("train", "evaluate") if name == "evaluate" else ("train",)
        more = {} if name == "evaluate" else {"pretrained_encoder": encoder}
        knobs = {"models_dir": tmp_path / "models", "output_dir": tmp_path / name, "spacing_factor": factor}
        with pytest.raises(SystemExit, match=told) as ending:
            run_bundle(BUNDLE, *configs, folder=tmp_path, **knobs | more)
        record_property("error", str(ending.value.code))
        assert "\n" not in str(ending.value.code)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        (
            {"roi_size": [32, 48, 32]},
            [
                "--roi_size [32, 48, 32]: expected multiples of 32, and more than 32 along one axis: "
                'give --roi_size "[32, 64, 32]"'
            ],
        ),
        ({"roi_size": 32}, ['--roi_size 32: expected 3 numbers in voxels, as in "[96, 96, 96]"']),
        ({"depths": [1, 1, 1], "num_heads": 3}, [f"--depths [1, 1, 1]: {FOUR}", f"--num_heads 3: {FOUR}"]),
        (
            {"feature_size": 18, "window_size": 1, "use_v2": "yes"},
            [
                "--use_v2 yes: expected true or false",
                "--window_size 1: expected a whole number of at least 2",
                "--feature_size 18: expected a multiple of 12",
            ],
        ),
        ({"spacing_factor": 0}, ["--spacing_factor 0: expected a number from 0.1 to 10"]),
        ({"spacing_factor": "two"}, ["--spacing_factor two: expected a number from 0.1 to 10"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_faulty_knobs(
    run_bundle: Run, tmp_path: Path, knobs: dict[str, Any], expected: list[str], record_property: Callable
) -> None:
    with pytest.raises(SystemExit) as ending:
        run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    record_property("error", str(ending.value.code))
    assert str(ending.value.code).splitlines() == [f"error: {line}" for line in expected]


def test_an_encoder_of_another_size_names_the_knobs(
    run_bundle: Run, encoder: Path, tmp_path: Path, record_property: Callable
) -> None:
    knobs = {"feature_size": 24, "use_v2": True, "depths": [2, 1, 1, 1], "pretrained_encoder": encoder}
    with pytest.raises(SystemExit) as ending:
        run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    record_property("error", str(ending.value.code))
    assert str(ending.value.code) == (
        f"error: --pretrained_encoder {encoder}: another architecture than this run's: "
        'give --feature_size 12 --depths "[1, 1, 1, 1]" --use_v2 False'
    )


def test_another_kind_of_encoder(
    run_bundle: Run, coarse_preset: Path, tiny_vit: Callable, tmp_path: Path, record_property: Callable
) -> None:
    save_encoder(tmp_path / "vit.pt", tiny_vit(), [16, 24, 8], get_preset(str(coarse_preset)))
    with pytest.raises(SystemExit) as ending:
        run_bundle(BUNDLE, "train", folder=tmp_path, pretrained_encoder=tmp_path / "vit.pt")
    record_property("error", str(ending.value.code))
    assert str(ending.value.code) == (
        f"error: --pretrained_encoder {tmp_path / 'vit.pt'}: holds a ViT, but this network's encoder is a "
        "SwinTransformer: give a file of a SwinTransformer"
    )
