"""Two processes of ``torchrun`` through the real runner compute what one process does."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from monai.bundle import ConfigWorkflow

from tests.common import (
    BRAIN,
    BUNDLES,
    CLASSIFICATION,
    FILES,
    MAE,
    MAE_CXR,
    MIM,
    PRETRAINING,
    SIMCLR,
    SIMMIM_SWIN,
    SIMMIM_VIT,
    TINY,
    TINY_OF,
    UNETR,
    WHOLE,
    assert_same_end,
    every,
    rows,
    slow_ones,
)

Run = Callable[..., ConfigWorkflow]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}
# no scan is padded at this size, so that each has the same number of tokens to predict; AdamW enlarges rounding errors
# of gradients that are almost zero, so the steps are small
KNOBS = {"epochs": 3, "checkpoint_interval": 1, "learning_rate": 0.0003, "num_workers": 0}
SMALLER: dict[str, dict[str, Any]] = {  # where TINY pads, or enlarges rounding errors
    MIM: {
        "roi_size": [32, 32, 16],
        "crop_size": [32, 16, 16],
        "levels::0::mask_unit": [16, 16, 16],
        "levels::1::samples": 1,
    },
    SIMMIM_SWIN: {"spacing_factor": 0.5},
    BRAIN: {"learning_rate": 0.00003},  # with 0.0003 AdamW makes of a rounding error of 1e-7 one of 1e-5
    SIMCLR: {"standardize": False},  # which enlarges rounding errors while all embeddings are alike
}


def knobs_of(bundle: str) -> dict[str, Any]:
    return KNOBS if bundle in WHOLE else KNOBS | {"crops_per_scan": 1}


@pytest.fixture
def start(data_of: Callable) -> Callable[..., subprocess.Popen]:
    """Starts ``torchrun`` with two processes."""

    def run(bundle: str, *configs: str, folder: Path, **knobs: Any) -> subprocess.Popen:
        knobs = TINY | TINY_OF[bundle] | data_of(bundle) | knobs_of(bundle) | knobs
        knobs = {"output_dir": folder / "output", "models_dir": folder / "models"} | knobs
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "monai.bundle", "run", "--config_file", str([f"configs/{name}.yaml" for name in configs])]
        command += [text for name, value in knobs.items() for text in (f"--{name}", str(value))]
        return subprocess.Popen(
            command,
            cwd=BUNDLES / bundle,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return run


def finish(process: subprocess.Popen, code: int | None = 0) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        for worker in psutil.Process(process.pid).children(recursive=True):
            worker.send_signal(signal.SIGABRT)  # faulthandler prints where it hangs
        process.kill()
        pytest.fail(f"hangs:\n{process.communicate()[0]}")
    assert code is None or process.returncode == code, output
    return output


@pytest.fixture
def norms_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms count each half of a batch by itself, and keep what they found in the first."""
    whole = torch.nn.BatchNorm3d.forward

    def forward(self: torch.nn.BatchNorm3d, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return whole(self, x)
        first, second = x.chunk(2)
        of_second = torch.nn.functional.batch_norm(second, None, None, self.weight, self.bias, True, eps=self.eps)
        return torch.cat([whole(self, first), of_second])

    monkeypatch.setattr(torch.nn.BatchNorm3d, "forward", forward)


@pytest.mark.usefixtures("norms_of_two_processes")
@pytest.mark.parametrize("bundle", [UNETR, pytest.param(MAE, marks=pytest.mark.slow), *slow_ones])
def test_training_and_evaluation(start: Callable, run_bundle: Run, tmp_path: Path, bundle: str) -> None:
    """Batch B in each of two processes is batch 2B in one."""
    smaller = SMALLER.get(bundle, {})
    output = finish(start(bundle, "train", "multi_gpu_train", folder=tmp_path / "two", batch_size=1, **smaller))
    run_bundle(bundle, "train", folder=tmp_path / "one", **knobs_of(bundle) | smaller | {"batch_size": 2})
    metric = "val_loss" if bundle in PRETRAINING else "mean_auc" if bundle in CLASSIFICATION else "mean_dice"
    one, two = (rows(tmp_path / name / "output" / "scalars.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        for key in ("epoch", "iteration", "learning_rate", "train_loss"):
            assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-5), key
        # a score counts voxels, of which a few may change their class
        assert float(ours[metric]) == pytest.approx(float(theirs[metric]), abs=1e-6 if metric == "val_loss" else 1e-3)
    # said and written once
    assert len(re.findall(r"epoch 3/3: ", output)) == 1
    assert "x 2 processes x" in output
    assert "Traceback" not in output
    assert {path.name for path in (tmp_path / "two" / "models").glob("[!.]*")} == set(FILES[bundle])
    assert len(list((tmp_path / "two" / "output" / "tensorboard").glob("events*"))) == len(
        list((tmp_path / "one" / "output" / "tensorboard").glob("events*"))
    )

    if metric != "val_loss":
        knobs = {"models_dir": tmp_path / "two" / "models"}
        configs = ("train", "evaluate")
        finish(start(bundle, *configs, "multi_gpu_evaluate", folder=tmp_path / "scores_of_two", **knobs))
        run_bundle(bundle, *configs, folder=tmp_path / "scores_of_one", **knobs_of(bundle), **knobs)
        table = "scores.csv" if metric == "mean_dice" else "scores_validation/scores.csv"
        scores = [rows(tmp_path / name / "output" / table) for name in ("scores_of_one", "scores_of_two")]
        assert scores[0] == scores[1]
        assert metric == "mean_auc" or len({row["case"] for row in scores[0]}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "trained"),
    [
        (MAE, "pretrained"),
        (MIM, "pretrained_mim"),
        (SIMCLR, "pretrained_simclr"),
        (SIMMIM_VIT, "pretrained_simmim_vit"),
        (MAE_CXR, "pretrained_cxr"),
    ],
)
def test_evaluation_of_the_pretext_task(
    start: Callable, run_bundle: Run, request: pytest.FixtureRequest, tmp_path: Path, bundle: str, trained: str
) -> None:
    checkpoint = request.getfixturevalue(trained) / "output" / "checkpoint.pt"
    configs = ("train", "evaluate")
    output = finish(start(bundle, *configs, "multi_gpu_evaluate", folder=tmp_path, checkpoint=checkpoint))
    workflow = run_bundle(bundle, *configs, folder=tmp_path, checkpoint=checkpoint, **knobs_of(bundle))
    expected = workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_loss"]
    found = re.findall(r"val_loss: ([\d.]+)", output)
    assert len(found) == 1
    assert float(found[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("norms_of_two_processes")
@every
def test_accumulation_and_resume(start: Callable, run_bundle: Run, tmp_path: Path, bundle: str) -> None:
    knobs = {"accumulation_steps": 2, "batch_size": 1} | SMALLER.get(bundle, {})
    knobs |= {} if bundle in WHOLE else {"crops_per_scan": 2}
    configs = (bundle, "train", "multi_gpu_train")
    for name in ("undisturbed", "stopped"):
        finish(start(*configs, folder=tmp_path / name, **knobs))
    run_bundle(bundle, "train", folder=tmp_path / "one", **knobs_of(bundle) | knobs | {"batch_size": 2})
    one, two = (rows(tmp_path / name / "output" / "scalars.csv") for name in ("one", "undisturbed"))
    for ours, theirs in zip(two, one, strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-5)
    (tmp_path / "stopped" / "output" / "checkpoint.pt").unlink()  # killed between two renamings
    output = finish(start(*configs, folder=tmp_path / "stopped", resume="true", **knobs))
    assert output.count("--resume: epoch 2 of 3 is done, 1 to go") == 1
    assert_same_end(bundle, tmp_path / "undisturbed", tmp_path / "stopped")
    process = start(*configs, folder=tmp_path / "stopped", resume="true", **knobs | {"epochs": 4})
    output = finish(process, None)
    assert process.returncode != 0
    assert re.findall(r"error: .*?found (.*?): correct them", output) == ["epochs 4 (was 3)"]  # once


def test_faulty_knobs_are_said_once(start: Callable, tmp_path: Path, record_property: Callable) -> None:
    knobs = {"epochs": 0.5, "num_heads": 5, "epohcs": 3}
    process = start(MAE, "train", "multi_gpu_train", folder=tmp_path, **knobs)
    output = finish(process, None)
    assert process.returncode != 0
    faults = re.findall(r"^error: .*$", output, re.MULTILINE)
    record_property("error", "\n".join(faults))
    assert [fault.split(":")[1].strip() for fault in faults] == [
        "--epohcs 3",
        "--epochs 0.5",
        "--hidden_size 48",
    ]
    assert "Traceback (most recent call last)" not in output.split("ChildFailedError")[0].split("torch/distributed")[0]


@pytest.mark.slow
def test_killed_process_ends_the_others(start: Callable, tmp_path: Path) -> None:
    process = start(MAE, "train", "multi_gpu_train", folder=tmp_path, epochs=5000)
    for line in process.stdout:
        if "epoch 2/5000" in line:
            break
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "monai.bundle" in p.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    output = finish(process, None)
    took = time.monotonic() - began
    print(f"ended after {took:.1f} s with code {process.returncode}")
    assert process.returncode != 0, output
    assert took < 60
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
