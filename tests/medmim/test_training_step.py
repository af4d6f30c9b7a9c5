"""``TrainingStep`` in MONAI's trainer: accumulation, mixed precision, events."""

import logging
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines import IterationEvents, SupervisedTrainer
from monai.handlers import from_engine
from monai.inferers import SimpleInferer
from monai.utils import CommonKeys
from torch import Tensor, nn

from medmim.engines import TrainingStep, autocast_dtype

CPU = torch.device("cpu")


def batches(count: int, size: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randn(size, 1, 6, generator=generator), "label": torch.randn(size, 1, 6, generator=generator)}
        for _ in range(count)
    ]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def small_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 4), nn.Conv1d(4, 1, 3, padding=1))


def trainer_of(data: list, step: Callable | None, network: nn.Module, epochs: int = 1, **arguments: Any) -> Any:
    optimizer = arguments.pop("optimizer", None) or torch.optim.AdamW(network.parameters(), 0.01)
    return SupervisedTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=data,
        network=network,
        optimizer=optimizer,
        loss_function=arguments.pop("loss_function", nn.MSELoss()),
        inferer=SimpleInferer(),
        iteration_update=step,
        decollate=False,
        **arguments,
    )


def loss_of(output: Any) -> float:
    """By the function that MONAI's MLflow tracking uses; MONAI's trainer decollates for it."""
    return float(from_engine(["loss"], first=True)(output if isinstance(output, list) else [output]))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# ------------------------------------------------------------------------------------------------------ accumulation


def test_one_step_in_full_precision_is_monais() -> None:
    theirs, ours = small_network(), small_network()
    data = batches(5, 3)
    losses: dict[str, list[float]] = {"theirs": [], "ours": []}
    for name, network, step in (("theirs", theirs, None), ("ours", ours, TrainingStep(CPU))):
        trainer = trainer_of(data, step, network, epochs=3)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine, to=losses[name]: to.append(loss_of(engine.state.output))
        )
        trainer.run()
    assert torch.equal(weights(theirs), weights(ours))
    assert losses["theirs"] == losses["ours"]
    assert len(losses["ours"]) == 15


@pytest.mark.parametrize(("n_batches", "steps"), [(6, 3), (5, 3), (7, 3), (2, 3), (4, 1)])
def test_accumulation_is_one_large_batch(n_batches: int, steps: int) -> None:
    """By MONAI's own trainer, on the batches put together; the last group of an epoch may be smaller."""
    data = batches(n_batches, 2)
    large = [joined(data[start : start + steps]) for start in range(0, n_batches, steps)]
    theirs, ours = small_network(), small_network()
    sgd = {name: torch.optim.SGD(n.parameters(), 0.1, 0.9) for name, n in (("theirs", theirs), ("ours", ours))}
    trainer_of(large, None, theirs, epochs=3, optimizer=sgd["theirs"]).run()
    trainer_of(data, TrainingStep(CPU, accumulation_steps=steps), ours, epochs=3, optimizer=sgd["ours"]).run()
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=1e-6)
    assert float((weights(ours) - weights(small_network())).abs().max()) > 0.01


def test_optimiser_steps_once_for_each_group() -> None:
    network = small_network()
    seen = []
    trainer = trainer_of(batches(5, 2), TrainingStep(CPU, accumulation_steps=2), network, epochs=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(weights(network)))
    trainer.run()
    changes = [not torch.equal(a, b) for a, b in pairwise([weights(small_network()), *seen])]
    assert changes == [False, True, False, True, True] * 2


# --------------------------------------------------------------------------------------------------- mixed precision


class Probe(nn.Module):
    """Remembers the number format of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        self.seen.append(result.dtype)
        return result


@pytest.mark.parametrize(
    ("amp", "dtype"), [(False, torch.float32), (True, torch.bfloat16), (True, torch.float16)], ids=str
)
def test_autocast_on_the_cpu(amp: bool, dtype: torch.dtype) -> None:
    network = Probe()
    step = TrainingStep(CPU, amp, torch.bfloat16 if dtype == torch.float32 else dtype)
    trainer_of(batches(2, 2), step, network).run()
    assert network.seen == [dtype] * 2
    assert step.scaler.is_enabled() is (dtype == torch.float16)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())


def test_bfloat16_learns_about_the_same() -> None:
    exact, rounded = small_network(), small_network()
    trainer_of(batches(4, 4), TrainingStep(CPU), exact, epochs=5).run()
    trainer_of(batches(4, 4), TrainingStep(CPU, True), rounded, epochs=5).run()
    assert not torch.equal(weights(exact), weights(rounded))
    torch.testing.assert_close(weights(exact), weights(rounded), atol=0.02, rtol=0.05)


def test_float16_skips_a_step_whose_gradients_overflow_and_lowers_the_scale() -> None:
    class Product(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction.float() * target).mean() * factors.pop(0)

    factors = [1.0, 1e38, 1.0]
    network = Probe()
    step = TrainingStep(CPU, True, torch.float16)
    scales, seen = [], [weights(network)]
    trainer = trainer_of(batches(3, 2), step, network, loss_function=Product())

    @trainer.on(Events.ITERATION_COMPLETED)
    def remember() -> None:
        scales.append(step.scaler.get_scale())
        seen.append(weights(network))

    trainer.run()
    assert scales == [65536.0, 32768.0, 32768.0]
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [False, True, False]


@pytest.mark.parametrize(("factors", "told"), [([1e38, 1e38], True), ([1e38, 1.0], False), ([1.0, 1.0], False)])
def test_an_epoch_of_float16_that_learned_nothing_is_told(
    factors: list[float], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Product(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction.float() * target).mean() * left.pop(0)

    left = [1.0, 1.0, *factors]
    network = Probe()
    with caplog.at_level(logging.WARNING):
        trainer_of(batches(2, 2), TrainingStep(CPU, True, torch.float16), network, 2, loss_function=Product()).run()
    messages = [record.getMessage() for record in caplog.records if "learned nothing" in record.getMessage()]
    assert [message.split(":")[0] for message in messages] == (["epoch 2 learned nothing"] if told else [])


def test_state_of_the_scaler_travels() -> None:
    first = TrainingStep(CPU, True, torch.float16)
    first.scaler.scale(torch.ones(1))
    first.scaler.update(128.0)
    second = TrainingStep(CPU, True, torch.float16)
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 128.0
    assert second.state_dict() == first.state_dict()
    without = TrainingStep(CPU, True, torch.bfloat16)
    assert without.state_dict() == {}
    without.load_state_dict(first.state_dict())
    second.load_state_dict(without.state_dict())
    assert second.scaler.get_scale() == 128.0


def test_number_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autocast_dtype("float16", "cpu") == torch.float16
    assert autocast_dtype("bfloat16", "cuda") == autocast_dtype("auto", "cpu") == torch.bfloat16
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert autocast_dtype("auto", "cuda:1") == expected
    with pytest.raises(ValueError, match=r"^--amp_dtype half: expected auto, bfloat16 or float16$"):
        autocast_dtype("half", "cpu")


# ------------------------------------------------------------------------------------------------------------- events


def order_of_events(trainer: Any) -> list[tuple[str, int]]:
    """Runs a trainer; its events in the order in which they came."""
    seen: list[tuple[str, int]] = []

    def remember(engine: Any, name: str) -> None:
        seen.append((name, engine.state.iteration))

    for event in [*list(IterationEvents)[:4], Events.ITERATION_STARTED, Events.ITERATION_COMPLETED]:
        trainer.add_event_handler(event, remember, event.name)
    trainer.run()
    return seen


@pytest.mark.parametrize("steps", [1, 2])
def test_events_come_as_in_monai(steps: int) -> None:
    theirs = order_of_events(trainer_of(batches(3, 2), None, small_network()))
    ours = order_of_events(trainer_of(batches(3, 2), TrainingStep(CPU, accumulation_steps=steps), small_network()))
    assert ours == theirs
    assert {name for name, _ in ours} >= {
        "FORWARD_COMPLETED",
        "LOSS_COMPLETED",
        "BACKWARD_COMPLETED",
        "MODEL_COMPLETED",
    }


def test_output_is_the_loss_alone() -> None:
    outputs = []
    trainer = trainer_of(batches(2, 2), TrainingStep(CPU, accumulation_steps=2), small_network())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(deepcopy(engine.state.output)))
    trainer.run()
    for (output,), batch in zip(outputs, batches(2, 2), strict=True):
        assert set(output) == {CommonKeys.LOSS}
        assert not output["loss"].requires_grad
        expected = nn.functional.mse_loss(small_network()(batch["image"]), batch["label"])
        torch.testing.assert_close(output["loss"], expected.detach())  # not divided by the batches of a step


def test_further_arguments_reach_the_network() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, factor: float, offset: float = 0.0) -> Tensor:
            seen.append((factor, offset, type(x)))
            return x * self.weight * factor + offset

    seen: list[tuple] = []

    def prepare(batch: dict, *args: Any, **kwargs: Any) -> tuple:
        return batch["image"], batch["label"], (3.0,), {"offset": 2.0}

    trainer_of(batches(1, 2), TrainingStep(CPU), Scaled(), prepare_batch=prepare).run()
    assert seen == [(3.0, 2.0, Tensor)]
