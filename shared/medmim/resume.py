"""Checkpoints of a training, and going on from them exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from medmim.files import check_archive, remove_leftovers, save_tensors
from medmim.folders import CHECKPOINTS, check_resume
from medmim.randomness import random_states, seed_epoch, set_random_states
from medmim.scan_datasets import SeededDataset

logger = logging.getLogger(__name__)

NEWEST, PREVIOUS = CHECKPOINTS
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
        resume: go on from the newest readable checkpoint, if there is any; without it there must be none.
        evaluator: whose best metric is kept.
        made_with: knobs that whoever loads the checkpoint must give as well; plain values.
        run_with: knobs with which a training goes on; plain values.
        models_dir: where the best model is, which a checkpoint does not hold.
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
        models_dir: str | Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.objects = objects
        self.interval = interval
        self.resume = resume
        self.evaluator = evaluator
        self.made_with = dict(made_with or {})
        self.run_with = dict(run_with or {})
        self.models_dir = None if models_dir is None else Path(models_dir)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, engine: Engine) -> None:
        """Load the newest readable checkpoint.

        Raises:
            CheckpointError: when it does not fit this run, or would be overwritten.
        """
        if self.resume:
            self._load(engine)
        else:
            try:
                check_resume(self.folder, self.resume)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
        if idist.get_rank() == 0:
            remove_leftovers(self.folder / NEWEST, self.folder / "scalars.csv")

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
        before = found["made_with"] | found["run_with"] | {"batches in an epoch": found["epoch_length"]}
        changed = _changes(before, self.made_with | self.run_with | {"batches in an epoch": epoch_length})
        if changed:
            raise CheckpointError(
                f"{self.folder / NEWEST}: --resume needs the data and the knobs of the run before, found "
                f"{', '.join(changed)}: correct them, or take another --output_dir"
            )
        if self.models_dir is not None and found.get("best", {}).get("epoch", 0) > 0:
            model = self.models_dir / "model.pt"
            if not model.is_file():
                raise CheckpointError(f"{model}: no such file: --resume needs the --models_dir of the run before")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    different = [key for key in now if key in before and before[key] != now[key]]
    texts = {key: f"{key} {now[key]} (was {before[key]})" for key in different}
    return [text if len(text) < 100 else f"another {key}" for key, text in texts.items()]


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
