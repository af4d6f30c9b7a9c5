"""Lists of scans and their splits."""

import csv
import json
from pathlib import Path

import pytest

from medmim.datalists import Datalist, find_items, find_scans, load_datalist


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(items: list) -> list[str]:
    return [Path(item["image"]).name for item in items]


@pytest.fixture
def decathlon(tmp_path):
    """Makes a folder in Decathlon layout with a dataset.json."""

    def make(n: int = 10, **content) -> Path:
        entries = [{"image": f"./imagesTr/c{i:02d}.nii.gz", "label": f"./labelsTr/c{i:02d}.nii.gz"} for i in range(n)]
        for entry in entries:
            touch(tmp_path / entry["image"], tmp_path / entry["label"])
        (tmp_path / "dataset.json").write_text(json.dumps({"training": entries} | content))
        return tmp_path

    return make


@pytest.fixture
def pairs(tmp_path):
    """Makes imagesTr and labelsTr without a list."""

    def make(n: int = 10) -> Path:
        for i in range(n):
            touch(tmp_path / "imagesTr" / f"c{i:02d}.nii.gz", tmp_path / "labelsTr" / f"c{i:02d}.nii.gz")
        return tmp_path

    return make


def write_csv(path: Path, columns: list, rows: list, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def test_find_scans_below_sorted_without_hidden_files(tmp_path):
    touch(tmp_path / "b.nii", tmp_path / "sub" / "deep" / "a.nii.gz", tmp_path / "a.nii.gz")
    touch(tmp_path / "._b.nii", tmp_path / "sub" / "._a.nii.gz", tmp_path / "notes.txt", tmp_path / "c.nii.gz.part")
    found = [path.relative_to(tmp_path).as_posix() for path in find_scans(tmp_path)]
    assert found == ["a.nii.gz", "b.nii", "sub/deep/a.nii.gz"]
    assert find_items(tmp_path)[0] == {"image": str(tmp_path / "a.nii.gz")}


def test_find_scans_refuses_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}/no: no such folder$"):
        find_scans(tmp_path / "no")
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}: no NIfTI file"):
        find_scans(tmp_path)


def test_decathlon_paths_are_absolute(decathlon):
    root = decathlon(10)
    split = load_datalist(root)
    assert len(split.training) == 8
    assert len(split.validation) == 2
    for item in split.training + split.validation:
        assert set(item) == {"image", "label"}
        assert Path(item["image"]).is_file()
        assert Path(item["label"]).is_file()
        assert Path(item["image"]).name == Path(item["label"]).name
        assert "imagesTr" in item["image"]
        assert "labelsTr" in item["label"]


def test_labels_are_neither_read_nor_looked_for_in_pretraining(decathlon):
    root = decathlon(10)
    for path in (root / "labelsTr").iterdir():
        path.unlink()
    split = load_datalist(root, labelled=False)
    assert all(set(item) == {"image"} for item in split.training + split.validation)


def test_pretraining_and_segmentation_split_alike(decathlon, tmp_path):
    root = decathlon(23)
    for fold in range(5):
        assert names(load_datalist(root, fold=fold).validation) == names(
            load_datalist(root, labelled=False, fold=fold).validation
        )


def test_json_of_ones_own_with_bare_file_names(decathlon, tmp_path):
    root = decathlon(4)
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"training": [f"imagesTr/c{i:02d}.nii.gz" for i in range(3)]}))
    split = load_datalist(root, path, labelled=False, folds=3)
    assert sorted(names(split.training + split.validation)) == ["c00.nii.gz", "c01.nii.gz", "c02.nii.gz"]


def test_validation_key_is_the_split(decathlon):
    root = decathlon(6)
    entries = json.loads((root / "dataset.json").read_text())["training"]
    root = decathlon(6, training=entries[:4], validation=entries[4:])
    for fold in (0, 1):
        split = load_datalist(root, fold=fold)
        assert names(split.validation) == ["c04.nii.gz", "c05.nii.gz"]
        assert sorted(names(split.training)) == [f"c0{i}.nii.gz" for i in range(4)]


def test_fold_key_is_the_split(decathlon):
    root = decathlon(6)
    entries = json.loads((root / "dataset.json").read_text())["training"]
    entries = [entry | {"fold": i % 3} for i, entry in enumerate(entries)]
    root = decathlon(6, training=entries)
    split = load_datalist(root, fold=1, folds=3)
    assert names(split.validation) == ["c01.nii.gz", "c04.nii.gz"]
    assert sorted(names(split.training)) == ["c00.nii.gz", "c02.nii.gz", "c03.nii.gz", "c05.nii.gz"]


def test_no_validation_is_no_fault(decathlon):
    assert len(load_datalist(decathlon(10, validation=None)).validation) == 2


@pytest.mark.parametrize("fold", [None, "first"])
def test_faulty_fold_of_a_scan(decathlon, fold):
    root = decathlon(4)
    entries = json.loads((root / "dataset.json").read_text())["training"]
    entries = [entry | {"fold": i % 2} for i, entry in enumerate(entries)]
    entries[2] = {key: value for key, value in entries[2].items() if key != "fold"} | ({"fold": fold} if fold else {})
    with pytest.raises(ValueError, match=rf"c02\.nii\.gz: its fold is {fold!r}: number each scan, or none$"):
        load_datalist(decathlon(4, training=entries), folds=2)


def test_an_image_may_be_one_file_for_each_channel(tmp_path):
    entries = [{"image": [f"t1_{i}.nii", f"t2_{i}.nii"], "label": f"l_{i}.nii"} for i in range(4)]
    for entry in entries:
        touch(*[tmp_path / name for name in [*entry["image"], entry["label"]]])
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    item = load_datalist(tmp_path, folds=2).training[0]
    assert [Path(path).parent for path in item["image"]] == [tmp_path, tmp_path]
    (tmp_path / "t2_1.nii").unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}/t2_1.nii: no such file$"):
        load_datalist(tmp_path, folds=2)


def test_images_and_labels_in_two_folders(pairs):
    root = pairs(10)
    touch(root / "imagesTr" / "._c00.nii.gz")
    split = load_datalist(root)
    items = split.training + split.validation
    assert len(items) == 10
    assert all(item["label"] == item["image"].replace("imagesTr", "labelsTr") for item in items)


def test_any_folder_will_do_without_labels(tmp_path):
    touch(*[tmp_path / "site" / f"s{i}" / "scan.nii" for i in range(4)])
    split = load_datalist(tmp_path, labelled=False, folds=2)
    assert len(split.training) == len(split.validation) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(pairs, tmp_path, encoding):
    root = pairs(6)
    rows = [["x", f"imagesTr/c{i:02d}.nii.gz", f"labelsTr/c{i:02d}.nii.gz"] for i in range(6)]
    path = write_csv(tmp_path / "list.csv", ["id", "image", "label"], rows, encoding)
    split = load_datalist(root, path, folds=3)
    assert len(split.training) == 4
    assert all(set(item) == {"image", "label"} for item in split.training)
    path = write_csv(tmp_path / "images.csv", ["image"], [row[1:2] for row in rows], encoding)
    assert len(load_datalist(root, path, labelled=False, folds=3).validation) == 2


def test_csv_with_folds(pairs, tmp_path):
    root = pairs(6)
    rows = [[f"imagesTr/c{i:02d}.nii.gz", f"labelsTr/c{i:02d}.nii.gz", i // 3] for i in range(6)]
    path = write_csv(tmp_path / "list.csv", ["image", "label", "fold"], rows)
    split = load_datalist(root, path, fold=1, folds=2)
    assert names(split.validation) == ["c03.nii.gz", "c04.nii.gz", "c05.nii.gz"]


@pytest.mark.parametrize(("n", "folds"), [(10, 5), (23, 5), (7, 3), (5, 2)])
def test_folds_are_disjoint_complete_and_of_even_size(pairs, n, folds):
    root = pairs(n)
    parts = []
    for fold in range(folds):
        split = load_datalist(root, fold=fold, folds=folds)
        assert sorted(names(split.training + split.validation)) == [f"c{i:02d}.nii.gz" for i in range(n)]
        parts.append(names(split.validation))
    assert sorted(name for part in parts for name in part) == [f"c{i:02d}.nii.gz" for i in range(n)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_split_is_deterministic_and_shuffled(pairs):
    root = pairs(20)
    assert load_datalist(root) == load_datalist(root)
    assert load_datalist(root) != load_datalist(root, split_seed=1)
    assert names(load_datalist(root).training) != sorted(names(load_datalist(root).training))


def test_split_does_not_depend_on_the_place(pairs, tmp_path):
    first = pairs(12)
    second = first.rename(tmp_path.parent / f"{tmp_path.name}_moved")
    found = load_datalist(second)
    pairs(12)
    assert names(found.training) == names(load_datalist(first).training)
    assert names(found.validation) == names(load_datalist(first).validation)


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.1, 2), (0.25, 4), (0.5, 8), (0.55, 9), (1.0, 16), (0.001, 1), (3 / 16, 3)]
)
def test_label_fraction_rounds_up(pairs, fraction, count):
    assert len(load_datalist(pairs(20), label_fraction=fraction).training) == count


def test_smaller_fractions_are_subsets_of_larger_ones(pairs):
    root = pairs(40)
    for fold in (0, 3):
        whole = load_datalist(root, fold=fold)
        larger = names(whole.training)
        for fraction in (0.5, 0.25, 0.1):
            split = load_datalist(root, fold=fold, label_fraction=fraction)
            assert set(names(split.training)) < set(larger)
            assert split.validation == whole.validation
            larger = names(split.training)


def test_datalist_is_two_lists(decathlon):
    split = load_datalist(decathlon(10))
    assert isinstance(split, Datalist)
    assert names(split.validation) == sorted(names(split.validation))


@pytest.mark.parametrize("fraction", [0, -0.5, 1.1])
def test_faulty_fraction(pairs, fraction):
    with pytest.raises(ValueError, match=rf"^--label_fraction {fraction}: must lie in \(0, 1\]$"):
        load_datalist(pairs(), label_fraction=fraction)


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 1), (0, 0)])
def test_faulty_fold(pairs, fold, folds):
    with pytest.raises(ValueError, match=f"^--fold {fold} of --folds {folds}: fold must lie in 0"):
        load_datalist(pairs(), fold=fold, folds=folds)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}/no: no such folder$"):
        load_datalist(tmp_path / "no")


def test_missing_list(tmp_path):
    with pytest.raises(ValueError, match=f"^--datalist {tmp_path}/no.json: no such file$"):
        load_datalist(tmp_path, tmp_path / "no.json")


def test_folder_without_labels(tmp_path):
    touch(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"no dataset\.json, and no imagesTr with labelsTr: labels cannot be found"):
        load_datalist(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no NIfTI file"):
        load_datalist(tmp_path, labelled=False)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"test": []}', "5"])
def test_faulty_json(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json: expected a Decathlon list with the key 'training'"):
        load_datalist(tmp_path)


@pytest.mark.parametrize(
    ("content", "key"), [({"training": 5}, "training"), ({"training": ["a"], "validation": [1]}, "validation")]
)
def test_json_without_a_list_of_scans(tmp_path, content, key):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"dataset\.json: '{key}' must be a list of"):
        load_datalist(tmp_path, labelled=False)


def test_json_that_is_no_text(tmp_path):
    (tmp_path / "dataset.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="expected a Decathlon list"):
        load_datalist(tmp_path)


@pytest.mark.parametrize(
    ("entry", "missing"),
    [
        ({"label": "l.nii"}, "image"),
        ({"image": None}, "image"),
        ({"image": "a.nii"}, "label"),
        ({"image": "a.nii", "label": ""}, "label"),
        ("a.nii", "label"),
    ],
)
def test_entry_without_image_or_label(tmp_path, entry, missing):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
    with pytest.raises(ValueError, match=rf"dataset\.json: entry 0 of 'training' has no '{missing}'"):
        load_datalist(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "a.nii", "label": 5}, "label is 5, expected a file"),
        ({"image": "a.nii", "label": ["a.nii"]}, r"label is \['a.nii'\], expected a file"),
        (
            {"image": [["a.nii"], 1], "label": "a.nii"},
            r"image is \[\['a.nii'\], 1\], expected a file, or a list of files",
        ),
        (
            {"image": {"t1": "a.nii"}, "label": "a.nii"},
            r"image is {'t1': 'a.nii'}, expected a file, or a list of files",
        ),
        ({"image": ["a.nii", ""], "label": "a.nii"}, r"image is \['a.nii', ''\], expected a file, or a list of files"),
        ({"image": 7, "label": "a.nii"}, "image is 7, expected a file, or a list of files"),
    ],
)
def test_entry_of_another_type(tmp_path, entry, message):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": [entry]}))
    with pytest.raises(ValueError, match=f"^{path}: entry 0 of 'training': {message}"):
        load_datalist(tmp_path)


def test_empty_list(tmp_path):
    (tmp_path / "dataset.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="the list of training scans is empty"):
        load_datalist(tmp_path)


def test_too_few_scans(pairs):
    with pytest.raises(ValueError, match="1 scans leave 0 for training and 1 for validation with --fold 0 of --folds"):
        load_datalist(pairs(1))
    with pytest.raises(ValueError, match="1 scans leave 1 for training and 0 for validation with --fold 4 of"):
        load_datalist(pairs(1), fold=4)


def test_image_without_its_label(pairs):
    root = pairs(3)
    (root / "labelsTr" / "c01.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"imagesTr/c01\.nii\.gz: its label .*labelsTr/c01\.nii\.gz does not exist$"):
        load_datalist(root)


def test_missing_files_are_listed_up_to_five(decathlon):
    root = decathlon(8)
    for path in (root / "imagesTr").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"c00\.nii\.gz: no such file; .*; .*; .*; .*c04.*\(and 3 more\)$"):
        load_datalist(root)


@pytest.mark.parametrize(("columns", "column"), [(["label"], "image"), (["image"], "label")])
def test_csv_without_a_column(tmp_path, columns, column):
    path = write_csv(tmp_path / "list.csv", columns, [["a.nii"]])
    with pytest.raises(ValueError, match=rf"list\.csv: line 2 has no value in column '{column}'"):
        load_datalist(tmp_path, path)


def test_csv_with_a_gap(tmp_path):
    path = write_csv(tmp_path / "list.csv", ["image", "label"], [["a.nii", "l.nii"], ["b.nii", ""]])
    with pytest.raises(ValueError, match=r"list\.csv: line 3 has no value in column 'label'"):
        load_datalist(tmp_path, path)


def test_label_maps_of_a_decathlon_folder_are_no_scans(tmp_path, caplog):
    for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz", "labelsTs/b.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        found = find_scans(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["imagesTr/a.nii.gz", "imagesTs/b.nii.gz"]
    assert "2 label maps in labelsTr or labelsTs left out" in caplog.text
    assert find_scans(tmp_path / "labelsTr") == [tmp_path / "labelsTr" / "a.nii.gz"]  # asked for by name


def test_part_for_testing_is_left_out(pairs):
    root = pairs(10)
    plain, split = load_datalist(root, fold=1), load_datalist(root, fold=1, test_fold=3)
    assert names(split.validation) == names(plain.validation)
    assert len(split.test) == 2
    assert set(names(split.training)) == set(names(plain.training)) - set(names(split.test))
    assert names(split.test) == names(load_datalist(root, fold=3).validation)


@pytest.mark.parametrize("test_fold", [1, 5, -1])
def test_part_for_testing_that_is_none(pairs, test_fold):
    with pytest.raises(ValueError, match=f"--test_fold {test_fold}: expected null, or a part in 0 … folds - 1 but"):
        load_datalist(pairs(10), fold=1, test_fold=test_fold)
