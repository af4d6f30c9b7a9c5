"""Checkpoints of a training, and going on from them exactly."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from medmim.files import remove_leftovers, save_tensors
from medmim.randomness import random_states, seed_epoch, set_random_states
from medmim.scan_datasets import SeededDataset

logger = logging.getLogger(__name__)

NEWEST, PREVIOUS, SET_ASIDE = "checkpoint.pt", "checkpoint_previous.pt", "checkpoint_old.pt"
DAMAGED = "checkpoint_damaged.pt"


class CheckpointError(ValueError):
    """A training cannot go on from the checkpoints that are there."""


class SeedEpoch:
    """Seed all random numbers of an epoch from (seed, epoch, rank), those of a sample from (seed, epoch, sample).

    Args:
        seed: of the run.
        dataset: for training.
    """

    def __init__(self, seed: int, dataset: SeededDataset) -> None:
        self.seed = seed
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        self.dataset.set_epoch(engine.state.epoch)
        seed_epoch(self.seed, engine.state.epoch)


class Checkpoints:
    """Write at intervals what a training needs to go on, and go on from it.

    ``checkpoint.pt`` is replaced in one step, the one before it stays as ``checkpoint_previous.pt``; a process that
    is killed at any moment leaves at least one of them whole. Only rank 0 writes, every rank reads. Stands last among
    the trainer's handlers: what a checkpoint's epoch has to leave behind must be there before it.

    Args:
        folder: where the files are; on several nodes one that all of them see.
        objects: name and object with ``state_dict`` and ``load_state_dict``; ``network`` is the bare network, not the
            ``DistributedDataParallel`` around it.
        interval: epochs between two checkpoints; the last epoch is always written.
        resume: go on from the newest readable checkpoint, if there is any.
        evaluator: whose best metric is kept.
        made_with: knobs that whoever loads the checkpoint must give as well; plain values.
        run_with: knobs without which a resumed training ends elsewhere than an undisturbed one; a change is said.
    """

    def __init__(
        self,
        folder: str | Path,
        objects: Mapping[str, Any],
        interval: int,
        resume: bool = False,
        evaluator: Engine | None = None,
        made_with: Mapping[str, Any] | None = None,
        run_with: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.objects = objects
        self.interval = interval
        self.resume = resume
        self.evaluator = evaluator
        self.made_with = dict(made_with or {})
        self.run_with = dict(run_with or {})

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, engine: Engine) -> None:
        """Load the newest readable checkpoint, or set aside what an earlier run has left."""
        if self.resume:
            self._load(engine)
        elif idist.get_rank() == 0:
            self._set_aside()
        if idist.get_rank() == 0:
            remove_leftovers(self.folder / NEWEST, self.folder / "scalars.csv")

    def _set_aside(self) -> None:
        there = [path for path in (self.folder / NEWEST, self.folder / PREVIOUS) if path.is_file()]
        if there:
            there[0].replace(self.folder / SET_ASIDE)
            logger.warning(f"{there[0]} of an earlier run is now {SET_ASIDE}; --resume true would have gone on from it")
        for path in there[1:]:
            path.unlink()

    def save(self, engine: Engine) -> None:
        """Write a checkpoint when it is due.

        Raises:
            WriteError: when the disk is full; the checkpoint before stays.
        """
        state: Any = engine.state
        if state.epoch % self.interval and state.epoch != state.max_epochs:
            return
        content: dict[str, Any] = {name: item.state_dict() for name, item in self.objects.items()}
        content |= {
            "epoch": state.epoch,
            "epoch_length": state.epoch_length,
            "random_states": random_states(),
            "made_with": self.made_with,
            "run_with": self.run_with,
        }
        if self.evaluator is not None:
            best: Any = self.evaluator.state
            content["best"] = {"metric": float(best.best_metric), "epoch": int(best.best_metric_epoch)}
        save_tensors(self.folder / NEWEST, content, keep=self.folder / PREVIOUS)

    def _load(self, engine: Engine) -> None:
        found, faults = read_newest(self.folder)
        epoch = 0 if found is None else int(found["epoch"])
        seen: Any = idist.all_gather(epoch) if idist.get_world_size() > 1 else [epoch]
        epochs = sorted({int(number) for number in seen})
        if len(epochs) > 1:
            raise CheckpointError(
                f"{self.folder}: the processes see checkpoints of epochs {epochs}: "
                "--output_dir must be a folder that all nodes share"
            )
        if found is None:
            logger.info(f"--resume: no checkpoint in {self.folder} yet, starting with the first epoch")
            return
        if faults and idist.get_rank() == 0:  # every process has read; it must not replace the one that is whole
            (self.folder / NEWEST).replace(self.folder / DAMAGED)
            logger.warning(f"{faults[0]}, it is now {DAMAGED}; going on from {PREVIOUS}, epoch {epoch}")
        state: Any = engine.state
        self._compare(found, state.epoch_length)
        for name, item in self.objects.items():
            if name in found:
                self._load_into(item, name, found[name])
        if self.evaluator is not None and "best" in found:
            best: Any = self.evaluator.state
            best.best_metric, best.best_metric_epoch = found["best"]["metric"], found["best"]["epoch"]
        set_random_states(found["random_states"])
        state.epoch, state.iteration = epoch, epoch * state.epoch_length
        left = f"{state.max_epochs - epoch} to go" if epoch < state.max_epochs else "nothing left to train"
        logger.info(f"--resume: epoch {epoch} of {state.max_epochs} is done, {left}")

    def _load_into(self, item: Any, name: str, state: Any) -> None:
        try:
            item.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.folder / NEWEST}: its {name} does not fit this run's: --resume needs the knobs of the run "
                f"before, or another --output_dir ({reason[:120]})"
            ) from error

    def _compare(self, found: Mapping[str, Any], epoch_length: int) -> None:
        changed = _changes(found["made_with"], self.made_with)
        changed += _changes({"batches in an epoch": found["epoch_length"]}, {"batches in an epoch": epoch_length})
        if changed:
            raise CheckpointError(
                f"{self.folder / NEWEST}: --resume needs the data and the knobs of the run before, found "
                f"{', '.join(changed)}: correct them, or take another --output_dir"
            )
        changed = _changes(found["run_with"], self.run_with)
        if changed and idist.get_rank() == 0:
            logger.warning(f"--resume with {', '.join(changed)}: ends elsewhere than an undisturbed run")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{key} {now[key]} (was {before[key]})" for key in now if key in before and before[key] != now[key]]


def check_archive(path: Path) -> None:
    """Compare the check sums of a file that ``torch.save`` wrote, which ``torch.load`` does not look at.

    Raises:
        ValueError: when a part of it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"wrong check sum of {broken}")


def read_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest readable checkpoint of a folder.

    Returns:
        its content, ``None`` when there is none yet; what is wrong with a newer one that is damaged.

    Raises:
        CheckpointError: when there are checkpoints, but none is readable.
    """
    damaged = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            (
                content["epoch"],
                content["epoch_length"],
                content["random_states"],
                content["made_with"],
                content["run_with"],
            )
        except Exception as error:  # a damaged file makes torch raise anything
            reason = " ".join(str(error).split()).split(". ")[0][:150]
            damaged.append(f"{path}: not readable as a checkpoint ({type(error).__name__}: {reason})")
            continue
        return content, damaged
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}: remove them to begin anew, or restore one")
    return None, []
