"""Checkpoints, and going on from them, on small engines."""

import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from medmim.files import WriteError
from medmim.resume import CheckpointError, Checkpoints, SeedEpoch, read_newest
from medmim.scan_datasets import SeededDataset

FILES = ("checkpoint.pt", "checkpoint_previous.pt")


class Training:
    """A linear map that moves a random way in each iteration; stops after an epoch when told to."""

    def __init__(self, folder: Path, resume: bool = False, stop_after: int = 99, epochs: int = 6, **knobs: Any) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(3, 3)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 0.1)
        self.evaluator = Engine(lambda engine, batch: None)
        self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = -1.0, -1
        self.epochs_seen: list[int] = []
        self.iterations: list[int] = []
        self.engine = Engine(self._step)
        objects = {"network": self.network, "optimizer": self.optimizer}
        SeedEpoch(4, SeededDataset([], 4)).attach(self.engine)
        knobs = {"interval": 1, "made_with": {"num_heads": 2}, "run_with": {"seed": 4}} | knobs
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self._validate)
        Checkpoints(folder, objects, resume=resume, evaluator=self.evaluator, **knobs).attach(self.engine)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop, stop_after)
        self.epochs = epochs

    def run(self, batches: int = 2) -> "Training":
        self.engine.run(range(batches), max_epochs=self.epochs)
        return self

    def run_until_it_stops(self) -> "Training":
        with pytest.raises(InterruptedError):
            self.run()
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])

    def _step(self, engine: Engine, batch: Any) -> None:
        self.iterations.append(engine.state.iteration)
        self.optimizer.zero_grad()
        self.network(torch.rand(4, 3)).square().sum().backward()
        self.optimizer.step()

    def _validate(self, engine: Engine) -> None:
        self.epochs_seen.append(engine.state.epoch)
        state = self.evaluator.state
        state.best_metric, state.best_metric_epoch = engine.state.epoch / 10, engine.state.epoch

    def _stop(self, engine: Engine, after: int) -> None:
        if engine.state.epoch == after:
            raise InterruptedError


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of the package."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("medmim") and r.levelno == logging.WARNING]


def epoch_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("interval", "epochs", "written"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 2, [2])])
def test_written_at_intervals_and_after_the_last_epoch(
    tmp_path: Path, interval: int, epochs: int, written: list[int]
) -> None:
    folder = tmp_path / "deep" / "er"
    training = Training(folder, interval=interval, epochs=epochs)
    seen: list[list[int]] = []

    @training.engine.on(Events.EPOCH_COMPLETED)
    def look() -> None:
        there = [epoch_in(folder / name) for name in FILES if (folder / name).is_file()]
        if there and there not in seen:
            seen.append(there)

    training.run()
    assert seen == [[written[0]], *([last, before] for before, last in pairwise(written))]
    assert {path.name for path in folder.iterdir()} == set(FILES[: len(written)])


def test_checkpoint_holds_plain_values_only(tmp_path: Path) -> None:
    training = Training(tmp_path, epochs=2).run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    expected = {"network", "optimizer", "epoch", "epoch_length", "random_states", "made_with", "run_with", "best"}
    assert set(content) == expected
    assert (content["epoch"], content["epoch_length"]) == (2, 2)
    assert content["best"] == {"metric": 0.2, "epoch": 2}
    assert torch.equal(content["network"]["weight"], training.network.weight)


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, epochs=3)
    save, calls = torch.save, []

    def fill_the_disk(content: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(WriteError, match=r"checkpoint\.pt: cannot be written \(No space left on device\); the one bef"):
        training.run()
    assert [epoch_in(tmp_path / name) for name in FILES] == [2, 1]
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    Training(tmp_path).run()
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("stop_after", [1, 2, 5])
@pytest.mark.parametrize("interval", [1, 2])
def test_resumed_training_ends_where_an_undisturbed_one_does(tmp_path: Path, stop_after: int, interval: int) -> None:
    undisturbed = Training(tmp_path / "a", interval=interval).run()
    Training(tmp_path / "b", stop_after=stop_after, interval=interval).run_until_it_stops()
    resumed = Training(tmp_path / "b", resume=True, interval=interval)
    torch.rand(7)
    resumed.run()
    start = stop_after - stop_after % interval + 1
    assert resumed.epochs_seen == list(range(start, 7))
    assert resumed.iterations == list(range(2 * start - 1, 13))
    assert torch.equal(resumed.weights(), undisturbed.weights())
    ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert torch.equal(ours["random_states"]["torch"], theirs["random_states"]["torch"])
    assert ours["best"] == theirs["best"]


def test_best_metric_survives(tmp_path: Path) -> None:
    Training(tmp_path, stop_after=3).run_until_it_stops()
    resumed = Training(tmp_path, resume=True, epochs=3).run()
    state = resumed.evaluator.state
    assert (state.best_metric, state.best_metric_epoch) == (0.3, 3)


def test_none_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "medmim"):
        resumed = Training(tmp_path / "new", resume=True).run()
    assert resumed.epochs_seen == [1, 2, 3, 4, 5, 6]
    assert f"--resume: no checkpoint in {tmp_path / 'new'} yet, starting with the first epoch" in caplog.text


def test_finished_training_has_nothing_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished = Training(tmp_path).run()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    with caplog.at_level(logging.INFO, "medmim"):
        resumed = Training(tmp_path, resume=True).run()
    assert resumed.epochs_seen == []
    assert torch.equal(resumed.weights(), finished.weights())
    assert "--resume: epoch 6 of 6 is done, nothing left to train" in caplog.text
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------------------ damaged files


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"no" * 100,
    "one byte": lambda content: content[:-1500] + bytes([content[-1500] ^ 1]) + content[-1499:],
}


def damage(path: Path, how: str) -> None:
    if how == "another file":
        torch.save({"epoch": 3}, path)
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))


@pytest.mark.parametrize("how", [*DAMAGE, "another file"])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    undisturbed = Training(tmp_path / "a").run()
    folder = tmp_path / "b"
    Training(folder, stop_after=4).run_until_it_stops()
    damage(folder / "checkpoint.pt", how)
    with caplog.at_level(logging.WARNING, "medmim"):
        resumed = Training(folder, resume=True).run()
    (message,) = told(caplog)
    assert message.startswith(f"{folder / 'checkpoint.pt'}: not readable as a checkpoint (")
    assert message.endswith("it is now checkpoint_damaged.pt; going on from checkpoint_previous.pt, epoch 3")
    assert resumed.epochs_seen == [4, 5, 6]
    assert torch.equal(resumed.weights(), undisturbed.weights())
    assert [epoch_in(folder / name) for name in FILES] == [6, 5]


def test_damaged_checkpoint_never_replaces_the_whole_one(tmp_path: Path) -> None:
    """Otherwise a process that is killed between the two renamings would leave none."""
    Training(tmp_path, stop_after=4).run_until_it_stops()
    damage(tmp_path / "checkpoint.pt", "truncated")
    Training(tmp_path, resume=True, stop_after=4).run_until_it_stops()
    assert [epoch_in(tmp_path / name) for name in FILES] == [4, 3]


def test_newest_is_missing_after_a_kill_between_the_two_renamings(tmp_path: Path) -> None:
    Training(tmp_path, stop_after=4).run_until_it_stops()
    (tmp_path / "checkpoint.pt").replace(tmp_path / "checkpoint_previous.pt")
    (tmp_path / ".checkpoint.pt.77.tmp").write_bytes(b"half")
    assert Training(tmp_path, resume=True).run().epochs_seen == [5, 6]
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_both_are_damaged(tmp_path: Path, record_property: Any) -> None:
    Training(tmp_path, stop_after=4).run_until_it_stops()
    for name in FILES:
        damage(tmp_path / name, "truncated")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    training = Training(tmp_path, resume=True)
    with pytest.raises(CheckpointError) as error:
        training.run()
    message = str(error.value)
    assert all(f"{tmp_path / name}: not readable as a checkpoint (" in message for name in FILES)
    assert message.endswith(": remove them to begin anew, or restore one")
    assert "\n" not in message
    assert training.iterations == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    record_property("error", message)


def test_newest_of_a_folder_without_any(tmp_path: Path) -> None:
    assert read_newest(tmp_path) == (None, [])


# --------------------------------------------------------------------------------------------------------- other knobs


def test_other_knobs_of_the_network_are_refused(tmp_path: Path, record_property: Any) -> None:
    Training(tmp_path, stop_after=2).run_until_it_stops()
    training = Training(tmp_path, resume=True, made_with={"num_heads": 4, "new": 1})
    with pytest.raises(CheckpointError) as error:
        training.run(batches=3)
    assert str(error.value) == (
        f"{tmp_path / 'checkpoint.pt'}: --resume needs the data and the knobs of the run before, found num_heads 4 "
        "(was 2), batches in an epoch 3 (was 2): correct them, or take another --output_dir"
    )
    assert training.iterations == []
    record_property("error", str(error.value))


@pytest.mark.parametrize(
    ("run_with", "told"),
    [({"seed": 5}, "seed 5 (was 4)"), ({"seed": 4, "preset": {"a": "b" * 99}}, "another preset")],
    ids=["seed", "preset"],
)
def test_other_knobs_of_the_run_are_refused(tmp_path: Path, run_with: dict, told: str) -> None:
    Training(tmp_path, stop_after=2, run_with={"seed": 4, "preset": {"a": "b"}}).run_until_it_stops()
    with pytest.raises(CheckpointError, match=re.escape(f"found {told}: correct them")):
        Training(tmp_path, resume=True, run_with=run_with).run()


def test_best_model_must_be_there(tmp_path: Path) -> None:
    models = tmp_path / "models"
    Training(tmp_path / "run", stop_after=2, models_dir=models).run_until_it_stops()
    with pytest.raises(CheckpointError, match=r"models/model\.pt: no such file: --resume needs the --models_dir"):
        Training(tmp_path / "run", resume=True, models_dir=models).run()
    models.mkdir()
    (models / "model.pt").touch()
    assert Training(tmp_path / "run", resume=True, models_dir=models).run().epochs_seen == [3, 4, 5, 6]


def test_nodes_that_see_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training(tmp_path, stop_after=2).run_until_it_stops()
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_gather", lambda epoch: [epoch, 0])
    with pytest.raises(CheckpointError, match=r"see checkpoints of epochs \[0, 2\]: --output_dir must be"):
        Training(tmp_path, resume=True).run()


# ------------------------------------------------------------------------------------------------------ without resume


@pytest.mark.parametrize("names", [FILES, FILES[:1], FILES[1:]], ids=["both", "newest", "previous"])
def test_existing_checkpoint_is_never_overwritten(tmp_path: Path, names: tuple) -> None:
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    training = Training(tmp_path)
    with pytest.raises(CheckpointError, match=f"{names[0]}: the checkpoint of an earlier training: go on from it"):
        training.run()
    assert training.epochs_seen == []
    assert {path.name: path.read_bytes().decode() for path in tmp_path.iterdir()} == {name: name for name in names}


# --------------------------------------------------------------------------------------------------------- seeding


def test_epochs_are_seeded_before_their_first_batch() -> None:
    dataset = SeededDataset([], 4)
    found: dict[int, list[float]] = {}
    epochs: list[int] = []
    for start in (0, 2):
        engine = Engine(lambda engine, batch: found.setdefault(engine.state.epoch, []).append(float(torch.rand(()))))
        SeedEpoch(4, dataset).attach(engine)
        engine.add_event_handler(Events.STARTED, lambda engine, start=start: setattr(engine.state, "epoch", start))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: epochs.append(int(dataset.epoch)))
        engine.run(range(1), max_epochs=4)
    assert found[3][0] == found[3][1] != found[4][0] == found[4][1]
    assert len(found[1]) == 1
    assert epochs == [1, 2, 3, 4, 3, 4]
