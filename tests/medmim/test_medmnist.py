"""Volumes of MedMNIST become NIfTI files and a list, voxel for voxel; whatever else is refused in one line."""

import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmim.datalists import find_scans
from medmim.datasets import get_preset
from medmim.medmnist import PARTS, main, unpack
from medmim.splits import load_split
from tests.common import rows

COUNTS = {"train": 6, "val": 2, "test": 3}


def arrays(shape: tuple = (5, 6, 7), labels: str = "column") -> dict[str, np.ndarray]:
    """As in a file of MedMNIST; labels as a column or a row of numbers."""
    random = np.random.default_rng(0)
    found = {}
    for part, n in COUNTS.items():
        found[f"{part}_images"] = random.integers(0, 256, (n, *shape), dtype=np.uint8)
        found[f"{part}_labels"] = np.arange(n, dtype=np.uint8) % 2
        if labels == "column":
            found[f"{part}_labels"] = found[f"{part}_labels"][:, None]
    return found


def save(path: Path, content: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path, **content)
    return path


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return save(tmp_path / "small_7.npz", arrays())


@pytest.mark.parametrize("labels", ["column", "row"])
def test_every_voxel_label_and_part_comes_back(tmp_path, labels):
    content = arrays(labels=labels)
    folder = tmp_path / "new" / "folder"
    unpack(save(tmp_path / "small_7.npz", content), folder)
    listed = rows(folder / "labels.csv")
    assert [row["split"] for row in listed] == [part for part, n in COUNTS.items() for _ in range(n)]
    assert sorted(row["image"] for row in listed) == [str(p.relative_to(folder)) for p in find_scans(folder)]
    volumes = np.concatenate([content[f"{part}_images"] for part in PARTS])
    expected = np.concatenate([content[f"{part}_labels"].ravel() for part in PARTS])
    assert [int(row["label"]) for row in listed] == expected.tolist()
    for row, volume in zip(listed, volumes, strict=True):
        image = nib.load(folder / row["image"])
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume)
        np.testing.assert_array_equal(image.affine, np.eye(4))


def test_the_official_split_and_classes_are_read(npz, tmp_path):
    unpack(npz, tmp_path / "data")
    preset = get_preset("adrenalmnist3d")
    split = load_split(tmp_path / "data", preset)
    assert [len(part) for part in (split.training, split.validation, split.test)] == [6, 2, 3]
    for part, items in zip(PARTS, (split.training, split.validation, split.test), strict=True):
        for item in items:
            number = int(Path(item["image"]).name.removesuffix(".nii.gz").split("_")[-1])
            assert Path(item["image"]).name == f"small_7_{part}_{number:05d}.nii.gz"
            assert item["label"] == [number % 2]
    unlabelled = load_split(tmp_path / "data", preset, labelled=False)  # as pre-training reads it
    for part in ("training", "validation", "test"):
        assert {item["image"] for item in getattr(unlabelled, part)} == {item["image"] for item in getattr(split, part)}


def test_a_second_run_mends_the_first(npz, tmp_path, capsys):
    folder = tmp_path / "data"
    main(str(npz), str(folder))
    assert capsys.readouterr().out.strip() == f"11 volumes of 5x6x7 voxels in {folder}"
    before = (folder / "labels.csv").read_bytes()
    (folder / "labels.csv").unlink()  # as after a break
    (folder / "images" / "small_7_val_00001.nii.gz").write_bytes(b"half")
    (folder / "images" / "small_7_test_00002.nii.gz").unlink()
    for _ in range(2):
        main(str(npz), str(folder))
        assert (folder / "labels.csv").read_bytes() == before
        assert len(find_scans(folder)) == 11
        volume = np.asarray(nib.load(folder / "images" / "small_7_val_00001.nii.gz").dataobj)
        np.testing.assert_array_equal(volume, arrays()["val_images"][1])


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "images/other_train_00000.nii.gz",
        "images/small_7_64_train_00000.nii.gz",  # of another resolution
        "images/small_7_train_00000.nii.gz.txt",
        "images/patient/small_7_train_00000.nii.gz",
        "labels.csv",
    ],
)
def test_other_data_are_left_alone(npz, tmp_path, name):
    folder = tmp_path / "data"
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text("image,label\nmine.nii.gz,1\n")
    with pytest.raises(SystemExit, match=f"^error: {folder}: holds other data: give a folder that is empty or new$"):
        main(str(npz), str(folder))
    assert [p for p in folder.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "image,label\nmine.nii.gz,1\n"


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays().items() if key != name}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (without("val_labels"), "expected a .npz file of MedMNIST with train_images, .*, test_labels "),
        (without("test_images"), "expected a .npz file of MedMNIST .*test_images"),
        (arrays((28, 28)), r"train_images of shape \(6, 28, 28\) \(uint8\) with .*: give a 3D set of MedMNIST$"),
        (arrays((28, 28, 3)), r"train_images of shape \(6, 28, 28, 3\) .*: give a 3D set"),  # colours
        (arrays((5, 6, 7, 2)), r"train_images of shape \(6, 5, 6, 7, 2\) .*: give a 3D set"),
        (arrays() | {"test_labels": np.zeros((2, 1), int)}, r"test_images .* test_labels of shape \(2, 1\) \(int64\)"),
        (arrays() | {"val_labels": np.zeros((2, 3), int)}, r"val_images .* val_labels of shape \(2, 3\) "),
        (arrays() | {"val_labels": np.zeros((1, 2), int)}, r"val_images .* val_labels of shape \(1, 2\) "),
        (arrays() | {"val_labels": np.array(1)}, r"val_images .* val_labels of shape \(\) "),
        (arrays() | {"val_labels": np.array([0.5, np.nan])}, r"val_images .* val_labels of shape \(2,\) \(float64\)"),
        (arrays() | {"val_images": np.zeros((2, 5, 6, 7), bool)}, r"val_images of shape \(2, 5, 6, 7\) \(bool\) "),
        (arrays() | {"val_labels": np.array([{}, {}])}, "expected a .npz file .*allow_pickle"),
    ],
)
def test_faulty_arrays(tmp_path, content, expected):
    path = save(tmp_path / "faulty.npz", content)
    assert_refused(path, tmp_path / "data", expected)


@pytest.mark.parametrize("how", ["missing", "folder", "empty", "text", "truncated", "npy", "changed", "damaged"])
def test_what_is_no_such_file(tmp_path, npz, how):
    path = tmp_path / "faulty.npz"
    content = npz.read_bytes()
    if how == "folder":
        path.mkdir()
    elif how == "npy":
        np.save(tmp_path / "one.npy", arrays()["val_images"])
        (tmp_path / "one.npy").rename(path)
    elif how != "missing":
        new = {"empty": b"", "text": b"no zip" * 9, "truncated": content[: len(content) // 2]}
        new |= {"changed": content[:300] + b"\xff" + content[301:]}  # the zip's index is whole
        new |= {"damaged": content[:60] + b"\xff" * 40 + content[100:]}
        path.write_bytes(new[how])
    advice = "check the path" if how == "missing" else "download it again"
    assert_refused(
        path, tmp_path / "data", f"expected a .npz file of MedMNIST with train_images, .*[(].+[)]: {advice}$"
    )


def assert_refused(path: Path, folder: Path, expected: str) -> None:
    """One line that names the file; nothing is written."""
    with pytest.raises(SystemExit, match=f"^error: {path}: {expected}") as caught:
        main(str(path), str(folder))
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(npz, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^error: .*{tmp_path}/file"):
        main(str(npz), str(tmp_path / "file"))


def test_the_command_that_a_folder_with_such_a_file_asks_for(npz, tmp_path, monkeypatch):
    given = f"python -m medmim.medmnist {npz}"
    expected = rf"^--dataset_dir {tmp_path}: no NIfTI file .* but small_7\.npz: unpack it first: {given} FOLDER$"
    with pytest.raises(ValueError, match=expected):
        find_scans(tmp_path)
    monkeypatch.setattr(sys, "argv", [*given.split()[2:], str(tmp_path / "data")])
    runpy.run_module("medmim.medmnist", run_name="__main__")
    assert len(find_scans(tmp_path / "data")) == 11


def test_the_real_file(tmp_path):
    path = Path(os.environ.get("MEDMIM_TEST_DATA", "/nowhere")) / "data" / "adrenalmnist3d" / "adrenalmnist3d.npz"
    if not path.is_file():
        pytest.skip("MEDMIM_TEST_DATA names no folder with data/adrenalmnist3d/adrenalmnist3d.npz")
    unpack(path, tmp_path / "data")
    split = load_split(tmp_path / "data", get_preset("adrenalmnist3d"))
    assert [len(part) for part in (split.training, split.validation, split.test)] == [1188, 98, 298]
    with np.load(path) as content:
        for part, items in zip(PARTS, (split.training, split.validation, split.test), strict=True):
            found = Counter(item["label"][0] for item in items)
            assert found == Counter(content[f"{part}_labels"].ravel().astype(float).tolist())
        volume = np.asarray(nib.load(tmp_path / "data" / "images" / "adrenalmnist3d_test_00297.nii.gz").dataobj)
        np.testing.assert_array_equal(volume, content["test_images"][297])
