"""What each bundle's folder holds, and what MONAI asks of it."""

import json
import os
import re
from collections.abc import Callable
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent

from tests.common import (
    BRAIN,
    CONVVIT_CT,
    CONVVIT_UNETR,
    MAE,
    MAE_CXR,
    MIM,
    SIMCLR,
    SIMMIM_SWIN,
    SIMMIM_VIT,
    SWIN_UNETR,
    TINY,
    TINY_OF,
    UNETR,
    VIT_CXR,
)

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if (path / "configs").is_dir())
CONFIGS = [path for bundle in BUNDLES for path in sorted((bundle / "configs").glob("*.yaml"))]

ALONE = ("train.yaml", "inference.yaml")
OVERRIDES = [path for path in CONFIGS if path.name not in ALONE]


def of_bundle(path: Path) -> str:
    return path.name


def of_config(path: Path) -> str:
    return f"{path.parents[1].name}/{path.name}"


@pytest.fixture(params=BUNDLES, ids=of_bundle)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def metadata(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def test_bundles_are_found() -> None:
    assert {path.name for path in BUNDLES} == set(TRAINED)


def test_folder_is_complete(bundle: Path) -> None:
    configs = {path.name for path in (bundle / "configs").iterdir()}
    wanted = {"train.yaml", "evaluate.yaml", "inference.yaml", "demo.yaml", "metadata.json", "logging.conf"}
    assert wanted <= configs
    for name in ("LICENSE", "docs/README.md"):
        assert (bundle / name).stat().st_size > 1000, name
    assert "Apache License" in (bundle / "LICENSE").read_text(encoding="utf-8")


def test_metadata_follows_the_schema(metadata: dict) -> None:
    data = os.environ.get("MEDMIM_TEST_DATA")
    if not data:
        pytest.skip("MEDMIM_TEST_DATA is not set: the schema of metadata.json lies there")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(data) / "schema" / "meta_schema_20240725.json").read_text(encoding="utf-8"))
    assert metadata["schema"].endswith("meta_schema_20240725.json")
    jsonschema.validate(metadata, schema)


def test_metadata_names_the_pinned_versions(metadata: dict) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    named = {
        key: metadata[f"{name}_version"]
        for key, name in {"torch": "pytorch", "monai": "monai", "numpy": "numpy"}.items()
    }
    assert named | metadata["required_packages_version"] == pins


def test_metadata_versions_are_told_in_its_changelog(metadata: dict) -> None:
    assert metadata["version"] in metadata["changelog"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["version"])


def test_pinned_versions_are_installed() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: version(name).split("+")[0] for name in pins} == pins


@pytest.mark.parametrize("path", CONFIGS, ids=of_config)
def test_config_has_no_duplicate_keys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
    assert ConfigParser.load_config_file(str(path))


def test_duplicate_keys_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
    (tmp_path / "twice.yaml").write_text("epochs: 1\nepochs: 2\n")
    with pytest.raises(Exception, match="epochs"):
        ConfigParser.load_config_file(str(tmp_path / "twice.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=of_config)
def test_targets_exist(path: Path) -> None:
    parser = ConfigParser()
    parser.read_config([str(path)] if path.name in ALONE else [str(path.with_name("train.yaml")), str(path)])
    parser.parse()
    components = [item for item in parser.ref_resolver.items.values() if isinstance(item, ConfigComponent)]
    assert components
    for component in components:
        target = component.resolve_module_name()
        module, _, name = str(target).rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[name]), name)), target


@pytest.mark.parametrize("path", OVERRIDES, ids=of_config)
def test_override_files_override_what_is_there(path: Path) -> None:
    """A knob in an override file that ``train.yaml`` does not know would change nothing, without an error."""
    train = ConfigParser.load_config_file(str(path.parent / "train.yaml"))
    override = ConfigParser.load_config_file(str(path))
    text = path.read_text(encoding="utf-8")
    for key in override:
        name = key.lstrip("+").split("::")[0]
        assert name in train or f"@{key}" in text or key == "finalize", f"{key} is neither in train.yaml nor used here"


TRAINED = {  # fixtures: folders that a training of each bundle has written
    MAE: "pretrained",
    UNETR: "finetuned",
    MIM: "pretrained_mim",
    SIMMIM_VIT: "pretrained_simmim_vit",
    SIMMIM_SWIN: "pretrained_simmim_swin",
    SIMCLR: "pretrained_simclr",
    CONVVIT_UNETR: "convvit_from_scratch",
    SWIN_UNETR: "swin_from_scratch",
    BRAIN: "brain_from_scratch",
    MAE_CXR: "pretrained_cxr",
    VIT_CXR: "classified",
    CONVVIT_CT: "classified_ct",
}


@pytest.mark.parametrize(("config", "kind"), [("train", "train"), ("inference", "infer")])
def test_required_properties_are_there(
    bundle: Path,
    config: str,
    kind: str,
    data_of: Callable,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    trained = request.getfixturevalue(TRAINED[bundle.name])
    data = data_of(bundle.name)
    knobs = {"dataset_dir": data["dataset_dir"], "models_dir": str(trained / "models"), "num_workers": 0}
    knobs["output_dir"] = str(tmp_path)
    if config == "train":
        knobs |= TINY | TINY_OF[bundle.name] | data | {"cache_rate": 0.0}
    with chdir(bundle):
        workflow = ConfigWorkflow([f"configs/{config}.yaml"], logging_file=False, workflow_type=kind, **knobs)
        workflow.initialize()
        assert workflow.check_properties() == []
