"""What a classification is to tell apart, and presets that say so."""

import json
from dataclasses import replace

import pytest

from medmim.classes import Classification
from medmim.datasets import Preset, get_preset, get_radiograph_preset, preset_table

PLAIN = {"task": "multilabel", "classes": ["a", "b"]}
RADIOGRAPHS = ("phantom_cxr", "cxr", "cxr14", "pneumonia", "pneumonia_binary")
OWN = """\
channels: [X-ray]
roi_size: [32, 32]
patch_size: 8
window: [0.1, 0.9]
classification:
  task: binary
  classes: [healthy, ill]
"""


@pytest.mark.parametrize(
    ("task", "classes", "outputs"),
    [
        ("multiclass", ["a", "b", "c"], ["a", "b", "c"]),
        ("multilabel", ["a", "b"], ["a", "b"]),
        ("multilabel", ["a"], ["a"]),
        ("binary", ["no", "yes"], ["yes"]),
    ],
)
def test_outputs(task, classes, outputs):
    assert Classification.from_dict({"task": task, "classes": classes}).outputs == outputs


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ("multilabel", "classification must hold task and classes, or be null, found 'multilabel'"),
        ({}, "classification lacks the field 'task'; classification lacks the field 'classes'"),
        ({"task": "binary"}, "classification lacks the field 'classes'"),
        (PLAIN | {"class": "a"}, "classification has an unknown field 'class'"),
        (PLAIN | {"task": "regression"}, "task must be multiclass or binary or multilabel, found 'regression'"),
        (PLAIN | {"task": ["binary"]}, r"task must be multiclass or binary or multilabel, found \['binary'\]"),
        (PLAIN | {"classes": ["a", "a"]}, r"classes must be a list of different names, found \['a', 'a'\]"),
        (PLAIN | {"classes": "ab"}, "classes must be a list of different names, found 'ab'"),
        (PLAIN | {"classes": [0, 1]}, r"classes must be a list of different names, found \[0, 1\]"),
        (PLAIN | {"classes": [["a"], "b"]}, "classes must be a list of different names"),
        (PLAIN | {"classes": ["a", ""]}, "classes must be a list of different names"),
        (PLAIN | {"classes": None}, "classes must be a list of different names, found None"),
        (PLAIN | {"classes": []}, "a multilabel task needs more classes, found 0"),
        ({"task": "multiclass", "classes": ["a"]}, "a multiclass task needs more classes, found 1"),
        (
            {"task": "binary", "classes": list("abc")},
            "a binary task needs two classes, the negative one first, found 3",
        ),
        (PLAIN | {"patterns": ["a"]}, r"patterns must map classes to regular expressions, found \['a'\]"),
        (PLAIN | {"patterns": {"c": "x"}}, "patterns must map classes to regular expressions, found {'c': 'x'}"),
        (PLAIN | {"patterns": {"a": "(x"}}, r"expected a regular expression, found '\(x'"),
        (PLAIN | {"patterns": {"a": 3}}, "expected a regular expression, found 3"),
        (PLAIN | {"patient_pattern": "p[0-9"}, r"expected a regular expression, found 'p\[0-9'"),
        (PLAIN | {"patient_pattern": r"p\d"}, r"patient_pattern needs one group \(...\) that holds the patient, found"),
        (PLAIN | {"patient_pattern": "(p)(q)"}, "patient_pattern needs one group"),
        (PLAIN | {"image_column": None}, "image_column must be text, found None"),
        (PLAIN | {"label_column": 3}, "label_column must be text, found 3"),
        (PLAIN | {"datalist": "/data/list.csv"}, "datalist must name a file in the folder of the data, or be null, f"),
        (PLAIN | {"test_list": ""}, "test_list must name a file in the folder of the data, or be null, found ''"),
    ],
)
def test_faults(values, fault):
    with pytest.raises(ValueError, match=f"^{fault}"):
        Classification.from_dict(values)
    with pytest.raises(ValueError, match=f"^preset own: {fault}"):
        Preset.from_dict(
            "own",
            {"channels": ["X"], "roi_size": [8, 8], "patch_size": 4, "z_score": "all"} | {"classification": values},
        )


def test_every_fault_is_told_in_one_line():
    values = {"task": "binary", "classes": list("abc"), "patterns": {"a": "("}, "patient_pattern": "x", "nothing": 0}
    with pytest.raises(ValueError, match="two classes") as caught:
        Classification.from_dict(values)
    message = str(caught.value)
    assert all(part in message for part in ("two classes", "expression, found '('", "one group", "nothing must be"))
    assert "\n" not in message


@pytest.mark.parametrize("name", RADIOGRAPHS)
def test_presets_survive_their_description(name):
    preset = get_radiograph_preset(name)
    body = json.loads(json.dumps(preset.to_dict()))
    assert ("classification" in body) == (name != "cxr")
    assert Preset.from_dict(body.pop("name"), body) == preset


def test_presets_without_a_classification_do_not_speak_of_one():
    for preset in preset_table().values():
        assert (preset.classification is None) == ("classification" not in preset.to_dict())
    assert get_preset("phantom").classification is None


def test_the_presets_of_radiographs():
    tasks = {name: get_radiograph_preset(name).classification for name in RADIOGRAPHS}
    assert tasks["cxr"] is None
    found = {name: (known.task, len(known.outputs)) for name, known in tasks.items() if known}
    assert found == {
        "phantom_cxr": ("multilabel", 2),
        "cxr14": ("multilabel", 14),
        "pneumonia": ("multiclass", 3),
        "pneumonia_binary": ("binary", 1),
    }


@pytest.mark.parametrize("name", RADIOGRAPHS)
def test_normalization(name):
    preset = get_radiograph_preset(name)
    fixed, image = (get_radiograph_preset(name, normalization) for normalization in ("fixed", "image"))
    assert (preset.z_score, preset.window) == ("all", None)
    assert image == preset
    assert (fixed.z_score, fixed.window) == (None, (0.0, 1.0))
    assert replace(fixed, z_score="all", window=None) == preset


def test_normalization_of_a_preset_of_ones_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    assert get_radiograph_preset(str(path)).window == (0.1, 0.9)
    image = get_radiograph_preset(str(path), "image")
    assert (image.z_score, image.window) == ("all", None)
    assert image.classification.outputs == ["ill"]
    assert get_radiograph_preset(str(path), "fixed").window == (0.0, 1.0)


@pytest.mark.parametrize("normalization", ["window", "", 1, True])
def test_unknown_normalization(normalization):
    with pytest.raises(ValueError, match=f"^--normalization {normalization}: expected image or fixed$"):
        get_radiograph_preset("cxr", normalization)


def test_presets_that_are_not_of_radiographs(tmp_path):
    with pytest.raises(
        ValueError, match=r"^--dataset phantom: a preset of 3 axes and 1 channels, expected 2 axes and 1"
    ):
        get_radiograph_preset("phantom")
    path = tmp_path / "own.yaml"
    path.write_text(OWN.replace("[X-ray]", "[red, green, blue]"))
    with pytest.raises(ValueError, match=f"^--dataset {path}: a preset of 2 axes and 3 channels"):
        get_radiograph_preset(str(path))
    with pytest.raises(ValueError, match=r"^--dataset cxr41: no such preset \(did you mean cxr14"):
        get_radiograph_preset("cxr41")


def test_a_faulty_classification_names_the_preset(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN.replace("[healthy, ill]", "[no, yes]"))  # YAML reads switches
    with pytest.raises(ValueError, match=r"^preset own: classes must be a list of different names, found \[False, Tru"):
        get_radiograph_preset(str(path))
