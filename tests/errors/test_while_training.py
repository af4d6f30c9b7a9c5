"""What goes wrong in a training, and how it looks on the command line."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.common import MAE, UNETR, both, spoil


@both
def test_loss_that_is_not_finite(one_line: Callable, phantom_dir: Path, bundle: str) -> None:
    message = one_line(bundle, learning_rate=1e30, epochs=3)
    assert message.startswith(("the loss is nan in epoch ", "the loss is inf in epoch "))
    assert ", iteration " in message
    assert message.count(f"{phantom_dir}/imagesTr/phantom_00") == 2  # each scan once
    assert message.endswith("lower --learning_rate, or try --amp false")


def last_line_of(run: subprocess.CompletedProcess) -> str:
    """The message of a command that failed, which must be the last line and no stack trace."""
    assert run.returncode == 1
    assert "Traceback" not in run.stdout + run.stderr
    return run.stderr.rstrip("\n").splitlines()[-1]


def test_command_line_dataset_folder_missing(command_line: Callable, tmp_path: Path) -> None:
    knobs = {"dataset": "hippocampus", "dataset_dir": tmp_path / "nowhere", "output_dir": tmp_path / "output"}
    run = command_line(UNETR, "train", models_dir=tmp_path / "models", **knobs)
    assert last_line_of(run) == f"error: --dataset_dir {tmp_path / 'nowhere'}: no such folder"


def test_command_line_scan_breaks_in_a_worker(
    command_line: Callable, data: Path, coarse_preset: Path, tmp_path: Path
) -> None:
    for path in (data / "imagesTr").iterdir():
        spoil(path, "truncated")
    knobs = {"dataset": coarse_preset, "dataset_dir": data, "output_dir": tmp_path / "output", "num_workers": 2}
    knobs |= {"models_dir": tmp_path / "models", "check_scans": False, "cache_rate": 0.0, "batch_size": 2}
    knobs |= {"hidden_size": 48, "num_layers": 4, "num_heads": 4, "decoder_num_layers": 1}
    message = last_line_of(command_line(MAE, "train", **knobs))
    assert message.startswith(f"error: {data}/imagesTr/phantom_00")
    assert message.endswith("replace or remove the file")


def test_command_line_loss_that_is_not_finite(
    command_line: Callable, phantom_dir: Path, coarse_preset: Path, tmp_path: Path
) -> None:
    knobs = {"dataset": coarse_preset, "dataset_dir": phantom_dir, "output_dir": tmp_path / "output"}
    knobs |= {"models_dir": tmp_path / "models", "num_workers": 0, "learning_rate": 1e30, "epochs": 3}
    knobs |= {"warmup_epochs": 1, "hidden_size": 48, "num_layers": 4, "num_heads": 4, "feature_size": 4}
    message = last_line_of(command_line(UNETR, "train", **knobs))
    assert message.startswith("error: the loss is nan in epoch ")
    assert "--amp false" in message
