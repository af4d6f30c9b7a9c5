"""What the continuous integration of MONAI's model zoo asks of a bundle, asked of ours after export.

The zoo's checks are those of ``ci/verify_bundle.py``, ``ci/get_bundle_requirements.py``, ``ci/unit_tests`` and
``CONTRIBUTING.md`` in Project-MONAI/model-zoo.
"""

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, create_workflow, verify_metadata, verify_net_in_out
from monai.bundle.properties import InferProperties, MetaProperties
from monai.utils import set_determinism

from tests.common import CLASSIFICATION, MAE, OTHERS, UNETR, VIT_CXR, WHOLE, rows
from tools.export import export

BUNDLES = [MAE, UNETR, VIT_CXR, *[pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name != VIT_CXR]]
LARGEST_FILE = 25 * 2**20  # bytes


@pytest.fixture(params=BUNDLES)
def folder(request: pytest.FixtureRequest, weights, exported, data_of: Callable) -> Path:
    """An exported bundle with weights, of a coarse preset so that a scan is a few windows."""
    trained = weights(request.param, dataset=data_of(request.param)["dataset"])
    return exported(request.param, weights=str(trained))


@pytest.fixture
def metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))


def paths(folder: Path, config: str) -> dict[str, str]:
    return {
        "bundle_root": str(folder),
        "config_file": str(folder / "configs" / config),
        "meta_file": str(folder / "configs" / "metadata.json"),
    }


def test_necessary_and_preferred_files(folder: Path) -> None:
    for name in ("configs/metadata.json", "LICENSE", "models/model.pt", "configs/inference.json"):
        assert (folder / name).is_file(), name
    assert (folder / "docs" / "data_license.txt").is_file()  # the data have terms of their own
    assert (folder / "docs" / "README.md").is_file()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_files_are_small_without_weights(bundle: str, exported) -> None:
    sizes = {path: path.stat().st_size for path in exported(bundle).rglob("*") if path.is_file()}
    assert max(sizes.values()) < LARGEST_FILE
    assert not [path for path in sizes if path.suffix in (".pt", ".ts", ".safetensors")]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_version_and_changelog(bundle: str, tmp_path: Path) -> None:
    export(bundle, output_dir=str(tmp_path))
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        metadata = json.loads(content.read(f"{bundle}/configs/metadata.json"))
    assert metadata["version"] in metadata["changelog"]
    name_and_version = re.fullmatch(r"(.+)_v(\d.*)", archive.stem)
    assert name_and_version is not None
    assert name_and_version.groups() == (bundle, metadata["version"])
    assert metadata["name"]  # shown in the zoo's browser


def test_metadata_follows_its_schema(folder: Path) -> None:
    data = os.environ.get("MEDMIM_TEST_DATA")
    if not data:
        pytest.skip("MEDMIM_TEST_DATA is not set: the schema of metadata.json lies there")
    (folder / "eval").mkdir()
    schema = folder / "eval" / "schema.json"
    shutil.copy(Path(data) / "schema" / "meta_schema_20240725.json", schema)
    before = schema.read_bytes()
    verify_metadata(meta_file=str(folder / "configs" / "metadata.json"), filepath=str(schema))
    assert schema.read_bytes() == before  # nothing was downloaded over it


def test_requirements_of_the_metadata_can_be_installed(metadata: dict) -> None:
    pins = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    pins |= metadata["required_packages_version"]
    assert {name: version(name).split("+")[0] for name in pins} == pins


@pytest.mark.parametrize("config", ["inference.json", "train.json"])
def test_data_shape(folder: Path, config: str) -> None:
    verify_net_in_out(net_id="network_def", device="cpu", **paths(folder, config))


def test_torchscript(folder: Path, metadata: dict) -> None:
    script = folder / "models" / "verify_model.ts"
    weights = folder / "models" / "model.pt"
    files = paths(folder, "inference.json")
    about = metadata["network_data_format"]["inputs"]["image"]
    size, channels = about["spatial_shape"], about["num_channels"]
    only_traced = re.search("convvit|swin", folder.name)  # as their pages say
    traced = {"use_trace": True, "input_shape": [2, channels, *size]} if only_traced else {}
    ckpt_export(net_id="network_def", filepath=str(script), ckpt_file=str(weights), **files, **traced)
    network = ConfigParser.load_config_file(files["config_file"])
    network = ConfigParser(network).get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.rand(2, channels, *size)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(script)(image), network(image), rtol=1e-4, atol=1e-4)


def test_names_of_ids(folder: Path) -> None:
    train, inference = (
        ConfigParser(ConfigParser.load_config_file(folder / "configs" / f"{name}.json"))
        for name in ("train", "inference")
    )
    for name in ("bundle_root", "device", "dataset_dir", "output_dir", "network_def"):
        assert name in train
        assert name in inference
    assert "inferer" in inference
    for name in ("trainer", "trainer#max_epochs", "dataset", "dataset#data", "handlers", "preprocessing", "inferer"):
        assert f"train#{name}" in train
    for name in ("evaluator", "handlers", "dataset", "dataset#data", "preprocessing", "inferer", "key_metric"):
        assert f"validate#{name}" in train
    validation = [handler for handler in train["train#handlers"] if "ValidationHandler" in str(handler)]
    assert [handler["interval"] for handler in validation][-1] == "@val_interval"


def run(config_files: list[Path], kind: str, **knobs: Any) -> None:
    """Check the properties of a workflow and run it."""
    search_path = sys.path.copy()
    workflow = ConfigWorkflow(
        [str(path) for path in config_files], workflow_type=kind, logging_file=False, num_workers=0, **knobs
    )
    try:
        workflow.initialize()
        if len(config_files) == 1:  # the zoo does not ask this of evaluate, which stands after train
            assert workflow.check_properties() == []
        workflow.run()
        workflow.finalize()
    finally:
        sys.path[:] = search_path
        set_determinism(None)


def test_properties_and_runs(folder: Path, data_of: Callable, tmp_path: Path) -> None:
    data = Path(data_of(folder.name)["dataset_dir"])
    knobs = {"bundle_root": str(folder), "dataset_dir": str(data), "output_dir": str(tmp_path / "output")}
    train, evaluate, inference = (
        folder / "configs" / name for name in ("train.json", "evaluate.yaml", "inference.json")
    )
    small = {"epochs": 1, "warmup_epochs": 0, "batch_size": 2, "val_interval": 1}
    small |= {} if folder.name in WHOLE else {"crops_per_scan": 1}
    if "pretraining" in folder.name and "simclr" not in folder.name:
        small |= {"decoder_hidden_size": 24, "decoder_num_layers": 1, "decoder_num_heads": 4}
    if folder.name.startswith("mim"):
        small |= {"crop_size": [32, 32, 32], "levels::1::samples": 2, "levels::2::samples": 1}
    before = (folder / "models" / "model.pt").read_bytes()
    run([train], "train", **knobs, **small)
    assert (folder / "models" / "model.pt").read_bytes() != before
    run([train, evaluate], "train", **knobs, **small)
    images = data / ("images" if folder.name in WHOLE else "imagesTr")
    run([inference], "infer", **knobs | {"dataset_dir": str(images)})
    if folder.name in CLASSIFICATION:
        assert len(rows(tmp_path / "output" / "probabilities.csv")) == len(list(images.iterdir()))
    else:
        assert len(list((tmp_path / "output").glob("*.nii.gz"))) == len(list(images.iterdir()))


def test_properties_of_the_metadata(folder: Path) -> None:
    workflow = create_workflow(workflow_type="inference", logging_file=False, **paths(folder, "inference.json"))
    required = {name: MetaProperties[name] for name in MetaProperties}
    workflow.properties = required | {"network_def": InferProperties["network_def"]}
    assert workflow.check_properties() == []
