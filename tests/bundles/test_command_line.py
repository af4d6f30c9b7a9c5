"""One real start of each bundle, as the documentation does it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., subprocess.CompletedProcess]
SMALL = {
    "phantom_cases": 5,
    "epochs": 2,
    "warmup_epochs": 1,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_heads": 4,
    "crops_per_scan": 1,
}


@pytest.mark.parametrize(
    ("bundle", "knobs", "files"),
    [
        ("mae_vit_pretraining", {"decoder_hidden_size": 24, "decoder_num_layers": 1}, ["encoder.pt", "model.pt"]),
        ("unetr_segmentation", {"feature_size": 4, "overlap": 0.0, "label_fraction": 1.0}, ["model.pt", "model.json"]),
    ],
)
def test_demo(command_line: Start, tmp_path: Path, bundle: str, knobs: dict, files: list[str]) -> None:
    folders = {"output_dir": tmp_path / "output", "models_dir": tmp_path / "models"}
    run = command_line(bundle, "train", "demo", **SMALL, **knobs, **folders)
    assert run.returncode == 0, run.stderr
    assert "phantom: 4 scans for training, 1 for validation" in run.stdout
    assert "epoch 2/2: train_loss" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    for name in files:
        assert (tmp_path / "models" / name).is_file()
