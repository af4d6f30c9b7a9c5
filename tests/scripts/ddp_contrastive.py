"""Two processes of ``torchrun``: the contrastive loss under ``DistributedDataParallel``, for test_contrastive.py.

``ddp_contrastive.py FOLDER`` writes ``FOLDER/rank_N.pt``: outputs and gradients of each batch, and scores of an
evaluation with other numbers of batches in the two processes.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents, SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.networks.nets import ViT
from torch import Tensor, nn

from medmim.contrastive import ContrastiveStep, PairScores, prepare_pair_batch
from medmim.losses import NTXentLoss
from medmim.networks import SimCLR

SIZE = (16, 16, 16)
N_BATCHES, PER_PROCESS, PROCESSES = 4, 3, 2
TEMPERATURE = 0.2
SHARES = [[3, 3, 1], [2]]  # pairs in the batches of an evaluation, of the two processes


def build() -> SimCLR:
    """Small network, the same in each process."""
    torch.manual_seed(0)
    return SimCLR(ViT(1, SIZE, 8, hidden_size=24, mlp_dim=32, num_layers=2, num_heads=2), SIZE, 24, 8)


def global_batches() -> list[dict[str, Tensor]]:
    """What one process would see."""
    generator = torch.Generator().manual_seed(3)
    shape = (PER_PROCESS * PROCESSES, 1, *SIZE)
    return [{key: torch.rand(shape, generator=generator) for key in ("image", "image_2")} for _ in range(N_BATCHES)]


def pairs_of_evaluation() -> list[list[Tensor]]:
    """Embeddings for each process and batch."""
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(n, 2, 8, generator=generator) for n in sizes] for sizes in SHARES]


def evaluate(batches: list[Tensor]) -> dict[str, float]:
    """Scores of an engine that puts out these embeddings."""
    evaluator = Engine(lambda engine, batch: {"pred": batch})
    scores = PairScores(TEMPERATURE)
    for name in ("loss", "accuracy", "alignment", "spread"):
        scores[name].attach(evaluator, name)
    return {name: float(value) for name, value in evaluator.run(batches).metrics.items()}


def train(
    network: nn.Module, batches: list[dict[str, Tensor]], steps: int, standardize: bool = False
) -> list[dict[str, Any]]:
    """Output and gradients after each batch; the weights stay."""
    seen: list[dict[str, Any]] = []

    def remember(engine: SupervisedTrainer) -> None:
        pretext = getattr(network, "module", network)
        gradients = {name: p.grad.clone() for name, p in pretext.named_parameters() if p.requires_grad}
        output = {str(name): value.clone() for name, value in engine.state.output.items()}
        seen.append({"output": output, "gradients": gradients})

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.0),
        loss_function=NTXentLoss(TEMPERATURE, standardize),
        prepare_batch=prepare_pair_batch,
        inferer=SimpleInferer(),
        iteration_update=ContrastiveStep("cpu", False, torch.bfloat16, steps, TEMPERATURE, standardize),
        decollate=False,
    )
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, remember)
    trainer.run()
    return seen


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    part = slice(rank * PER_PROCESS, (rank + 1) * PER_PROCESS)
    batches = [{key: value[part] for key, value in batch.items()} for batch in global_batches()]
    network = nn.parallel.DistributedDataParallel(build())  # find_unused_parameters stays off
    found: dict[str, Any] = {
        f"{steps} {standardize}": train(network, batches, steps, standardize)
        for steps in (1, 2)
        for standardize in (False, True)
    }
    found["evaluation"] = evaluate(pairs_of_evaluation()[rank])
    torch.save(found, Path(sys.argv[1]) / f"rank_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
