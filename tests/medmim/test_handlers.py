"""Handlers, on real engines."""

import csv
import logging
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from medmim.description import read_description
from medmim.figures import curves_figure
from medmim.handlers import (
    LearningCurve,
    NonFiniteLossError,
    SaveBestModel,
    SaveEncoder,
    SaveScores,
    StopOnNonFiniteLoss,
    batch_files,
)
from medmim.losses import MaskedReconstructionLoss
from medmim.metrics import SegmentationScores
from medmim.networks import FeatureExtractor, MaskedAutoencoder
from medmim.networks.patches import hidden_voxels
from medmim.previews import ReconstructionPreview, draw_reconstruction
from medmim.weights import build_encoder, load_checkpoint

SIZE = (16, 24, 8)


def scans(n: int) -> list:
    meta = [{"filename_or_obj": f"/data/s{i}.nii.gz"} for i in range(n)]
    return [{"image": MetaTensor(torch.rand(1, 2, 2), meta=m), "label": torch.rand(1, 2, 2)} for m in meta]


def trainer_of(network, loss_function, n_scans=6, epochs=2, handlers=()):
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(scans(n_scans), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=loss_function,
        train_handlers=list(handlers),
        decollate=False,
    )


def looping(n_iterations=3, output=None, **state) -> Engine:
    """Engine that only passes through its events."""
    engine = Engine(lambda engine, batch: output(engine) if output else {"loss": 1.0})
    for name, value in state.items():
        setattr(engine.state, name, value)
    return engine


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("iteration", [1, 2, 3, 6])
def test_non_finite_loss_ends_the_training_before_a_file_is_written(value, iteration):
    calls, written = [], []

    def loss(prediction, label):
        calls.append(1)
        return (prediction - label).square().mean() + (float(value) if len(calls) == iteration else 0.0)

    network = torch.nn.Conv2d(1, 1, 1)
    trainer = trainer_of(network, loss, handlers=[StopOnNonFiniteLoss()])
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: written.append(network.weight.detach().clone()))
    epoch, place = (iteration + 2) // 3, (iteration - 1) % 3
    names = [rf"/data/s{i}\.nii\.gz" for i in (2 * place, 2 * place + 1)]
    message = rf"^the loss is {value} in epoch {epoch}, iteration {place + 1}, with {', '.join(names)}: lower --learn"
    with pytest.raises(NonFiniteLossError, match=message) as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)
    assert len(calls) <= iteration + 1  # looked at in the next iteration, or at the epoch's end
    assert len(written) == epoch - 1
    assert all(bool(weight.isfinite().all()) for weight in written)


def test_finite_loss_goes_on():
    trainer = trainer_of(torch.nn.Conv2d(1, 1, 1), torch.nn.MSELoss(), handlers=[StopOnNonFiniteLoss()])
    trainer.run()
    assert trainer.state.iteration == 6


def test_batch_files():
    batch = next(iter(DataLoader(scans(3), batch_size=2)))
    assert batch_files(batch) == ["/data/s0.nii.gz", "/data/s1.nii.gz"]
    assert batch_files(scans(1)[0]) == ["/data/s0.nii.gz"]
    assert batch_files({"image": torch.rand(2, 1, 3)}) == ["unknown files"]


def test_encoder_is_written_at_intervals(tmp_path, tiny_vit, preset):
    extractor = FeatureExtractor(tiny_vit(), SIZE).eval()
    engine = looping()
    SaveEncoder(str(tmp_path), extractor, SIZE, preset, interval=2).attach(engine)
    written = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: written.append((tmp_path / "encoder.pt").exists()))
    engine.run([0], max_epochs=3)
    assert written == [False, True, True]
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.pt", "model.pt", "model.json"}
    image = torch.rand(1, 1, *SIZE)
    torch.testing.assert_close(build_encoder(tmp_path / "encoder.pt").eval()(image)[0], extractor.encoder(image)[0])
    assert read_description(tmp_path / "model.json")["network"]["name"] == "FeatureExtractor"
    other = FeatureExtractor(tiny_vit(), SIZE).eval()
    load_checkpoint(other, tmp_path / "model.pt")
    assert torch.equal(other(image), extractor(image))


def test_encoder_is_written_after_the_last_epoch(tmp_path, tiny_vit, preset):
    engine = looping()
    SaveEncoder(str(tmp_path), FeatureExtractor(tiny_vit(), SIZE), SIZE, preset, interval=10).attach(engine)
    engine.run([0], max_epochs=3)
    assert (tmp_path / "encoder.pt").exists()


def test_best_model_is_kept(tmp_path, tiny_vit, preset):
    network = FeatureExtractor(tiny_vit(), SIZE)
    quality = {1: 0.5, 2: 0.8, 3: 0.3}
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.rand(1, 1, *SIZE), "label": torch.rand(1)}],
        network=network,
        key_val_metric={"mean_dice": Average(output_transform=lambda output: quality[evaluator.state.epoch])},
        val_handlers=[SaveBestModel(str(tmp_path), network, SIZE, preset)],
    )
    bias = network.encoder.norm.bias
    for epoch in quality:
        torch.nn.init.constant_(bias, epoch)
        evaluator.run(epoch)
    assert torch.load(tmp_path / "model.pt")["encoder.norm.bias"][0] == 2
    assert read_description(tmp_path / "model.json")["preset"]["name"] == preset.name


def test_learning_curve(tmp_path):
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.4)])
    evaluator = looping()
    trainer = looping(output=lambda engine: {"loss": torch.tensor(float(engine.state.iteration))})

    @trainer.on(Events.EPOCH_COMPLETED(every=2))
    def validate():
        evaluator.state.metrics = {"val_loss": 10.0 * trainer.state.epoch}
        evaluator.state.epoch = trainer.state.epoch

    LearningCurve(str(tmp_path / "out"), optimizer, evaluator).attach(trainer)
    trainer.run(range(3), max_epochs=3)
    with (tmp_path / "out" / "scalars.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "iteration", "seconds", "learning_rate", "train_loss", "val_loss"]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [int(row["iteration"]) for row in rows] == [3, 6, 9]
    assert [float(row["train_loss"]) for row in rows] == [2.0, 5.0, 8.0]
    assert [float(row["learning_rate"]) for row in rows] == [0.4] * 3
    assert [row["val_loss"] for row in rows] == ["", "20.0", ""]
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_learning_curve_of_a_trainer_that_decollates(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    trainer = looping(output=lambda engine: [{"loss": 3.0}, {"loss": 3.0}])
    curve = LearningCurve(str(tmp_path), optimizer)
    curve.attach(trainer)
    trainer.run(range(2), max_epochs=1)
    assert curve.rows[0]["train_loss"] == 3
    assert (tmp_path / "curves.png").is_file()


def test_learning_curve_of_a_loss_with_terms(tmp_path, monkeypatch):
    """Every scalar of the output by name; a term that is left out in some epochs stays empty there."""

    def output(engine):
        late = {"term_2": torch.tensor(7.0)} if engine.state.epoch > 1 else {}
        return [{"loss": torch.tensor(float(engine.state.iteration)), "term_1": 0.5, "pred": torch.ones(2), **late}]

    evaluator = looping(metrics={"val_term_1": 0.25, "dice": 1.0}, epoch=2)
    curve = LearningCurve(str(tmp_path), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), evaluator)
    trainer = looping(output=output)
    curve.attach(trainer)
    panels = []
    monkeypatch.setattr("medmim.handlers.curves_figure", lambda points: panels.append(points) or curves_figure(points))
    trainer.run(range(2), max_epochs=2)
    with (tmp_path / "scalars.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [[row[name] for name in ("train_loss", "train_term_1", "train_term_2", "val_term_1")] for row in rows]
    assert found == [["1.5", "0.5", "", ""], ["3.5", "0.5", "7.0", "0.25"]]
    assert "train_pred" not in rows[0]
    assert panels[-1] == {
        "loss": {"train": [(1, 1.5), (2, 3.5)]},
        "term_1": {"train": [(1, 0.5), (2, 0.5)], "val": [(2, 0.25)]},
        "term_2": {"train": [(2, 7.0)]},
        "dice": {"": [(2, 1.0)]},
    }


@pytest.mark.parametrize("grid_and_patch", [((2, 3, 1), (2, 1, 4)), ((3, 2), (2, 5))])
def test_hidden_voxels_repeat_the_mask(grid_and_patch):
    grid, patch_size = grid_and_patch
    mask = torch.rand(2, *grid) > 0.5
    expected = mask
    for axis, size in enumerate(patch_size):
        expected = expected.repeat_interleave(size, axis + 1)
    assert torch.equal(hidden_voxels(mask, patch_size), expected.unsqueeze(1))


def panel(figure, title):
    """What the column shows of the middle axial slice."""
    column = next(axis for axis in figure.axes if axis.get_title() == title)
    row = [axis for axis in figure.axes if axis.get_subplotspec().colspan == column.get_subplotspec().colspan][-1]
    return row.images[0].get_array()


@pytest.mark.parametrize("normalize", [True, False])
def test_preview_shows_original_masked_and_reconstruction(normalize):
    loss = MaskedReconstructionLoss((8, 8, 8), normalize_target=normalize)
    image, mask = torch.rand(1, 1, *SIZE), torch.zeros(1, 2, 3, 1, dtype=torch.bool)
    mask[0, 0, 1, 0] = mask[0, 1, 2, 0] = True

    class Zeros(torch.nn.Module):
        def forward(self, image, mask):
            assert not self.training
            return torch.zeros(1, 6, 512)

    network = Zeros().train()
    figure = draw_reconstruction(network, loss, image, mask, "epoch 7")
    assert network.training
    original = np.rot90(image[0, 0, :, :, 4].numpy())
    hidden = np.rot90(mask[0, :, :, 0].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
    np.testing.assert_allclose(panel(figure, "original"), original)
    np.testing.assert_array_equal(np.ma.getmaskarray(panel(figure, "masked")), hidden)
    means = torch.nn.functional.avg_pool3d(image, 8)[0, 0, :, :, 0].numpy()
    predicted = np.rot90(np.kron(means, np.ones((8, 8)))) if normalize else np.zeros((24, 16))
    np.testing.assert_allclose(panel(figure, "reconstruction"), np.where(hidden, predicted, original), atol=1e-5)
    assert "epoch 7" in figure.get_suptitle()
    assert ("normalised" in figure.get_suptitle()) is normalize
    assert ("raw intensities" in figure.get_suptitle()) is not normalize


@pytest.mark.parametrize("img_size", [SIZE, (16, 24)])
@pytest.mark.parametrize("crops", [False, True])
def test_preview_is_written_as_png_and_for_tensorboard(tmp_path, tiny_vit, img_size, crops):
    network = MaskedAutoencoder(tiny_vit(2, img_size), img_size, "linear")
    mask = torch.zeros(network.grid, dtype=torch.bool)
    mask[0] = True
    item = {"image": MetaTensor(torch.rand(2, *img_size)), "mask": mask}
    engine = looping()
    loss = MaskedReconstructionLoss(network.patch_size)
    dataset = [[item] if crops else item]
    settings = {"output_dir": str(tmp_path), "interval": 2, "device": torch.device("cpu")}
    ReconstructionPreview(loss, network=network, dataset=dataset, **settings).attach(engine)
    engine.run([0], max_epochs=3)
    pictures = sorted((tmp_path / "previews").iterdir())
    assert [path.name for path in pictures] == ["epoch_0002.png", "epoch_0003.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    assert any(path.stat().st_size > 1000 for path in (tmp_path / "tensorboard").iterdir())


def test_scores_are_written_and_summed_up(tmp_path, caplog):
    label = torch.zeros(1, 4, 4, 4)
    label[0, 1:3] = 1
    engine = Engine(lambda engine, batch: [{"pred": label, "label": label}])
    scores = SegmentationScores({1: "cube"}, 1.0)
    scores.attach(engine, "mean_dice")
    SaveScores(scores, str(tmp_path / "out")).attach(engine)
    with caplog.at_level(logging.INFO):
        engine.run([0])
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows] == [1.0]
    assert not math.isnan(float(rows[0]["hd95_mm"]))
    assert "mean_dice: 1.0000" in caplog.text
    assert "mean_hd95_mm: 0.0000" in caplog.text
