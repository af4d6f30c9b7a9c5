"""Segmentation of nested regions in scans of four channels: train, fine-tune, evaluate, predict, and bad input.

What does not depend on regions and channels is tested with the UNETR bundle.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.losses import DiceLoss
from torch.nn.functional import binary_cross_entropy_with_logits

from medmim.datasets import get_preset
from medmim.description import build_network, read_description
from tests.common import BRAIN, BUNDLES, CONVVIT_UNETR, MAE, SWIN_UNETR, rows

REGIONS = {"whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
ENDINGS = ["_fla", "_t1", "_t1c", "_t2"]
TO_BRATS = np.array([0, 2, 1, 4], np.uint8)  # edema, core, enhancing
STEM = "vit.patch_embedding.patch_embeddings.weight"
Run = Callable[..., ConfigWorkflow]
Tensors = dict[str, torch.Tensor]


def final_weights(folder: Path) -> Tensors:
    return torch.load(folder / "output" / "checkpoint.pt", weights_only=True)["network"]


def encoder_weights(path: Path) -> Tensors:
    state_dict = torch.load(path, weights_only=True)["state_dict"]
    return {f"vit.{name}": value for name, value in state_dict.items()}


def volume(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def split_channels(heads: Path, folder: Path, names: list[str], brats: bool = False) -> None:
    """Heads with a file for each channel, in ``images``, and their label maps in ``labels``."""
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for name in names:
        scan = nib.load(heads / "imagesTr" / f"{name}.nii.gz")
        for channel, ending in enumerate(ENDINGS):
            one = nib.Nifti1Image(np.asarray(scan.dataobj)[..., channel], scan.affine)
            nib.save(one, folder / "images" / f"{name}{ending}.nii.gz")
        label = volume(heads / "labelsTr" / f"{name}.nii.gz")
        label = nib.Nifti1Image(TO_BRATS[label] if brats else label, scan.affine)
        nib.save(label, folder / "labels" / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def trained(brain_from_scratch: Path) -> Path:
    return brain_from_scratch


@pytest.fixture(scope="module")
def separate(heads_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads with a file for each channel."""
    folder = tmp_path_factory.mktemp("separate")
    split_channels(heads_dir, folder, ["head_000", "head_001"])
    return folder


def test_training_learns_regions(trained: Path) -> None:
    scalars = rows(trained / "output" / "scalars.csv")
    assert float(scalars[-1]["train_loss"]) < 0.85 * float(scalars[0]["train_loss"])
    assert max(float(row["mean_dice"]) for row in scalars if row["mean_dice"]) > 0.1
    description = read_description(trained / "models" / "model.json")
    assert description["preset"]["regions"] == REGIONS
    network = build_network(description)
    network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True), strict=True)
    assert network(torch.rand(1, 4, 16, 24, 16)).shape == (1, 3, 16, 24, 16)
    assert len(list((trained / "output" / "previews").iterdir())) == 1


def test_loss_of_regions_is_dice_and_binary_cross_entropy() -> None:
    config = ConfigParser.load_config_file(str(BUNDLES / BRAIN / "configs" / "train.yaml"))
    losses = ConfigParser({key: config[key] for key in ("loss", "losses")} | {"preset": get_preset("brats21")})
    logits, target = torch.randn(2, 3, 5, 4, 3), (torch.rand(2, 3, 5, 4, 3) > 0.6).float()
    dice = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-6)(logits, target)
    expected = dice + binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(losses.get_parsed_content("loss")(logits, target), expected)


def test_scores_are_those_of_the_predicted_files(
    trained: Path, run_bundle: Run, heads_dir: Path, separate: Path, tmp_path: Path
) -> None:
    models = trained / "models"
    run_bundle(BRAIN, "train", "evaluate", folder=tmp_path, models_dir=models)
    found, images = tmp_path / "predictions", heads_dir / "imagesTr"
    run_bundle(
        BRAIN, "inference", folder=tmp_path, models_dir=models, dataset_dir=images, output_dir=found, overlap=0.25
    )
    scores = rows(tmp_path / "output" / "scores.csv")
    assert [row["class"] for row in scores] == list(REGIONS) * 2
    for row in scores:
        name = Path(row["case"]).name.removesuffix(".nii.gz")
        prediction, label = volume(found / f"{name}_seg.nii.gz"), volume(heads_dir / "labelsTr" / f"{name}.nii.gz")
        assert prediction.dtype == np.uint8
        a, b = (np.isin(one, REGIONS[row["class"]]) for one in (prediction, label))
        expected = 2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1
        assert float(row["dice"]) == pytest.approx(expected, abs=1e-6)
        assert float(row["hd95_mm"]) >= 0
    # the same heads with a file for each channel, under names that the model's preset does not know
    knobs: dict[str, Any] = {"dataset_dir": separate, "models_dir": models, "overlap": 0.25, "channel_files": ENDINGS}
    run_bundle(BRAIN, "inference", folder=tmp_path, output_dir=tmp_path / "again", **knobs)
    names = ["head_000_seg.nii.gz", "head_001_seg.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "again" / "images").iterdir()) == names
    for name in names:
        np.testing.assert_array_equal(volume(tmp_path / "again" / "images" / name), volume(found / name))


def test_self_pretraining_and_fine_tuning_on_files_for_each_channel(
    run_bundle: Run, heads_dir: Path, coarse_heads: Path, tmp_path: Path
) -> None:
    split_channels(heads_dir, tmp_path / "data", [f"head_00{i}" for i in range(4)], brats=True)
    text = coarse_heads.read_text().replace("2: non-enhancing", "9: non-enhancing").replace("1: edema", "2: edema")
    text = text.replace("9:", "1:").replace("3: enhancing", "4: enhancing").replace("[1, 2, 3]", "[1, 2, 4]")
    text = text.replace("[2, 3]", "[1, 4]").replace("[3]", "[4]")
    (tmp_path / "brats.yaml").write_text(f"{text}channel_files: {ENDINGS}\n")
    data = {"dataset": tmp_path / "brats.yaml", "dataset_dir": tmp_path / "data", "folds": 2, "epochs": 1}
    run_bundle(MAE, "train", folder=tmp_path / "mae", **data)
    encoder = tmp_path / "mae" / "models" / "encoder.pt"
    run_bundle(BRAIN, "train", folder=tmp_path, pretrained_encoder=encoder, learning_rate=0.0, **data)
    weights = final_weights(tmp_path)
    assert weights[STEM].shape[1] == 4
    for name, value in encoder_weights(encoder).items():
        assert torch.equal(weights[name], value), name
    knobs = {"dataset_dir": tmp_path / "data", "models_dir": tmp_path / "models", "overlap": 0.0}
    run_bundle(BRAIN, "inference", folder=tmp_path, output_dir=tmp_path / "found", **knobs)
    written = sorted((tmp_path / "found" / "images").iterdir())
    assert [path.name for path in written] == [f"head_00{i}_seg.nii.gz" for i in range(4)]
    assert {int(value) for path in written for value in np.unique(volume(path))} <= {0, 1, 2, 4}
    run_bundle(MAE, "inference", folder=tmp_path, dataset_dir=tmp_path / "data", models_dir=encoder.parent)
    assert (tmp_path / "output" / "images" / "head_003_features.nii.gz").is_file()


def test_an_encoder_of_one_channel(pretrained: Path, run_bundle: Run, tmp_path: Path) -> None:
    encoder = pretrained / "models" / "encoder.pt"
    knobs = {"pretrained_encoder": encoder, "learning_rate": 0.0, "epochs": 1}
    with pytest.raises(SystemExit, match=r"pre-trained with preset coarse: channels \['CT'\] \(this run \['FLAIR', "):
        run_bundle(BRAIN, "train", folder=tmp_path, **knobs)
    run_bundle(BRAIN, "train", folder=tmp_path, allow_other_preset=True, **knobs)
    stem = encoder_weights(encoder)[STEM]
    torch.testing.assert_close(final_weights(tmp_path)[STEM], stem.expand(-1, 4, -1, -1, -1) / 4)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"images/head_001: no head_001_t1c\.nii\.gz: add it, or move the case's files away;"),
        ("grid", r"images/head_001_t1c\.nii\.gz: \(60, 64, 48\) voxels, but .*head_001_fla\.nii\.gz, a channel of the"),
        ("endings", r"^error: --channel_files \['_t1'\]: channel_files must give an ending for each of 4 channels"),
        ("channels", r"head_000_fla\.nii\.gz: 1 channels, expected 4"),
    ],
)
def test_cases_that_cannot_be_used(
    trained: Path, run_bundle: Run, separate: Path, tmp_path: Path, fault: str, message: str
) -> None:
    folder = tmp_path / "scans" / "images"
    folder.mkdir(parents=True)
    for path in (separate / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    broken = folder / "head_001_t1c.nii.gz"
    if fault == "missing":
        broken.unlink()
    elif fault == "grid":
        nib.save(nib.load(broken).slicer[:60], broken)
    endings = {"endings": ["_t1"], "channels": []}.get(fault, ENDINGS)
    knobs = {"dataset_dir": folder.parent, "models_dir": trained / "models", "channel_files": endings}
    with pytest.raises(SystemExit, match=message):
        run_bundle(BRAIN, "inference", folder=tmp_path, **knobs)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", [SWIN_UNETR, CONVVIT_UNETR])
def test_other_segmentation_bundles_take_regions(
    run_bundle: Run, data_of: Callable, tmp_path: Path, bundle: str
) -> None:
    run_bundle(bundle, "train", folder=tmp_path, **data_of(BRAIN) | {"epochs": 1})
    description = read_description(tmp_path / "models" / "model.json")
    assert description["network"]["arguments"]["out_channels"] == 3
    scans = {"dataset_dir": Path(data_of(BRAIN)["dataset_dir"]) / "imagesTr", "overlap": 0.0}
    run_bundle(bundle, "inference", folder=tmp_path, models_dir=tmp_path / "models", **scans)
    assert len(list((tmp_path / "output").glob("*_seg.nii.gz"))) == 6
