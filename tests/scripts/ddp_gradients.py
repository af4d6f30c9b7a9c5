"""Two processes of ``torchrun``: gradients of small networks under ``DistributedDataParallel``, for test_distributed.

``ddp_gradients.py FOLDER`` writes ``FOLDER/rank_N.pt``: for each case the gradients after each batch.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from monai.networks.nets import ViT
from torch import Tensor, nn

from medmim.engines import PretextLoss, TrainingStep, prepare_pretext_batch
from medmim.losses import MaskedReconstructionLoss
from medmim.networks import UNETR, MaskedAutoencoder

SIZE = (16, 16, 16)
N_BATCHES, PER_PROCESS, PROCESSES = 4, 2, 2


def build(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Network, loss and further arguments of the trainer."""
    torch.manual_seed(0)
    if name == "mae":
        vit = ViT(1, SIZE, 8, hidden_size=24, mlp_dim=32, num_layers=3, num_heads=2)
        network = MaskedAutoencoder(vit, SIZE, decoder_hidden_size=24, decoder_num_layers=2, decoder_num_heads=2)
        loss = PretextLoss(MaskedReconstructionLoss(network.patch_size))
        return network, loss, {"prepare_batch": prepare_pretext_batch}
    network = UNETR(1, 3, SIZE, 8, feature_size=4, hidden_size=24, mlp_dim=32, num_layers=4, num_heads=2)
    return network, DiceCELoss(to_onehot_y=True, softmax=True), {}


def global_batches() -> list[dict[str, Tensor]]:
    """What one process would see."""
    generator = torch.Generator().manual_seed(3)
    size = PER_PROCESS * PROCESSES
    masks = [torch.rand(size, 8, generator=generator).argsort(1) < 5 for _ in range(N_BATCHES)]
    return [
        {
            "image": torch.rand(size, 1, *SIZE, generator=generator),
            "label": torch.randint(0, 3, (size, 1, *SIZE), generator=generator),
            "mask": mask.reshape(size, 2, 2, 2),
        }
        for mask in masks
    ]


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters() if p.requires_grad
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name in ("mae", "unetr"):
        for steps in (1, 2):
            network, loss, arguments = build(name)
            seen: list[dict[str, Tensor | None]] = []
            trainer = SupervisedTrainer(
                device=torch.device("cpu"),
                max_epochs=1,
                train_data_loader=[{k: v[rank::PROCESSES] for k, v in batch.items()} for batch in global_batches()],
                network=nn.parallel.DistributedDataParallel(network),  # find_unused_parameters stays off
                optimizer=torch.optim.SGD(network.parameters(), 0.0),
                loss_function=loss,
                inferer=SimpleInferer(),
                iteration_update=TrainingStep("cpu", accumulation_steps=steps),
                decollate=False,
                **arguments,
            )
            trainer.add_event_handler(
                IterationEvents.BACKWARD_COMPLETED, lambda engine, n=network, to=seen: to.append(gradients(n))
            )
            trainer.run()
            found[f"{name} {steps}"] = seen
    torch.save(found, Path(sys.argv[1]) / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
