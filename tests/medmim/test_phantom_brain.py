"""Synthetic heads: deterministic, of four channels, with a tumour whose regions are nested."""

import json

import nibabel as nib
import numpy as np

from medmim.datalists import load_datalist
from medmim.datasets import get_preset
from medmim.phantom_brain import CHANNELS, LABELS, SIZE, SPACING, phantom_brain_case, write_phantom_brain
from medmim.scan_checks import check_scans


def test_same_seed_same_case():
    (image, label), again, other = phantom_brain_case(0), phantom_brain_case(0), phantom_brain_case(1)
    assert np.array_equal(image, again[0])
    assert np.array_equal(label, again[1])
    assert not np.array_equal(label, other[1])
    assert image.shape == (*SIZE, 4)
    assert (image.dtype, label.dtype) == (np.int16, np.uint8)


def test_tumours_differ_and_some_do_not_enhance():
    labels = [phantom_brain_case(seed)[1] for seed in range(12)]
    assert all(set(np.unique(label)) >= {0, 1, 2} for label in labels)
    enhancing = [int((label == 3).sum()) for label in labels]
    assert 1 <= enhancing.count(0) <= 6
    assert min(n for n in enhancing if n) > 50
    assert len({tuple(np.argwhere(label > 0).mean(0)) for label in labels}) == 12


def test_channels_tell_tissues_apart():
    seed = next(seed for seed in range(9) if 3 in phantom_brain_case(seed)[1])
    image, label = phantom_brain_case(seed)
    brain = image.min(-1) > 0
    assert 0.2 < brain.mean() < 0.6
    assert (image[~brain] == 0).all()
    assert not label[~brain].any()
    mean = {(c, v): np.median(image[..., CHANNELS.index(c)][label == v]) for c in CHANNELS for v in (1, 2, 3)}
    rest = {c: np.median(image[..., CHANNELS.index(c)][brain & (label == 0)]) for c in CHANNELS}
    assert mean["T1c", 3] > 1.5 * max(mean["T1c", 2], mean["T1c", 1], rest["T1c"])
    assert mean["FLAIR", 1] > 1.5 * rest["FLAIR"]
    assert mean["T1", 2] < mean["T1", 1] < rest["T1"]


def test_files_suit_the_preset(tmp_path):
    write_phantom_brain(tmp_path, 4, seed=2)
    content = json.loads((tmp_path / "dataset.json").read_text())
    preset = get_preset("phantom_brain")
    assert tuple(content["modality"].values()) == preset.channels == CHANNELS
    assert preset.labels == {value: name for name, value in LABELS.items() if value}
    assert preset.spacing == SPACING
    image = nib.load(tmp_path / content["training"][0]["image"])
    np.testing.assert_array_equal(np.asarray(image.dataobj), phantom_brain_case(2)[0])
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    check_scans(load_datalist(tmp_path, preset=preset), preset)
    kept = (tmp_path / "imagesTr" / "head_002.nii.gz").stat().st_mtime_ns
    write_phantom_brain(tmp_path, 4, seed=2)
    assert (tmp_path / "imagesTr" / "head_002.nii.gz").stat().st_mtime_ns == kept
