"""Pairs of views in MONAI's trainer and evaluator, in one process and in two."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer

from medmim.contrastive import PairScores, WarnOfCollapse, prepare_pair_batch, training_scalars
from medmim.losses import NTXentLoss, pair_scores
from medmim.networks import SimCLR

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "ddp_contrastive.py"
SIZE = (16, 24, 8)


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("ddp_contrastive", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTED = load_script()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has seen."""
    folder = tmp_path_factory.mktemp("contrastive")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_two_processes_compute_what_one_does(ranks: list[dict[str, Any]], steps: int, standardize: bool) -> None:
    """Loss, scores, and the gradient after it was averaged."""
    expected = SCRIPTED.train(SCRIPTED.build(), SCRIPTED.global_batches(), steps, standardize)
    for rank in ranks:
        for number, (found, one) in enumerate(zip(rank[f"{steps} {standardize}"], expected, strict=True), start=1):
            assert found["output"].keys() == {"loss", "accuracy", "alignment", "spread"}
            torch.testing.assert_close(found["output"], one["output"], rtol=1e-5, atol=1e-6)
            if number % steps:  # the processes have not exchanged their gradients yet
                continue
            largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
            assert largest > 1e-3
            assert found["gradients"].keys() == one["gradients"].keys()
            for name, gradient in one["gradients"].items():
                torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_gradient_of_one_process_is_that_of_monais_loss() -> None:
    """And so, with the test above, that of two."""
    from monai.losses import ContrastiveLoss

    network, batch = SCRIPTED.build(), SCRIPTED.global_batches()[0]
    embeddings = network(batch["image"], batch["image_2"])
    ContrastiveLoss(SCRIPTED.TEMPERATURE)(embeddings[:, 0], embeddings[:, 1]).backward()
    seen = SCRIPTED.train(SCRIPTED.build(), [batch], 1)[0]
    truth = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    torch.testing.assert_close(seen["gradients"], truth, rtol=1e-4, atol=1e-7)


def test_evaluation_by_two_processes(ranks: list[dict[str, Any]]) -> None:
    """With three batches in one process, and one in the other."""
    shares = SCRIPTED.pairs_of_evaluation()
    expected = pair_scores(torch.cat([batch for share in shares for batch in share]), SCRIPTED.TEMPERATURE)
    for rank in ranks:
        assert rank["evaluation"] == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def batch_of(n: int) -> list[dict[str, Any]]:
    return [{key: MetaTensor(torch.rand(1, *SIZE)) for key in ("image", "image_2")} for _ in range(n)]


def test_batch_is_taken_apart() -> None:
    batch = next(iter(DataLoader(batch_of(2), batch_size=2)))
    view, targets, arguments, options = prepare_pair_batch(batch, torch.device("cpu"), dtype=torch.float64)
    assert targets is None
    assert options == {}
    for found, key in ((view, "image"), (*arguments, "image_2")):
        assert type(found) is torch.Tensor
        assert found.dtype == torch.float64
        assert torch.equal(found.float(), batch[key].as_tensor())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_validation_does_not_depend_on_the_batch_size(tiny_vit: Callable, batch_size: int) -> None:
    torch.manual_seed(1)
    network, data = SimCLR(tiny_vit(), SIZE), batch_of(5)
    scores = PairScores(0.5)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=batch_size),
        network=network,
        prepare_batch=prepare_pair_batch,
        inferer=SimpleInferer(),
        key_val_metric={"val_loss": scores["loss"]},
        additional_metrics={"val_spread": scores["spread"]},
        decollate=False,
    )
    for _ in range(2):  # nothing of the first is left in the second
        evaluator.run()
        with torch.no_grad():
            pairs = network(*(torch.stack([item[key].as_tensor() for item in data]) for key in ("image", "image_2")))
        assert set(evaluator.state.metrics) == {"val_loss", "val_spread"}
        assert evaluator.state.metrics["val_loss"] == pytest.approx(float(NTXentLoss()(pairs)), rel=1e-5)
        assert evaluator.state.metrics["val_spread"] == pytest.approx(
            float(pair_scores(pairs, 0.5)["spread"]), rel=1e-4
        )


def test_one_pair_cannot_be_scored() -> None:
    scores = PairScores(0.5)
    scores.update(torch.randn(1, 2, 4))
    with pytest.raises(NotComputableError, match="two pairs of views or more"):
        scores.compute()


def test_scalars_for_tensorboard() -> None:
    assert training_scalars([{"loss": 1, "spread": 2}]) == {"train_loss": 1, "train_spread": 2}


def test_collapse_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    curve: Any = SimpleNamespace(rows=[])
    spreads = [0.01, 0.5, 0.04, 0.03, 0.6]
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: curve.rows.append({"train_spread": spreads[engine.state.epoch - 1]})
    )
    WarnOfCollapse(curve, threshold=0.05, first_epoch=2).attach(trainer)
    with caplog.at_level(logging.WARNING, "medmim"):
        trainer.run([0], max_epochs=5)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("epoch 3: spread of the embeddings 0.040 ")
