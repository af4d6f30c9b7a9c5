"""Ignite handlers that MONAI does not have."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn
from torch.optim import Optimizer

from medmim.classification_scores import ClassificationScores
from medmim.datasets import Preset
from medmim.description import describe, name_data, write_description
from medmim.figures import curves_figure, save_figure
from medmim.files import remove_leftovers, replace_file, save_tensors
from medmim.metrics import SegmentationScores
from medmim.weights import find_encoder, read_checkpoint, save_encoder

logger = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


class StopOnNonFiniteLoss:
    """End a training whose loss or weights are NaN or infinite, before they reach a file; names the batch.

    A loss is copied to the host while the device goes on, and looked at in the following iteration, so that nothing
    waits for it; the weights are looked at when an epoch ends. Stands before the handlers that write.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer."""
        self.latest: tuple[torch.Tensor, Any, str] | None = None
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check_weights)

    def __call__(self, engine: Engine) -> None:
        self.check()
        state: Any = engine.state
        loss, copied = state.output["loss"], None
        if loss.is_cuda:
            on_device = loss
            loss = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(on_device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        iteration = (state.iteration - 1) % state.epoch_length + 1
        place = f"in epoch {state.epoch}, iteration {iteration}, with {', '.join(batch_files(state.batch))}"
        self.latest = (loss, copied, place)

    def check(self, engine: Engine | None = None) -> None:
        """Look at the latest loss.

        Raises:
            NonFiniteLossError: naming epoch, iteration and files.
        """
        if self.latest is None:
            return
        loss, copied, place = self.latest
        self.latest = None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {float(loss)} {place}: lower --learning_rate, or try --amp false")

    def check_weights(self, engine: Engine) -> None:
        """Look at the network's weights.

        Raises:
            NonFiniteLossError: naming the first parameter and the epoch.
        """
        network: Any = getattr(engine, "network", None)
        if network is None:
            return
        for name, parameter in network.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteLossError(
                    f"{name} is no longer finite after epoch {engine.state.epoch}: lower --learning_rate, or try "
                    "--amp false"
                )


def batch_files(batch: Any) -> list[str]:
    """Names of the image files in a collated batch, each once, however many crops of it there are."""
    names = getattr(batch["image"], "meta", {}).get("filename_or_obj", "unknown files")
    return [names] if isinstance(names, str) else list(dict.fromkeys(str(name) for name in names))


class SaveEncoder:
    """Write ``encoder.pt``, ``model.pt`` (the feature extractor around the encoder) and ``model.json`` at intervals.

    Args:
        models_dir: folder of the files that travel.
        feature_extractor: network around the encoder that is being pre-trained.
        img_size: voxels along each axis that the encoder was built for.
        preset: the data it is trained on.
        interval: epochs between two writings; the last epoch is always written.
        kept_apart: what tells the scans that are not trained on, see :func:`medmim.image_splits.kept_apart`.
    """

    def __init__(
        self,
        models_dir: str,
        feature_extractor: nn.Module,
        img_size: Sequence[int],
        preset: Preset,
        interval: int,
        kept_apart: Mapping[str, str] | None = None,
    ) -> None:
        self.kept_apart = kept_apart
        self.models_dir = Path(models_dir)
        self.feature_extractor = feature_extractor
        self.encoder = find_encoder(feature_extractor)
        self.img_size = img_size
        self.preset = preset
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            remove_leftovers(
                self.models_dir / "encoder.pt", self.models_dir / "model.pt", self.models_dir / "model.json"
            )
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs:
            save_encoder(self.models_dir / "encoder.pt", self.encoder, self.img_size, self.preset, self.kept_apart)
            save_model(self.models_dir, self.feature_extractor, self.img_size, self.preset)


class SaveBestModel:
    """Write ``model.pt`` and ``model.json`` whenever the validation's key metric is the best so far.

    Args:
        models_dir: folder of the files that travel.
        network: the network that is being trained.
        img_size: voxels along each axis that it was built for.
        preset: the data it is trained on.
        pretrained_encoder: the file that training started from, if any, whose data are named too.
        scores: of a classification, whose thresholds are written too.
        kept_apart: what tells its validation and test images, see :func:`medmim.image_splits.kept_apart`.
    """

    def __init__(
        self,
        models_dir: str,
        network: nn.Module,
        img_size: Sequence[int],
        preset: Preset,
        pretrained_encoder: str | None = None,
        scores: ClassificationScores | None = None,
        kept_apart: Mapping[str, str] | None = None,
    ) -> None:
        self.scores = scores
        self.kept_apart = kept_apart
        self.models_dir = Path(models_dir)
        self.network = network
        self.img_size = img_size
        self.preset = preset
        self.pretrained_on: list[dict[str, str]] = []
        if pretrained_encoder:
            self.pretrained_on = name_data(read_checkpoint(pretrained_encoder)[1], pretrained_encoder)

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator, which keeps the best metric and its epoch in its state."""
        if idist.get_rank() == 0:
            remove_leftovers(self.models_dir / "model.pt", self.models_dir / "model.json")
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        if state.best_metric_epoch == state.epoch:
            further: dict[str, Any] = {} if self.scores is None else {"thresholds": self.scores.thresholds()}
            further |= {} if self.kept_apart is None else {"kept_apart": dict(self.kept_apart)}
            save_model(self.models_dir, self.network, self.img_size, self.preset, self.pretrained_on, further)
            logger.info(f"best {state.key_metric_name} so far, {state.best_metric:.4f}: wrote model.pt")


def save_model(
    models_dir: Path,
    network: nn.Module,
    img_size: Sequence[int],
    preset: Preset,
    pretrained_on: Sequence[dict[str, str]] = (),
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write the flat state dict ``model.pt`` and its description ``model.json``, with further entries."""
    state_dict = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    save_tensors(models_dir / "model.pt", state_dict)
    description = describe(network, img_size, preset, pretrained_on) | dict(further or {})
    write_description(description, models_dir / "model.json")


class LearningCurve:
    """Write the scalars of a training as ``scalars.csv`` and ``curves.png``, brought up to date after each epoch.

    Stands after the validation handler, so that an epoch's row holds its validation. The learning rate is put into
    the trainer's state too, for TensorBoard. Each scalar of the trainer's output is recorded as ``train_<name>``, the
    mean over the epoch and all processes; rank 0 writes.

    Args:
        output_dir: where the two files go.
        optimizer: whose largest learning rate is recorded.
        evaluator: whose metrics are recorded.
    """

    def __init__(self, output_dir: str, optimizer: Optimizer, evaluator: Engine | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.rows: list[dict[str, float]] = []
        self.scalars: dict[str, list[torch.Tensor]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def state_dict(self) -> dict[str, Any]:
        """All rows up to now."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after these rows."""
        self.rows = list(state_dict["rows"])
        self.started = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)

    def _start(self, engine: Engine) -> None:
        self.started = time.monotonic()
        self._say_learning_rate(engine)

    def _say_learning_rate(self, engine: Engine) -> None:
        state: Any = engine.state
        state.learning_rate = self._learning_rate()

    def _learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _remember(self, engine: Engine) -> None:
        output: Any = engine.state.output
        for name, value in (output[0] if isinstance(output, list) else output).items():
            if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.ndim == 0):
                # kept where it is until the epoch's end: reading it now would wait for the device
                self.scalars.setdefault(name, []).append(torch.as_tensor(value))

    def _write(self, engine: Engine) -> None:
        means: Any = torch.stack([torch.stack(values).mean() for values in self.scalars.values()])
        if idist.get_world_size() > 1:
            means = idist.all_reduce(means) / idist.get_world_size()
        scalars = {f"train_{name}": value for name, value in zip(self.scalars, means.tolist(), strict=True)}
        self.scalars = {}
        self._say_learning_rate(engine)
        row: dict[str, float] = {
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "seconds": round(time.monotonic() - self.started, 1),
            "learning_rate": self._learning_rate(),
            **scalars,
        }
        validated = self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch
        if validated and self.evaluator is not None:
            row |= {name: float(value) for name, value in self.evaluator.state.metrics.items()}
        self.rows.append(row)
        if idist.get_rank() > 0:
            return
        self.write_csv()
        if validated or engine.state.epoch == engine.state.max_epochs:
            self.write_png()
        self._log(row, int(engine.state.max_epochs or 0))

    def _log(self, row: dict[str, float], max_epochs: int) -> None:
        scores = ", ".join(f"{name} {row[name]:.4f}" for name in list(row)[4:])
        left = row["seconds"] / len(self.rows) * (max_epochs - row["epoch"])
        logger.info(f"epoch {row['epoch']}/{max_epochs}: {scores}; {row['seconds']:.0f} s, about {left:.0f} s left")

    def write_csv(self) -> None:
        """Write all rows; what an epoch did not measure stays empty."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)

        replace_file(self.output_dir / "scalars.csv", write)

    def write_png(self) -> None:
        """Draw losses and validation metrics against the epoch; ``train_x`` and ``val_x`` share a panel."""
        names = list(dict.fromkeys(key for row in self.rows for key in row))[4:]
        points: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name in names:
            line, _, panel = name.partition("_") if name.startswith(("train_", "val_")) else ("", "", name)
            found = [(row["epoch"], row[name]) for row in self.rows if math.isfinite(row.get(name, math.nan))]
            points.setdefault(panel, {})[line] = found
        save_figure(curves_figure(points), self.output_dir / "curves.png")


class SaveScores:
    """Write the scores of an evaluation: ``scores.csv`` (case and class) and a summary in the log.

    Args:
        scores: the metric that is attached to the evaluator.
        output_dir: where the file goes.
    """

    def __init__(self, scores: SegmentationScores, output_dir: str) -> None:
        self.scores = scores
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.scores.write_csv(self.output_dir / "scores.csv")
        for name, value in self.scores.summary().items():
            logger.info(f"{name}: {value:.4f}")
        logger.info(f"wrote {self.output_dir / 'scores.csv'}")
