"""Pictures of segmentations, from files."""

from dataclasses import replace
from pathlib import Path

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmim.datasets import Preset
from medmim.previews import SegmentationPreview, draw_segmentation

SIZE = (12, 10, 8)
real = draw_segmentation


def write_case(folder: Path, name: str, axes: str = "RAS") -> dict[str, MetaTensor]:
    """A scan file in some orientation, and class maps on its grid as an evaluator gives them."""
    rng = np.random.default_rng(0)
    label = np.zeros(SIZE)
    label[2:6, 3:9, 1:5] = 1
    volumes = {"image": rng.uniform(-400, 400, SIZE), "label": label, "pred": np.roll(label, 2, 0)}
    target = nib.orientations.axcodes2ornt(axes)
    case = {}
    for key, volume in volumes.items():
        image = nib.Nifti1Image(volume.astype(np.float32), np.diag([3.0, 3.0, 5.0, 1.0]))
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target))
        if key == "image":
            nib.save(image, folder / name)
        meta = {"filename_or_obj": str(folder / name)}
        case[key] = MetaTensor(torch.as_tensor(image.get_fdata())[None], affine=image.affine, meta=meta)
    return case


def validate(engine: Engine, cases: list, epoch: int) -> None:
    """As MONAI's evaluators are run."""
    engine.state.max_epochs, engine.state.epoch, engine.state.iteration = epoch, epoch - 1, 0
    engine.run(cases, epoch_length=len(cases))
    assert engine.state.epoch == epoch


@pytest.mark.parametrize("rank", [0, 1])
def test_first_case_is_drawn_when_it_is_due(
    rank: int, tmp_path: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    cases = [write_case(tmp_path, "first.nii.gz"), {"pred": None}]
    drawn = []
    monkeypatch.setattr("medmim.previews.draw_segmentation", lambda case, *a: drawn.append(case) or real(case, *a))
    engine = Engine(lambda engine, case: [case])
    out = tmp_path / "out"
    SegmentationPreview(preset, output_dir=str(out), interval=4, val_interval=3, epochs=10).attach(engine)
    for epoch in (3, 6, 9, 10):
        validate(engine, cases, epoch)
    if rank:
        assert not out.exists()
        return
    assert [case is cases[0] for case in drawn] == [True] * 3
    pictures = sorted((out / "previews").iterdir())
    assert [path.name for path in pictures] == ["epoch_0006.png", "epoch_0009.png", "epoch_0010.png"]
    with Image.open(pictures[0]) as picture:
        picture.load()
        assert picture.width > 600
        assert picture.height > 400
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    steps = []
    for path in sorted((out / "tensorboard").iterdir()):
        events = EventAccumulator(str(path))
        events.Reload()
        assert events.Tags()["images"] == ["segmentation"]
        steps += [(event.step, event.width > 600) for event in events.Images("segmentation")]
    assert sorted(steps) == [(6, True), (9, True), (10, True)]


@pytest.mark.parametrize(
    ("interval", "val_interval", "epochs", "expected"),
    [
        (50, 10, 500, list(range(50, 501, 50))),
        (50, 20, 80, [60, 80]),
        (3, 5, 12, [5, 10, 12]),
        (100, 10, 20, [20]),
        (1, 1, 3, [1, 2, 3]),
        (5, 7, 20, [7, 14, 20]),
    ],
)
def test_due(tmp_path: Path, preset: Preset, interval: int, val_interval: int, epochs: int, expected: list) -> None:
    preview = SegmentationPreview(
        preset, output_dir=str(tmp_path), interval=interval, val_interval=val_interval, epochs=epochs
    )
    validated = sorted({*range(val_interval, epochs + 1, val_interval), epochs})
    assert [epoch for epoch in validated if preview.is_due(epoch)] == expected


def panels(figure) -> dict[str, list[list[np.ndarray]]]:
    """What each column shows in each plane: scan and classes."""
    n_columns = 3
    titles = [axis.get_title() for axis in figure.axes[:n_columns]]
    return {
        title: [[np.asarray(image.get_array()) for image in axis.images] for axis in figure.axes[i::n_columns]]
        for i, title in enumerate(titles)
    }


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIR"])
def test_picture_does_not_depend_on_how_the_scan_is_stored(axes: str, tmp_path: Path, preset: Preset) -> None:
    case = write_case(tmp_path, "scan.nii", axes)
    figure = draw_segmentation(case, preset, "epoch 7")
    assert figure.get_suptitle() == "epoch 7: scan.nii"
    shown = panels(figure)
    scan = np.random.default_rng(0).uniform(-400, 400, SIZE)
    label = np.zeros(SIZE)
    label[2:6, 3:9, 1:5] = 1
    at = np.median(np.argwhere(label), axis=0).astype(int)
    assert preset.window is not None
    for plane, index in enumerate(at):
        background = np.rot90(np.clip(scan, *preset.window).take(index, plane))
        for column, classes in (("scan", 0 * label), ("reference", label), ("prediction", np.roll(label, 2, 0))):
            np.testing.assert_allclose(shown[column][plane][0], background, rtol=1e-5)
            np.testing.assert_array_equal(shown[column][plane][1], np.rot90(classes.take(index, plane)))


def test_scan_without_window_and_with_several_channels(tmp_path: Path, preset: Preset) -> None:
    case = write_case(tmp_path, "one.nii")
    voxels = nib.load(tmp_path / "one.nii").get_fdata()
    nib.save(nib.Nifti1Image(np.stack([voxels, 0 * voxels], -1), case["pred"].affine.numpy()), tmp_path / "one.nii")
    figure = draw_segmentation(case, replace(preset, window=None, z_score="all"), "epoch 1")
    plane = panels(figure)["scan"][2][0]
    low, high = figure.axes[0].images[0].get_clim()
    np.testing.assert_allclose([low, high], np.percentile(voxels, [1, 99]), rtol=1e-4)
    assert plane.shape == (10, 12)
    assert plane.std() > 100
