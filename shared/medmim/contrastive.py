"""How pairs of views pass through MONAI's trainer and evaluator, and what is measured of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from torch import Tensor

from medmim.engines import TrainingStep, as_plain_tensor
from medmim.handlers import LearningCurve
from medmim.losses.contrastive import gather_pairs, pair_scores

logger = logging.getLogger(__name__)


def prepare_pair_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, None, tuple[Tensor], dict[str, Any]]:
    """``prepare_batch`` of a contrastive task: the network is called as ``network(view_1, view_2)``.

    Args:
        batch: the views ``image`` and ``image_2``, each ``(B, C, *spatial)``.

    Returns:
        the first view; no targets; further arguments.
    """
    views = [
        as_plain_tensor(batch[key].to(device, non_blocking=non_blocking, **kwargs)) for key in ("image", "image_2")
    ]
    return views[0], None, (views[1],), {}


class ContrastiveStep(TrainingStep):
    """``iteration_update`` for :class:`medmim.networks.SimCLR`: puts out accuracy, alignment and spread too.

    They are those of :func:`medmim.losses.pair_scores`, over the pairs of all processes. With ``accumulation_steps``
    each batch has its own negatives, so a step of the optimiser is not that of one larger batch.

    Args:
        device, amp, dtype, accumulation_steps: see :class:`medmim.engines.TrainingStep`.
        temperature, standardize: of the loss.
    """

    def __init__(
        self,
        device: str | torch.device,
        amp: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        accumulation_steps: int = 1,
        temperature: float = 0.5,
        standardize: bool = False,
    ) -> None:
        super().__init__(device, amp, dtype, accumulation_steps)
        self.temperature = temperature
        self.standardize = standardize

    def further_scalars(self, prediction: Tensor) -> dict[str, Tensor]:
        """Scores of a batch's embeddings ``(B, 2, F)``, without its loss."""
        scores = pair_scores(gather_pairs(prediction), self.temperature, self.standardize)
        return {name: scores[name] for name in ("accuracy", "alignment", "spread")}


def training_scalars(output: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """``output_transform`` of MONAI's TensorBoard handler: loss and scores of a step as ``train_<name>``."""
    return {f"train_{name}": value for name, value in output[0].items()}


class PairScores(Metric):
    """:func:`medmim.losses.pair_scores` over all pairs of an evaluation, of all batches and processes at once.

    So it depends neither on the batch size nor on the number of processes. ``scores["loss"]`` is a metric of its own,
    for an evaluator's ``key_val_metric``.

    Args:
        temperature, standardize: of the loss.
        output_transform: picks the embeddings ``(B, 2, F)``; by default ``pred`` of the engine's output.
    """

    def __init__(self, temperature: float, standardize: bool = False, output_transform: Callable | None = None) -> None:
        self.temperature = temperature
        self.standardize = standardize
        super().__init__(output_transform=output_transform or (lambda output: output["pred"]))

    def reset(self) -> None:
        """Forget all pairs."""
        self.embeddings: list[Tensor] = []
        self.scores: dict[str, float] | None = None

    def update(self, output: Tensor) -> None:
        """Keep the embeddings of a batch."""
        self.embeddings.append(output.detach().float().cpu())
        self.scores = None

    def compute(self) -> dict[str, float]:
        """Scores by name.

        Raises:
            NotComputableError: when there were fewer than two pairs in all processes.
        """
        if self.scores is None:
            pairs = self.embeddings
            if idist.get_world_size() > 1:  # as objects: processes may have other numbers of pairs
                ranks: Any = idist.all_gather([pairs])
                pairs = [batch for rank in ranks for batches in rank for batch in batches]
            if sum(map(len, pairs)) < 2:
                raise NotComputableError("an evaluation needs two pairs of views or more: one has no negatives")
            self.scores = {
                name: float(value)
                for name, value in pair_scores(torch.cat(pairs), self.temperature, self.standardize).items()
            }
        return self.scores


class WarnOfCollapse:
    """Say in the log, once, that all embeddings have become (nearly) the same; stands after the learning curve.

    Args:
        curve: whose latest ``train_spread`` is looked at.
        threshold: spread below which it is said, see :func:`medmim.losses.pair_scores`.
        first_epoch: nothing is said before it: an untrained network puts all images close together.
    """

    def __init__(self, curve: LearningCurve, threshold: float = 0.05, first_epoch: int = 1) -> None:
        self.curve = curve
        self.threshold = threshold
        self.first_epoch = first_epoch
        self.said = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        spread = self.curve.rows[-1]["train_spread"]
        if self.said or engine.state.epoch < self.first_epoch or not spread < self.threshold:
            return
        self.said = True
        logger.warning(
            f"epoch {engine.state.epoch}: spread of the embeddings {spread:.3f} (1: they point everywhere, 0: all are "
            "the same): they have collapsed, and the encoder learns little: try a lower --learning_rate or "
            "--temperature, or larger batches (--batch_size, --crops_per_scan)"
        )
