"""The phantom: deterministic, anatomy-like, in Decathlon layout."""

import json

import nibabel as nib
import numpy as np
import pytest

from medmim.datalists import load_datalist
from medmim.phantom import LABELS, SIZE, SPACING, phantom_case, write_phantom
from medmim.scan_checks import check_scans


@pytest.fixture(scope="module")
def case():
    return phantom_case(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom")
    write_phantom(path, n_cases=3, seed=5)
    return path


def test_same_seed_same_case(case):
    again = phantom_case(0)
    assert all(np.array_equal(a, b) for a, b in zip(case, again, strict=True))
    other = phantom_case(1)
    assert not np.array_equal(case[0], other[0])
    assert not np.array_equal(case[1], other[1])


def test_types_and_sizes(case):
    image, label = case
    assert image.shape == label.shape == SIZE
    assert image.dtype == np.int16
    assert label.dtype == np.uint8
    assert image.min() >= -1024


@pytest.mark.parametrize("seed", range(3))
def test_every_organ_is_there_with_its_intensity(seed):
    image, label = phantom_case(seed)
    assert sorted(np.unique(label)) == sorted(LABELS.values())
    ranges = {"liver": (75, 130), "spleen": (85, 140), "left kidney": (115, 195), "right kidney": (115, 195)}
    for name, (low, high) in ranges.items():
        assert (label == LABELS[name]).sum() > 300
        assert low < np.median(image[label == LABELS[name]]) < high
    assert np.median(image[:3, :3]) < -900
    assert image[label == 1].std() > 10


def test_organs_lie_on_their_side(case):
    """Axes are RAS: the first one grows to the right of the patient."""
    middle = (SIZE[0] - 1) / 2
    place = {name: np.argwhere(case[1] == value)[:, 0].mean() for name, value in LABELS.items() if value}
    assert place["liver"] > middle
    assert place["right kidney"] > middle
    assert place["spleen"] < middle
    assert place["left kidney"] < middle


def test_files_are_nifti_with_spacing_on_one_grid(folder):
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == len(content["training"]) == 3
    assert {name: int(value) for value, name in content["labels"].items()} == LABELS
    for number, entry in enumerate(content["training"]):
        image, label = nib.load(folder / entry["image"]), nib.load(folder / entry["label"])
        assert image.shape == label.shape == SIZE
        assert image.header.get_zooms() == pytest.approx(SPACING)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(image.affine, label.affine)
        expected = phantom_case(5 + number)
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected[0])
        np.testing.assert_array_equal(np.asarray(label.dataobj), expected[1])


def test_it_suits_its_preset(folder, preset):
    assert preset.labels == {value: name for name, value in LABELS.items() if value}
    split = load_datalist(folder, folds=3)
    assert len(split.training) == 2
    check_scans(split, preset)
