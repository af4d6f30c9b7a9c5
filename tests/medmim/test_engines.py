"""Pretext batches in MONAI's trainer and evaluator."""

import pytest
import torch
from ignite.metrics import Loss
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer

from medmim.engines import PretextLoss, batch_length, prediction_and_targets, prepare_pretext_batch
from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskedAutoencoder

SIZE = (16, 24, 8)


def items(n, padding=True):
    result = []
    for i in range(n):
        mask = torch.zeros(2, 3, 1, dtype=torch.bool)
        mask.view(-1)[[i % 6, (i + 2) % 6]] = True
        item = {"image": MetaTensor(torch.rand(1, *SIZE)), "mask": mask}
        result.append(item | ({"padding": torch.zeros(2, 3, 1, dtype=torch.bool)} if padding else {}))
    return result


@pytest.mark.parametrize("padding", [True, False])
def test_batch_is_taken_apart(padding):
    batch = next(iter(DataLoader(items(2, padding), batch_size=2)))
    image, targets, arguments, options = prepare_pretext_batch(batch, torch.device("cpu"), dtype=torch.float64)
    assert type(image) is torch.Tensor
    assert image.dtype == torch.float64
    assert set(targets) == ({"image", "mask", "padding"} if padding else {"image", "mask"})
    assert targets["image"] is image
    assert all(targets[key].dtype == torch.bool for key in targets if key != "image")
    assert len(arguments) == 1
    assert torch.equal(arguments[0], batch["mask"])
    assert options == {}
    assert batch_length(targets) == 2


def test_plain_tensors_do_as_well():
    image = torch.rand(1, 1, *SIZE)
    batch = {"image": image, "mask": torch.zeros(1, 2, 3, 1, dtype=torch.bool)}
    assert torch.equal(prepare_pretext_batch(batch)[0], image)


@pytest.mark.parametrize("amp", [False, True])
def test_training_and_validation(tiny_vit, amp):
    network = MaskedAutoencoder(tiny_vit(), SIZE, "mlp", 12)
    reconstruction = MaskedReconstructionLoss(network.patch_size)
    loss = PretextLoss(reconstruction)
    common = {"device": torch.device("cpu"), "network": network, "prepare_batch": prepare_pretext_batch}
    common |= {"inferer": SimpleInferer(), "decollate": False, "amp": amp, "amp_kwargs": {"dtype": torch.bfloat16}}
    data = items(3)
    evaluator = SupervisedEvaluator(
        val_data_loader=DataLoader(data, batch_size=2),
        key_val_metric={"val_loss": Loss(loss, prediction_and_targets, batch_length)},
        **common,
    )
    evaluator.run()
    before = evaluator.state.metrics["val_loss"]
    with torch.no_grad():
        errors = [
            reconstruction(network(d["image"][None], d["mask"][None]), d["image"][None].as_tensor(), d["mask"][None])
            for d in data
        ]
    assert before == pytest.approx(float(sum(errors)) / 3, rel=2e-2 if amp else 1e-5)
    SupervisedTrainer(
        max_epochs=15,
        train_data_loader=DataLoader(data, batch_size=3),
        optimizer=torch.optim.AdamW(network.parameters(), 0.01),
        loss_function=loss,
        **common,
    ).run()
    evaluator.run()
    assert evaluator.state.metrics["val_loss"] < before
