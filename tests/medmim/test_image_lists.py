"""Lists of radiographs and volumes from folders and CSV files, and what is wrong with them."""

import csv
import math
from pathlib import Path

import pytest

from medmim.datasets import Preset, get_preset, get_radiograph_preset
from medmim.image_lists import find_images, find_radiographs, load_image_list

BODY = {"channels": ["X-ray"], "roi_size": [8, 8], "patch_size": 4, "z_score": "all"}
VOLUMES = {"channels": ["CT"], "roi_size": [16, 16, 16], "patch_size": 16, "min_max": True}


def preset(task: str = "multiclass", classes: tuple = ("a", "b"), **fields) -> Preset:
    return Preset.from_dict("own", BODY | {"classification": {"task": task, "classes": list(classes), **fields}})


def volumes(task: str = "multiclass", classes: tuple = ("a", "b"), **fields) -> Preset:
    return Preset.from_dict("own", VOLUMES | {"classification": {"task": task, "classes": list(classes), **fields}})


def touch(root: Path, *names: str) -> Path:
    """Files of different contents, which only the list's makers look at."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def write_csv(path: Path, columns: list, rows: list, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def by_name(split, *parts: str) -> dict[str, list]:
    """Name and label of the images of some parts, or of all."""
    items = [item for part in parts or ("training", "validation", "test") for item in getattr(split, part)]
    return {Path(item["image"]).name: item.get("label") for item in items}


@pytest.fixture
def listed(tmp_path):
    """Makes six images and a list of them: ``listed(columns, rows)``, the first column of each row left to it."""
    touch(tmp_path, *[f"images/{i}.png" for i in range(6)])

    def make(columns: list, rows: list, name: str = "list.csv") -> Path:
        rows = [[f"images/{i}.png", *row] for i, row in enumerate(rows)]
        return write_csv(tmp_path / name, ["image", *columns], rows)

    return make


def test_radiographs_below_sorted_without_what_is_hidden(tmp_path):
    touch(tmp_path, "b.PNG", "sub/deep/a.jpeg", "a.dcm", "c.jpg", "e.dicom", "._b.png", ".x/a.png", "n.txt", "c.png~")
    touch(tmp_path, "out/.medmim_results", "out/roc.png", "out/deep/a.png", ".medmim_results")
    found = [path.relative_to(tmp_path).as_posix() for path in find_radiographs(tmp_path)]
    assert found == ["a.dcm", "b.PNG", "c.jpg", "e.dicom", "sub/deep/a.jpeg"]
    assert find_images(tmp_path)[0] == {"image": str(tmp_path / "a.dcm")}


def test_missing_and_empty_folders_are_refused(tmp_path):
    for make in (find_radiographs, lambda folder: load_image_list(folder, preset())):
        with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}/no: no such folder$"):
            make(tmp_path / "no")
        with pytest.raises(ValueError, match=rf"^--dataset_dir {tmp_path}: no radiograph \(.png, .jpg, .jpeg, .dcm"):
            make(tmp_path)


@pytest.mark.parametrize(
    ("task", "expected"), [("multiclass", {"a": [1, 0], "b": [0, 1]}), ("binary", {"a": [0], "b": [1]})]
)
def test_folders_with_the_names_of_classes(tmp_path, task, expected):
    touch(tmp_path, *[f"{'Ab'[i % 2]}/sub/{i}.png" for i in range(10)])
    found = by_name(load_image_list(tmp_path, preset(task)))
    assert found == {f"{i}.png": expected["ab"[i % 2]] for i in range(10)}


def test_patterns(tmp_path):
    names = [f"{part}/{name}" for part in ("test", "train") for name in ("N/x1_1.jpg", "P/x2_bacteria_4.jpg")]
    touch(tmp_path, *names, "train/N/x9_2.jpg")
    own = preset(patterns={"a": "N/", "b": "P/.*_bacteria_"}, patient_pattern=r"^(x\d+)_")
    split = load_image_list(tmp_path, own, folds=2)
    assert by_name(split, "test") == {"x1_1.jpg": [1, 0], "x2_bacteria_4.jpg": [0, 1]}
    assert {item["patient"] for item in split.training + split.validation} == {"x1", "x2", "x9"}
    assert all(Path(item["image"]).parts[-3] == "test" for item in split.test)


def test_the_preset_of_the_pneumonia_radiographs(tmp_path):
    names = ["NORMAL/IM-0115-0001.jpeg", "NORMAL/NORMAL2-IM-0052-0001.jpeg", "PNEUMONIA/person1_bacteria_1.jpeg"]
    touch(tmp_path, *[f"chest_xray/train/{name}" for name in [*names, "PNEUMONIA/person7_virus_2.jpeg"]])
    touch(tmp_path, *[f"chest_xray/val/{name}" for name in ("NORMAL/IM-9-1.jpeg", "PNEUMONIA/person8_virus_2.jpeg")])
    split = load_image_list(tmp_path, get_radiograph_preset("pneumonia"))
    found = {item["patient"]: item["label"] for item in split.training}
    assert found == {"IM-0115": [1, 0, 0], "NORMAL2-IM-0052": [1, 0, 0], "person1": [0, 1, 0], "person7": [0, 0, 1]}
    binary = load_image_list(tmp_path, get_radiograph_preset("pneumonia_binary"))
    assert {item["patient"]: item["label"] for item in binary.validation} == {"IM-9": [0], "person8": [1]}


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION"])
def test_folders_give_the_split(tmp_path, name):
    touch(tmp_path, "train/a/1.png", "training/b/2.png", f"a/{name}/3.png", f"{name}/b/4.png", "test/b/5.png")
    split = load_image_list(tmp_path, preset())
    assert by_name(split, "training").keys() == {"1.png", "2.png"}
    assert by_name(split, "validation").keys() == {"3.png", "4.png"}
    assert by_name(split, "test").keys() == {"5.png"}


@pytest.mark.parametrize("name", ["c/1.png", "1.png", "a/b/1.png"])
def test_a_path_that_tells_no_class(tmp_path, name):
    touch(tmp_path, name, "a/2.png", "b/3.png")
    told = "a and b" if "b" in name else "no class"
    with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: its path tells {told}, expected one of a, b: move"):
        load_image_list(tmp_path, preset())


def test_a_path_may_tell_several_findings(tmp_path):
    touch(tmp_path, "a/b/1.png", "a/2.png", "b/3.png")
    found = by_name(load_image_list(tmp_path, preset("multilabel"), folds=3))
    assert found == {"1.png": [1, 1], "2.png": [1, 0], "3.png": [0, 1]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_with_one_label(tmp_path, encoding):
    touch(tmp_path, "x/é.png", "x/2.png", "3.png")
    rows = [["x/é.png", " a"], [" x/2.png ", "b"], [tmp_path / "3.png", "b"]]
    path = write_csv(tmp_path / "list.csv", ["image", "label"], rows, encoding)
    found = by_name(load_image_list(tmp_path, preset(), path, folds=3))
    assert found == {"é.png": [1, 0], "2.png": [0, 1], "3.png": [0, 1]}


@pytest.mark.parametrize("header", ["image,label", '"image","label"', "\ufeffimage,label"])
def test_labels_csv_is_found(tmp_path, header):
    touch(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    (tmp_path / "labels.csv").write_text(f"{header}\na/1.png,b\nb/2.png,a\n", encoding="utf-8")
    assert by_name(load_image_list(tmp_path, preset(), folds=2)) == {"1.png": [0, 1], "2.png": [1, 0]}
    assert by_name(load_image_list(tmp_path, get_radiograph_preset("cxr"), labelled=False, folds=2)).keys() == {
        "1.png",
        "2.png",
    }


def test_labels_csv_of_another_kind_is_left_alone(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "labels.csv").write_text("file,label\na/1.png,b\n")
    assert by_name(load_image_list(tmp_path, preset(), folds=2)) == {"1.png": [1, 0], "2.png": [0, 1]}
    touch(tmp_path, "a/3.png")
    (tmp_path / "labels.csv").write_text("file,label\na/1.png,b\nb/2.png,a\n")
    assert by_name(load_image_list(tmp_path, preset(image_column="file"), folds=2)).keys() == {"1.png", "2.png"}


def test_several_findings(listed, tmp_path):
    path = listed(["label"], [["a|b"], ["No Finding"], [" b "], ["a | c"], [""], ["b|No Finding"]])
    own = preset("multilabel", ("a", "b", "c"))
    with pytest.raises(ValueError, match=rf"^{path}: no label is known for .*/4\.png \(1 images in all\): fill in"):
        load_image_list(tmp_path, own, path)
    path = listed(["label"], [["a|b"], ["No Finding"], [" b "], ["a | c"], ["c"], ["b|No Finding"]])
    found = by_name(load_image_list(tmp_path, own, path))
    assert list(map(found.get, [f"{i}.png" for i in range(6)])) == [
        [1, 1, 0],
        [0, 0, 0],
        [0, 1, 0],
        [1, 0, 1],
        [0, 0, 1],
        [0, 1, 0],
    ]


def test_no_finding_may_be_a_class(listed, tmp_path):
    path = listed(["label"], [["No Finding"], ["b"], ["No Finding"], ["b"]])
    found = by_name(load_image_list(tmp_path, preset("multilabel", ("No Finding", "b")), path, folds=2))
    assert [found[f"{i}.png"] for i in range(4)] == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_a_column_for_each_class(listed, tmp_path):
    path = listed(["b", "a"], [["1", "0"], ["0.0", "1.0"], ["-1", "1"], ["", "0"], ["-1.0", "0"], ["1", ""]])
    found = by_name(load_image_list(tmp_path, preset("multilabel"), path))
    values = [["unknown" if math.isnan(value) else value for value in found[f"{i}.png"]] for i in range(6)]
    assert values == [[0, 1], [1, 0], [1, "unknown"], [0, "unknown"], [0, "unknown"], ["unknown", 1]]


def test_columns_for_split_and_patient(listed, tmp_path):
    rows = [["a", "Test", "p1"], ["b", "train", "p2"], ["a", "val", " p3"], ["b", "validation", ""], ["b", "", "p2"]]
    path = listed(["label", "split", "patient"], rows)
    split = load_image_list(tmp_path, preset(), path)
    parts = [by_name(split, part).keys() for part in ("training", "validation", "test")]
    assert parts == [{"1.png", "4.png"}, {"2.png", "3.png"}, {"0.png"}]
    told = {Path(item["image"]).name: item for item in split.training + split.validation}
    assert [told[f"{i}.png"]["patient"] for i in (1, 4, 2)] == ["p2", "p2", "p3"]
    assert told["3.png"]["patient"] == told["3.png"]["image"]  # one of its own


@pytest.fixture
def nih(tmp_path):
    """Thirty images of ten patients as the NIH gives them: twelve folders, one CSV, two lists."""
    rows = []
    for i in range(30):
        name = f"{i // 3:08d}_{i % 3:03d}.png"
        touch(tmp_path, f"images_{i % 12 + 1:03d}/images/{name}")
        rows.append([name, ["No Finding", "Mass|Nodule", "Hernia"][i // 3 % 3], i // 3])
    write_csv(tmp_path / "Data_Entry_2017_v2020.csv", ["Image Index", "Finding Labels", "Patient ID"], rows)
    for part, chosen in (("train_val", rows[:24]), ("test", rows[24:])):
        (tmp_path / f"{part}_list.txt").write_text("\n".join(row[0] for row in chosen))
    return tmp_path


def test_official_lists(nih):
    split = load_image_list(nih, get_radiograph_preset("cxr14"))
    assert {item["patient"] for item in split.test} == {"8", "9"}
    assert len(split.test) == 6
    label = by_name(split)["00000004_001.png"]
    assert [i for i, value in enumerate(label) if value] == [4, 5]  # Mass, Nodule
    with pytest.raises(ValueError, match=f"^--test_fold 1: {nih} names 6 test images: leave it away$"):
        load_image_list(nih, get_radiograph_preset("cxr14"), test_fold=1)


def test_official_lists_that_contradict_each_other_or_cannot_be_read(nih):
    with (nih / "test_list.txt").open("a") as file:
        file.write("\n00000001_000.png\n")
    with pytest.raises(ValueError, match=rf"^{nih}/test_list\.txt: 00000001_000\.png stands in the lists of training"):
        load_image_list(nih, get_radiograph_preset("cxr14"))
    (nih / "test_list.txt").write_bytes(b"00000001_000\xff.png")
    with pytest.raises(ValueError, match=rf"^{nih}/test_list\.txt: not readable as UTF-8"):
        load_image_list(nih, get_radiograph_preset("cxr14"))


def test_a_bare_name_must_be_unique(tmp_path):
    touch(tmp_path, "x/1.png", "y/1.png", "x/2.png")
    path = write_csv(tmp_path / "list.csv", ["image", "label"], [["2.png", "a"], ["1.png", "a"], ["0.png", "b"]])
    with pytest.raises(ValueError, match=rf"^{path}: line 3: 1\.png: found several times \(2 such lines; --dataset_"):
        load_image_list(tmp_path, preset(), path)
    write_csv(path, ["image", "label"], [["2.png", "a"], ["0.png", "b"]])
    expected = rf"^{path}: line 3: 0\.png: no such file in --dataset_dir {tmp_path}: correct the name"
    with pytest.raises(ValueError, match=expected):
        load_image_list(tmp_path, preset(), path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,label\n1.png,a\n\n2.png,c\n", "line 4: label 'c' in column 'label', expected one of a, b: correct it"),
        ("image,label\n1.png,a\n2.png,\n", "line 3: column 'label' is empty, expected one of a, b"),
        ("image,other\n1.png,a\n", "line 2: no column 'label'; found image, other"),
        ("image,label,split\n1.png,a,dev\n", "line 2: split 'dev', expected one of train, val, valid, test, training"),
        ("image,label\n,a\n", "line 2 names no image"),
        ("file,label\n1.png,a\n", "found file, label, expected a column 'image' with names of images"),
        ("file,label\n1.png,a,more\n", "found file, label, None, expected a column 'image'"),
        ("image,label\n", "found no line, expected a column 'image'"),
        ("image,label\n1.png,\xe4\n", "not readable as a CSV in UTF-8"),
    ],
)
def test_faulty_lists(tmp_path, text, expected):
    touch(tmp_path, "1.png", "2.png")
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{path}: {expected}"):
        load_image_list(tmp_path, preset(), path)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (["label"], ["a|d|b"], "label 'd' in column 'label', expected some of a, b, No Finding: correct it"),
        (["a", "b"], ["1", "yes"], r"'yes' in column 'b', expected 1, 0, or nothing \(-1\) where it is not known"),
        (["a", "c"], ["1", "1"], "no column 'label', nor one for each of a, b; found image, a, c"),
    ],
)
def test_faulty_lists_of_several_findings(listed, tmp_path, columns, row, expected):
    path = listed(columns, [row])
    with pytest.raises(ValueError, match=f"^{path}: line 2: {expected}"):
        load_image_list(tmp_path, preset("multilabel"), path)


@pytest.mark.parametrize(("splits", "told"), [("train test", "test and training"), ("train train", "training")])
def test_an_image_listed_twice(tmp_path, splits, told):
    touch(tmp_path, "1.png", "2.png")
    rows = [["1.png", "a", split] for split in splits.split()]
    path = write_csv(tmp_path / "list.csv", ["image", "label", "split"], [*rows, ["2.png", "b", "val"]])
    with pytest.raises(ValueError, match=rf"/1\.png: listed 2 times, in {told} \(1 images in all\): list each image"):
        load_image_list(tmp_path, preset(), path)


def test_lists_and_presets_that_are_not_there(tmp_path):
    touch(tmp_path, "a/1.png")
    with pytest.raises(ValueError, match=rf"^--datalist {tmp_path}/no\.csv: no such file$"):
        load_image_list(tmp_path, preset(), tmp_path / "no.csv")
    with pytest.raises(ValueError, match=r"^--dataset cxr: the preset has no classification: name its classes"):
        load_image_list(tmp_path, get_radiograph_preset("cxr"))


# ----------------------------------------------------------------------------------------------------------- volumes


def test_volumes_in_folders_with_the_names_of_classes(tmp_path):
    touch(tmp_path, *[f"{'Ab'[i % 2]}/{i}.nii{['', '.gz'][i % 3 == 0]}" for i in range(10)])
    touch(tmp_path, "a/x.png", "b/x.npz", "a/x.dcm", "b/labelsTr/x.nii.gz", "a/.y.nii", "x.txt")  # are no volumes
    found = by_name(load_image_list(tmp_path, volumes()))
    assert found == {f"{i}.nii{['', '.gz'][i % 3 == 0]}": [1 - i % 2, i % 2] for i in range(10)}
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}/no: no such folder$"):
        load_image_list(tmp_path / "no", volumes())
    touch(tmp_path / "other", "a/x.png")
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}/other: no NIfTI file .* in it or below$"):
        load_image_list(tmp_path / "other", volumes())


def test_the_preset_of_chest_ct(tmp_path):
    """Classes and patients are folders; each class numbers its patients anew."""
    scans = [f"{kind}/{number}/{i}.nii.gz" for kind in ("NCP", "CP", "Normal") for number in (1, 2, 3) for i in (8, 9)]
    touch(tmp_path, *[f"CP/{name}" for name in ("x.nii.gz", "1/x.png")], *scans)
    split = load_image_list(tmp_path, get_preset("cc_ccii"), folds=3)
    items = {Path(item["image"]).relative_to(tmp_path).as_posix(): item for item in split.training + split.validation}
    assert items.keys() == {*scans, "CP/x.nii.gz"}
    assert items.pop("CP/x.nii.gz")["patient"] == str(tmp_path / "CP/x.nii.gz")  # one of its own
    for name, item in items.items():
        kind = name.split("/")[0]
        assert item["label"] == [kind == "Normal", kind == "CP", kind == "NCP"]
        assert item["patient"] == name.rsplit("/", 1)[0]
    assert not {item["patient"] for item in split.training} & {item["patient"] for item in split.validation}


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_numbers_of_classes(tmp_path, task):
    """As MedMNIST has them, counted from 0."""
    classes = ("a", "b", "c") if task == "multiclass" else ("a", "b")
    touch(tmp_path, *[f"{i}.nii.gz" for i in range(6)])
    path = write_csv(tmp_path / "labels.csv", ["image", "label"], [[f"{i}.nii.gz", i % len(classes)] for i in range(6)])
    found = by_name(load_image_list(tmp_path, volumes(task, classes), folds=2))
    rows = [[1, 0, 0], [0, 1, 0], [0, 0, 1]] if task == "multiclass" else [[0], [1]]
    assert found == {f"{i}.nii.gz": rows[i % len(classes)] for i in range(6)}
    for wrong in (len(classes), -1, "1.0"):
        write_csv(path, ["image", "label"], [["0.nii.gz", "a"], ["1.nii.gz", wrong]])
        with pytest.raises(ValueError, match=f"line 3: label '{wrong}' in column 'label', expected one of a, b"):
            load_image_list(tmp_path, volumes(task, classes))


def test_classes_that_are_numbers_themselves(tmp_path):
    """A grade 0 that the preset does not name is not the first of the grades that it names."""
    touch(tmp_path, *[f"{i}.nii.gz" for i in range(4)])
    path = write_csv(tmp_path / "labels.csv", ["image", "label"], [[f"{i}.nii.gz", i % 2 + 1] for i in range(4)])
    found = by_name(load_image_list(tmp_path, volumes(classes=("1", "2")), folds=2))
    assert found == {f"{i}.nii.gz": [1 - i % 2, i % 2] for i in range(4)}
    write_csv(path, ["image", "label"], [["0.nii.gz", 1], ["1.nii.gz", 0]])
    with pytest.raises(ValueError, match="line 3: label '0' in column 'label', expected one of 1, 2"):
        load_image_list(tmp_path, volumes(classes=("1", "2")))


def test_a_list_of_volumes_finds_bare_names_and_takes_its_split(tmp_path):
    touch(tmp_path, "x/1.nii.gz", "y/2.nii", "3.nii.gz", "z/4.png")
    rows = [["1.nii.gz", "a", "train"], ["2.nii", "b", "val"], ["3.nii.gz", "b", "test"]]
    path = write_csv(tmp_path / "list.csv", ["image", "label", "split"], rows)
    split = load_image_list(tmp_path, volumes(), path)
    assert [by_name(split, part) for part in ("training", "validation", "test")] == [
        {"1.nii.gz": [1, 0]},
        {"2.nii": [0, 1]},
        {"3.nii.gz": [0, 1]},
    ]
    write_csv(path, ["image", "label"], [*[row[:2] for row in rows], ["4.png", "a"]])
    with pytest.raises(ValueError, match=rf"^{path}: line 5: 4\.png: no such file in --dataset_dir"):
        load_image_list(tmp_path, volumes(), path)


def test_a_list_that_the_preset_names_is_missing(tmp_path):
    start = f"^--dataset_dir {tmp_path}: no labels.csv in it, which the preset names"
    with pytest.raises(ValueError, match=rf"{start}: put the list there, or give another \(--datalist\)$"):
        load_image_list(tmp_path, get_preset("adrenalmnist3d"))
    with pytest.raises(ValueError, match=r"or for images without one the preset cxr \(--dataset\)$"):
        load_image_list(tmp_path, get_radiograph_preset("cxr14"))
    touch(tmp_path, "adrenalmnist3d_64.npz")  # as it is given out
    command = f"python -m medmim.medmnist {tmp_path}/adrenalmnist3d_64.npz FOLDER"
    for labelled in (True, False):
        with pytest.raises(ValueError, match=f"{start}, but adrenalmnist3d_64.npz: unpack it first: {command}$"):
            load_image_list(tmp_path, get_preset("adrenalmnist3d"), labelled=labelled)
