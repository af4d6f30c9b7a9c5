"""Trainings that are killed end with the same weights, to the bit, as one that nothing disturbs."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common import (
    BUNDLES,
    CLASSIFICATION,
    MAE,
    OTHERS,
    PRETRAINING,
    TINY,
    TINY_OF,
    UNETR,
    assert_same_end,
    rows,
)

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "killed_in_writes.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def arguments(data_of: Callable) -> Callable[..., list[str]]:
    """The runner's arguments for a tiny training."""

    def make(bundle: str, folder: Path, **knobs: Any) -> list[str]:
        knobs = TINY | TINY_OF[bundle] | data_of(bundle) | {"num_workers": 0} | knobs
        knobs |= {"output_dir": folder / "output", "models_dir": folder / "models", "checkpoint_interval": 1}
        knobs |= {"preview_interval": 99} if bundle in PRETRAINING else {}
        found = ["--config_file", "configs/train.yaml", "--resume", "true"]
        return found + [text for name, value in knobs.items() for text in (f"--{name}", str(value))]

    return make


def assert_undisturbed_end(bundle: str, folder: Path) -> None:
    assert_same_end(bundle, folder / "undisturbed", folder / "killed")
    assert list(folder.rglob(".*.tmp")) == []


def kill_in_writes(bundle: str, arguments: Callable, folder: Path, kills: list[list]) -> None:
    plans = [
        {"run": arguments(bundle, folder / name), "kills": plan}
        for name, plan in (("undisturbed", []), ("killed", kills))
    ]
    command = [sys.executable, str(SCRIPT), json.dumps(plans)]
    run = subprocess.run(
        command, cwd=BUNDLES / bundle, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    endings = [int(code) for code in re.findall(r"^ended with (-?\d+)", run.stdout, re.MULTILINE)]
    assert endings == [0] + [-signal.SIGKILL] * len(kills) + [0], run.stdout + run.stderr
    assert_undisturbed_end(bundle, folder)


def test_killed_exactly_inside_a_write(arguments: Callable, tmp_path: Path) -> None:
    """With a half-written checkpoint, and twice between the two renamings, when there is only the one before."""
    kills = [["save", 6], ["replace", 13], ["replace", 12]]
    kill_in_writes(MAE, lambda *args: arguments(*args, epochs=6), tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "step"),
    [(MAE, 1), (UNETR, 1), *[(bundle, 3) for bundle in OTHERS]],
)
def test_killed_in_every_write(arguments: Callable, tmp_path: Path, bundle: str, step: int) -> None:
    """Every flush, every renaming and every half-written file of the second epoch after each start, or each third."""
    kills = [["fsync", n] for n in range(8, 24)] + [["replace", n] for n in range(4, 16)]
    kills += [["save", n] for n in range(3, 8)]
    epochs = (
        60 // step * (3 if bundle in CLASSIFICATION else 1)
    )  # they seldom write a best model: more epochs for each kill
    kill_in_writes(bundle, lambda *args: arguments(*args, epochs=epochs), tmp_path, kills[::step])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "kills", "length"),
    [(MAE, 20, 60), (UNETR, 20, 60), *[(bundle, 6, 30) for bundle in OTHERS]],
)
def test_kills_at_random_moments(arguments: Callable, tmp_path: Path, bundle: str, kills: int, length: int) -> None:
    moments = random.Random(3)

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "monai.bundle", "run", *arguments(bundle, folder, epochs=length)]
        return subprocess.Popen(
            command, cwd=BUNDLES / bundle, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(process: subprocess.Popen) -> None:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output

    finish(start(tmp_path / "undisturbed"))
    seconds = float(rows(tmp_path / "undisturbed" / "output" / "scalars.csv")[-1]["seconds"]) / length  # of an epoch
    epochs = []
    for number in range(kills):
        process = start(tmp_path / "killed")
        seen = threading.Event()
        marker = ("--resume: ", f"/{length}: train_loss")[number % 2]  # before the first epoch, after it

        def read(process: subprocess.Popen = process, seen: threading.Event = seen, marker: str = marker) -> None:
            for line in process.stdout:
                if marker in line:
                    seen.set()

        reader = threading.Thread(target=read)
        reader.start()
        if number % 5 == 4:  # while it starts
            time.sleep(moments.uniform(0, 6))
        else:
            assert seen.wait(120)
            time.sleep(moments.uniform(0, 3 * seconds))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        reader.join()
        path = tmp_path / "killed" / "output" / "checkpoint.pt"
        epochs.append(torch.load(path, weights_only=True)["epoch"] if path.is_file() else 0)
    print(bundle, "epoch after each kill:", epochs)
    assert epochs == sorted(epochs)
    assert 0 < epochs[-1] < length
    finish(start(tmp_path / "killed"))
    assert_undisturbed_end(bundle, tmp_path)
