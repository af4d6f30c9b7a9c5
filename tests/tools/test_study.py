"""Small studies through the real bundle runner."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.common import MAE, TINY, TINY_OF, UNETR
from tools.study import study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_study(tmp_path, phantom_dir, coarse_preset):
    """Writes a study of tiny networks on phantom data: from scratch and from a masked autoencoder."""

    def write(evaluate: bool, epochs: int) -> Path:
        common = {"dataset": str(coarse_preset), "dataset_dir": str(phantom_dir), "num_workers": 0, "amp": False}
        common["datalist"] = None
        short = TINY | {"epochs": epochs, "checkpoint_interval": 1}
        content = {
            "common": common,
            "pretraining": {"bundle": MAE, **short, **TINY_OF[MAE]},
            "finetuning": {"bundle": UNETR, **short, **TINY_OF[UNETR], "preview_interval": 99},
            "arms": {"scratch": {}, "mae": {"pretraining": {}}},
            "labels": [2],
            "seeds": [0],
            "evaluate": evaluate,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def _on_processors(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def curve(folder):
    with (folder / "scalars.csv").open() as file:
        return [(row["epoch"], row["train_loss"], row["mean_dice"]) for row in csv.DictReader(file)]


@pytest.mark.usefixtures("_on_processors")
def test_a_tiny_study(tiny_study, tmp_path):
    study(str(tiny_study(evaluate=False, epochs=2)), output_dir=str(tmp_path / "out"), jobs=2)
    out = tmp_path / "out"
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["scans"], row["state"]) for row in rows] == [
        ("scratch", "2", "finished"),
        ("mae", "2", "finished"),
    ]
    assert all(0 <= float(row["best_dice"]) <= 1 for row in rows)
    assert rows[1]["difference"]
    log = (out / "finetuning" / "mae" / "labels_2" / "seed_0" / "log.txt").read_text()
    assert f"{out}/pretraining/mae/seed_0/models/encoder.pt" in log  # what was loaded
    assert "3 of 3 cells are finished" in (out / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("_on_processors")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_ended_in_a_cell_goes_on_to_the_same_end(tiny_study, tmp_path, number):
    path = tiny_study(evaluate=True, epochs=6)
    study(str(path), output_dir=str(tmp_path / "undisturbed"), jobs=2)

    out = tmp_path / "ended"
    command = [
        sys.executable,
        "-m",
        "tools",
        "study",
        str(path),
        "--output_dir",
        str(out),
        "--jobs",
        "1",
        "--threads",
        "1",
    ]
    scratch = out / "finetuning" / "scratch" / "labels_2" / "seed_0"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not (scratch / "checkpoint.pt").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, number)
        printed = process.communicate()[0]
    assert process.returncode != 0
    if number == signal.SIGTERM:
        assert "stopped; 1 cells are finished, the same command goes on" in printed
        assert len(curve(scratch)) < 6
    deadline = time.monotonic() + 300  # a run that was left behind keeps the folder locked until it has ended
    while (done := subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)).returncode:
        assert "left behind" in done.stderr, done
        assert time.monotonic() < deadline
        time.sleep(1)
    for name in ("finetuning/scratch/labels_2/seed_0", "finetuning/mae/labels_2/seed_0"):
        assert curve(out / name) == curve(tmp_path / "undisturbed" / name)
        results = [
            json.loads((root / name / "cell.json").read_text())["results"] for root in (out, out.parent / "undisturbed")
        ]
        for one in results:
            del one["train_seconds"]
        assert results[0] == results[1]
        assert results[0]["dice"] == pytest.approx(results[0]["best_dice"], abs=1e-6)
