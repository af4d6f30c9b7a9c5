"""Checks of radiographs before a run, and the synthetic ones."""

import csv
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmim import radiograph_checks
from medmim.datalists import Datalist
from medmim.datasets import Preset, get_radiograph_preset
from medmim.image_checks import check_class_weights, check_evaluated, check_image_data, check_image_encoder
from medmim.image_lists import find_radiographs, load_image_list
from medmim.image_splits import kept_apart
from medmim.phantom_radiographs import FINDINGS, phantom_radiograph, write_phantom_radiographs
from medmim.radiograph_checks import check_image_inference, check_radiograph_preset, check_radiographs
from medmim.transforms import ScanError
from medmim.transforms.radiographs import load_radiograph
from medmim.weights import save_encoder

BODY = {"channels": ["X-ray"], "roi_size": [8, 8], "patch_size": 4, "z_score": "all"}
ABC = Preset.from_dict("own", BODY | {"classification": {"task": "multiclass", "classes": ["a", "b", "c"]}})


@pytest.fixture
def images(tmp_path):
    """Makes small radiographs: ``images({"a": 5, "b": 5})`` in folders with the names of classes."""

    def make(counts: dict[str, int]) -> Path:
        for label, n in counts.items():
            (tmp_path / "data" / label).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng([ord(label), i]).integers(0, 256, (6, 5), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
        return tmp_path / "data"

    return make


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read from now on."""
    read = []

    def note(path: str):
        read.append(Path(path).name)
        return load_radiograph(path)

    monkeypatch.setattr(radiograph_checks, "load_radiograph", note)
    return read


def messages(caplog, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_preset_with_and_without_classes():
    check_radiograph_preset("cxr")
    check_radiograph_preset("cxr14", "fixed", labelled=True)
    with pytest.raises(
        ValueError, match=r"^--dataset cxr: the preset names no classes, so nothing can be classified: "
    ):
        check_radiograph_preset("cxr", labelled=True)
    with pytest.raises(ValueError, match=r"^--dataset hippocampus: a preset of 3 axes"):
        check_radiograph_preset("hippocampus")
    with pytest.raises(ValueError, match=r"^--normalization none: expected image or fixed"):
        check_radiograph_preset("cxr", "none")


def test_what_a_good_list_tells(images, tmp_path, caplog):
    root = images({"a": 10, "b": 5, "c": 5})
    with caplog.at_level(logging.INFO, "medmim"):
        check_image_data(ABC, str(root), [str(tmp_path / "out"), str(tmp_path / "models")], test_fold=1)
    assert messages(caplog, logging.INFO) == [
        f"own: 12 images for training, 4 for validation, 4 for testing from {root}",
        "training: 6 a, 3 b, 3 c",
        "validation: 2 a, 1 b, 1 c",
        "test: 2 a, 1 b, 1 c",
    ]
    few = "4 images are few to choose a model and thresholds on: a --datalist with a column split may name more"
    assert messages(caplog, logging.WARNING) == [f"validation: {few}"]
    assert (tmp_path / "out" / ".medmim_results").is_file()
    assert list((tmp_path / "models").iterdir()) == []


def test_classes_that_a_part_lacks_are_told(images, tmp_path, caplog):
    root = images({"a": 8, "b": 6, "c": 1})
    with caplog.at_level(logging.INFO, "medmim"):
        check_image_data(ABC, str(root), [str(tmp_path / "out")], fold=1)
    assert messages(caplog, logging.WARNING)[1:] == [
        "validation: no image has c: no score can be given, or nothing be learned"
    ]


def test_labels_that_are_not_known_are_told(images, tmp_path, caplog):
    root = images({"a": 10})
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "a", "b"], *[[f"a/{i}.png", i % 2, ["", 1, -1][i % 3]] for i in range(10)]]
        )
    both = Preset.from_dict("own", BODY | {"classification": {"task": "multilabel", "classes": ["a", "b"]}})
    with caplog.at_level(logging.INFO, "medmim"):
        check_image_data(both, str(root), [str(tmp_path / "out")])
    told = [message for message in messages(caplog, logging.INFO) if message.endswith(" labels unknown")]
    assert sum(int(message.split("; ")[1].split()[0]) for message in told) == 7


def test_nothing_could_be_learned_or_scored(images, tmp_path):
    root = images({"a": 10})
    with pytest.raises(ValueError, match=r"^--dataset_dir") as caught:
        check_image_data(ABC, str(root), [str(tmp_path / "out")])
    lines = str(caught.value).splitlines()
    start = f"--dataset_dir {root}: none of a, b, c has images with it and images without it among the "
    assert lines[0].startswith(start + "8 for training: nothing could be learned: add images, or change --fold")
    assert lines[1].startswith(start + "2 for validation: nothing could be scored")
    check_image_data(ABC, str(root), [str(tmp_path / "out")], labelled=False)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"fold": 5}, "--fold 5 of --folds 5: fold must lie in 0 … folds - 1"),
        ({"fold": -1}, "--fold -1 of --folds 5: fold must lie in 0 … folds - 1"),
        ({"test_fold": 5}, "--test_fold 5 of --folds 5: expected null, or a number in 0 … folds - 1"),
        ({"test_fold": -1}, "--test_fold -1 of --folds 5: expected null, or a number in 0 … folds - 1"),
        ({"test_fold": "one"}, "--test_fold one of --folds 5: expected null, or a number in 0 … folds - 1"),
        ({"test_fold": True}, "--test_fold True of --folds 5: expected null, or a number in 0 … folds - 1"),
        ({"test_fold": 0}, "--test_fold 0: the same part as --fold, which is for validation: take another"),
        ({"datalist": "no.csv"}, "--datalist no.csv: no such file"),
        ({"dataset_dir": "no"}, "--dataset_dir no: no such folder"),
    ],
)
def test_faulty_knobs(images, tmp_path, knobs, expected):
    arguments = {"dataset_dir": str(images({"a": 5, "b": 5})), "output_dirs": [str(tmp_path / "out")]} | knobs
    with pytest.raises(ValueError, match=f"^{expected}$"):
        check_image_data(ABC, **arguments)


def test_faults_of_folder_and_list_are_told_together(images, tmp_path):
    root = images({"a": 5, "d": 5})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^folder") as caught:
        check_image_data(ABC, str(root), [str(tmp_path / "file" / "out")])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"folder {tmp_path}/file/out is not writable")
    assert lines[1].startswith(f"{root}/d/0.png: its path tells no class, expected one of a, b, c")
    assert len(lines) == 2


def test_more_processes_than_images_for_validation(images, tmp_path, monkeypatch):
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="2 images for validation by 3 processes: each needs one: start fewer, or low"):
        check_image_data(ABC, str(images({"a": 5, "b": 5})), [str(tmp_path / "out")])


def test_faulty_radiographs_are_reported_together(images, tmp_path):
    root = images({"a": 5, "b": 5})
    (root / "a" / "1.png").write_bytes(b"")
    Image.fromarray(np.full((6, 5), 9, np.uint8)).save(root / "b" / "2.png")
    split = load_image_list(root, ABC, test_fold=1)
    (root / "b" / "3.png").unlink()
    with pytest.raises(ScanError) as caught:
        check_radiographs(split, ABC, tmp_path / "checked.json")
    *lines, summary = str(caught.value).splitlines()
    assert summary == "3 of 10 scans cannot be used"
    assert sorted(lines) == [
        f"{root}/a/1.png: empty file (0 bytes): replace or remove it",
        f"{root}/b/2.png: constant image, each pixel is 0.0352941 of full scale: remove the file",
        f"[Errno 2] No such file or directory: '{root}/b/3.png'",
    ]
    assert len(json.loads((tmp_path / "checked.json").read_text())) == 7


def test_only_new_and_changed_radiographs_are_read_again(images, tmp_path, reads):
    split = load_image_list(images({"a": 5, "b": 5}), ABC)
    remember = tmp_path / "checked.json"
    names = sorted(f"{i}.png" for i in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4))
    check_radiographs(split, ABC, remember)
    assert sorted(reads) == names
    reads.clear()
    check_radiographs(split, ABC, remember)
    assert reads == []
    changed = Path(split.training[2]["image"])
    os.utime(changed, ns=(1, 1))
    check_radiographs([*split.training, *split.validation], ABC, remember)
    assert reads == [changed.name]
    reads.clear()
    changed.write_bytes(b"broken")
    with pytest.raises(ScanError, match=f"^{changed}: not readable"):
        check_radiographs(split, ABC, remember)
    remember.write_text('{"a": {"sta')
    changed.unlink()
    split.training.pop(2)
    reads.clear()
    check_radiographs(split, ABC, remember)
    assert len(reads) == 9
    check_radiographs(split, ABC)
    assert len(reads) == 18


def test_images_to_be_evaluated(tmp_path):
    """Those that training kept apart, by their names below the folder of the data."""
    split = Datalist([{"image": "/data/a"}], [{"image": "/data/b"}], [{"image": "/data/c"}])
    body = {"network": {"name": "ViTClassifier", "arguments": {}}, "preset": {"name": "own"}}
    body |= {"format_version": 1, "medmim_version": "0", "kept_apart": kept_apart(split, "/data")}
    (tmp_path / "model.json").write_text(json.dumps(body))
    moved = Datalist([], [{"image": "/new/b"}], [{"image": "/new/c"}])
    for part in ("validation", "test"):
        check_evaluated(split, part, "/data", str(tmp_path))
        check_evaluated(moved, part, "/new", str(tmp_path))
        with pytest.raises(ValueError, match=f"^--part {part}: 1 images, not those that training kept apart"):
            check_evaluated(Datalist([], [{"image": "/data/a"}], [{"image": "/data/b"}]), part, "/data", str(tmp_path))
        check_evaluated(Datalist([], [{"image": "/d/x"}], [{"image": "/d/y"}]), part, "/d", str(tmp_path), "true")
    with pytest.raises(ValueError, match=r"^--part test: 0 images for testing: give --test_fold as in training, or a "):
        check_evaluated(Datalist([], [{"image": "/data/b"}]), "test", "/data", str(tmp_path))
    with pytest.raises(ValueError, match=r"^--allow_other_images 1x: expected true or false$"):
        check_evaluated(split, "test", "/data", str(tmp_path), "1x")
    for part in ("training", None, 5):
        with pytest.raises(ValueError, match=f"^--part {part}: expected validation or test$"):
            check_evaluated(split, part, "/data", str(tmp_path))
    del body["kept_apart"]  # a model of before
    (tmp_path / "model.json").write_text(json.dumps(body))
    check_evaluated(moved, "test", "/", str(tmp_path))


def test_a_test_part_that_cannot_be_scored_is_refused(images, tmp_path):
    root = images({"a": 10, "b": 10})
    parts = ("val", "train")
    lines = [f"{p.relative_to(root)},{p.parent.name},{parts[i % 2]}" for i, p in enumerate(find_radiographs(root))]
    first = next(i for i, line in enumerate(lines) if ",a," in line)
    lines[first] = lines[first].rsplit(",", 1)[0] + ",test"
    (tmp_path / "list.csv").write_text("\n".join(["image,label,split", *lines]))
    with pytest.raises(ValueError, match=r"images without it among the 1 for test: nothing could be scored"):
        check_image_data(ABC, str(root), [str(tmp_path / "out")], str(tmp_path / "list.csv"))


def test_encoder_of_another_preset_is_told(tmp_path, tiny_vit, caplog):
    path = tmp_path / "encoder.pt"
    save_encoder(path, tiny_vit(1, (16, 16), 8), [16, 16], get_radiograph_preset("cxr"))
    with caplog.at_level(logging.WARNING, "medmim"):
        check_image_encoder(str(path), get_radiograph_preset("cxr"))
        check_image_encoder(None, get_radiograph_preset("cxr14"))
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "medmim"):
        check_image_encoder(str(path), get_radiograph_preset("cxr14"))
    assert "pre-trained with preset cxr, which may split the images otherwise" in caplog.text


@pytest.mark.parametrize("how", ["even", [1, 2], [1, 2, 0], [1, 2, -3], [1, 2, math.nan], [1, True, 2], 3, ["1", 2, 3]])
def test_class_weights_that_are_none(how):
    split = Datalist([{"image": "x", "label": [1.0, 0.0, 0.0]}], [])
    with pytest.raises(
        ValueError, match=r"^--class_weights .*: expected null, balanced, or 3 numbers above 0, for a, b"
    ):
        check_class_weights(split, ABC, how)
    for good in (None, "null", "balanced", [1, 2.5, 3]):
        check_class_weights(split, ABC, good)
    check_class_weights(split, get_radiograph_preset("cxr"), how)  # said by another check


def test_before_a_prediction(images, tmp_path, monkeypatch):
    root, out = images({"a": 2}), tmp_path / "out"
    with pytest.raises(ValueError, match=r"model\.json"):
        check_image_inference(str(tmp_path), str(root), str(out))
    monkeypatch.setattr(radiograph_checks, "read_description", lambda path: {})
    check_image_inference(str(tmp_path), str(root), str(out))
    assert (out / ".medmim_results").is_file()
    with pytest.raises(ValueError, match=f"^--output_dir {root}: the folder of the images: choose another"):
        check_image_inference(str(tmp_path), str(root), str(root))
    (root / "a" / "1.png").write_bytes(b"broken")
    with pytest.raises(ScanError, match=f"^{root}/a/1.png: not readable"):
        check_image_inference(str(tmp_path), str(root), str(out))
    check_image_inference(str(tmp_path), str(root), str(out), check_scans=False)


def test_phantom_is_the_same_for_the_same_seed():
    image, found = phantom_radiograph(3)
    again, found_again = phantom_radiograph(3)
    np.testing.assert_array_equal(image, again)
    assert found == found_again
    assert (image.shape, image.dtype) == ((112, 96), np.uint8)
    assert (phantom_radiograph(4)[0] != image).any()
    assert {tuple(phantom_radiograph(seed)[1].items()) for seed in range(20)} == {
        ((FINDINGS[0], effusion), (FINDINGS[1], nodule)) for effusion in (0, 1) for nodule in (0, 1)
    }


def test_phantom_suits_its_preset_and_is_kept(tmp_path, caplog):
    preset = get_radiograph_preset("phantom_cxr")
    root = tmp_path / "phantom"
    write_phantom_radiographs(root, n_patients=12)
    check_image_data(preset, str(root), [str(tmp_path / "out")])
    split = load_image_list(root, preset)
    check_radiographs(split, preset)
    assert len(split.training) + len(split.validation) == 16  # each third patient has two
    kept = root / "images" / "patient0003_0.png"
    kept.write_bytes(b"kept")
    (root / "images" / "patient0003_1.png").unlink()
    before = (root / "labels.csv").read_bytes()
    write_phantom_radiographs(root, n_patients=12)
    assert kept.read_bytes() == b"kept"
    assert (root / "images" / "patient0003_1.png").is_file()
    assert (root / "labels.csv").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"image,label\n", b"\xff\xfe"])
def test_phantom_does_not_write_into_other_data(tmp_path, content):
    path = tmp_path / ("scan.dcm" if content is None else "labels.csv")
    path.write_bytes(content or b"")
    with pytest.raises(ValueError, match=f"^--dataset_dir {tmp_path}: holds other data, synthetic radiographs are not"):
        write_phantom_radiographs(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [path]
