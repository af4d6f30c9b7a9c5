"""Scores of cubes, against values by hand and against distances between all pairs of surface voxels."""

import csv
import math
from itertools import product

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from monai.data import MetaTensor

from medmim.metrics import COLUMNS, SegmentationScores, case_mean

SPACING = (1.0, 2.0, 3.0)
LABELS = {2: "box", 1: "cube"}


def scan(boxes, size=(20, 20, 20), spacing=SPACING, name="a.nii"):
    """Class map with boxes ``(value, start, stop)``, later ones on top."""
    array = torch.zeros(1, *size)
    for value, start, stop in boxes:
        array[(0, *[slice(a, b) for a, b in zip(start, stop, strict=True)])] = value
    affine = torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))], dtype=torch.float64))
    return MetaTensor(array, affine=affine, meta={"filename_or_obj": name})


def score(prediction, reference, labels=LABELS, tolerance=3.0):
    scores = SegmentationScores(labels, tolerance)
    scores.update(([prediction], [reference]))
    return {row["class"]: row for row in scores.rows}, scores


CUBE = (1, (4, 4, 4), (12, 12, 12))


def surface(mask, spacing):
    """Places in mm of the voxels that have a neighbour (sharing a face) outside."""
    places = []
    for voxel in np.argwhere(mask):
        for axis, step in product(range(mask.ndim), (-1, 1)):
            neighbour = voxel.copy()
            neighbour[axis] += step
            outside = neighbour[axis] < 0 or neighbour[axis] >= mask.shape[axis]
            if outside or not mask[tuple(neighbour)]:
                places.append(voxel * np.array(spacing))
                break
    return np.array(places)


def naive_scores(found, truth, spacing, tolerance):
    a, b = surface(found, spacing), surface(truth, spacing)
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    there, back = distance.min(1), distance.min(0)
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    within = (there <= tolerance).sum() + (back <= tolerance).sum()
    return dice, max(np.percentile(there, 95), np.percentile(back, 95)), within / (len(a) + len(b))


def test_perfect_prediction():
    rows, scores = score(scan([CUBE]), scan([CUBE]), {1: "cube"})
    expected = {"case": "a.nii", "class": "cube", "dice": 1.0, "hd95_mm": 0.0, "surface_dice": 1.0}
    assert rows["cube"] == expected | {"reference_ml": 512 * 6 / 1000, "predicted_ml": 512 * 6 / 1000}
    assert scores.compute() == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2])
def test_shifted_cube_is_scored_in_mm(axis, shift):
    start, stop = [4, 4, 4], [12, 12, 12]
    start[axis] += shift
    stop[axis] += shift
    away = shift * SPACING[axis]
    row = score(scan([(1, start, stop)]), scan([CUBE]), {1: "cube"}, tolerance=away)[0]["cube"]
    assert row["dice"] == pytest.approx((8 - shift) / 8)
    assert row["hd95_mm"] == pytest.approx(away)
    assert row["surface_dice"] == 1
    row = score(scan([(1, start, stop)]), scan([CUBE]), {1: "cube"}, tolerance=away - 0.01)[0]["cube"]
    assert row["surface_dice"] < 0.9


@pytest.mark.parametrize("size", [(14, 9, 11), (16, 13)])
@pytest.mark.parametrize("tolerance", [1.0, 2.5])
def test_random_shapes_equal_all_pairs_of_surface_voxels(size, tolerance):
    rng = np.random.default_rng(len(size))
    spacing = SPACING[: len(size)]

    def blob():
        grid = np.indices(size)
        centre = [n * rng.uniform(0.35, 0.65) for n in size]
        radius = [n * rng.uniform(0.2, 0.45) for n in size]
        return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True)) < 1

    found, truth = blob(), blob()
    prediction, reference = scan([], size, spacing), scan([], size, spacing)
    prediction[0][torch.from_numpy(found)] = 1
    reference[0][torch.from_numpy(truth)] = 1
    row = score(prediction, reference, {1: "blob"}, tolerance)[0]["blob"]
    expected = naive_scores(found, truth, spacing, tolerance)
    assert (row["dice"], row["hd95_mm"], row["surface_dice"]) == pytest.approx(expected, rel=1e-5)


def test_spacing_comes_from_a_rotated_affine():
    prediction, reference = scan([(1, (4, 4, 5), (12, 12, 13))]), scan([CUBE])
    rotation = torch.tensor([[0, -1, 0, 5], [0, 0, 1, 7], [-1, 0, 0, 9], [0, 0, 0, 1]], dtype=torch.float64)
    reference.affine = rotation @ reference.affine
    assert score(prediction, reference, {1: "cube"})[0]["cube"]["hd95_mm"] == pytest.approx(3)


def test_class_that_neither_holds_is_left_out():
    rows, scores = score(scan([CUBE]), scan([CUBE]))
    assert math.isnan(rows["box"]["dice"])
    assert math.isnan(rows["box"]["hd95_mm"])
    assert math.isnan(rows["box"]["surface_dice"])
    assert scores.compute() == 1
    summary = scores.summary()
    assert summary["mean_dice"] == summary["mean_surface_dice"] == summary["dice cube"] == 1
    assert summary["mean_hd95_mm"] == 0
    assert math.isnan(summary["dice box"])


@pytest.mark.parametrize("in_prediction", [True, False])
def test_class_that_only_one_holds_counts_as_wrong(in_prediction):
    both, one = scan([CUBE, (2, (15, 15, 15), (17, 17, 17))]), scan([CUBE])
    rows, scores = score(both, one) if in_prediction else score(one, both)
    assert rows["box"]["dice"] == 0
    assert rows["box"]["surface_dice"] == 0
    assert rows["box"]["hd95_mm"] == pytest.approx(math.hypot(20, 40, 60))
    volume = 8 * 6 / 1000
    assert (rows["box"]["predicted_ml"], rows["box"]["reference_ml"]) == ((volume, 0) if in_prediction else (0, volume))
    assert scores.compute() == pytest.approx(0.5)


def test_background_and_unnamed_values_do_not_count():
    rows, _ = score(scan([CUBE, (7, (0, 0, 0), (3, 3, 3))]), scan([CUBE]), {1: "cube"})
    assert list(rows) == ["cube"]
    assert rows["cube"]["dice"] == 1


def test_dice_alone_leaves_distances_empty():
    rows, scores = score(scan([CUBE]), scan([CUBE]), {1: "cube"}, tolerance=None)
    assert rows["cube"]["hd95_mm"] == rows["cube"]["surface_dice"] == ""
    assert scores.summary() == {"mean_dice": 1.0, "dice cube": 1.0}
    rows, scores = score(scan([CUBE]), scan([CUBE]), tolerance=None)
    assert rows["box"]["hd95_mm"] == ""
    assert scores.compute() == 1


def test_mean_is_over_classes_first_then_over_cases():
    scores = SegmentationScores(LABELS)
    small = (2, (15, 15, 15), (17, 17, 17))
    first = scan([CUBE, small], name="a.nii")
    second = scan([CUBE], name="b.nii")
    scores.update(([scan([CUBE], name="a.nii")], [first]))  # cube 1, box 0: 0.5
    scores.update(([scan([(1, (4, 4, 8), (12, 12, 16))], name="b.nii")], [second]))  # cube 0.5, box in neither: 0.5
    scores.update(([scan([CUBE, small], name="c.nii")], [scan([CUBE, small], name="label_of_c.nii")]))  # 1
    assert scores.compute() == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert scores.summary()["dice cube"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores.summary()["dice box"] == pytest.approx((0 + 1) / 2)


REGIONS = {"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}
TUMOUR = {1: "necrosis", 2: "edema", 4: "rim"}
WHOLE, CORE, RIM = (2, (3, 3, 3), (13, 12, 11)), (1, (5, 5, 5), (10, 10, 10)), (4, (6, 6, 6), (9, 8, 9))


def score_regions(prediction, reference, tolerance=3.0):
    scores = SegmentationScores(TUMOUR, tolerance, regions=REGIONS)
    scores.update(([prediction], [reference]))
    return {row["class"]: row for row in scores.rows}, scores


def test_nested_regions_equal_all_pairs_of_surface_voxels():
    moved = [(value, [n + 1 for n in start], stop) for value, start, stop in (WHOLE, CORE, RIM)]
    prediction, reference = scan(moved), scan([WHOLE, CORE, RIM])
    rows, scores = score_regions(prediction, reference, tolerance=1.5)
    assert list(rows) == list(REGIONS)
    for name, inside in REGIONS.items():
        found, truth = (np.isin(one[0].numpy(), inside) for one in (prediction, reference))
        row = rows[name]
        expected = naive_scores(found, truth, SPACING, 1.5)
        assert (row["dice"], row["hd95_mm"], row["surface_dice"]) == pytest.approx(expected, rel=1e-5)
        assert row["reference_ml"] == pytest.approx(truth.sum() * 6 / 1000)
    assert scores.compute() == pytest.approx(np.mean([row["dice"] for row in rows.values()]))
    assert set(scores.summary()) == {
        "mean_dice", "mean_hd95_mm", "mean_surface_dice", "dice whole", "dice core", "dice enhancing"
    }  # fmt: skip


def test_region_that_neither_holds_is_right():
    rows, scores = score_regions(scan([WHOLE]), scan([WHOLE, CORE]))
    assert (rows["enhancing"]["dice"], rows["enhancing"]["hd95_mm"], rows["enhancing"]["surface_dice"]) == (1, 0, 1)
    assert rows["core"]["dice"] == 0
    assert scores.compute() == pytest.approx((1 + 0 + 1) / 3)
    fast = SegmentationScores(TUMOUR, regions=REGIONS)
    fast.update(([scan([])], [scan([])]))
    assert fast.compute() == 1
    assert {row["hd95_mm"] for row in fast.rows} == {""}


@pytest.mark.parametrize("missed", [True, False])
def test_region_that_only_one_holds(missed):
    pair = [scan([WHOLE, CORE]), scan([WHOLE, CORE, RIM])]
    row = score_regions(*(pair if missed else pair[::-1]))[0]["enhancing"]
    diagonal = math.dist((0, 0, 0), [20 * spacing for spacing in SPACING])
    assert (row["dice"], row["surface_dice"]) == (0, 0)
    assert row["hd95_mm"] == pytest.approx(diagonal)


def test_case_mean_of_rows():
    rows = [{"case": "a", "dice": 0.5}, {"case": "a", "dice": 1.0}, {"case": "b", "dice": 0.0}]
    assert case_mean(rows, "dice") == pytest.approx(0.375)
    nan = float("nan")
    assert case_mean([*rows, {"case": "b", "dice": nan}, {"case": "c", "dice": nan}], "dice") == pytest.approx(0.375)
    assert math.isnan(case_mean([{"case": "c", "dice": nan}], "dice"))


def test_csv(tmp_path):
    scores = SegmentationScores(LABELS, 3.0)
    scores.update(([scan([CUBE], name="b.nii"), scan([CUBE], name="a.nii")], [scan([CUBE]), scan([CUBE])]))
    scores.write_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(row["case"], row["class"]) for row in rows] == [
        ("a.nii", "cube"), ("a.nii", "box"), ("b.nii", "cube"), ("b.nii", "box")
    ]  # fmt: skip
    assert float(rows[0]["dice"]) == 1
    assert float(rows[0]["reference_ml"]) == pytest.approx(3.072)
    assert math.isnan(float(rows[1]["dice"]))


def test_attached_to_an_engine():
    batches = [[{"pred": scan([CUBE]), "label": scan([CUBE], name=f"{i}.nii")}] for i in range(3)]
    engine = Engine(lambda engine, batch: batch)
    SegmentationScores({1: "cube"}).attach(engine, "mean_dice")
    assert engine.run(batches).metrics["mean_dice"] == 1
    assert engine.run(batches).metrics["mean_dice"] == 1


def test_reset_forgets_and_nothing_cannot_be_scored():
    scores = score(scan([CUBE]), scan([CUBE]))[1]
    scores.reset()
    assert scores.rows == []
    with pytest.raises(NotComputableError, match="there was no case to score"):
        scores.compute()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"^a\.nii: prediction \(1, 20, 20, 19\), reference \(1, 20, 20, 20\)$"):
        score(scan([CUBE], (20, 20, 19)), scan([CUBE]))
