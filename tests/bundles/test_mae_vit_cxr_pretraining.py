"""MAE pre-training on radiographs, through the real bundle runner."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import ViT
from PIL import Image

from medmim.weights import build_encoder
from tests.common import FILES, MAE_CXR, rows, tensorboard_names

Run = Callable[..., ConfigWorkflow]


def test_training_writes_everything_and_lowers_the_loss(pretrained_cxr: Path) -> None:
    assert {path.name for path in (pretrained_cxr / "models").iterdir()} == set(FILES[MAE_CXR])
    losses = [float(row["train_loss"]) for row in rows(pretrained_cxr / "output" / "scalars.csv")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    for name in ("curves.png", "previews/epoch_0008.png"):
        assert np.asarray(Image.open(pretrained_cxr / "output" / name)).std() > 1, name
    assert {"train_loss", "val_loss"} <= tensorboard_names(pretrained_cxr / "output" / "tensorboard")


def test_encoder_loads_complete_into_a_stock_vit(pretrained_cxr: Path) -> None:
    path = pretrained_cxr / "models" / "encoder.pt"
    vit = ViT(1, (32, 24), 8, hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4, spatial_dims=2).eval()
    vit.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    image = torch.randn(2, 1, 32, 24)
    torch.testing.assert_close(vit(image)[0], build_encoder(path).eval()(image)[0])


def test_evaluation_gives_the_loss_of_training(pretrained_cxr: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = pretrained_cxr / "output" / "checkpoint.pt"
    workflow = run_bundle(MAE_CXR, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint)
    found = workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_loss"]
    assert found == pytest.approx(float(rows(pretrained_cxr / "output" / "scalars.csv")[-1]["val_loss"]), rel=1e-5)


def test_reconstructions_hide_three_quarters(pretrained_cxr: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = pretrained_cxr / "output" / "checkpoint.pt"
    run_bundle(MAE_CXR, "train", "reconstruct", folder=tmp_path, checkpoint=checkpoint, scans=2)
    folder = tmp_path / "output" / "reconstructions"
    assert len(list(folder.rglob("*.png"))) == 2
    masked = [np.asarray(nib.load(path).dataobj).squeeze() for path in folder.rglob("*_masked.nii.gz")]
    filled = [np.asarray(nib.load(path).dataobj) for path in folder.rglob("*_reconstruction.nii.gz")]
    assert [image.shape for image in masked] == [(32, 24)] * 2
    assert [round(float((image == 0).mean()), 2) for image in masked] == [0.75] * 2
    assert all(np.isfinite(image).all() and (image != 0).all() for image in filled)


def test_features_of_new_images(pretrained_cxr: Path, run_bundle: Run, radiographs_dir: Path, tmp_path: Path) -> None:
    knobs = {"models_dir": pretrained_cxr / "models", "dataset_dir": radiographs_dir / "images"}
    run_bundle(MAE_CXR, "inference", folder=tmp_path, batch_size=4, **knobs)
    found = sorted((tmp_path / "output").rglob("*_features.nii.gz"))
    assert len(found) == len(list(radiographs_dir.rglob("*.png")))
    features = np.asarray(nib.load(found[0]).dataobj).squeeze()
    assert features.shape == (4, 3, 48)
    assert np.isfinite(features).all()
    assert features.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["mlp", "linear"])
def test_other_decoders_and_fixed_intensities(run_bundle: Run, tmp_path: Path, decoder: str) -> None:
    knobs = {"decoder": decoder, "normalization": "fixed", "load_size": 40, "mask_unit": 16, "roi_size": [32, 32]}
    run_bundle(MAE_CXR, "train", folder=tmp_path, mask_ratio=0.5, cache="memory", **knobs)
    assert len(rows(tmp_path / "output" / "scalars.csv")) == 2


def test_preset_of_scans_is_refused(run_bundle: Run, tmp_path: Path, record_property: Callable) -> None:
    with pytest.raises(SystemExit) as end:
        run_bundle(MAE_CXR, "train", folder=tmp_path, dataset="btcv")
    record_property("error", str(end.value))
    assert str(end.value).splitlines() == [
        "error: --dataset btcv: a preset of 3 axes and 1 channels, expected 2 axes and 1 channel for radiographs: "
        "choose another"
    ]


def test_widths_that_two_axes_do_not_divide(run_bundle: Run, tmp_path: Path, record_property: Callable) -> None:
    """Sines and cosines of two axes need a multiple of 4, not of 6 as in a volume."""
    with pytest.raises(SystemExit) as end:
        run_bundle(MAE_CXR, "train", folder=tmp_path, decoder_hidden_size=18, decoder_num_heads=3)
    record_property("error", str(end.value))
    assert str(end.value) == "error: --decoder_hidden_size 18: expected a multiple of 4"


def test_names_that_would_share_a_result(
    pretrained_cxr: Path, run_bundle: Run, radiographs_dir: Path, tmp_path: Path, record_property: Callable
) -> None:
    (tmp_path / "new").mkdir()
    source = Image.open(next(radiographs_dir.rglob("*.png")))
    for name in ("a.png", "a.jpg", "b.png"):
        source.save(tmp_path / "new" / name)
    knobs = {"models_dir": pretrained_cxr / "models", "dataset_dir": tmp_path / "new"}
    with pytest.raises(SystemExit, match="new/a: 1 names stand with several endings") as end:
        run_bundle(MAE_CXR, "inference", folder=tmp_path, **knobs)
    record_property("error", str(end.value))
    assert not list((tmp_path / "output").glob("*.nii.gz"))
