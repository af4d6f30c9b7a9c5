"""How batches pass through MONAI's trainer and evaluator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils import CommonKeys
from torch import Tensor, nn

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """Number format of mixed precision.

    Args:
        name: ``bfloat16``, ``float16``, or ``auto``: bfloat16 where the device computes in it, else float16.
        device: of the network.

    Raises:
        ValueError: when the name is unknown.
    """
    if name in AMP_DTYPES:
        return AMP_DTYPES[name]
    if name != "auto":
        raise ValueError(f"--amp_dtype {name}: expected auto, bfloat16 or float16")
    is_cuda = torch.device(device).type == "cuda"
    return torch.float16 if is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16


class TrainingStep:
    """``iteration_update`` of MONAI's ``SupervisedTrainer``, which autocasts on CUDA only and always scales gradients.

    Mixed precision on any device, with a gradient scaler for float16 only. With ``accumulation_steps`` N the
    optimiser steps once in N batches (and at the end of an epoch) with the mean of their gradients; processes of
    ``DistributedDataParallel`` exchange gradients only then. The output holds the loss alone, not the predictions,
    which would stay in memory until the next iteration. An epoch of float16 whose gradients all overflowed, so that
    nothing was learned, is told in the log.

    Args:
        device: of the network.
        amp: whether to use mixed precision.
        dtype: its number format.
        accumulation_steps: batches between two steps of the optimiser.
    """

    def __init__(
        self,
        device: str | torch.device,
        amp: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        accumulation_steps: int = 1,
    ) -> None:
        self.device_type = torch.device(device).type
        self.amp = amp
        self.dtype = dtype
        self.accumulation_steps = accumulation_steps
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=amp and dtype == torch.float16)
        self.latest_scale = self.scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        """State of the gradient scaler; empty without one."""
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the gradient scaler, when both the run before and this one have one."""
        if state_dict and self.scaler.is_enabled():
            self.scaler.load_state_dict(state_dict)
            self.latest_scale = self.scaler.get_scale()

    def __call__(self, engine: SupervisedTrainer, batchdata: Any) -> list[dict[str, Tensor]]:
        """One iteration; fires MONAI's ``IterationEvents``.

        The output is a list of one, as decollating leaves it: MONAI's handlers that log a loss expect that.
        """
        inputs, targets, args, kwargs = self._prepare(engine, batchdata)
        network, size, last = self._begin(engine)
        waits = not last and isinstance(network, nn.parallel.DistributedDataParallel)
        with network.no_sync() if waits else nullcontext():
            with torch.autocast(self.device_type, self.dtype, enabled=self.amp):
                prediction = engine.inferer(inputs, network, *args, **kwargs)
                engine.fire_event(IterationEvents.FORWARD_COMPLETED)
                loss = engine.loss_function(prediction, targets).mean()
            engine.state.output = {CommonKeys.LOSS: loss.detach(), **self.further_scalars(prediction)}
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            self.scaler.scale(loss / size).backward()
        return self._finish(engine, last)

    def further_scalars(self, prediction: Any) -> dict[str, Tensor]:
        """What a batch's output holds beside the loss: nothing; a subclass may measure the predictions."""
        return {}

    def _prepare(self, engine: SupervisedTrainer, batchdata: Any) -> tuple[Tensor, Any, tuple, dict[str, Any]]:
        prepared = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        inputs, targets, *rest = prepared
        args, kwargs = rest or ((), {})
        # metadata costs time in each operation, and torch.compile cannot see through it
        return as_plain_tensor(inputs), as_plain_tensor(targets), args, kwargs

    def _begin(self, engine: SupervisedTrainer) -> tuple[Any, int, bool]:
        """The network, ready to learn; batches in this optimiser step; whether this batch is its last."""
        first, size, last = self._place(engine)
        network: Any = engine.network
        network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        return network, size, last

    def _finish(self, engine: SupervisedTrainer, last: bool) -> list[dict[str, Tensor]]:
        """Step after the last batch, and the iteration's output."""
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if last:
            self.scaler.step(engine.optimizer)
            self.scaler.update()
            self._tell_skipped_steps(engine)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return [engine.state.output]

    def _tell_skipped_steps(self, engine: SupervisedTrainer) -> None:
        state: Any = engine.state
        if not self.scaler.is_enabled() or state.iteration % state.epoch_length:
            return
        scale = self.scaler.get_scale()  # makes the device wait, so once in an epoch
        steps = -(-state.epoch_length // self.accumulation_steps)
        if scale <= self.latest_scale * self.scaler.get_backoff_factor() ** steps:
            logger.warning(
                f"epoch {state.epoch} learned nothing: gradients overflowed float16 in all its steps ({steps}; loss "
                f"scale {self.latest_scale:g} before, {scale:g} after): if this goes on, try --amp_dtype bfloat16 or "
                "--amp false"
            )
        self.latest_scale = scale

    def _place(self, engine: SupervisedTrainer) -> tuple[bool, int, bool]:
        """Of this batch among those of its optimiser step: whether it is the first, how many there are, the last."""
        state: Any = engine.state
        position = (state.iteration - 1) % state.epoch_length
        start = position - position % self.accumulation_steps
        size = min(self.accumulation_steps, state.epoch_length - start)
        return position == start, size, position == start + size - 1


def as_plain_tensor(value: Any) -> Any:
    """A MetaTensor without its metadata; anything else as it is."""
    return value.as_tensor() if hasattr(value, "as_tensor") else value


def prepare_pretext_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor], dict[str, Any]]:
    """``prepare_batch`` of a masked pretext task: the network is called as ``network(image, mask)``.

    The network's mask stays on the host: the tokens are counted there, without waiting for the device.

    Args:
        batch: ``image`` ``(B, C, *spatial)``, ``mask`` ``(B, *grid)`` and, optionally, ``padding`` ``(B, *grid)``.

    Returns:
        image; the targets ``{"image", "mask", "padding"}`` that :class:`PretextLoss` takes apart; further arguments.
    """
    moved = {
        key: batch[key].to(device=device, non_blocking=non_blocking, **kwargs if key == "image" else {})
        for key in ("image", "mask", "padding")
        if key in batch
    }
    moved["image"] = as_plain_tensor(moved["image"])
    return moved["image"], moved, (batch["mask"],), {}


class PretextLoss(nn.Module):
    """Calls ``loss(prediction, image, mask, padding)`` where MONAI's engines call ``loss(prediction, targets)``."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, prediction: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Scalar loss; ``targets`` come from :func:`prepare_pretext_batch`."""
        return self.loss(prediction, **targets)


def prediction_and_targets(output: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """``output_transform`` for ``ignite.metrics.Loss`` on an engine that uses :func:`prepare_pretext_batch`."""
    return output["pred"], output["label"]


def batch_length(targets: Mapping[str, Tensor]) -> int:
    """Number of samples in the targets of a pretext batch."""
    return len(targets["image"])
