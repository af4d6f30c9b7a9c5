"""Reading every scan before a run: scans with a list of numbers or a map as label, in each part of a split."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmim import scan_checks
from medmim.datalists import Datalist
from medmim.datasets import Preset
from medmim.scan_checks import check_scans
from medmim.transforms import ScanError

BODY = {"channels": ["CT"], "roi_size": [16, 16, 16], "patch_size": 16, "labels": {1: "organ"}}
PRESET = Preset.from_dict("own", BODY | {"window": [0, 1]})
RANGE = Preset.from_dict("own", BODY | {"min_max": True})


@pytest.fixture
def scan(tmp_path):
    """Writes a scan of small random voxels, or those given: ``scan("a", voxels)`` is its path."""

    def make(name: str, voxels: np.ndarray | None = None) -> str:
        voxels = np.random.default_rng(0).random((4, 5, 6)) if voxels is None else voxels
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii")
        return str(tmp_path / f"{name}.nii")

    return make


@pytest.fixture
def classified(scan) -> Datalist:
    """Labels as a classification has them."""
    items = [{"image": scan(name), "label": [0.0, float("nan")], "patient": "p"} for name in "abcd"]
    return Datalist(items[:2], items[2:3], items[3:])


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read from now on."""
    read, load = [], scan_checks.load_scan
    monkeypatch.setattr(scan_checks, "load_scan", lambda path: read.append(Path(path).name) or load(path))
    return read


def test_scans_with_classes_need_no_foreground(classified, caplog, reads):
    check_scans(classified, PRESET)
    check_scans(classified, RANGE)
    assert sorted(reads) == sorted([f"{name}.nii" for name in "abcd"] * 2)
    assert caplog.text == ""
    check_scans(classified.test, PRESET)
    assert reads[8:] == ["d.nii"]


def test_scans_with_classes_are_remembered(classified, tmp_path, reads):
    remember = tmp_path / "checked.json"
    check_scans(classified, RANGE, remember)
    reads.clear()
    check_scans(classified, RANGE, remember)
    classified.training[0]["label"] = [1.0, 0.0]  # corrected, which changes no file
    check_scans(classified, RANGE, remember)
    assert reads == []
    check_scans(classified, PRESET, remember)  # another rule for intensities
    assert len(reads) == 4


@pytest.mark.parametrize("part", ["training", "validation", "test"])
@pytest.mark.parametrize("preset", [PRESET, RANGE], ids=["window", "range"])
def test_a_faulty_scan_in_any_part_is_told(classified, scan, part, preset):
    path = getattr(classified, part)[0]["image"]
    scan(Path(path).stem, np.full((4, 5, 6), 0.5))
    with pytest.raises(ScanError, match=rf"^{path}: constant image, each voxel is 0\.5: remove the file$"):
        check_scans(classified, preset)
    Path(path).write_bytes(b"")
    with pytest.raises(ScanError, match=f"^{path}: not readable .*Empty file"):
        check_scans(classified, preset)


def test_a_range_has_no_window_to_lie_outside_of(scan):
    item = {"image": scan("high", np.random.default_rng(0).uniform(5, 6, (4, 5, 6))), "label": [1.0]}
    check_scans([item], RANGE)
    with pytest.raises(ScanError, match=r"constant image after the preset's window \[0, 1\]"):
        check_scans([item], PRESET)


def test_small_scans_in_any_part_are_told(classified, scan, caplog):
    scan("d", np.random.default_rng(0).random((4, 4, 6)))
    with caplog.at_level(logging.WARNING, "medmim"):
        check_scans(classified, PRESET, roi_size=(4, 5, 6))
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 scans are smaller than a crop of (4, 5, 6) voxels and will be padded, for example "
        f"{classified.test[0]['image']}: about (4, 4, 6) voxels"
    ]


def test_only_label_maps_for_training_can_teach(scan, caplog):
    """Foreground in those for validation and testing is of no use."""
    empty, full = np.zeros((4, 5, 6)), np.ones((4, 5, 6))
    a, b, c = ({"image": scan(name), "label": scan(f"label_{name}", empty)} for name in "abc")
    scan("label_b", full)
    scan("label_c", full)
    with pytest.raises(ValueError, match=rf"^{a['label']}: no foreground, as in all 1 label maps for training"):
        check_scans(Datalist([a], [b], [c]), PRESET)
    with caplog.at_level(logging.WARNING, "medmim"):
        check_scans(Datalist([b], [c], [a]), PRESET)
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 3 label maps have no foreground, for example {a['label']}"
    ]
