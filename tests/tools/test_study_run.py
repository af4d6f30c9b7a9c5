"""Studies run each cell once, go on after a break, and say what failed. A stand-in takes the runner's place."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools.study import study
from tools.study_file import read_study
from tools.study_folder import locked
from tools.study_run import StudyRun, share_machine, visible_gpus

ONE = {"labels": "[2]", "seeds": "[0]"}  # three cells


@pytest.fixture
def run(phantom_dir, tmp_path, stand_in):
    """Runs a study file on phantom data; gives the starts of this run."""

    def run_study(path: Path, **options) -> list[str]:
        before = len(stand_in())
        study(str(path), str(phantom_dir), str(tmp_path / "out"), **options)
        return stand_in()[before:]

    return run_study


def test_each_cell_runs_once(study_file, run, tmp_path, capsys):
    starts = run(study_file(**ONE), jobs=1)
    assert [start.split("|")[:2] for start in starts] == [
        ["pretraining/mae/seed_0", "train"],  # what others wait for comes first
        ["finetuning/scratch/labels_2/seed_0", "train"],
        ["finetuning/scratch/labels_2/seed_0", "evaluate"],
        ["finetuning/mae/labels_2/seed_0", "train"],
        ["finetuning/mae/labels_2/seed_0", "evaluate"],
    ]
    assert "[3/3] finetuning/mae/labels_2/seed_0: " in capsys.readouterr().out
    cell = tmp_path / "out" / "finetuning" / "mae" / "labels_2" / "seed_0"
    state = json.loads((cell / "cell.json").read_text())
    assert state["state"] == "finished"
    assert state["settings"]["knobs"]["epochs"] == 10
    assert state["results"]["best_dice"] == pytest.approx(1 - 0.5 / 21)
    assert not (cell / "checkpoint.pt").exists()
    assert (tmp_path / "out" / "pretraining" / "mae" / "seed_0" / "checkpoint.pt").exists()
    assert "python -m monai.bundle run --config_file configs/train.yaml" in (cell / "command.txt").read_text()

    assert run(study_file(**ONE)) == []
    more = run(study_file(labels="[2]", seeds="[0, 1]"))  # a cell more for each arm
    assert {start.split("|")[0] for start in more} == {
        f"finetuning/{arm}/labels_2/seed_1" for arm in ("scratch", "mae")
    }


def test_several_at_a_time(study_file, run, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.03")
    starts = run(study_file(), jobs=4)
    assert len(starts) == 1 + 2 * 8
    assert {start.split("|")[3] for start in starts} == {"1"}
    assert "9 of 9 cells are finished" in (tmp_path / "out" / "report.md").read_text()


def test_a_failure_is_reported_and_the_rest_goes_on(study_file, run, tmp_path, stand_in):
    grid = "{pretraining: {mask_ratio: [0.13, 0.5]}}"
    with pytest.raises(SystemExit) as error:
        run(study_file(grid=grid, **ONE))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: pretraining/mae/mask_ratio_0.13/seed_0: --mask_ratio 0.13: unlucky; log: ")
    assert lines[1].endswith("skipped: it needs pretraining/mae/mask_ratio_0.13/seed_0, which failed")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "3 of 5 cells are finished" in report
    assert "* pretraining/mae/mask_ratio_0.13/seed_0: failed: --mask_ratio 0.13: unlucky" in report
    assert "* finetuning/mae/mask_ratio_0.13/labels_2/seed_0: skipped" in report

    before = len(stand_in())
    with pytest.raises(SystemExit):  # it is tried again, alone
        run(study_file(grid=grid, **ONE))
    assert [start.split("|")[0] for start in stand_in()[before:]] == ["pretraining/mae/mask_ratio_0.13/seed_0"]


def test_finished_cells_with_other_settings_are_not_mixed(study_file, run, tmp_path):
    run(study_file(**ONE))
    other = study_file(pretraining="{bundle: mae_vit_pretraining, epochs: 4}", **ONE)
    with pytest.raises(SystemExit) as error:
        run(other)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "pretraining/mae/seed_0: was finished with other settings: epochs 4 (was 3): take another" in lines[0]
    assert "finetuning/mae/labels_2/seed_0: was finished with other settings: pre-training: epochs 4" in lines[1]
    starts = run(other, rerun_changed=True)
    assert {start.split("|")[0] for start in starts} == {"pretraining/mae/seed_0", "finetuning/mae/labels_2/seed_0"}
    assert (tmp_path / "out" / "set_aside" / "1" / "pretraining" / "mae" / "seed_0" / "cell.json").is_file()


def test_an_unfinished_cell_with_other_settings_begins_anew(study_file, run, tmp_path, capsys):
    failing = study_file(pretraining="{bundle: mae_vit_pretraining, epochs: 3, mask_ratio: 0.13}", **ONE)
    with pytest.raises(SystemExit):
        run(failing)
    run(study_file(**ONE))
    assert "other settings (mask_ratio 0.75 (was 0.13)): set aside as set_aside/1/pretrain" in capsys.readouterr().out


def test_a_pretraining_whose_encoder_is_gone_runs_again(study_file, run, tmp_path):
    run(study_file(**ONE))
    (tmp_path / "out" / "pretraining" / "mae" / "seed_0" / "models" / "encoder.pt").unlink()
    assert [start.split("|")[0] for start in run(study_file(**ONE))] == ["pretraining/mae/seed_0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_and_the_next_study_goes_on(study_file, run, tmp_path, monkeypatch, number):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.05")
    folder = tmp_path / "out" / "finetuning" / "scratch" / "labels_2" / "seed_0"

    def kill() -> None:
        while not (folder / "checkpoint.pt").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=kill)
    killer.start()
    long = {"finetuning": "{bundle: unetr_segmentation, epochs: 100}", "arms": "{scratch: {}}"}
    with pytest.raises(SystemExit, match="stopped; 0 cells are finished, the same command goes on"):
        run(study_file(**ONE, **long), jobs=2)
    killer.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = int((folder / "checkpoint.pt").read_text())
    assert 1 <= done < 100
    time.sleep(0.2)
    assert int((folder / "checkpoint.pt").read_text()) == done  # its process has ended
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    assert len(run(study_file(**ONE, **long))) == 2
    assert json.loads((folder / "cell.json").read_text())["results"]["best_epoch"] == 100


def test_one_study_in_a_folder(study_file, run, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(SystemExit, match=r"another study works there \(process \d+ on"):
        run(study_file(**ONE))
    with locked(tmp_path / "out") as lock:  # a run that outlives its study holds the lock
        left_behind = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(ValueError, match="another study works there"), locked(tmp_path / "out"):
        pass
    left_behind.communicate(b"\n")
    with locked(tmp_path / "out"):
        pass


def test_a_gpu_for_each_cell(study_file, phantom_dir, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.1")
    plan = read_study(study_file(arms="{scratch: {}}"), phantom_dir)
    with locked(tmp_path / "out") as lock:
        StudyRun(plan, tmp_path / "out", 2, 3, ["4", "GPU-7"]).run(lock)
    starts = [start.split("|") for start in stand_in()]
    assert {start[2] for start in starts[:2]} == {"4", "GPU-7"}
    for cell in plan.cells:  # training and evaluation on the same
        assert len({start[2] for start in starts if start[0] == cell.name}) == 1
    assert {start[3] for start in starts} == {"3"}


def test_gpus_of_this_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert visible_gpus() == ["3", "GPU-5"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("jobs", "threads", "gpus", "expected"),
    [
        (None, None, 0, (8, 1)),
        (None, 4, 0, (2, 4)),
        (None, 16, 0, (1, 16)),
        (1, None, 0, (1, 8)),
        (3, None, 0, (3, 1)),
        (None, None, 2, (2, 4)),
        (4, 1, 2, (4, 1)),
    ],
)
def test_how_the_machine_is_shared(jobs, threads, gpus, expected):
    assert share_machine(jobs, threads, [str(n) for n in range(gpus)], 8) == expected


def test_faulty_options(study_file, run):
    with pytest.raises(SystemExit) as error:
        run(study_file(), jobs=0, threads="x")
    assert str(error.value).splitlines() == [
        "error: --jobs 0: expected a whole number above 0",
        "error: --threads x: expected a whole number above 0",
    ]


def test_time_left_knows_the_kinds(study_file, phantom_dir, tmp_path):
    plan = read_study(study_file(**ONE), phantom_dir)
    run = StudyRun(plan, tmp_path / "out", 1, 1)
    assert run.time_left() == ""
    run.seconds = {"pretraining/mae/seed_0": 500.0}
    assert run.time_left() == ""  # nothing is known of a fine-tuning
    run.seconds["finetuning/scratch/labels_2/seed_0"] = 30.0
    assert run.time_left() == "about 30 s left"
    run.seconds = {"finetuning/scratch/labels_2/seed_0": 300.0}
    run.failed = {"pretraining/mae/seed_0": ""}
    assert run.time_left() == "about 5 min left"


def test_a_dry_run_prints_the_plan(study_file, run, tmp_path, capsys):
    assert run(study_file(), dry_run=True, jobs=2) == []
    printed = capsys.readouterr().out
    assert printed.count("python -m monai.bundle run") == 1 + 2 * 8
    assert "# finetuning/mae/labels_4/seed_1 (new, after pretraining/mae/seed_0)" in printed
    assert printed.splitlines()[-1].startswith("9 cells: 1 pre-trainings, 8 fine-tunings, 2 at a time, in ")
    assert not (tmp_path / "out").exists()


def test_report_only(study_file, run, stand_in, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no study was run there"):
        run(study_file(**ONE), report_only=True)
    run(study_file(**ONE))
    before = (tmp_path / "out" / "results.csv").read_text()
    (tmp_path / "out" / "results.csv").unlink()
    starts = len(stand_in())
    study(str(study_file(**ONE)), output_dir=str(tmp_path / "out"), report_only=True)  # it remembers the data
    assert len(stand_in()) == starts
    assert (tmp_path / "out" / "results.csv").read_text() == before
