"""Two real processes compute the gradients that one would compute on both their batches."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "ddp_gradients.py"
CASES = [(name, steps) for name in ("mae", "unetr") for steps in (1, 2)]
Gradients = list[dict[str, Tensor | None]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_gradients", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Gradients]]:
    """What each of the two processes has seen."""
    folder = tmp_path_factory.mktemp("gradients")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


def expected(script: ModuleType, name: str, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradient of the mean loss of some batches, by autograd alone."""
    network, loss, _ = script.build(name)
    for batch in batches:
        if name == "mae":
            prediction = network(batch["image"], batch["mask"])
            value = loss.loss(prediction, batch["image"], batch["mask"])
        else:
            value = loss(network(batch["image"]), batch["label"])
        (value / len(batches)).backward()
    return {key: p.grad for key, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_gradients_are_those_of_one_process(script: Any, ranks: Any, name: str, steps: int) -> None:
    batches = script.global_batches()
    for last in range(steps - 1, len(batches), steps):
        truth = expected(script, name, batches[last + 1 - steps : last + 1])
        largest = max(float(gradient.abs().max()) for gradient in truth.values())
        assert largest > 1e-3
        for rank in ranks:
            found = rank[f"{name} {steps}"][last]
            assert found.keys() == truth.keys()
            for key, gradient in truth.items():
                torch.testing.assert_close(found[key], gradient, atol=1e-5 * largest, rtol=1e-5, msg=key)


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_gradients_are_exchanged_with_the_last_batch_of_a_step_only(ranks: Any, name: str, steps: int) -> None:
    for number, (first, second) in enumerate(zip(*(rank[f"{name} {steps}"] for rank in ranks), strict=True), start=1):
        same = all(torch.equal(first[key], second[key]) for key in first)
        assert same is (number % steps == 0), number


@pytest.mark.parametrize("name", ["mae", "unetr"])
def test_every_learning_parameter_gets_a_gradient(ranks: Any, name: str) -> None:
    """Otherwise ``find_unused_parameters`` would be needed."""
    for seen in ranks[0][f"{name} 1"]:
        assert [key for key, gradient in seen.items() if gradient is None] == []
