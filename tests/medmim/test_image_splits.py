"""Splits of radiographs: by patient, each class in proportion, and alike whoever asks for them."""

import csv
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medmim.datasets import Preset
from medmim.image_lists import load_image_list

PARTS = ("training", "validation", "test")
BODY = {"channels": ["X-ray"], "roi_size": [8, 8], "patch_size": 4, "z_score": "all"}


def preset(task: str = "multiclass", classes: tuple = ("a", "b", "c"), **fields) -> Preset:
    return Preset.from_dict("own", BODY | {"classification": {"task": task, "classes": list(classes), **fields}})


def names(items: list) -> list[str]:
    return [Path(item["image"]).name for item in items]


def split_names(split) -> list[list[str]]:
    return [sorted(names(getattr(split, part))) for part in PARTS]


@pytest.fixture
def make(tmp_path):
    """Makes images and their list: a row ``(label, patient)`` or ``(label, patient, split)`` for each image."""

    def write(rows: list, shuffle: int | None = None) -> Path:
        lines = [[f"{i:03d}.png", *row] for i, row in enumerate(rows)]
        for name, *_ in lines:
            if not (tmp_path / name).is_file():
                (tmp_path / name).write_text(name)
        order = range(len(lines)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(lines))
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            columns = ["image", "label", "patient", "split"][: max(map(len, lines))]
            csv.writer(file).writerows([columns, *[lines[i] for i in order]])
        return tmp_path

    return write


def random_rows(seed: int, task: str, n: int = 60) -> list[tuple[str, str]]:
    """Labels at random; patients of one to many images, some images without a patient."""
    random = np.random.default_rng(seed)
    labels = ["a", "b", "c"] if task == "multiclass" else ["a", "b|c", "c", "No Finding"]
    patients = random.geometric(0.08, n)
    return [(str(random.choice(labels)), f"p{p}" if p % 9 else "") for p in patients]


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_patients_stay_together_and_every_image_is_somewhere(make, task):
    for seed in range(12):
        rows = random_rows(seed, task)
        root = make(rows)
        split = load_image_list(root, preset(task), fold=seed % 4, folds=4, test_fold=(seed + 1) % 4, split_seed=seed)
        assert sorted(name for part in split_names(split) for name in part) == [f"{i:03d}.png" for i in range(60)]
        where = {name: part for part in PARTS for name in names(getattr(split, part))}
        for patient in {patient for _, patient in rows if patient}:
            of_patient = {where[f"{i:03d}.png"] for i, row in enumerate(rows) if row[1] == patient}
            assert len(of_patient) == 1


def test_the_patient_may_stand_in_the_name(tmp_path):
    for i in range(30):
        (tmp_path / f"case{i % 10}_{i}.png").write_text(str(i))
    own = preset(patterns={"a": "case[0-3]", "b": "case[4-6]", "c": "case[7-9]"}, patient_pattern=r"(case\d)_")
    split = load_image_list(tmp_path, own)
    held = {name.split("_")[0] for name in names(split.validation)}
    assert len(held) == 2
    assert not held & {item["patient"] for item in split.training}


def test_the_patient_may_stand_in_the_path_below_the_folder(tmp_path):
    """The name comes first; what stands above the folder is nobody's patient."""
    root = tmp_path / "case9_" / "data"
    for i in range(20):
        path = root / f"case{i % 4}_x" / ("case7_z.nii" if i == 19 else f"{i}.nii")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(i))
    (root / "0.nii").write_text("alone")
    body = BODY | {"roi_size": [16, 16, 16]}
    own = {"task": "multiclass", "classes": ["a", "b"], "patterns": {"a": "case[02]", "b": "case[13]|^0"}}
    own |= {"patient_pattern": r"(case\d)_"}
    split = load_image_list(root, Preset.from_dict("own", body | {"classification": own}), folds=3)
    found = {Path(item["image"]).relative_to(root).as_posix(): item["patient"] for item in split.training}
    found |= {Path(item["image"]).relative_to(root).as_posix(): item["patient"] for item in split.validation}
    expected = {f"case{i % 4}_x/{i}.nii": f"case{i % 4}" for i in range(19)}
    assert found == expected | {"case3_x/case7_z.nii": "case7", "0.nii": str(root / "0.nii")}
    held = {item["patient"] for item in split.validation}
    assert held
    assert not held & {item["patient"] for item in split.training}


@pytest.mark.parametrize("absolute", [True, False])
def test_a_list_may_name_files_outside_the_folder(tmp_path, absolute):
    (tmp_path / "data").mkdir()
    (tmp_path / "case7_").mkdir()
    outside = str(tmp_path / "case7_") if absolute else "../case7_"
    lines = ["image,label", *[f"{outside}/{'case' * (i > 1)}{i // 2}_{i}.nii,{'ab'[i % 2]}" for i in range(8)]]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines))
    for i in range(8):
        (tmp_path / "case7_" / f"{'case' * (i > 1)}{i // 2}_{i}.nii").write_text(str(i))
    own = {"task": "multiclass", "classes": ["a", "b"], "patient_pattern": r"(case\d)_"}
    split = load_image_list(
        tmp_path / "data", Preset.from_dict("own", BODY | {"roi_size": [16, 16, 16], "classification": own}), folds=4
    )
    patients = [item["patient"] for item in split.training + split.validation]
    assert sorted(patients) == sorted(["case1", "case2", "case3", "case7"] * 2)


def test_copies_of_a_volume_stay_together(tmp_path):
    """Gzip's header and the first bytes are often alike: the whole content counts."""
    for i in range(12):
        path = tmp_path / "ab"[i % 2] / f"p{i}" / "scan.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"\x1f\x8b" * 40000 + bytes([i % 6]))
    own = {"task": "multiclass", "classes": ["a", "b"], "patient_pattern": "(p[0-9]+)/"}
    preset = Preset.from_dict("own", BODY | {"roi_size": [16, 16, 16], "classification": own})
    held = {item["patient"] for item in load_image_list(tmp_path, preset, folds=3).validation}
    assert len(held) == 4
    assert all((f"p{i}" in held) == (f"p{i + 6}" in held) for i in range(6))


def test_names_without_a_patient_are_patients_of_their_own(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_text(str(i))
    own = preset(patterns={"a": "[0-4]\\.", "b": "[5-8]\\.", "c": "9\\."}, patient_pattern="(case)?")
    split = load_image_list(tmp_path, own)
    assert len(split.training) == 8
    assert all(item["patient"] == item["image"] for item in split.training)


def test_copies_of_a_file_stay_together_across_patients(make):
    rows = [("a" if i % 2 else "b", f"p{i}") for i in range(40)]
    root = make(rows)
    pairs = [(i, i + 20) for i in range(20)]
    for i, j in pairs:
        (root / f"{j:03d}.png").write_bytes((root / f"{i:03d}.png").read_bytes())
    for seed in range(5):
        held = set(names(load_image_list(root, preset(), split_seed=seed).validation))
        assert len(held) == 8
        assert all((f"{i:03d}.png" in held) == (f"{j:03d}.png" in held) for i, j in pairs)


def test_patients_and_copies_tie_in_a_chain(make):
    root = make([("a", "p1"), ("a", "p1"), ("b", "p2"), ("b", "p2"), *[("c", f"q{i}") for i in range(6)]])
    (root / "002.png").write_bytes((root / "001.png").read_bytes())  # of both patients
    for fold in range(3):
        held = set(names(load_image_list(root, preset(), fold=fold, folds=3).validation))
        assert len(held & {f"00{i}.png" for i in range(4)}) in (0, 4)


@pytest.mark.parametrize("seed", range(4))
def test_each_part_has_its_share_of_each_class(make, seed):
    counts = {"a": 50, "b": 20, "c": 5}
    root = make([(label, "") for label, n in counts.items() for _ in range(n)])
    held = []
    for fold in range(5):
        split = load_image_list(root, preset(), fold=fold, test_fold=(fold + 1) % 5, split_seed=seed)
        for part, share in (("validation", 1), ("test", 1), ("training", 3)):
            found = Counter("abc"[item["label"].index(1)] for item in getattr(split, part))
            assert found == {label: share * n // 5 for label, n in counts.items()}
        held += names(split.validation)
    assert len(set(held)) == len(held) == 75


def test_neither_the_order_of_lines_nor_the_folder_matters(make, tmp_path):
    rows = random_rows(5, "multilabel")
    expected = load_image_list(make(rows), preset("multilabel"), test_fold=3)
    for shuffle in range(3):
        assert load_image_list(make(rows, shuffle), preset("multilabel"), test_fold=3) == expected
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "_moved"))
    found = load_image_list(moved, preset("multilabel"), test_fold=3)
    assert names(found.training) == names(expected.training)
    assert split_names(found) == split_names(expected)


def test_pretraining_and_classification_split_alike(make):
    rows = random_rows(7, "multilabel")
    rows[3] = ("d", "")  # a label that only classification refuses
    root = make(rows)
    with pytest.raises(ValueError, match="label 'd'"):
        load_image_list(root, preset("multilabel"))
    make([("a", ""), *rows[1:3], ("c", ""), *rows[4:]])
    for fold in range(5):
        knobs = {"fold": fold, "test_fold": (fold + 2) % 5, "split_seed": fold}
        labelled = load_image_list(root, preset("multilabel"), **knobs)
        unlabelled = load_image_list(root, preset("multilabel"), labelled=False, **knobs)
        assert split_names(labelled) == split_names(unlabelled)
        assert all(set(item) == {"image"} for item in unlabelled.training + unlabelled.validation + unlabelled.test)


def test_pretraining_takes_images_of_which_no_label_is_known(make):
    root = make([("d", "") for _ in range(10)])
    assert len(load_image_list(root, preset("multilabel"), labelled=False).training) == 8


def test_another_seed_is_another_split(make):
    root = make(random_rows(1, "multiclass"))
    splits = [split_names(load_image_list(root, preset(), split_seed=seed)) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_a_share_of_the_labels(make):
    counts = {"a": 50, "b": 25, "c": 5}  # of which four fifths are for training
    root = make([(label, "") for label, n in counts.items() for _ in range(n)])
    whole = load_image_list(root, preset())
    before: list[str] = []
    for fraction, n in ((0.001, 1), (0.05, 4), (0.1, 7), (0.25, 16), (0.5, 32), (0.75, 48), (1.0, 64)):
        split = load_image_list(root, preset(), label_fraction=fraction)
        assert len(split.training) == n
        assert names(split.training)[: len(before)] == before
        assert split.validation == whole.validation
        found = Counter("abc"[item["label"].index(1)] for item in split.training)
        assert all(abs(found[label] - 0.8 * n * counts[label] / 64) <= 1 for label in counts)
        before = names(split.training)


def test_a_list_that_names_test_images_has_the_rest_dealt(make):
    root = make([("abc"[i % 3], "", "test" if i < 6 else "") for i in range(36)])
    split = load_image_list(root, preset())
    assert sorted(names(split.test)) == [f"00{i}.png" for i in range(6)]
    assert (len(split.training), len(split.validation)) == (24, 6)
    with pytest.raises(ValueError, match=rf"^--test_fold 1: {root} names 6 test images: leave it away$"):
        load_image_list(root, preset(), test_fold=1)


def test_patients_that_a_list_itself_splits_are_told(make, caplog):
    root = make([("abc"[i % 3], f"p{i // 2}", "train" if i < 7 else "val") for i in range(12)])
    (root / "011.png").write_bytes((root / "000.png").read_bytes())
    with caplog.at_level(logging.WARNING, "medmim"):
        split = load_image_list(root, preset())
    assert len(split.validation) == 5
    assert [record.getMessage() for record in caplog.records] == [
        "1 patients stand in two parts of the split, for example p3 in training and validation: scores will flatter",
        f"1 files and their copies stand in two parts of the split, for example {root}/000.png in training and "
        "validation: scores will flatter",
    ]


def test_a_split_of_ones_own_without_shared_patients_warns_of_nothing(make, caplog):
    root = make([("abc"[i % 3], f"p{i}", "train" if i < 7 else "val") for i in range(12)])
    with caplog.at_level(logging.WARNING, "medmim"):
        load_image_list(root, preset())
    assert not caplog.records


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"fold": 2, "test_fold": 2}, "--test_fold 2: the same part as --fold, which is for validation: take another"),
        ({"fold": 5}, "--fold 5 of --folds 5: fold must lie in 0 … folds - 1"),
        ({"fold": -1}, "--fold -1 of --folds 5: fold must lie in 0 … folds - 1"),
        ({"test_fold": 5}, "--test_fold 5 of --folds 5: test_fold must lie in 0 … folds - 1"),
    ],
)
def test_folds_that_are_none(make, knobs, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_image_list(make(random_rows(0, "multiclass")), preset(), **knobs)


def test_too_few_patients(make):
    root = make([("a", "p1"), ("b", "p1"), ("c", "p1")])
    expected = f"^--dataset_dir {root}: 3 images leave 0 for training and 3 for validation with --fold 0 of --folds 5: "
    with pytest.raises(ValueError, match=expected):
        load_image_list(root, preset())
    with pytest.raises(ValueError, match="3 images leave 3 for training and 0 for validation with --fold 1"):
        load_image_list(root, preset(), fold=1)


def listed_with_splits(tmp_path, rows):
    """Images ``name, patient, split``, all of one class in turn."""
    for name, _, _ in rows:
        (tmp_path / name).write_text(name)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        lines = [[name, "ab"[i % 2], patient, split] for i, (name, patient, split) in enumerate(rows)]
        csv.writer(file).writerows([["image", "label", "patient", "split"], *lines])
    return tmp_path


def test_other_images_of_a_listed_patient_follow(tmp_path, caplog):
    rows = [("a0.png", "a", "test"), ("a1.png", "a", ""), ("b0.png", "b", "val"), ("b1.png", "b", "")]
    rows += [(f"c{i}.png", f"c{i}", "") for i in range(4)]
    found = load_image_list(listed_with_splits(tmp_path, rows), preset())
    assert set(names(found.test)) == {"a0.png", "a1.png"}
    assert set(names(found.validation)) == {"b0.png", "b1.png"}
    assert set(names(found.training)) == {f"c{i}.png" for i in range(4)}
    assert "stand in two parts" not in caplog.text


@pytest.mark.parametrize("test_fold", [None, 1])
def test_images_listed_for_training_stay_there(tmp_path, test_fold):
    rows = [(f"t{i}.png", f"t{i}", "train") for i in range(6)] + [(f"o{i}.png", f"o{i}", "") for i in range(10)]
    found = load_image_list(listed_with_splits(tmp_path, rows), preset(), test_fold=test_fold)
    assert {f"t{i}.png" for i in range(6)} <= set(names(found.training))
    assert len(found.validation) == 2
    assert len(found.test) == (0 if test_fold is None else 2)


def test_a_list_of_training_images_only_is_dealt(tmp_path):
    rows = [(f"t{i}.png", f"t{i}", "train") for i in range(10)]
    found = load_image_list(listed_with_splits(tmp_path, rows), preset())
    assert (len(found.training), len(found.validation)) == (8, 2)


def test_no_part_is_left_for_training(make):
    root = make([(name, f"p{number}") for number, name in enumerate("abcabcab")])
    message = (
        f"--dataset_dir {root}: 8 images leave 0 for training and 4 for validation with --fold 0 of --folds 2 and 4 "
        "for testing with --test_fold 1: add images or patients, or raise folds"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_image_list(root, preset(), folds=2, test_fold=1)


def test_images_without_a_label_leave_the_others_where_they_are(tmp_path):
    """Pre-training may see more images than fine-tuning has labels for: what is kept apart stays apart."""
    lines = [[f"{i}.png", "a" if i % 3 else "b"] for i in range(30)]
    for name, _ in lines:
        (tmp_path / name).write_text(name)
    own = preset()
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *lines])
    labelled = load_image_list(tmp_path, own, test_fold=1)
    for extra in (1, 2, 7):
        for i in range(extra):
            (tmp_path / f"u{i}.png").write_text(f"u{i}")
        with (tmp_path / "all.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "label"], *lines, *[[f"u{i}.png", ""] for i in range(extra)]])
        whole = load_image_list(tmp_path, own, tmp_path / "all.csv", labelled=False, test_fold=1)
        assert set(names(labelled.test)) <= set(names(whole.test))
        assert set(names(labelled.validation)) <= set(names(whole.validation))
