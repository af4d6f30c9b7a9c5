"""``python -m tools export``: what is in the zip, how it loads, and what is refused."""

import hashlib
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import monai.networks.nets
import pytest
import torch
import yaml
from monai.apps.utils import extractall
from monai.bundle import ConfigParser, ConfigWorkflow, download, load

import tools.export
from medmim import package
from medmim.networks import UNETR, ConvViT, FeatureExtractor
from medmim.version import __version__
from tools.export import export
from tools.export_configs import check_texts, stock_arguments, without_infinity

MAE, SEGMENTATION, MIM = "mae_vit_pretraining", "unetr_segmentation", "mim_convvit_pretraining"
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"img_size": [16, 24, 16], "patch_size": [8, 8, 8], "num_layers": 4}  # needs our UNETR
DEEP = {"img_size": [32, 48, 32], "patch_size": [16, 16, 16], "num_layers": 12}  # MONAI's does
both = pytest.mark.parametrize("bundle", [MAE, SEGMENTATION])


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "configs" / name).read_text(encoding="utf-8"))


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / "model.pt", weights_only=True)


def has_weights(network: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = network.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def one_line(ending: pytest.ExceptionInfo, request: pytest.FixtureRequest) -> str:
    message = str(ending.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    request.node.user_properties.append(("error", message))
    return message


# ------------------------------------------------------------------------------------------------- the zip


@both
@pytest.mark.parametrize("with_weights", [False, True])
def test_layout(bundle: str, with_weights: bool, weights, exported) -> None:
    folder = exported(bundle, weights=str(weights(bundle)), safetensors=True) if with_weights else exported(bundle)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    configs = {path.name for path in (ROOT / "bundles" / bundle / "configs").iterdir()} | {"train.json"}
    configs |= {"inference.json"}
    assert {name for name in files if name.startswith("configs/")} == {f"configs/{name}" for name in configs}
    assert {"LICENSE", "docs/README.md", "docs/data_license.txt", "requirements.txt"} <= files
    source = ROOT / "shared" / "medmim"
    package_files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix != ".pyc" and p.is_file()}
    assert {name for name in files if name.startswith("medmim/")} == {f"medmim/{name}" for name in package_files}
    assert {"medmim/presets.yaml", "medmim/py.typed"} <= files
    models = {name.removeprefix("models/") for name in files if name.startswith("models/")}
    expected = {"model.pt", "model.json", "model.safetensors"} if with_weights else {"README.txt"}
    if with_weights and bundle == MAE:
        expected |= {"encoder.pt", "encoder.safetensors"}
    assert models == expected
    assert {name.split("/")[0] for name in files} <= {
        *("LICENSE", "requirements.txt", "configs", "docs", "medmim", "models")
    }
    assert "-e" not in (folder / "requirements.txt").read_text().split()


def test_members_are_plain_files_below_one_folder(tmp_path: Path) -> None:
    export(SEGMENTATION, output_dir=str(tmp_path))
    with zipfile.ZipFile(tmp_path / f"{SEGMENTATION}_v{__version__}.zip") as archive:
        for entry in archive.infolist():
            assert entry.filename.startswith(f"{SEGMENTATION}/")
            assert ".." not in entry.filename.split("/")
            assert stat.S_ISREG(entry.external_attr >> 16), entry.filename  # no link, no folder
            assert stat.S_IMODE(entry.external_attr >> 16) == 0o644
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        text = b"".join(archive.read(name) for name in archive.namelist())
    assert str(ROOT).encode() not in text
    assert str(Path.home()).encode() + b"/" not in text


@both
def test_same_bytes_elsewhere(bundle: str, weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = weights(bundle)
    export(bundle, weights=str(trained), output_dir=str(tmp_path / "here"), safetensors=True)
    copy = tmp_path / "another checkout"
    shutil.copytree(ROOT / "bundles", copy / "bundles")
    shutil.copytree(ROOT / "shared" / "medmim", copy / "medmim")
    moved = copy / "best.pt"  # torch.save puts the name of the file into it, and so may a copy
    torch.save(torch.load(trained, weights_only=True), moved)
    for name in ("model.json", "encoder.pt"):
        if trained.with_name(name).exists():
            shutil.copy(trained.with_name(name), copy / name)
    for path in copy.rglob("*"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o700)
    (copy / "bundles" / bundle / "output").mkdir(exist_ok=True)
    (copy / "bundles" / bundle / "output" / "checkpoint.pt").write_bytes(b"x")
    (copy / "medmim" / "__pycache__").mkdir(exist_ok=True)
    (copy / "medmim" / "__pycache__" / "stale.pyc").write_bytes(b"x")
    monkeypatch.setattr(tools.export, "BUNDLES", copy / "bundles")
    monkeypatch.setattr(tools.export, "PACKAGE", copy / "medmim")
    mask = os.umask(0o077)
    try:
        export(bundle, weights=str(moved), output_dir=str(tmp_path / "there"), safetensors=True)
    finally:
        os.umask(mask)
    name = f"{bundle}_v{__version__}.zip"
    for file in (name, f"{name}.sha256"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


def test_checksum_is_what_sha256sum_reads(tmp_path: Path) -> None:
    export(MAE, output_dir=str(tmp_path))
    (archive,) = tmp_path.glob("*.zip")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert archive.name == f"{MAE}_v{__version__}.zip"
    assert (tmp_path / f"{archive.name}.sha256").read_text() == f"{digest}  {archive.name}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, f"{archive.name}.sha256"]


def test_bundle_may_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "bundles" / MAE, tmp_path / "my_pretraining")
    monkeypatch.chdir(tmp_path)
    export("my_pretraining")
    with zipfile.ZipFile(tmp_path / "dist" / f"my_pretraining_v{__version__}.zip") as archive:
        assert "my_pretraining/configs/train.json" in archive.namelist()


def test_extraction_stays_in_its_folder(tmp_path: Path) -> None:
    """MONAI's ``extractall``, which ``download`` uses, refuses what leaves the folder; ours passes."""
    for name in ("../outside.txt", "/outside.txt", "bundle/../../outside.txt"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr(name, "x")
        with pytest.raises(ValueError, match="Unsafe path"):
            download(name="bad", url=(tmp_path / "bad.zip").as_uri(), bundle_dir=str(tmp_path / f"to{len(name)}"))
        assert not list(tmp_path.rglob("outside.txt"))
    export(MAE, output_dir=str(tmp_path / "dist"))
    extractall(tmp_path / "dist" / f"{MAE}_v{__version__}.zip", tmp_path / "in")
    assert (tmp_path / "in" / MAE / "LICENSE").is_file()


def test_a_file_that_would_leave_the_folder_is_not_written(tmp_path: Path) -> None:
    for name in ("../x", "/x", "a/../../x", "..\\x"):
        with pytest.raises(ValueError, match="outside"):
            tools.export.write_zip(tmp_path / "x.zip", "bundle", {name: b""})


# ------------------------------------------------------------------------------------------------- weights and configs


@both
def test_weights_are_plain_tensors(bundle: str, weights, exported) -> None:
    trained = weights(bundle)
    folder = exported(bundle, weights=str(trained), safetensors=True)
    expected = torch.load(trained, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state(folder).values())
    assert state(folder).keys() == expected.keys()
    assert all(torch.equal(state(folder)[name], expected[name]) for name in expected)
    from safetensors.torch import load_file

    assert all(
        torch.equal(value, expected[name]) for name, value in load_file(folder / "models" / "model.safetensors").items()
    )
    if bundle == MAE:
        encoder = torch.load(folder / "models" / "encoder.pt", weights_only=True)
        assert encoder["description"]["network"]["name"] == "ViT"
        assert all(torch.equal(value, expected[f"encoder.{name}"]) for name, value in encoder["state_dict"].items())


@both
def test_configs_are_the_yaml_ones(bundle: str, exported) -> None:
    """Without weights ``train.json`` is ``train.yaml``, but for the check that export puts in."""
    folder = exported(bundle)
    config = read(folder, "train.json")
    original = yaml.safe_load((ROOT / "bundles" / bundle / "configs" / "train.yaml").read_text(encoding="utf-8"))
    assert config.pop("run") == ["@package", *original.pop("run")]
    assert config.pop("network_def").pop("_requires_") == "@package"
    assert original.pop("network_def")
    assert config.pop("package")["version"] == __version__
    assert config == without_infinity(original)
    assert "Infinity" not in (folder / "configs" / "train.json").read_text()
    for path in (folder / "configs").glob("*.yaml"):
        source = ROOT / "bundles" / bundle / "configs" / path.name
        found, original = (yaml.safe_load(p.read_text(encoding="utf-8")) for p in (path, source))
        assert found.pop("run", None) == (["@package", *original.pop("run")] if "run" in original else None)
        assert ("package" in found) == ("bundle_root" in original)  # the files that stand alone
        found.pop("package", None)
        assert found == original


@both
def test_inference_without_weights_is_for_the_network_of_train_yaml(bundle: str, exported) -> None:
    config = read(exported(bundle), "inference.json")
    assert config["roi_size"] == [96, 96, 96]
    assert config["description"]["preset"]["name"] == "btcv"
    arguments = config["network_def"].get("encoder", config["network_def"])
    assert (arguments["hidden_size"], arguments["img_size"]) == (768, [96, 96, 96])


@pytest.mark.parametrize("workflow", ["train", "inference"])
@pytest.mark.parametrize(
    ("bundle", "sizes", "network_class"),
    [(MAE, SMALL, FeatureExtractor), (SEGMENTATION, SMALL, UNETR), (SEGMENTATION, DEEP, None)],
)
def test_load(bundle, sizes, network_class, workflow, weights, exported, tmp_path, monkeypatch) -> None:
    folder = exported(bundle, weights=str(weights(bundle, sizes)))
    monkeypatch.chdir(tmp_path)
    network = load(bundle, bundle_dir=str(folder.parent), workflow_type=workflow)
    stock = monai.networks.nets.UNETR if workflow == "inference" else UNETR  # training takes ours where it can
    assert type(network) is (network_class or stock)
    assert has_weights(network, state(folder))


def test_feature_extractor_around_a_convvit(weights, exported, tmp_path, monkeypatch) -> None:
    folder = exported(MIM, weights=str(weights(MIM, {"img_size": [32, 64, 32]})))
    pred = read(folder, "metadata.json")["network_data_format"]["outputs"]["pred"]
    assert (pred["num_channels"], pred["spatial_shape"]) == (12, [2, 4, 2])
    inference = read(folder, "inference.json")
    assert (inference["roi_size"], inference["patch_size"]) == ([32, 64, 32], 16)
    monkeypatch.chdir(tmp_path)
    for workflow in ("train", "inference"):
        network = load(MIM, bundle_dir=str(folder.parent), workflow_type=workflow)
        assert (type(network), type(network.encoder)) == (FeatureExtractor, ConvViT)
        assert has_weights(network, state(folder))
    assert read(exported(MIM), "train.json")["embed_dims"] == [48, 96, 192, 384]


@pytest.mark.parametrize("workflow", ["train", "inference"])
def test_load_with_stock_monai_only(workflow, weights, exported, tmp_path, monkeypatch, hide_package) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION, DEEP)))
    hide_package()
    monkeypatch.chdir(tmp_path)
    network = load(SEGMENTATION, bundle_dir=str(folder.parent), workflow_type=workflow)
    assert type(network) is monai.networks.nets.UNETR
    assert has_weights(network, state(folder))


def test_own_class_asks_for_the_package(weights, exported, hide_package) -> None:
    folder = exported(MAE, weights=str(weights(MAE)))
    hide_package()
    with pytest.raises(ModuleNotFoundError, match="medmim"):
        load(MAE, bundle_dir=str(folder.parent), workflow_type="inference")


def test_stock_class_gives_the_same_outputs(weights, exported) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION, DEEP)))
    ours = ConfigParser.load_config_file(folder / "models" / "model.json")["network"]
    networks = (UNETR(**ours["arguments"]), monai.networks.nets.UNETR(**stock_arguments(ours)))
    image = torch.rand(1, 1, 32, 48, 32)
    for network in networks:
        network.load_state_dict(state(folder), strict=True)
        network.eval()
    with torch.no_grad():
        first, second = (network(image) for network in networks)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert first.std() > 0.1


@pytest.mark.parametrize(
    "change", [{"patch_size": [8, 8, 8]}, {"patch_size": [32, 32, 32]}, {"num_layers": 4}, {"num_layers": 24}]
)
def test_other_networks_are_not_stock(change: dict) -> None:
    arguments = {"in_channels": 1, "out_channels": 2, "hidden_size": 12, "mlp_dim": 12, "num_heads": 2}
    arguments |= {"feature_size": 2, "img_size": [64, 64, 64], "patch_size": [16, 16, 16], "num_layers": 12}
    assert stock_arguments({"name": "UNETR", "arguments": arguments}) is not None
    assert stock_arguments({"name": "UNETR", "arguments": arguments | change}) is None
    assert stock_arguments({"name": "FeatureExtractor", "arguments": arguments}) is None


def test_stock_keeps_the_norm() -> None:
    arguments = {"in_channels": 1, "out_channels": 2, "hidden_size": 12, "mlp_dim": 12, "num_heads": 2}
    arguments |= {"img_size": [32, 32, 32], "norm_name": "batch", "qkv_bias": True, "feature_size": 2}
    stock = stock_arguments({"name": "UNETR", "arguments": arguments})
    assert stock is not None
    assert (stock["norm_name"], stock["qkv_bias"]) == ("batch", True)


def test_a_preset_of_the_users_own_goes_along(weights, exported, coarse_preset: Path) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION, SMALL, str(coarse_preset))))
    config = ConfigParser(read(folder, "train.json"))
    config["bundle_root"] = str(folder)
    preset = config.get_parsed_content("preset")
    assert (preset.name, preset.spacing) == ("coarse", (8.0, 8.0, 8.0))
    recorded = json.loads((folder / "models" / "model.json").read_text())["preset"]
    assert json.loads(json.dumps(preset.to_dict())) == recorded


# ------------------------------------------------------------------------------------------------- licences, metadata


def test_licences_are_named(weights, exported, capsys: pytest.CaptureFixture) -> None:
    terms = "CC-BY-NC-4.0"
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION, dataset="hippocampus")), weights_license=terms)
    printed, written = capsys.readouterr().out, (folder / "docs" / "data_license.txt").read_text()
    license = read(folder, "metadata.json")["license"]
    for text in (printed, written):
        assert f"Weights: {terms}\n" in text
        assert "Code: Apache-2.0" in text
        assert "hippocampus: CC-BY-SA-4.0" in text
        assert "Antonelli" in text
        assert "medicaldecathlon.com" in text
        assert "phantom" not in text
    assert license["weights"] == terms
    assert license["code"] == "Apache-2.0"
    assert license["data"]["hippocampus"]["license"] == "CC-BY-SA-4.0"


def test_licences_by_default_and_without_weights(weights, exported) -> None:
    folder = exported(MAE, weights=str(weights(MAE)))
    assert "Weights: Apache-2.0, within the terms of the data's licence" in (
        (folder / "docs" / "data_license.txt").read_text()
    )
    text = (exported(SEGMENTATION) / "docs" / "data_license.txt").read_text()
    assert "Weights: none" in text
    assert all(name in text for name in ("phantom", "hippocampus", "btcv"))


def test_metadata_is_that_of_the_weights(weights, exported) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION)))
    metadata = read(folder, "metadata.json")
    assert metadata["version"] == __version__
    image, pred = (metadata["network_data_format"][key] for key in ("inputs", "outputs"))
    assert image["image"]["spatial_shape"] == pred["pred"]["spatial_shape"] == [16, 24, 16]
    assert (image["image"]["num_channels"], image["image"]["modality"]) == (1, "CT")
    assert image["image"]["channel_def"] == {"0": "CT"}
    names = ["background", "liver", "spleen", "left kidney", "right kidney", "spine"]
    assert pred["pred"]["channel_def"] == {str(number): name for number, name in enumerate(names)}
    assert pred["pred"]["num_channels"] == 6
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    named = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    assert {name: metadata[key] for name, key in named.items()} | metadata["required_packages_version"] == pins

    pred = read(exported(MAE, weights=str(weights(MAE))), "metadata.json")["network_data_format"]["outputs"]["pred"]
    assert (pred["num_channels"], pred["spatial_shape"]) == (48, [2, 3, 2])


def test_metadata_without_weights_is_the_bundles_own(exported) -> None:
    metadata = read(exported(MAE), "metadata.json")
    assert metadata.pop("license")
    assert metadata == json.loads((ROOT / "bundles" / MAE / "configs" / "metadata.json").read_text())


# ------------------------------------------------------------------------------------------------- two versions


def test_two_bundles_of_one_version_share_the_package(weights, exported) -> None:
    for bundle in (MAE, SEGMENTATION):
        folder = exported(bundle, weights=str(weights(bundle)))
        assert has_weights(load(bundle, bundle_dir=str(folder.parent), workflow_type="inference"), state(folder))


@pytest.mark.parametrize("workflow", ["train", "inference"])
@both
def test_another_version_is_refused(bundle, workflow, weights, exported, monkeypatch, request) -> None:
    folder = exported(bundle, weights=str(weights(bundle)))
    monkeypatch.setattr(package, "__version__", "9.8.7")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit) as ending:
        load(bundle, bundle_dir=str(folder.parent), workflow_type=workflow)
    message = one_line(ending, request)
    assert f"{bundle} brings medmim {__version__} ({folder / 'medmim'})" in message
    assert f"medmim 9.8.7 of {Path(package.__file__).parent} was imported before" in message


@pytest.mark.parametrize(
    "configs", [["train.yaml", "demo.yaml"], ["train.json"], ["inference.json"], ["inference.yaml"]]
)
def test_another_version_is_refused_in_a_run(configs, weights, exported, monkeypatch, request) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION, DEEP)))
    monkeypatch.setattr(package, "__version__", "9.8.7")
    workflow = ConfigWorkflow([str(folder / "configs" / name) for name in configs], logging_file=False)
    workflow.initialize()
    monkeypatch.syspath_prepend(folder)  # run() does that too, and does not take it back
    with pytest.raises(SystemExit) as ending:
        workflow.run()
    assert f"brings medmim {__version__}" in one_line(ending, request)


def test_stock_network_loads_beside_another_version(weights, exported, monkeypatch) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION, DEEP)))
    monkeypatch.setattr(package, "__version__", "9.8.7")
    network = load(SEGMENTATION, bundle_dir=str(folder.parent))
    assert type(network) is monai.networks.nets.UNETR
    assert has_weights(network, state(folder))


# ------------------------------------------------------------------------------------------------ knobs that do not fit


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"num_layers": 6}, ["num_layers 6 (exported: 4)"]),
        (
            {"roi_size": [32, 32, 32], "feature_size": 8},
            ["img_size [32, 32, 32] (exported: [16, 24, 16])", "feature_size 8"],
        ),
        ({"dataset": "hippocampus"}, ["out_channels 3 (exported: 6)"]),
        ({"patch_size": 8, "roi_size": (16, 24, 16), "learning_rate": 0.1}, []),  # the same network
    ],
)
def test_train_json_is_for_the_exported_network(knobs, says, weights, exported) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION)))
    parser = ConfigParser(read(folder, "train.json"))
    parser.update(knobs)
    assert "@check#exported" in parser["check#with_preset"]
    faults = parser.get_parsed_content("check#exported")
    assert len(faults) == bool(says)
    for text in says:
        assert text in faults[0]
        assert "take train.yaml" in faults[0]


def test_inference_json_is_for_the_exported_model(weights, exported) -> None:
    folder = exported(SEGMENTATION, weights=str(weights(SEGMENTATION)))
    assert read(folder, "inference.json")["run"][1]["faults"][-1] == "@check#exported"
    for dataset, sizes, says in (("hippocampus", SMALL, "spacing"), ("phantom", DEEP, "(other network)")):
        parser = ConfigParser(read(folder, "inference.json"))
        parser["models_dir"] = str(weights(SEGMENTATION, sizes, dataset).parent)
        (fault,) = parser.get_parsed_content("check#exported")
        assert says in fault
        assert "take inference.yaml" in fault
    for models_dir in (str(folder / "models"), "missing"):  # the run itself says what is missing
        parser = ConfigParser(read(folder, "inference.json"))
        parser["models_dir"] = models_dir
        assert parser.get_parsed_content("check#exported") == []


def test_names_with_a_number_sign_are_the_same_model(weights, exported) -> None:
    """MONAI's parser writes ``#`` as ``::``."""
    trained = weights(SEGMENTATION)
    edit(trained.with_name("model.json"), {"preset/labels/1": "organ #1", "preset/source": "https://example.org/#a"})
    folder = exported(SEGMENTATION, weights=str(trained))
    parser = ConfigParser(read(folder, "inference.json"))
    parser["models_dir"] = str(folder / "models")
    assert parser.get_parsed_content("check#exported") == []
    assert parser.get_parsed_content("preset").n_classes == 6


# ------------------------------------------------------------------------------------------------- bad input


def edit(path: Path, change: dict[str, Any]) -> None:
    """Change values in a JSON file: ``{"preset/citation": "x"}``."""
    content = json.loads(path.read_text())
    for name, value in change.items():
        *parents, last = name.split("/")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("bundle", "options", "says"),
    [
        ("unetr_segmentaton", {}, "no such bundle (did you mean unetr_segmentation or swin_unetr_segmentation?)"),
        ("tests", {}, "tests: no such bundle; there are convvit_ct_classification"),
        (MAE, {"weights": "missing/model.pt"}, "--weights missing/model.pt: no such file"),
        (MAE, {"weights": "."}, "--weights .: a folder: give the file model.pt in it"),
        (MAE, {"weights_license": ""}, "--weights_license : expected a text"),
        (MAE, {"weights_license": "%x"}, "the text '%x' would be run by MONAI's config parser"),
        (MAE, {"safetensors": "yes"}, "--safetensors yes: a switch must be True or False"),
    ],
)
def test_bad_arguments(bundle, options, says, tmp_path, request) -> None:
    with pytest.raises(SystemExit) as ending:
        export(bundle, output_dir=str(tmp_path / "dist"), **options)
    assert says in one_line(ending, request)
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w: w.with_name("model.json").unlink(), "has no model.json beside it"),
        (lambda w: w.with_name("model.json").write_text("{"), "not a description of a network"),
        (lambda w: edit(w.with_name("model.json"), {"format_version": 99}), "update medmim"),
        (lambda w: edit(w.with_name("model.json"), {"network/arguments/num_layers": 6}), "tensors do not fit a UNETR"),
        (lambda w: edit(w.with_name("model.json"), {"network/arguments/patch_size": 7}), "describes no UNETR"),
        (lambda w: edit(w.with_name("model.json"), {"network/arguments": {}}), "describes no UNETR"),
        (lambda w: edit(w.with_name("model.json"), {"network/name": "FeatureExtractor"}), "this bundle is for a UNETR"),
        (lambda w: edit(w.with_name("model.json"), {"preset/citation": "$exit(1)"}), "would be run by MONAI"),
        (lambda w: edit(w.with_name("model.json"), {"preset/labels": {"1": "%x"}}), "would be run by MONAI"),
        (lambda w: edit(w.with_name("model.json"), {"preset/name": "../../x"}), "name its file with letters"),
        (lambda w: edit(w.with_name("model.json"), {"preset/spacing": [1]}), "spacing must be 3 positive numbers"),
        (lambda w: w.write_bytes(w.read_bytes()[:1000]), "not readable as a checkpoint"),
        (lambda w: torch.save(torch.nn.Linear(1, 1), w), "not readable as a checkpoint of plain tensors"),
    ],
)
def test_bad_weights(spoil, says, weights, tmp_path, request) -> None:
    trained = weights(SEGMENTATION)
    spoil(trained)
    with pytest.raises(SystemExit) as ending:
        export(SEGMENTATION, weights=str(trained), output_dir=str(tmp_path / "dist"))
    assert says in one_line(ending, request)
    assert not (tmp_path / "dist").exists()


def test_encoder_of_another_training_is_refused(weights, tmp_path, request) -> None:
    trained = weights(MAE)
    content = torch.load(trained.with_name("encoder.pt"), weights_only=True)
    content["state_dict"]["norm.weight"] += 1
    torch.save(content, trained.with_name("encoder.pt"))
    with pytest.raises(SystemExit) as ending:
        export(MAE, weights=str(trained), output_dir=str(tmp_path / "dist"))
    assert "encoder.pt: is not the encoder of model.pt" in one_line(ending, request)


def test_a_version_without_a_line_in_the_changelog_is_refused(tmp_path, monkeypatch, request) -> None:
    monkeypatch.setattr("tools.export_metadata.__version__", "9.8.7")
    with pytest.raises(SystemExit) as ending:
        export(MAE, output_dir=str(tmp_path))
    assert "its changelog does not tell of version 9.8.7" in one_line(ending, request)


def test_an_incomplete_bundle_is_refused(tmp_path, request) -> None:
    shutil.copytree(ROOT / "bundles" / MAE, tmp_path / "mine")
    (tmp_path / "mine" / "LICENSE").unlink()
    with pytest.raises(SystemExit) as ending:
        export(str(tmp_path / "mine"), output_dir=str(tmp_path / "dist"))
    assert "LICENSE missing" in one_line(ending, request)


def test_a_run_that_is_no_list_is_refused(tmp_path, request) -> None:
    shutil.copytree(ROOT / "bundles" / MAE, tmp_path / "mine")
    (tmp_path / "mine" / "configs" / "other.yaml").write_text("run: ['@check#data']\n")
    with pytest.raises(SystemExit) as ending:
        export(str(tmp_path / "mine"), output_dir=str(tmp_path / "dist"))
    assert "other.yaml: run must be a list, with each item on a line of its own" in one_line(ending, request)


@pytest.mark.parametrize(("config", "cut"), [("train", "  with_preset:"), ("inference", "  faults:")])
def test_a_bundle_without_a_list_of_checks_is_refused(config, cut, tmp_path, request) -> None:
    shutil.copytree(ROOT / "bundles" / SEGMENTATION, tmp_path / "mine")
    path = tmp_path / "mine" / "configs" / f"{config}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(cut)), encoding="utf-8")
    with pytest.raises(SystemExit) as ending:
        export(str(tmp_path / "mine"), output_dir=str(tmp_path / "dist"))
    assert f"{config}.yaml of mine" in one_line(ending, request)


@pytest.mark.parametrize("text", ["$x", "@x", "%x", "see @#x", "a%::b"])
def test_texts_that_monai_would_resolve(text: str) -> None:
    for value in (text, {"a": [text]}, {text: 1}):
        with pytest.raises(ValueError, match="would be run"):
            check_texts(value, "preset")
    check_texts({"a": ["50 % of @home, see https://example.org/#part", 1, None]}, "preset")


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch) -> None:
    export(MAE, output_dir=str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(path: Path, *args: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tools.export, "write_zip", full_disk)
    with pytest.raises(SystemExit, match="No space left"):
        export(MAE, output_dir=str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
