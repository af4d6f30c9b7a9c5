"""Checks of images with classes before a run: their list, what is evaluated, the encoder, weights of classes."""

import csv
import json
import logging
import math

import pytest
import torch

from medmim.datalists import Datalist
from medmim.datasets import Preset, get_preset, get_radiograph_preset
from medmim.description import describe, write_description
from medmim.image_checks import (
    check_class_weights,
    check_evaluated,
    check_image_data,
    check_seen,
    check_volume_preset,
)
from medmim.image_lists import find_radiographs
from medmim.image_splits import kept_apart
from medmim.networks import ViTClassifier
from medmim.weights import save_encoder

BODY = {"channels": ["X-ray"], "roi_size": [8, 8], "patch_size": 4, "z_score": "all"}
ABC = Preset.from_dict("own", BODY | {"classification": {"task": "multiclass", "classes": ["a", "b", "c"]}})


def messages(caplog, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_presets_of_volumes():
    check_volume_preset("cc_ccii")
    check_volume_preset("phantom_ct", 1.5)
    with pytest.raises(ValueError, match=r"^--dataset cxr14: a preset of 2 axes, expected 3 for volumes: choose anoth"):
        check_volume_preset("cxr14")
    with pytest.raises(ValueError, match=r"^--dataset btcv: the preset names no classes, so nothing can be classified"):
        check_volume_preset("btcv")
    with pytest.raises(ValueError, match=r"^--spacing_factor 2: preset cc_ccii keeps each scan's own spacing"):
        check_volume_preset("cc_ccii", 2)
    with pytest.raises(ValueError, match=r"^--spacing_factor x: expected a number"):
        check_volume_preset("phantom_ct", "x")
    with pytest.raises(ValueError, match=r"^--dataset cc_cci: no such preset \(did you mean cc_ccii"):
        check_volume_preset("cc_cci")


def test_volumes_are_checked_like_images(tmp_path, caplog):
    root = tmp_path / "data"
    for i in range(30):
        path = root / ("Normal", "CP", "NCP")[i % 3] / f"p{i // 6}" / f"{i}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(i))
    with caplog.at_level(logging.INFO, "medmim"):
        check_image_data(get_preset("cc_ccii"), str(root), [str(tmp_path / "out")], test_fold=1)
    assert messages(caplog, logging.INFO) == [
        f"cc_ccii: 18 images for training, 6 for validation, 6 for testing from {root}",
        *[f"{part}: {n} Normal, {n} CP, {n} NCP" for part, n in (("training", 6), ("validation", 2), ("test", 2))],
    ]
    (root / "NCP").rename(root / "other")
    with pytest.raises(ValueError, match=rf"^{root}/other/p0/\d+\.nii\.gz: its path tells no class, expected one of "):
        check_image_data(get_preset("cc_ccii"), str(root), [str(tmp_path / "out")])


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
    path, vit = tmp_path / "encoder.pt", tiny_vit(1, (16, 16), 8)
    split = Datalist([{"image": f"{tmp_path}/a"}], [{"image": f"{tmp_path}/b"}], [{"image": f"{tmp_path}/c"}])
    other = Datalist([{"image": f"{tmp_path}/c"}], [{"image": f"{tmp_path}/b"}])
    cxr, cxr14 = get_radiograph_preset("cxr"), get_radiograph_preset("cxr14")

    def said(seen: dict | None, preset: Preset) -> str:
        caplog.clear()
        save_encoder(path, vit, [16, 16], cxr, seen)
        with caplog.at_level(logging.WARNING, "medmim"):
            check_seen(str(path), split, str(tmp_path), preset)
        return caplog.text

    assert said(None, cxr) == ""  # a file of an earlier version
    assert said(kept_apart(split, tmp_path), cxr) == ""
    assert "trained with preset cxr, other images were kept apart: it may" in said(kept_apart(other, tmp_path), cxr)
    assert "trained with preset cxr, which may split the images otherwise" in said(None, cxr14)
    caplog.clear()
    check_seen(None, split, str(tmp_path), cxr14)
    assert caplog.text == ""


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


def test_a_fine_tuned_model_as_encoder_is_told(tmp_path, tiny_vit, caplog):
    """It has learned from labelled images, which another split may keep apart."""
    torch.save(tiny_vit(1, (16, 16), 8).state_dict(), tmp_path / "model.pt")  # what it holds does not matter
    split = Datalist([{"image": f"{tmp_path}/a"}], [{"image": f"{tmp_path}/b"}], [{"image": f"{tmp_path}/c"}])
    other = Datalist([{"image": f"{tmp_path}/c"}], [{"image": f"{tmp_path}/b"}])
    preset = get_radiograph_preset("cxr")

    def said(name: str = "model.pt") -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "medmim"):
            check_seen(str(tmp_path / name), split, str(tmp_path), preset)
        return caplog.text

    assert said() == ""  # nothing is known
    network = ViTClassifier(1, 2, (16, 16), 8, hidden_size=24, mlp_dim=48, num_layers=1, num_heads=2, spatial_dims=2)
    description = describe(network, [16, 16], preset)
    write_description(description | {"kept_apart": kept_apart(other, tmp_path)}, tmp_path / "model.json")
    assert "it may have seen those for validation and testing (with labels)" in said()
    (tmp_path / "model.pt").rename(tmp_path / "imported.pt")
    assert said("imported.pt") == ""  # the description is of another file
    (tmp_path / "imported.pt").rename(tmp_path / "model.pt")
    write_description(description | {"kept_apart": kept_apart(split, tmp_path)}, tmp_path / "model.json")
    assert said() == ""
