"""A training that stops after an epoch goes on to the same weights, whatever the workers and the cache."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from medmim.resume import Checkpoints
from tests.common import (
    CONVVIT_UNETR,
    FILES,
    MAE,
    MIM,
    SIMCLR,
    SWIN_UNETR,
    UNETR,
    assert_same_end,
    both,
    every,
    rows,
    sha256,
    spoil,
)

Run = Callable[..., ConfigWorkflow]
KNOBS = {"epochs": 4, "checkpoint_interval": 1, "learning_rate": 0.003}
NO_FIT = "its network does not fit this run's: --resume needs the knobs"


@pytest.fixture(scope="module")
def undisturbed(run_bundle: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def run(bundle: str) -> Path:
        if bundle not in folders:
            folders[bundle] = tmp_path_factory.mktemp("undisturbed")
            run_bundle(bundle, "train", folder=folders[bundle], **KNOBS)
        return folders[bundle]

    return run


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends a training right after the checkpoint of an epoch."""

    def stop(epoch: int) -> None:
        def save_and_stop(self: Checkpoints, engine: Any) -> None:
            save(self, engine)
            if engine.state.epoch == epoch:
                raise SystemExit("stopped")

        monkeypatch.setattr(Checkpoints, "save", save_and_stop)

    save = Checkpoints.save
    return stop


@every
@pytest.mark.parametrize(
    ("num_workers", "cache"),
    [
        (0, "memory"),
        (2, "disk"),
        pytest.param(2, "memory", marks=pytest.mark.slow),
        pytest.param(0, "disk", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stopped_and_resumed(
    run_bundle: Run, undisturbed: Any, stop_after: Any, tmp_path: Path, bundle: str, num_workers: int, cache: str
) -> None:
    knobs = KNOBS | {"num_workers": num_workers, "cache": cache, "folder": tmp_path}
    stop_after(2)
    with pytest.raises(SystemExit, match="stopped"):
        run_bundle(bundle, "train", **knobs)
    assert len(rows(tmp_path / "output" / "scalars.csv")) == 2
    stop_after(99)
    run_bundle(bundle, "train", resume="true", **knobs)
    assert_same_end(bundle, undisturbed(bundle), tmp_path)


@every
def test_resumed_twice_with_other_workers_and_another_cache(
    run_bundle: Run, undisturbed: Any, stop_after: Any, tmp_path: Path, bundle: str
) -> None:
    for epoch, knobs in ((1, {"num_workers": 2}), (2, {"cache": "none"}), (99, {"cache": "memory", "cache_rate": 0.5})):
        stop_after(epoch)
        if epoch < 99:
            with pytest.raises(SystemExit, match="stopped"):
                run_bundle(bundle, "train", folder=tmp_path, resume=True, **KNOBS, **knobs)
        else:
            run_bundle(bundle, "train", folder=tmp_path, resume=True, **KNOBS, **knobs)
    assert_same_end(bundle, undisturbed(bundle), tmp_path)


@both
def test_finished_training_has_nothing_left(
    run_bundle: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, bundle: str
) -> None:
    knobs = KNOBS | {"epochs": 2, "folder": tmp_path}
    run_bundle(bundle, "train", **knobs)
    names = [*(f"models/{name}" for name in FILES[bundle]), "output/checkpoint.pt", "output/scalars.csv"]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    with caplog.at_level(logging.INFO, "medmim"):
        run_bundle(bundle, "train", resume=True, **knobs)
    assert "--resume: epoch 2 of 2 is done, nothing left to train" in caplog.text
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    with pytest.raises(SystemExit, match=r"found epochs 3 \(was 2\): correct them, or take another --output_dir"):
        run_bundle(bundle, "train", resume=True, **knobs | {"epochs": 3})
    with pytest.raises(SystemExit, match=r"checkpoint\.pt: the checkpoint of an earlier training: go on from it"):
        run_bundle(bundle, "train", **knobs)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


@pytest.mark.parametrize(
    ("bundle", "knobs", "told"),
    [
        (MAE, {"num_heads": 6}, "num_heads 6 (was 4)"),
        (MAE, {"loss_norm": "l1"}, "loss_norm l1 (was l2)"),
        (UNETR, {"num_heads": 6}, "num_heads 6 (was 4)"),
        (UNETR, {"batch_size": 1}, "batches in an epoch 4 (was 2)"),
        (UNETR, {"hidden_size": 96}, NO_FIT),
        pytest.param(SIMCLR, {"temperature": 0.2}, "temperature 0.2 (was 0.5)", marks=pytest.mark.slow),
        pytest.param(SIMCLR, {"crop_scale": 0.9}, "crop_scale 0.9 (was ", marks=pytest.mark.slow),
        pytest.param(MIM, {"temperature": 0.2}, "temperature 0.2 (was 0.1)", marks=pytest.mark.slow),
        pytest.param(MIM, {"levels::1::samples": 1}, "another levels", marks=pytest.mark.slow),
        pytest.param(MIM, {"curriculum": "fine_to_coarse"}, "curriculum fine_to_coarse", marks=pytest.mark.slow),
        pytest.param(CONVVIT_UNETR, {"embed_dims": [6, 6, 12, 12]}, NO_FIT, marks=pytest.mark.slow),
        pytest.param(SWIN_UNETR, {"window_size": 2}, NO_FIT, marks=pytest.mark.slow),
        pytest.param(UNETR, {"spacing_factor": 2}, "preset", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resume_with_another_network_or_data(
    run_bundle: Run, stop_after: Any, tmp_path: Path, record_property: Callable, bundle: str, knobs: dict, told: str
) -> None:
    stop_after(1)
    with pytest.raises(SystemExit, match="stopped"):
        run_bundle(bundle, "train", folder=tmp_path, **KNOBS)
    stop_after(99)
    before = sha256(tmp_path / "output" / "checkpoint.pt")
    with pytest.raises(SystemExit) as ending:
        run_bundle(bundle, "train", folder=tmp_path, resume=True, **KNOBS | knobs)
    message = str(ending.value.code)
    record_property("error", message)
    assert message.startswith(f"error: {tmp_path / 'output' / 'checkpoint.pt'}: ")
    assert told in message
    assert "\n" not in message
    assert sha256(tmp_path / "output" / "checkpoint.pt") == before


@both
def test_both_checkpoints_are_damaged(
    run_bundle: Run, stop_after: Any, tmp_path: Path, record_property: Callable, bundle: str
) -> None:
    stop_after(2)
    with pytest.raises(SystemExit, match="stopped"):
        run_bundle(bundle, "train", folder=tmp_path, **KNOBS)
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        spoil(tmp_path / "output" / name, "truncated")
    with pytest.raises(SystemExit) as ending:
        run_bundle(bundle, "train", folder=tmp_path, resume=True, **KNOBS)
    message = str(ending.value.code)
    record_property("error", message)
    assert message.startswith("error: ")
    assert message.count("not readable as a checkpoint") == 2
    assert message.endswith("remove them to begin anew, or restore one")


def test_float16_goes_on_with_the_state_of_its_scaler(run_bundle: Run, stop_after: Any, tmp_path: Path) -> None:
    knobs = KNOBS | {"amp": "true", "amp_dtype": "float16"}
    run_bundle(MAE, "train", folder=tmp_path / "undisturbed", **knobs)
    stop_after(3)
    with pytest.raises(SystemExit, match="stopped"):
        run_bundle(MAE, "train", folder=tmp_path / "stopped", **knobs)
    stop_after(99)
    workflow = run_bundle(MAE, "train", folder=tmp_path / "stopped", resume=True, **knobs)
    assert_same_end(MAE, tmp_path / "undisturbed", tmp_path / "stopped")
    scaler = workflow.parser.get_parsed_content("train#step").scaler
    assert scaler.state_dict()["_growth_tracker"] > 2  # counted on from the epochs before
    saved = torch.load(tmp_path / "stopped" / "output" / "checkpoint.pt", weights_only=True)["step"]
    assert saved == scaler.state_dict()
