"""What the second of two processes does, in this one: everything but writing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from medmim import commands, scan_checks
from medmim.datalists import load_datalist
from medmim.datasets import Preset, get_preset
from medmim.handlers import LearningCurve, SaveBestModel, SaveEncoder, SaveScores
from medmim.losses import MaskedReconstructionLoss
from medmim.metrics import SegmentationScores
from medmim.networks import FeatureExtractor, MaskedAutoencoder
from medmim.previews import ReconstructionPreview
from medmim.transforms import ScanError

SIZE = (16, 24, 8)


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(idist, "get_rank", lambda: request.param)
    return request.param


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_handlers_write_on_the_first_only(
    rank: int, tmp_path: Path, tiny_vit: Callable, preset: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    network = MaskedAutoencoder(tiny_vit(), SIZE, "linear")
    extractor = FeatureExtractor(network.encoder, SIZE)
    mask = torch.zeros(network.grid, dtype=torch.bool)
    mask[0] = True
    item = {"image": MetaTensor(torch.rand(1, *SIZE)), "mask": mask}
    loss = MaskedReconstructionLoss(network.patch_size)
    label = torch.ones(1, 4, 4, 4)
    scores = SegmentationScores({1: "cube"})
    evaluator = Engine(lambda engine, batch: [{"pred": label, "label": label}])
    evaluator.state.best_metric, evaluator.state.best_metric_epoch, evaluator.state.key_metric_name = 0.5, 1, "dice"
    scores.attach(evaluator, "mean_dice")
    SaveBestModel(str(tmp_path / "best"), extractor, SIZE, preset).attach(evaluator)
    SaveScores(scores, str(tmp_path / "scores")).attach(evaluator)
    with caplog.at_level("INFO", "medmim"):
        evaluator.run([0], max_epochs=1)
        trainer = Engine(lambda engine, batch: {"loss": torch.tensor(1.0)})
        curve = LearningCurve(str(tmp_path / "curve"), torch.optim.SGD(network.parameters(), 0.1), evaluator)
        curve.attach(trainer)
        SaveEncoder(str(tmp_path / "encoder"), extractor, SIZE, preset, 1).attach(trainer)
        preview = {"output_dir": str(tmp_path / "preview"), "interval": 1, "device": "cpu"}
        ReconstructionPreview(loss, network=network, dataset=[item], **preview).attach(trainer)
        trainer.run([0], max_epochs=1)
    written = {
        "best/model.pt", "best/model.json", "scores/scores.csv", "curve/scalars.csv", "curve/curves.png",
        "encoder/encoder.pt", "encoder/model.pt", "encoder/model.json", "preview/previews/epoch_0001.png",
    }  # fmt: skip
    found = files_below(tmp_path)
    assert {name for name in found if "tensorboard" not in name} == (written if rank == 0 else set())
    assert any("tensorboard" in name for name in found) is (rank == 0)
    assert bool([r for r in caplog.records if r.name.startswith("medmim")]) is (rank == 0)
    assert [row["train_loss"] for row in curve.rows] == [1.0]  # every process knows its rows


def test_loss_of_an_epoch_is_the_mean_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_reduce", lambda loss: loss + 5.0)  # the other process had 5
    trainer = Engine(lambda engine, batch: {"loss": torch.tensor(float(batch))})
    curve = LearningCurve(str(tmp_path), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
    curve.attach(trainer)
    trainer.run([1, 2, 6], max_epochs=1)
    assert curve.rows[0]["train_loss"] == 4.0


def test_scores_of_all_processes_are_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler may give the last cases to two processes."""
    scores = SegmentationScores({1: "cube"})
    row = {"class": "cube", "hd95_mm": "", "surface_dice": "", "reference_ml": 1.0, "predicted_ml": 1.0}
    ours = [row | {"case": "a", "dice": 0.2}, row | {"case": "b", "dice": 0.4}]
    theirs = [row | {"case": "c", "dice": 0.9}, row | {"case": "a", "dice": 0.2}]
    scores.rows = list(ours)
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_gather", lambda rows: [rows, theirs])
    assert scores.compute() == pytest.approx(0.5)
    assert sorted(r["case"] for r in scores.rows) == ["a", "b", "c"]


def test_each_process_reads_its_share_of_the_scans(
    phantom_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = load_datalist(phantom_dir).training
    bad = items[1] | {"image": str(tmp_path / "bad.nii.gz")}
    Path(bad["image"]).write_bytes(b"no scan")
    items = [items[0], bad, *items[2:]]
    read: list[list[str]] = []
    load = scan_checks.load_scan

    def remember(path: Any) -> Any:
        read[-1].append(str(path))
        return load(path)

    monkeypatch.setattr(scan_checks, "load_scan", remember)
    shares: list[Any] = []
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_gather", lambda found: shares.append(found) or shares * (3 - len(shares)))
    preset = get_preset("phantom")
    for rank in (1, 0):
        read.append([])
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        if rank == 1:
            with pytest.raises((ScanError, KeyError)):  # this fake knows no other share yet
                scan_checks.check_scans(items, preset, tmp_path / "checked.json")
            assert not (tmp_path / "checked.json").exists()
        else:
            with pytest.raises(ScanError, match=r"bad\.nii\.gz: not readable"):  # although the other has read it
                scan_checks.check_scans(items, preset, tmp_path / "checked.json")
            assert (tmp_path / "checked.json").is_file()
    images = [str(item["image"]) for item in items]
    assert [path for path in read[0] if "labels" not in path] == images[1::2]
    assert [path for path in read[1] if "labels" not in path] == images[::2]


def test_phantom_is_written_by_the_first(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "barrier", lambda: waited.append(rank))
    commands.write_phantom(str(tmp_path / "phantom"), 1)
    assert (tmp_path / "phantom" / "dataset.json").is_file() is (rank == 0)
    assert waited == [rank]
    if rank == 0:
        assert nib.load(tmp_path / "phantom" / "imagesTr" / "phantom_000.nii.gz").ndim == 3
