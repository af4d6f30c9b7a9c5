"""One real start of each bundle, as the documentation does it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.common import DEMO_KNOBS, FILES, rows


@pytest.mark.parametrize("bundle", list(DEMO_KNOBS))
def test_demo(command_line: Callable[..., subprocess.CompletedProcess], tmp_path: Path, bundle: str) -> None:
    folders = {"output_dir": tmp_path / "output", "models_dir": tmp_path / "models"}
    knobs = DEMO_KNOBS[bundle] | {"epochs": 1, "warmup_epochs": 0}
    run = command_line(bundle, "train", "demo", **knobs, **folders)
    assert run.returncode == 0, run.stderr
    assert "for training, " in run.stdout
    assert "epoch 1/1: train_loss" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    assert {path.name for path in (tmp_path / "models").glob("[!.]*")} == set(FILES[bundle])
    assert len(rows(tmp_path / "output" / "scalars.csv")) == 1
