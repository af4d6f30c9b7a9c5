"""Which reader of lists a preset asks for, and that every knob reaches it."""

import json
from pathlib import Path

import pytest

from medmim.datalists import load_datalist
from medmim.datasets import Preset
from medmim.image_lists import load_image_list
from medmim.splits import load_split

CLASSES = {"classification": {"task": "multiclass", "classes": ["a", "b"]}}
KNOBS = {"fold": 1, "folds": 4, "test_fold": 3, "label_fraction": 0.5}


def preset(axes: int, **fields) -> Preset:
    body = {"channels": ["CT"], "roi_size": [16] * axes, "patch_size": 16, "window": [0, 1]}
    return Preset.from_dict("own", body | fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Volumes with label maps and a Decathlon list of half of them, classes as folders; and radiographs."""
    for i in range(24):
        for name in (f"{'ab'[i % 2]}/{i:02d}.nii.gz", f"{'ab'[i % 2]}/{i:02d}.png", f"maps/labelsTr/{i:02d}.nii.gz"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
    entries = [{"image": f"a/{i:02d}.nii.gz", "label": f"maps/labelsTr/{i:02d}.nii.gz"} for i in range(0, 24, 2)]
    for name, chosen in (("dataset.json", entries), ("other.json", entries[:8])):
        (tmp_path / name).write_text(json.dumps({"training": chosen}))
    lines = ["image,label", *[f"{'ab'[i % 2]}/{i:02d}{suffix},a" for i in range(12) for suffix in (".png", ".nii.gz")]]
    for suffix in (".png", ".nii.gz"):
        chosen = [line for line in lines if line.endswith((f"{suffix},a", "label"))]
        (tmp_path / f"list{suffix}.csv").write_text("\n".join(chosen))
    return tmp_path


def names(items: list) -> list[str]:
    return [Path(item["image"]).name for item in items]


@pytest.mark.parametrize("labelled", [True, False])
def test_segmentation_and_its_pretraining_read_a_decathlon_list(folder, labelled):
    split = load_split(folder, preset(3), labelled=labelled, **KNOBS)
    assert split == load_datalist(folder, None, labelled, 1, 4, 0.5, test_fold=3)
    assert [len(items) for items in (split.training, split.validation, split.test)] == [3, 3, 3]
    assert all(isinstance(item.get("label"), str) is labelled for item in split.training)
    listed = load_split(folder, preset(3), folder / "other.json", labelled, **KNOBS)
    assert [len(items) for items in (listed.training, listed.validation, listed.test)] == [2, 2, 2]
    assert len(load_split(folder, preset(3), labelled=labelled).test) == 0


@pytest.mark.parametrize(("axes", "suffix"), [(2, ".png"), (3, ".nii.gz")])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_preset_with_classes_reads_a_list_of_images(folder, axes, suffix, labelled):
    own = preset(axes, **CLASSES)
    split = load_split(folder, own, labelled=labelled, **KNOBS)
    assert split == load_image_list(folder, own, None, labelled, 1, 4, 3, 0.5)
    found = names(split.training + split.validation + split.test)
    assert len(found) == (18 if labelled else 24)  # half of twelve, six and six; a share of labels only
    assert all(name.endswith(suffix) for name in found)
    assert all((item.get("label") in ([1, 0], [0, 1])) is labelled for item in split.training)
    listed = load_split(folder, own, folder / f"list{suffix}.csv", labelled)
    assert set(names(listed.training + listed.validation)) == {f"{i:02d}{suffix}" for i in range(12)}
    assert {tuple(item["label"]) for item in listed.training if labelled} == ({(1, 0)} if labelled else set())


def test_pretraining_and_classification_keep_the_same_volumes_apart(folder):
    own = preset(3, **CLASSES)
    splits = [load_split(folder, own, labelled=labelled, **(KNOBS | {"label_fraction": 1.0})) for labelled in (1, 0)]
    for part in ("validation", "test"):
        assert names(getattr(splits[0], part)) == names(getattr(splits[1], part))
    assert set(names(splits[0].training)) == set(names(splits[1].training))


def test_scans_of_two_axes_without_classes_are_scans(folder):
    split = load_split(folder, preset(2), labelled=False, **KNOBS)
    assert split == load_datalist(folder, None, False, 1, 4, 0.5, test_fold=3)
