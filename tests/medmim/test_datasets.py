"""Presets: the table, files of one's own, and every fault."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from monai.transforms import NormalizeIntensityd

from medmim.datasets import Preset, get_preset, intensity_transform, is_foreground, preset_table

GOOD = {"channels": ["CT"], "roi_size": [96, 96, 64], "patch_size": 16, "window": [-175, 250]}
RANGE = GOOD | {"window": None, "min_max": True, "channels": ["CT", "PET"]}


def test_table_holds_the_presets_of_the_readme():
    table = preset_table()
    assert {"phantom", "hippocampus", "btcv"} <= table.keys()
    for name, preset in table.items():
        assert preset.name == name
        assert all(n % preset.patch_size == 0 for n in preset.roi_size)
        assert preset.license
        assert preset.citation
        assert len(set(preset.labels.values())) == len(preset.labels)


def test_btcv():
    preset = get_preset("btcv")
    assert preset.spacing == (1.5, 1.5, 2.0)
    assert preset.window == (-175.0, 250.0)
    assert preset.roi_size == (96, 96, 96)
    assert preset.label_values == list(range(14))
    assert preset.n_classes == 14
    assert preset.labels[6] == "liver"


# name: spacing, window, roi_size, probabilities of flip, rotation and intensity (None: not named), crop_ratio
PUBLISHED = {
    "btcv": ((1.5, 1.5, 2.0), (-175, 250), (96, 96, 96), (0.1, 0.1, 0.5), (1, 1)),
    "mmwhs": ((1.5, 1.5, 1.5), (0, 1700), (96, 96, 96), None, (1, 1)),
    "amos22": ((1.5, 1.5, 2.0), (-175, 250), (96, 96, 96), (0.5, 0.5, 0.5), (1, 1)),
    "flare22": ((1.5, 1.5, 2.0), (-175, 250), (96, 96, 96), (0.2, 0.2, 0.1), (1, 1)),
    "msd03_liver": ((1, 1, 1), (-21, 189), (96, 96, 96), (0.2, 0.2, 0.1), (2, 1)),
    "msd06_lung": ((1, 1, 1), (-1000, 1000), (96, 96, 96), (0.5, 0.3, 0.1), (2, 1)),
    "msd07_pancreas": ((1.5, 1.5, 1.5), (-87, 199), (96, 96, 96), (0.5, 0.25, 0.5), (2, 1)),
    "msd08_hepatic_vessel": ((1.5, 1.5, 1.5), (0, 230), (96, 96, 96), (0.5, 0.25, 0.5), (2, 1)),
    "msd09_spleen": ((1, 1, 1), (-57, 175), (96, 96, 96), (0.5, 0.25, 0.5), (1, 1)),
    "msd10_colon": ((1.5, 1.5, 1.5), (-57, 175), (96, 96, 96), (0.5, 0.25, 0.5), (2, 1)),
    "covid_19_20": ((1.25, 1.25, 5.0), (-1000, 500), (192, 192, 32), (0.5, 0.15, 0.15), (1, 1)),
}
CLASSES = {
    "btcv": 13,
    "mmwhs": 7,
    "amos22": 15,
    "flare22": 13,
    "msd03_liver": 2,
    "msd06_lung": 1,
    "msd07_pancreas": 2,
    "msd08_hepatic_vessel": 2,
    "msd09_spleen": 1,
    "msd10_colon": 1,
    "covid_19_20": 1,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_of_the_published_fine_tuning(name):
    preset = get_preset(name)
    spacing, window, roi_size, probabilities, crop_ratio = PUBLISHED[name]
    assert preset.spacing == spacing
    assert preset.window == window
    assert preset.roi_size == roi_size
    assert preset.crop_ratio == crop_ratio
    if probabilities is not None:
        assert tuple(preset.augmentation[key] for key in ("flip", "rotate", "intensity")) == probabilities
    assert sorted(preset.labels) == list(range(1, CLASSES[name] + 1))
    assert preset.modality == "CT"
    assert preset.channels == ("CT",)
    assert preset.z_score is None
    assert preset.source.startswith("http")


def test_label_tables():
    """Where the same organ has another number in each data set."""
    number = {name: {label: value for value, label in get_preset(name).labels.items()} for name in PUBLISHED}
    assert [number[name]["liver"] for name in ("btcv", "amos22", "flare22", "msd03_liver")] == [6, 6, 1, 1]
    assert [number[name]["spleen"] for name in ("btcv", "amos22", "flare22", "msd09_spleen")] == [1, 1, 3, 1]
    assert [number[name]["pancreas"] for name in ("btcv", "amos22", "flare22", "msd07_pancreas")] == [11, 10, 4, 1]
    assert [number[name]["left kidney"] for name in ("btcv", "amos22", "flare22")] == [3, 3, 13]
    assert [number[name]["inferior vena cava"] for name in ("btcv", "amos22", "flare22")] == [9, 9, 6]
    heart = get_preset("mmwhs")
    names = {value: heart.labels[meant] for value, meant in heart.label_map.items()}
    assert names == {
        205: "myocardium of the left ventricle",
        420: "left atrium",
        500: "left ventricle",
        550: "right atrium",
        600: "right ventricle",
        820: "ascending aorta",
        850: "pulmonary artery",
    }


def test_values_of_label_files():
    preset = Preset.from_dict("mine", GOOD | {"labels": {1: "tumour"}, "label_map": {"2": 1, 1: 0, 600: 1}})
    assert preset.label_map == {2: 1, 1: 0, 600: 1}
    assert preset.label_values == [0, 1]
    assert preset.file_values == [0, 1, 2, 600]
    assert preset.n_classes == 2
    assert Preset.from_dict("mine", GOOD | {"labels": {1: "liver", 3: "spleen"}}).file_values == [0, 1, 3]


def test_defaults_of_a_small_preset():
    preset = Preset.from_dict("mine", GOOD)
    assert preset.labels == {}
    assert preset.label_map == {}
    assert preset.label_values == [0]
    assert preset.n_classes == 1
    assert preset.spacing is None
    assert preset.pixdim == (-1.0, -1.0, -1.0)
    assert preset.crop_foreground is False
    assert preset.crop_ratio == (1, 1)
    assert preset.license == "unknown"


def test_two_dimensions():
    preset = Preset.from_dict("xray", GOOD | {"roi_size": [224, 224], "spacing": [0.5, 0.5]})
    assert preset.pixdim == (0.5, 0.5)


def test_classes_may_have_gaps():
    preset = Preset.from_dict("mine", GOOD | {"labels": {"4": "tumour", 1: "organ"}})
    assert preset.labels == {4: "tumour", 1: "organ"}
    assert preset.label_values == [0, 1, 4]
    assert preset.n_classes == 5


def test_nested_regions():
    tumour = {"labels": {1: "a", 2: "b", 4: "c"}, "regions": {"core": [4, 1], "whole": [1, 2, 4], "rim": [4]}}
    preset = Preset.from_dict("mine", GOOD | tumour)
    assert list(preset.regions.items()) == [("whole", [1, 2, 4]), ("core", [1, 4]), ("rim", [4])]
    assert (preset.n_outputs, preset.n_classes) == (3, 5)
    assert preset.to_dict()["regions"] == preset.regions
    assert Preset.from_dict("mine", GOOD | {"labels": {3: "a"}}).n_outputs == 4
    assert Preset.from_dict("mine", GOOD).n_outputs == 1


def test_what_a_data_set_has_not_is_not_written():
    """So that descriptions and checkpoints of before there were these fields stay equal."""
    fields = {"regions", "channel_files", "label_file", "classification"}
    assert not fields & get_preset("btcv").to_dict().keys()
    assert list(get_preset("cxr14").to_dict())[-1] == "classification"
    assert fields & get_preset("msd_brain_tumour").to_dict().keys() == {"regions"}
    assert fields & get_preset("brats21").to_dict().keys() == {"regions", "channel_files", "label_file"}


def test_brain_tumours_in_both_conventions():
    """Edema is in the whole tumour only, and the core without the enhancing part is the same of both."""
    for name in ("msd_brain_tumour", "brats21", "phantom_brain"):
        preset = get_preset(name)
        value = {label: number for number, label in preset.labels.items()}
        core = value.get("necrotic core", value.get("non-enhancing tumour"))
        assert preset.regions == {
            "whole tumour": sorted(preset.labels),
            "tumour core": sorted([core, value["enhancing tumour"]]),
            "enhancing tumour": [value["enhancing tumour"]],
        }
        assert len(preset.channels) == 4
    assert get_preset("brats21").labels[4] == "enhancing tumour"
    assert get_preset("msd_brain_tumour").labels == get_preset("phantom_brain").labels


@pytest.mark.parametrize("name", list(preset_table()))
def test_plain_values_make_the_same_preset(name):
    preset = get_preset(name)
    body = yaml.safe_load(yaml.safe_dump(preset.to_dict()))
    assert Preset.from_dict(body.pop("name"), body) == preset


def test_window_becomes_0_to_1_clipped():
    transform = intensity_transform(Preset.from_dict("mine", GOOD))
    image = transform({"image": torch.tensor([[[-1000.0, -175.0, 37.5, 250.0, 3000.0]]])})["image"]
    torch.testing.assert_close(torch.as_tensor(image), torch.tensor([[[0.0, 0.0, 0.5, 1.0, 1.0]]]))


@pytest.mark.parametrize("kind", ["all", "nonzero"])
def test_z_score_of_each_channel(kind):
    preset = Preset.from_dict("mine", GOOD | {"window": None, "z_score": kind, "channels": ["T1", "T2"]})
    transform = intensity_transform(preset)
    assert isinstance(transform, NormalizeIntensityd)
    image = torch.tensor([[[0.0, 0.0, 1.0, 3.0, 5.0]], [[0.0, 10.0, 10.0, 40.0, 60.0]]])
    result = torch.as_tensor(transform({"image": image.clone()})["image"])
    for before, after in zip(image.flatten(1).tolist(), result.flatten(1).tolist(), strict=True):
        counted = [v for v in before if kind == "all" or v != 0]
        mean = sum(counted) / len(counted)
        std = (sum((v - mean) ** 2 for v in counted) / len(counted)) ** 0.5
        expected = [0.0 if kind == "nonzero" and v == 0 else (v - mean) / std for v in before]
        assert after == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_range_of_each_channel_becomes_0_to_1(dtype):
    transform = intensity_transform(Preset.from_dict("mine", RANGE))
    image = np.random.default_rng(0).uniform([[[[-1000]]], [[[7]]]], [[[[3000]]], [[[90]]]], (2, 4, 3, 5)).astype(dtype)
    found = np.asarray(transform({"image": torch.from_numpy(image.copy())})["image"])
    assert found.dtype == np.float32
    for before, after in zip(image.astype(float), found, strict=True):
        np.testing.assert_allclose(after, (before - before.min()) / (before.max() - before.min()), atol=1e-6)
        assert (after.min(), after.max()) == (0, 1)


def test_a_channel_of_one_value_stays_finite():
    image = torch.stack([torch.full((3, 3, 3), 7.0), torch.rand(3, 3, 3)])
    found = intensity_transform(Preset.from_dict("mine", RANGE))({"image": image})["image"]
    assert not found[0].any()
    assert found[1].max() == 1


def test_foreground_is_what_lies_above_the_lower_end():
    image = torch.tensor([[[-1000.0, -175.0, -174.0, 0.0]], [[5.0, 5.0, 5.0, 6.0]]])
    expected = {
        "window": [[False, False, True, True], [True] * 4],
        "z_score": [[True, True, True, False], [True] * 4],
        "min_max": [[False, True, True, True], [False, False, False, True]],  # of each channel its own
    }
    bodies = {"window": GOOD, "z_score": GOOD | {"window": None, "z_score": "all"}, "min_max": RANGE}
    for field, body in bodies.items():
        found = is_foreground(image, Preset.from_dict("mine", body | {"channels": ["CT", "PET"]}))
        assert found.squeeze(1).tolist() == expected[field], field


def test_descriptions_without_min_max_stay_as_they_were():
    before = {  # what stood in the files before there was this field
        "name", "description", "modality", "channels", "spacing", "window", "z_score", "crop_foreground", "roi_size",
        "patch_size", "augmentation", "crop_ratio", "labels", "label_map", "surface_tolerance", "license", "citation",
        "source",
    }  # fmt: skip
    body = Preset.from_dict("mine", GOOD).to_dict()
    assert set(body) == before
    assert Preset.from_dict(body.pop("name"), body).min_max is False
    assert Preset.from_dict("mine", RANGE).to_dict().keys() == before | {"min_max"}
    assert Preset.from_dict("mine", GOOD | {"min_max": False}) == Preset.from_dict("mine", GOOD)


def test_presets_of_whole_volumes():
    table = preset_table()
    chest, glands = table["cc_ccii"], table["adrenalmnist3d"]
    assert chest.roi_size == (384, 384, 32)
    assert chest.classification.outputs == ["Normal", "CP", "NCP"]
    assert glands.classification.outputs == ["hyperplasia"]
    for name, preset in table.items():
        assert preset.min_max is (preset in (chest, glands)), name
    for preset in (chest, glands):
        assert (preset.window, preset.z_score, preset.spacing) == (None, None, None)
    for field in ("channels", "spacing", "window", "z_score", "min_max"):  # an encoder of the one fits the other
        assert getattr(table["phantom_ct"], field) == getattr(table["phantom"], field)


@pytest.mark.parametrize(("name", "near"), [("hipocampus", "hippocampus"), ("BTCV", ""), ("fantom", "phantom")])
def test_unknown_preset_offers_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"^--dataset {name}: no such preset") as error:
        get_preset(name)
    assert f"(did you mean {near}" in str(error.value) or not near
    assert f"known are {', '.join(sorted(preset_table()))}, or give" in str(error.value)


def test_coarser_voxels():
    plain, coarse = get_preset("btcv"), get_preset("btcv", 1.5)
    assert coarse.spacing == tuple(1.5 * spacing for spacing in plain.spacing)
    assert dataclasses.replace(coarse, spacing=plain.spacing) == plain
    assert get_preset("btcv", 1) == plain


@pytest.mark.parametrize("factor", [0, -1, "two", True, None, float("inf"), float("nan")])
def test_a_factor_that_is_none(factor):
    with pytest.raises(ValueError, match=rf"^--spacing_factor {factor}: expected a number from 0.1 to 10$"):
        get_preset("phantom", factor)


def test_a_factor_needs_a_spacing(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("channels: [CT]\nwindow: [0, 1]\nroi_size: [8, 8, 8]\npatch_size: 8\n")
    assert get_preset(str(path), 1.0).spacing is None
    with pytest.raises(ValueError, match=r"^--spacing_factor 2: preset own keeps each scan's own spacing: leave the"):
        get_preset(str(path), 2)


def test_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"labels": {1: "liver"}}))
    preset = get_preset(str(path))
    assert preset.name == "mine"
    assert preset.labels == {1: "liver"}
    assert preset.roi_size == (96, 96, 64)
    assert dataclasses.replace(preset, name="other") == Preset.from_dict("other", GOOD | {"labels": {1: "liver"}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"roi_size: [1, 2", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"- 1\n- 2\n", "expected the fields of one preset, found list"),
        (b"", "expected the fields of one preset, found NoneType"),
    ],
)
def test_faulty_file(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--dataset {path}: {message}") as error:
        get_preset(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi_sise": [1, 2, 3]}, r"unknown field 'roi_sise' \(did you mean roi_size"),
        ({"roi_size": [96]}, r"roi_size must be 2 or 3 positive integers, found \[96\]"),
        ({"roi_size": [96, 96, 0]}, "roi_size must be"),
        ({"roi_size": 96}, "roi_size must be"),
        ({"spacing": [1.0, 1.0]}, r"spacing must be 3 positive numbers in mm or null, found \[1\.0, 1\.0\]"),
        ({"spacing": [1.0, 1.0, -1.0]}, "spacing must be"),
        ({"window": None}, "exactly one of window, z_score and min_max must be set"),
        ({"z_score": "all"}, "exactly one of window, z_score and min_max must be set"),
        ({"min_max": True}, "exactly one of window, z_score and min_max must be set"),
        ({"window": None, "min_max": True, "z_score": "all"}, "exactly one of window, z_score and min_max must be set"),
        ({"window": None, "min_max": "yes"}, "min_max must be true or false, found 'yes'"),
        ({"window": None, "min_max": 1}, "min_max must be true or false, found 1"),
        ({"min_max": None}, "min_max must be true or false, found None"),
        ({"window": [250, -175]}, r"window must be \[lower, upper\], found \[250, -175\]"),
        ({"window": None, "z_score": "some"}, "z_score must be all, nonzero or null, found 'some'"),
        ({"patch_size": 0}, "patch_size must be a positive integer, found 0"),
        ({"patch_size": "16"}, "patch_size must be a positive integer, found '16'"),
        ({"augmentation": {"flip": 0.1}}, "augmentation must give flip, rotate and intensity"),
        ({"channels": []}, r"channels must be a list of names, found \[\]"),
        ({"channels": "CT"}, "channels must be a list of names, found 'CT'"),
        ({"roi_size": [True, 96, 96]}, "roi_size must be"),
        ({"spacing": 1.5}, r"spacing must be 3 positive numbers in mm or null, found 1\.5"),
        ({"spacing": [1.0, 1.0, "1"]}, "spacing must be"),
        ({"spacing": [1.0, 1.0, float("nan")]}, "spacing must be"),
        ({"window": 250}, r"window must be \[lower, upper\], found 250"),
        ({"window": ["a", "b"]}, r"window must be \[lower, upper\], found \['a', 'b'\]"),
        ({"window": [0, float("inf")]}, "window must be"),
        ({"crop_foreground": "no"}, "crop_foreground must be true or false, found 'no'"),
        ({"crop_ratio": 1}, r"crop_ratio must be \[foreground, background\], .*, found 1"),
        ({"crop_ratio": [0, 0]}, r"crop_ratio must be .* not both 0, found \[0, 0\]"),
        ({"crop_ratio": [1, -1]}, "crop_ratio must be"),
        ({"crop_ratio": [1, 1, 1]}, "crop_ratio must be"),
        ({"augmentation": None}, "augmentation must give flip, rotate and intensity, found None"),
        ({"augmentation": {1: 0.1, "flip": 0.1}}, "augmentation must give flip, rotate and intensity"),
        (
            {"augmentation": {"flip": 2, "rotate": 0, "intensity": 0}},
            r"augmentation must give probabilities in \[0, 1\]",
        ),
        ({"augmentation": {"flip": "0", "rotate": 0, "intensity": 0}}, "augmentation must give probabilities"),
        ({"surface_tolerance": None}, "surface_tolerance must be a number of mm, found None"),
        ({"patch_size": [8, 8, 8]}, r"patch_size must be a positive integer, found \[8, 8, 8\]"),
        ({"patch_size": True}, "patch_size must be a positive integer, found True"),
        ({"channels": [1]}, "channels must be a list of names"),
        ({1: 2}, "unknown field 1"),
        (
            {"channel_files": ["_a"], "classification": {"task": "multiclass", "classes": ["a", "b"]}},
            "channel_files cannot stand beside classification",
        ),
        ({"labels": None}, "labels must map positive values to names"),
        ({"labels": {"liver": 1}}, r"labels must map positive values to names, {1: liver}, found {'liver': 1}"),
        ({"labels": {"liver": "liver"}}, "labels must map positive values to names, .* found value 'liver'"),
        ({"labels": {1.5: "liver"}}, r"labels must map positive values to names, .* found value 1\.5"),
        ({"labels": {True: "liver"}}, "labels must map positive values to names, .* found value True"),
        ({"labels": {300: "liver"}}, r"labels must .* value at most 255 \(uint8\), found value 300"),
        ({"labels": {0: "background", 1: "liver"}}, "labels must map positive values to names"),
        ({"labels": ["liver"]}, "labels must map positive values to names"),
        ({"label_map": None}, r"label_map must map positive values of label files .*, {500: 3}, found None"),
        ({"label_map": {0: 1}, "labels": {1: "a"}}, "label_map must map positive values of label files"),
        ({"label_map": {2.5: 1}, "labels": {1: "a"}}, "label_map must map positive values of label files"),
        ({"label_map": {500: 2}, "labels": {1: "a"}}, "label_map must map to 0 or a value of labels, found 500: 2"),
        ({"label_map": {500: True}, "labels": {1: "a"}}, "label_map must map to 0 or a value of labels, found 500: T"),
        ({"regions": [1]}, r"regions must map names to lists of values of labels, .*, found \[1\]"),
        ({"regions": {"a": []}, "labels": {1: "a"}}, "regions must map names to lists"),
        ({"regions": {"a": 1}, "labels": {1: "a"}}, "regions must map names to lists"),
        ({"regions": {"a": ["1"]}, "labels": {1: "a"}}, "regions must map names to lists"),
        (
            {"regions": {"a": [1], "b": [1, 3]}, "labels": {1: "a", 2: "b"}},
            r"regions must hold values of labels \(\[1, 2\]\), found 3 of b",
        ),
        (
            {"regions": {"a": [1, 2]}, "labels": {1: "a", 2: "b"}},
            r"regions must lie in each other, .* found a: \[1, 2\] as the smallest",
        ),
        (
            {"regions": {"a": [1], "b": [2, 3]}, "labels": {1: "a", 2: "b", 3: "c"}},
            r"regions must lie in each other, .* found b: \[2, 3\] around \[1\]",
        ),
        (
            {"regions": {"a": [1], "b": [1]}, "labels": {1: "a"}},
            r"regions must lie in each other, .* found b: \[1\] around \[1\]",
        ),
        (
            {"regions": {"a": [1], "b": [1, 2, 3]}, "labels": {1: "a", 2: "b", 3: "c"}},
            r"regions must lie in each other, .* found b: \[1, 2, 3\] around \[1\]",
        ),
        (
            {"regions": {"a": [1], "b": [1, 2]}, "labels": {1: "a", 2: "b", 3: "c"}},
            r"regions must hold each value of labels, found none with \[3\]",
        ),
        ({"channel_files": "_t1"}, "channel_files must be a list of endings of names, .* found '_t1'"),
        ({"channel_files": [""]}, "channel_files must be a list of endings"),
        (
            {"channel_files": None, "label_file": "_seg"},
            "channel_files must be a list of endings of names, .* found None",
        ),
        ({"channel_files": 3, "label_file": "_seg"}, "channel_files must be a list of endings of names, .* found 3"),
        ({"channel_files": ["_t1", "_t2"]}, "channel_files must give an ending for each of 1 channels, found"),
        ({"channel_files": ["_t1"] * 2, "channels": ["a", "b"]}, r"channel_files must differ, found \['_t1', '_t1'\]"),
        ({"label_file": None}, "label_file must be the ending of a name, such as _seg, found None"),
        ({"label_map": {500: "1"}, "labels": {1: "a"}}, "label_map must map to 0 or a value of labels, found 500: '1'"),
    ],
)
def test_faulty_field_is_named(change, message):
    with pytest.raises(ValueError, match=f"^preset mine: {message}") as error:
        Preset.from_dict("mine", GOOD | change)
    assert "\n" not in str(error.value)


def test_every_fault_is_listed():
    with pytest.raises(ValueError, match=r"^preset mine: field 'channels' is missing; field 'roi_size' is missing$"):
        Preset.from_dict("mine", {"patch_size": 8, "window": [0, 1]})
    with pytest.raises(ValueError, match=r"^preset mine: channels must .*; patch_size must "):
        Preset.from_dict("mine", GOOD | {"patch_size": -1, "channels": None})
