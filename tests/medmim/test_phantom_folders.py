"""Folders of synthetic data: other data are left alone, a break loses nothing, files that are there are kept."""

import json
import os

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medmim.phantom import write_phantom
from medmim.phantom_brain import write_phantom_brain
from medmim.phantom_folders import nifti, write_decathlon, write_listed
from medmim.phantom_lesions import write_phantom_lesions
from medmim.phantom_radiographs import write_phantom_radiographs

WRITERS = [write_phantom, write_phantom_brain, write_phantom_lesions, write_phantom_radiographs]
every = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every
@pytest.mark.parametrize("name", ["dataset.json", "labels.csv", "scan.nii.gz"])
@pytest.mark.parametrize("content", [b"", b'{"name": "mine"}', b"[1, 2]", b"image,label\nmine.nii.gz,0\n", b"\xff\xfe"])
def test_other_data_are_left_alone(tmp_path, write, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}: holds other data, phantom data are not written"):
        write(tmp_path, 2)
    assert contents(tmp_path) == {(tmp_path / name).relative_to(tmp_path): content}


@every
def test_after_a_break_the_same_folder(tmp_path, write):
    write(tmp_path / "whole", 2)
    write(tmp_path / "broken", 2)
    gone = sorted(path for path in (tmp_path / "broken").rglob("*") if path.suffix in (".gz", ".png"))[1]
    gone.unlink()
    write(tmp_path / "broken", 2)
    assert gone.is_file()
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")


@every
def test_more_are_added_and_those_there_are_kept(tmp_path, write):
    write(tmp_path, 1)
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*.*") if path.suffix in (".gz", ".png")}
    write(tmp_path, 2)
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert len([path for path in tmp_path.rglob("*.*") if path.suffix in (".gz", ".png")]) > len(before)


def test_the_list_is_there_before_the_first_file(tmp_path):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_decathlon(tmp_path, "ours", "", ["CT"], {"background": 0}, (1, 1, 1), {"a": stopped})
    assert json.loads((tmp_path / "dataset.json").read_text())["name"] == "ours"
    case = (np.zeros((4, 3, 2), np.int16), np.ones((4, 3, 2), np.uint8))
    write_decathlon(tmp_path, "ours", "", ["CT"], {"background": 0}, (1, 1, 1), {"a": lambda: case})
    assert nib.load(tmp_path / "labelsTr/a.nii.gz").get_fdata().sum() == 24


def test_a_file_is_written_at_once(tmp_path):
    def half(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_listed(tmp_path, [{"image": "images/a.png"}], "ours", {"images/a.png": half})
    assert not list((tmp_path / "images").iterdir())
    grey = Image.fromarray(np.full((3, 4), 7, np.uint8))
    write_listed(tmp_path, [{"image": "images/a.png"}], "ours", {"images/a.png": lambda p: grey.save(p, "PNG")})
    assert (np.asarray(Image.open(tmp_path / "images/a.png")) == 7).all()
    assert (tmp_path / "labels.csv").read_text().split() == ["image,source", "images/a.png,ours"]


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 3, 2, 5)])
def test_nifti_lies_around_the_origin(tmp_path, shape):
    volume = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    nifti(volume, (2.0, 1.0, 3.0))(tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(image.get_fdata(), volume)
    corners = image.affine @ np.array([[0, 0, 0, 1], [3, 2, 1, 1]]).T
    np.testing.assert_allclose(corners[:3, 0], -corners[:3, 1])
    np.testing.assert_allclose(np.diag(image.affine), [2, 1, 3, 1])
