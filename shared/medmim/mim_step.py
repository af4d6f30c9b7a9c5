"""How batches of nested sub-volumes pass through MONAI's trainer and evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from ignite.metrics import Loss
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils import CommonKeys
from torch import Tensor, nn

from medmim.engines import TrainingStep, as_plain_tensor, batch_length, prediction_and_targets
from medmim.losses.curricula import CURRICULA, curriculum_factors
from medmim.networks.mask_in_mask import MaskInMask


class MaskInMaskStep(TrainingStep):
    """``iteration_update`` for :class:`medmim.networks.MaskInMask`: goes backward share by share of the loss.

    Memory does not grow with the number of sub-volumes. Processes of ``DistributedDataParallel`` exchange gradients
    in the last share only. The output is a list of one, with ``loss`` and each term of the loss by its name.

    Args:
        device, amp, dtype, accumulation_steps: see :class:`medmim.engines.TrainingStep`.
        curriculum: how the weights of the levels change over the epochs, see
            :func:`medmim.losses.curriculum_factors`.

    Raises:
        ValueError: when the curriculum is unknown.
    """

    def __init__(
        self,
        device: str | torch.device,
        amp: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        accumulation_steps: int = 1,
        curriculum: str = "concurrent",
    ) -> None:
        super().__init__(device, amp, dtype, accumulation_steps)
        if curriculum not in CURRICULA:
            raise ValueError(f"curriculum must be one of {', '.join(CURRICULA)}, found {curriculum!r}")
        self.curriculum = curriculum

    def __call__(self, engine: SupervisedTrainer, batchdata: Any) -> list[dict[str, Tensor]]:
        """One iteration; fires MONAI's ``IterationEvents``, those of the forward pass with the last share."""
        batch: Any = self._prepare(engine, batchdata)[0]
        network, size, last = self._begin(engine)
        distributed = isinstance(network, nn.parallel.DistributedDataParallel)
        pretext: MaskInMask = network.module if distributed else network
        weights = self._level_weights(engine, pretext)
        shares = pretext.shares(batch, weights, run=network if distributed else None)
        output: dict[str, Tensor] = {}
        for left in reversed(range(pretext.n_shares(len(batch["image"]), weights))):
            waits = distributed and (left > 0 or not last)
            with network.no_sync() if waits else nullcontext():
                with torch.autocast(self.device_type, self.dtype, enabled=self.amp):
                    loss, terms = next(shares)
                for name, value in {CommonKeys.LOSS: loss.detach(), **terms}.items():
                    output[name] = output[name] + value if name in output else value
                if not left:
                    engine.state.output = output
                    engine.fire_event(IterationEvents.FORWARD_COMPLETED)
                    engine.fire_event(IterationEvents.LOSS_COMPLETED)
                self.scaler.scale(loss / size).backward()
        return self._finish(engine, last)

    def _level_weights(self, engine: SupervisedTrainer, pretext: MaskInMask) -> list[float]:
        state: Any = engine.state
        factors = curriculum_factors(self.curriculum, state.epoch - 1, state.max_epochs, len(pretext.levels))
        return [weight * factor for weight, factor in zip(pretext.level_weights, factors, strict=True)]


def prepare_nested_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[()], dict[str, Any]]:
    """``prepare_batch`` of nested sub-volumes: the network is called as ``network(batch)``.

    Only the image is moved: masks, regions and padding are counted on the host, without waiting for the device.

    Args:
        batch: ``image`` ``(B, C, *crop_size)`` and what :class:`medmim.transforms.RandNestedMaskd` writes.

    Returns:
        the network's batch; the targets ``{"image"}``, for :func:`medmim.engines.batch_length`; no further arguments.
    """
    image = as_plain_tensor(batch["image"].to(device=device, non_blocking=non_blocking, **kwargs))
    nested = {key: batch[key] for key in batch if key.startswith(("mask_", "region_", "padding_"))}
    return {"image": image, **nested}, {"image": image}, (), {}


class NamedTerm(nn.Module):
    """Picks one term from the output of :class:`medmim.networks.MaskInMask`: ``loss_fn`` of ``ignite.metrics.Loss``.

    Args:
        name: ``loss`` or the name of a term.
    """

    def __init__(self, name: str = "loss") -> None:
        super().__init__()
        self.name = name

    def forward(self, prediction: Mapping[str, Tensor], targets: Any) -> Tensor:
        """The term, scalar."""
        return prediction[self.name]


def term_metrics(network: MaskInMask) -> dict[str, Loss]:
    """A metric ``val_<term>`` for each term of the loss, for an evaluator's ``additional_metrics``.

    Args:
        network: whose weights say which terms there are.
    """
    return {
        f"val_{name}": Loss(NamedTerm(name), output_transform=prediction_and_targets, batch_size=batch_length)
        for name in network.term_names
    }


def training_scalars(output: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """``output_transform`` of MONAI's TensorBoard handler: loss and terms of a step as ``train_<name>``."""
    return {f"train_{name}": value for name, value in output[0].items()}
