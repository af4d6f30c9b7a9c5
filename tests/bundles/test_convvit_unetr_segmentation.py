"""Segmentation bundle of the hybrid encoder from end to end: train, fine-tune, freeze, resume, evaluate, predict.

What does not depend on the network is tested with the UNETR bundle.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.apps.utils import extractall
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export

from medmim.datasets import get_preset
from medmim.description import build_network, read_description
from medmim.networks import ConvViT
from medmim.resume import Checkpoints
from medmim.version import __version__
from medmim.weights import save_encoder
from tests.common import CONVVIT_UNETR, TINY_OF, assert_same_end, rows
from tools.export import export

BUNDLE = CONVVIT_UNETR
SIZES = {key: TINY_OF[BUNDLE][key] for key in ("embed_dims", "depths", "num_heads")}
FOUR = "expected 4 whole numbers of at least 1, for the three stages and the transformer"
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
    """``encoder.pt`` as Mask in Mask writes it: with what latents need, without what only dense tasks need."""
    torch.manual_seed(1)
    convvit = ConvViT(**SIZES, fusion=True, fifth_stage=False)
    for parameter in convvit.parameters():  # so that each tensor differs from a fresh network's
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_encoder(path, convvit, [16, 16, 16], get_preset(str(coarse_preset)))
    return path


@pytest.fixture(scope="module")
def loaded(encoder: Path) -> Tensors:
    """Tensors of ``encoder.pt`` that go into the network, under the network's names."""
    tensors = torch.load(encoder, weights_only=True)["state_dict"]
    return {f"encoder.{name}": value for name, value in tensors.items() if not name.startswith(("fusion.", "norm."))}


@pytest.fixture
def scratch(convvit_from_scratch: Path) -> Path:
    return convvit_from_scratch


def test_training_from_scratch_lowers_the_loss(scratch: Path) -> None:
    assert sorted(path.name for path in (scratch / "models").glob("[!.]*")) == ["model.json", "model.pt"]
    assert [path.name for path in (scratch / "output" / "previews").iterdir()] == ["epoch_0012.png"]
    scalars = rows(scratch / "output" / "scalars.csv")
    assert [row["epoch"] for row in scalars if row["mean_dice"]] == ["6", "12"]
    assert float(scalars[-1]["train_loss"]) < 0.6 * float(scalars[0]["train_loss"])
    assert float(scalars[-1]["mean_dice"]) > 0.05


def test_description_builds_the_model(scratch: Path) -> None:
    description = read_description(scratch / "models" / "model.json")
    assert description["network"]["name"] == "ConvViTUNETR"
    assert description["network"]["arguments"].items() >= (SIZES | {"img_size": [32, 32, 16]}).items()
    network = build_network(description)
    network.load_state_dict(torch.load(scratch / "models" / "model.pt", weights_only=True), strict=True)
    assert network(torch.rand(1, 1, 32, 32, 16)).shape == (1, 6, 32, 32, 16)


def test_switches_of_the_network(run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"layer_scale": None, "relative_position_bias": "false", "activation_checkpointing": True, "epochs": 1}
    run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    assert not [name for name in final_weights(tmp_path) if re.search(r"\.scale[12]\.|position_bias", name)]
    arguments = read_description(tmp_path / "models" / "model.json")["network"]["arguments"]
    assert arguments["layer_scale"] is None
    assert arguments["relative_position_bias"] is False


# -------------------------------------------------------------------------------------------------- the encoder's way


def test_pretrained_encoder_gets_in(
    encoder: Path, loaded: Tensors, run_bundle: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    knobs = {"epochs": 1, "learning_rate": 1e-12}  # the weights stay those of the start
    run_bundle(BUNDLE, "train", folder=tmp_path / "with", pretrained_encoder=encoder, **knobs)
    run_bundle(BUNDLE, "train", folder=tmp_path / "without", **knobs)
    assert f"{len(loaded)} of " in capsys.readouterr().out
    start, other = final_weights(tmp_path / "with"), final_weights(tmp_path / "without")
    assert changed(loaded, start) == set()
    assert changed(loaded, other) == loaded.keys()
    # nothing but the encoder differs between the two, and the statistics of what follows it
    assert {name for name in changed(start, other) if "running" not in name} == loaded.keys()
    seen = read_description(tmp_path / "with" / "models" / "model.json")["pretrained_on"]
    assert [data["name"] for data in seen] == ["coarse"]


def test_fine_tuning_trains_the_encoder(encoder: Path, loaded: Tensors, run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"pretrained_encoder": encoder, "learning_rate": 0.01, "layer_decay": 0.5, "epochs": 1}
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    assert changed(loaded, final_weights(tmp_path)) == loaded.keys()
    optimizer = workflow.parser.get_parsed_content("optimizer")
    network = workflow.parser.get_parsed_content("network_def")
    rate = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [stage[0].conv1 for stage in network.encoder.stages] + [block.attn.qkv for block in network.encoder.blocks]
    np.testing.assert_allclose([rate[id(block.weight)] for block in blocks], [0.01 * 0.5**k for k in (5, 4, 3, 2, 1)])
    assert rate[id(network.out.conv.conv.weight)] == 0.01


def test_frozen_encoder_stays_as_it_is(encoder: Path, loaded: Tensors, run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"pretrained_encoder": encoder, "freeze_encoder": True, "epochs": 1}
    workflow = run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    assert changed(loaded, final_weights(tmp_path)) == set()
    learning = {
        id(p) for group in workflow.parser.get_parsed_content("optimizer").param_groups for p in group["params"]
    }
    network = workflow.parser.get_parsed_content("network_def")
    assert {name for name, p in network.named_parameters() if id(p) in learning} >= {
        name for name, _ in network.named_parameters() if not name.startswith("encoder.")
    }


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


def test_label_files_with_values_of_their_own(
    run_bundle: Run, phantom_dir: Path, coarse_preset: Path, tmp_path: Path
) -> None:
    """As in MM-WHS, where the classes have numbers from 205 to 850; a class may be left out too."""
    folder = shutil.copytree(phantom_dir, tmp_path / "data")
    for path in (folder / "labelsTr").iterdir():
        label = nib.load(path)
        values = np.asarray(label.dataobj)
        nib.save(nib.Nifti1Image(100 * values.astype(np.int16), label.affine), path)
        plain = np.where(values == 2, 0, values).astype(np.uint8)
        nib.save(nib.Nifti1Image(plain, label.affine), tmp_path / path.name)
    body = yaml.safe_load(coarse_preset.read_text()) | {"label_map": {100: 1, 200: 0, 300: 3, 400: 4, 500: 5}}
    (tmp_path / "hundreds.yaml").write_text(yaml.safe_dump(body))
    workflow = run_bundle(
        BUNDLE, "train", folder=tmp_path, dataset_dir=folder, dataset=tmp_path / "hundreds.yaml", epochs=1
    )
    for item in workflow.parser.get_parsed_content("validate#dataset"):
        name = Path(item["label"].meta["filename_or_obj"]).name
        expected = np.asarray(nib.load(tmp_path / name).dataobj)
        np.testing.assert_array_equal(item["label"][0].numpy(), expected)
        assert {1, 3, 4, 5} <= set(np.unique(expected))
    assert read_description(tmp_path / "models" / "model.json")["preset"]["label_map"]["500"] == 5


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
    nib.save(image.slicer[30:60, 20:50, 10:17], tmp_path / "scans" / "small.nii.gz")  # 12 x 12 x 5 voxels of 8 mm
    run_bundle(BUNDLE, "inference", folder=tmp_path, dataset_dir=tmp_path / "scans", models_dir=scratch / "models")
    for name in ("whole", "small"):
        scan = nib.load(tmp_path / "scans" / f"{name}.nii.gz")
        prediction = nib.load(tmp_path / "output" / f"{name}_seg.nii.gz")
        assert prediction.shape == scan.shape
        np.testing.assert_allclose(prediction.affine, scan.affine, atol=1e-4)
        assert set(np.unique(prediction.dataobj)) <= set(range(6))
    label = np.asarray(nib.load(phantom_dir / "labelsTr" / "phantom_001.nii.gz").dataobj) > 0
    found = np.asarray(nib.load(tmp_path / "output" / "whole_seg.nii.gz").dataobj) > 0
    assert 2 * (label & found).sum() / (label.sum() + found.sum()) > 0.3


def test_torchscript_is_traced_at_one_size(scratch: Path, tmp_path: Path) -> None:
    models = scratch / "models"
    description = read_description(models / "model.json")
    config = tmp_path / "network.json"
    config.write_text(
        json.dumps({"network_def": {"_target_": "medmim.networks.ConvViTUNETR", **description["network"]["arguments"]}})
    )
    script = tmp_path / "model.ts"
    options = {"ckpt_file": str(models / "model.pt"), "config_file": str(config), "filepath": str(script)}
    ckpt_export(net_id="network_def", use_trace=True, input_shape=[1, 1, 32, 32, 16], **options)
    network = build_network(description).eval()
    network.load_state_dict(torch.load(models / "model.pt", weights_only=True))
    image = torch.rand(1, 1, 32, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(script)(image), network(image), rtol=1e-4, atol=1e-4)


def test_export(scratch: Path, tmp_path: Path) -> None:
    export(BUNDLE, weights=str(scratch / "models" / "model.pt"), output_dir=str(tmp_path))
    extractall(tmp_path / f"{BUNDLE}_v{__version__}.zip", tmp_path)
    for name in ("train", "inference"):
        parser = ConfigParser(ConfigParser.load_config_file(tmp_path / BUNDLE / "configs" / f"{name}.json"))
        del parser["network_def"]["_requires_"]  # the check that the zip's own package is imported
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(tmp_path / BUNDLE / "models" / "model.pt", weights_only=True), strict=True)
    metadata = json.loads((tmp_path / BUNDLE / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == [32, 32, 16]
    assert metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == 6


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"roi_size": [40, 32, 32]}, ["--roi_size [40, 32, 32]: expected multiples of 16"]),
        ({"roi_size": 32}, ['--roi_size 32: expected 3 numbers in voxels, as in "[96, 96, 96]"']),
        (
            {"embed_dims": [6, 6, 12], "depths": "[1, 1]"},
            [
                f"--embed_dims [6, 6, 12]: {FOUR}",
                f"--depths [1, 1]: {FOUR}",
            ],
        ),
        ({"num_heads": 5}, ["--embed_dims [6, 6, 6, 12]: the last must be a multiple of 5 (--num_heads)"]),
        (
            {"layer_scale": -1, "drop_path_rate": 1, "relative_position_bias": "yes"},
            [
                "--relative_position_bias yes: expected true or false",
                "--layer_scale -1: expected a number of at least 0",
                "--drop_path_rate 1: expected a number from 0 to 0.99",
            ],
        ),
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
    knobs = {"embed_dims": [6, 6, 12, 24], "num_heads": 4, "pretrained_encoder": encoder}
    with pytest.raises(SystemExit) as ending:
        run_bundle(BUNDLE, "train", folder=tmp_path, **knobs)
    record_property("error", str(ending.value.code))
    assert str(ending.value.code) == (
        f"error: --pretrained_encoder {encoder}: another architecture than this run's: "
        'give --embed_dims "[6, 6, 6, 12]" --num_heads 2'
    )


def test_another_kind_of_encoder(
    run_bundle: Run, coarse_preset: Path, tiny_vit: Callable, tmp_path: Path, record_property: Callable
) -> None:
    save_encoder(tmp_path / "vit.pt", tiny_vit(), [16, 24, 8], get_preset(str(coarse_preset)))
    with pytest.raises(SystemExit) as ending:
        run_bundle(BUNDLE, "train", folder=tmp_path, pretrained_encoder=tmp_path / "vit.pt")
    message = str(ending.value.code)
    record_property("error", message)
    assert "\n" not in message
    assert "ConvViT" in message or "num_heads" in message
