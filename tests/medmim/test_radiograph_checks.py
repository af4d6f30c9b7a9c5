"""Checks of radiographs before a run, and the synthetic ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmim import radiograph_checks
from medmim.datasets import Preset, get_radiograph_preset
from medmim.description import describe, write_description
from medmim.image_checks import check_image_data
from medmim.image_lists import load_image_list
from medmim.networks import ViTClassifier
from medmim.phantom_radiographs import FINDINGS, phantom_radiograph, write_phantom_radiographs
from medmim.radiograph_checks import check_image_inference, check_radiograph_preset, check_radiographs
from medmim.transforms import ScanError
from medmim.transforms.radiographs import load_radiograph

BODY = {"channels": ["X-ray"], "roi_size": [8, 8], "patch_size": 4, "z_score": "all"}
ABC = Preset.from_dict("own", BODY | {"classification": {"task": "multiclass", "classes": ["a", "b", "c"]}})


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read from now on."""
    read = []

    def note(path: str):
        read.append(Path(path).name)
        return load_radiograph(path)

    monkeypatch.setattr(radiograph_checks, "load_radiograph", note)
    return read


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


def test_before_a_prediction(images, tmp_path):
    root, out = images({"a": 2}), tmp_path / "out"
    with pytest.raises(ValueError, match=r"model\.json"):
        check_image_inference(str(tmp_path), str(root), str(out))
    network = ViTClassifier(1, 2, (16, 16), 8, hidden_size=24, mlp_dim=48, num_layers=1, num_heads=2, spatial_dims=2)
    write_description(describe(network, [16, 16], get_radiograph_preset("cxr")), tmp_path / "model.json")
    check_image_inference(str(tmp_path), str(root), str(out))
    assert (out / ".medmim_results").is_file()
    with pytest.raises(ValueError, match=f"^--output_dir {root}: the folder of the data: choose another"):
        check_image_inference(str(tmp_path), str(root), str(root))
    (root / "a" / "1.png").write_bytes(b"broken")
    with pytest.raises(ScanError, match=f"^{root}/a/1.png: not readable"):
        check_image_inference(str(tmp_path), str(root), str(out))
    check_image_inference(str(tmp_path), str(root), str(out), check_scans=False, task="classification")
    with pytest.raises(ValueError, match=f"^--models_dir {tmp_path}: a ViTClassifier, a model of classification, exp"):
        check_image_inference(str(tmp_path), str(root), str(out), task="pretraining")


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
