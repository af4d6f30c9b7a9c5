"""Synthetic scans with and without a lesion: deterministic, and different in one ball only."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmim.datasets import get_preset
from medmim.phantom import LABELS, SIZE, SPACING, phantom_case
from medmim.phantom_lesions import CLASSES, MARK, lesion_case, write_phantom_lesions
from medmim.scan_checks import check_scans
from medmim.splits import load_split
from tests.common import rows


@pytest.mark.parametrize("kind", CLASSES)
def test_same_seed_same_case(kind):
    case = lesion_case(3, kind)
    assert (case.shape, case.dtype) == (SIZE, np.int16)
    np.testing.assert_array_equal(case, lesion_case(3, kind))
    assert not np.array_equal(case, lesion_case(4, kind))


def test_without_a_lesion_it_is_the_phantom():
    np.testing.assert_array_equal(lesion_case(5, "normal"), phantom_case(5)[0])


@pytest.mark.parametrize("seed", range(3))
def test_classes_differ_inside_one_ball_in_the_liver_only(seed):
    image, label = phantom_case(seed)
    cyst, tumour = lesion_case(seed, "cyst"), lesion_case(seed, "tumour")
    changed = (cyst != image) | (tumour != image)
    places = np.argwhere(changed) * np.array(SPACING)
    centre = (places.min(axis=0) + places.max(axis=0)) / 2
    radii = (places.max(axis=0) - places.min(axis=0)) / 2
    assert all(15 - s <= radius < 22 for radius, s in zip(radii, SPACING, strict=True))
    distance = np.linalg.norm((np.indices(SIZE).reshape(3, -1).T * np.array(SPACING)) - centre, axis=1).reshape(SIZE)
    assert distance[changed].max() < max(radii) + max(SPACING)
    inner = distance < 0.7 * min(radii)
    assert changed[inner].mean() > 0.99  # a few voxels may be equal by chance
    assert (label[changed] == LABELS["liver"]).mean() > 0.9
    core, rim = distance < 0.4 * min(radii), changed & (distance > 0.8 * max(radii))
    assert -30 < np.median(cyst[core]) < 40  # water
    assert abs(np.median(cyst[rim]) - np.median(cyst[core])) < 25
    assert np.median(tumour[rim]) - np.median(tumour[core]) > 100  # enhances


@pytest.mark.parametrize("kind", ["Cyst", "", None, 1])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match=f"^kind must be normal or cyst or tumour, found {kind!r}$"):
        lesion_case(0, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four patients, six scans; a test leaves it as it was."""
    path = tmp_path_factory.mktemp("lesions") / "new"
    write_phantom_lesions(path, n_patients=4, seed=2)
    return path


def test_list(folder):
    listed = rows(folder / "labels.csv")
    patients = ["0", "0", "1", "2", "3", "3"]  # each third has two scans
    assert [row["patient"] for row in listed] == [f"patient000{number}" for number in patients]
    # one class for each patient, and several among those with two scans
    assert [row["label"] for row in listed] == ["normal", "normal", "cyst", "tumour", "cyst", "cyst"]
    assert {row["source"] for row in listed} == {MARK}
    assert {path.name for path in folder.iterdir()} == {"images", "labels.csv"}
    assert sorted(row["image"] for row in listed) == sorted(f"images/{p.name}" for p in (folder / "images").iterdir())


def test_scans_are_what_the_list_says(folder):
    seen = set()
    for row in rows(folder / "labels.csv"):
        number, visit = int(row["patient"][-4:]), int(row["image"][-8])
        image = nib.load(folder / row["image"])
        voxels = np.asarray(image.dataobj)
        if number in (0, 2):
            np.testing.assert_array_equal(voxels, lesion_case(2 + 10 * number + visit, row["label"]))
        seen.add(voxels.tobytes())
        assert image.header.get_zooms() == pytest.approx(SPACING)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_allclose(image.affine @ [*[(n - 1) / 2 for n in SIZE], 1], [0, 0, 0, 1])
    assert len(seen) == 6


def test_it_suits_its_preset(folder):
    preset = get_preset("phantom_ct")
    assert preset.classification.classes == CLASSES
    split = load_split(folder, preset, folds=2)
    check_scans(split, preset)
    patients = [{item["patient"] for item in items} for items in (split.training, split.validation)]
    assert patients[0] | patients[1] == {f"patient000{number}" for number in range(4)}
    assert not patients[0] & patients[1]
    (folder / "labels.csv").rename(folder / "other.csv")  # the preset finds patients in the names, too
    try:
        unlabelled = load_split(folder, preset, labelled=False, folds=4)
    finally:
        (folder / "other.csv").rename(folder / "labels.csv")
    assert len(unlabelled.training) + len(unlabelled.validation) == 6
    held = {Path(item["image"]).name[:11] for item in unlabelled.validation}
    assert len(held) == 1
    assert not any(Path(item["image"]).name[:11] in held for item in unlabelled.training)
