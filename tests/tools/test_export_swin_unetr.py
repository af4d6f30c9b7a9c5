"""Export of ``swin_unetr_segmentation``: its network is MONAI's own class, and a preset may be coarsened."""

import json
from pathlib import Path
from typing import Any

import monai.networks.nets
import pytest
import torch
from monai.bundle import ConfigParser, load

from medmim.datasets import get_preset

BUNDLE = "swin_unetr_segmentation"


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "configs" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("workflow", ["train", "inference"])
def test_load_needs_nothing_but_monai(workflow, weights, exported, tmp_path, monkeypatch, hide_package) -> None:
    folder = exported(BUNDLE, weights=str(weights(BUNDLE)))
    expected = torch.load(folder / "models" / "model.pt", weights_only=True)
    hide_package()
    monkeypatch.chdir(tmp_path)
    network = load(BUNDLE, bundle_dir=str(folder.parent), workflow_type=workflow)
    assert type(network) is monai.networks.nets.SwinUNETR
    found = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_weights_the_network_is_that_of_train_yaml(exported) -> None:
    config = read(exported(BUNDLE), "inference.json")
    assert config["roi_size"] == [96, 96, 96]
    sizes = {"feature_size": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    assert config["network_def"].items() >= sizes.items()


def test_knobs_of_train_json_are_those_of_the_weights(weights, exported) -> None:
    config = read(exported(BUNDLE, weights=str(weights(BUNDLE))), "train.json")
    sizes = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4], "window_size": 3}
    assert config.items() >= (sizes | {"roi_size": [64, 32, 32], "use_v2": False}).items()
    parser = ConfigParser(config)
    assert parser.get_parsed_content("check#network") == parser.get_parsed_content("check#knobs") == []
    parser.update({"window_size": 4, "drop_path_rate": 0.1})
    (fault,) = parser.get_parsed_content("check#exported")
    assert "window_size 4 (exported: 3)" in fault
    assert "dropout_path_rate 0.1 (exported: 0.0)" in fault


def test_a_coarsened_preset_goes_along(weights, exported) -> None:
    folder = exported(BUNDLE, weights=str(weights(BUNDLE, dataset="phantom", spacing_factor=2)))
    train, inference = (ConfigParser(read(folder, f"{name}.json")) for name in ("train", "inference"))
    for config in (train, inference):
        config["bundle_root"] = str(folder)
    assert train.get_parsed_content("preset") == get_preset("phantom", 2)
    assert train.get_parsed_content("spacing_factor") == 1.0
    assert inference.get_parsed_content("preset").spacing == (8.0, 8.0, 8.0)
