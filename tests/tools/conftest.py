"""What the tests of ``export`` share: weights as a training leaves them, without the training."""

import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from medmim.datasets import get_preset
from medmim.description import build_network, describe, write_description
from medmim.version import __version__
from medmim.weights import find_encoder, save_encoder
from tools.export import export

VIT = {"in_channels": 1, "spatial_dims": 3, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
SMALL = {"img_size": [16, 24, 16], "patch_size": [8, 8, 8], "num_layers": 4}  # needs our UNETR
DEEP = {"img_size": [32, 48, 32], "patch_size": [16, 16, 16], "num_layers": 12}  # MONAI's does
CONVVIT = {"in_channels": 1, "embed_dims": [6, 6, 12, 12], "depths": [1, 1, 1, 1], "num_heads": 2}
SWIN = {"in_channels": 1, "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4], "window_size": 3}
SWIN_ENCODER = {"encoder": "SwinTransformer", "in_chans": 1, "embed_dim": 12, "depths": [1, 1, 1, 1]}
SWIN_ENCODER |= {"num_heads": [1, 2, 3, 4], "window_size": [3, 3, 3], "patch_size": [2, 2, 2]}
NETWORKS = {
    "mae_vit_pretraining": ("FeatureExtractor", VIT),
    "unetr_segmentation": ("UNETR", VIT | {"feature_size": 4}),
    "mim_convvit_pretraining": ("FeatureExtractor", CONVVIT | {"encoder": "ConvViT", "fifth_stage": False}),
    "convvit_unetr_segmentation": ("ConvViTUNETR", CONVVIT),
    "swin_unetr_segmentation": ("SwinUNETR", SWIN),
    "unetr_brain_tumor_segmentation": ("UNETR", VIT | {"in_channels": 4, "feature_size": 4}),
    "simclr_vit_pretraining": ("FeatureExtractor", VIT),
    "simmim_vit_pretraining": ("FeatureExtractor", VIT),
    "simmim_swin_pretraining": ("FeatureExtractor", SWIN_ENCODER),
    "mae_vit_cxr_pretraining": ("FeatureExtractor", VIT | {"spatial_dims": 2}),
    "vit_cxr_classification": ("ViTClassifier", VIT | {"spatial_dims": 2, "n_outputs": 2}),
    "convvit_ct_classification": ("ConvViTClassifier", CONVVIT | {"n_outputs": 3}),
}
SIZES = {
    "mim_convvit_pretraining": {"img_size": [32, 32, 32]},
    "convvit_unetr_segmentation": {"img_size": [32, 32, 16]},
    "swin_unetr_segmentation": {"img_size": [64, 32, 32]},
    "simmim_swin_pretraining": {"img_size": [64, 32, 32]},
    "mae_vit_cxr_pretraining": {"img_size": [32, 24], "patch_size": [8, 8], "num_layers": 2},
    "convvit_ct_classification": {"img_size": [32, 32, 16]},
    "vit_cxr_classification": {"img_size": [32, 24], "patch_size": [8, 8], "num_layers": 2},
}
DATASETS = {"mae_vit_cxr_pretraining": "phantom_cxr", "vit_cxr_classification": "phantom_cxr"}
DATASETS |= {"convvit_ct_classification": "phantom_ct"}
Weights = Callable[..., Path]
Exported = Callable[..., Path]


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    """Writes ``model.pt``, ``model.json`` and ``encoder.pt`` (pre-training): ``weights(bundle, sizes, dataset)``."""

    def write(
        bundle: str, sizes: dict[str, Any] | None = None, dataset: str = "phantom", spacing_factor: float = 1.0
    ) -> Path:
        name, arguments = NETWORKS[bundle]
        sizes = sizes or SIZES.get(bundle, SMALL)
        own = {"phantom": "phantom_brain"} if "brain" in bundle else {}
        preset = get_preset(DATASETS.get(bundle, own.get(dataset, dataset)), spacing_factor)
        if name.endswith("UNETR"):
            arguments = arguments | {"out_channels": preset.n_outputs}
        torch.manual_seed(0)
        network = build_network({"network": {"name": name, "arguments": arguments | sizes}})
        for parameter in network.parameters():  # position embeddings and biases too, so that each tensor counts
            torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path / "trained" / bundle
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), folder / "model.pt")
        classes = [] if preset.classification is None else preset.classification.outputs
        thresholds = {"thresholds": dict.fromkeys(classes, 0.4)} if name.endswith("Classifier") else {}
        write_description(describe(network, sizes["img_size"], preset) | thresholds, folder / "model.json")
        if name == "FeatureExtractor":
            save_encoder(folder / "encoder.pt", find_encoder(network), sizes["img_size"], preset)
        return folder / "model.pt"

    return write


@pytest.fixture
def hide_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """When called, the package cannot be imported any more, as where it is neither installed nor on the path."""

    def hide() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "medmim"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "medmim").is_dir()])
        finders = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]  # of pip install -e
        monkeypatch.setattr(sys, "meta_path", finders)
        assert find_spec("medmim") is None

    return hide


@pytest.fixture(scope="session")
def made() -> dict[Any, dict[str, bytes]]:
    """Exports of this session, so that each is made once: the files of a zip."""
    return {}


@pytest.fixture
def exported(tmp_path: Path, made: dict[Any, dict[str, bytes]]) -> Exported:
    """Exports and unzips a bundle, to a folder that the test may change: ``exported(bundle, weights=..., ...)``."""

    def unzip(bundle: str, **options: Any) -> Path:
        trained = Path(options["weights"]) if "weights" in options else None
        files = [] if trained is None else [trained.read_bytes(), trained.with_name("model.json").read_bytes()]
        key = (bundle, *files, *sorted((name, value) for name, value in options.items() if name != "weights"))
        if key not in made:
            export(bundle, output_dir=str(tmp_path / "dist"), **options)
            with zipfile.ZipFile(tmp_path / "dist" / f"{bundle}_v{__version__}.zip") as archive:
                made[key] = {name: archive.read(name) for name in archive.namelist()}
        for name, content in made[key].items():
            path = tmp_path / "unzipped" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "unzipped" / bundle

    return unzip


STUDY = """\
common: {num_workers: 0}
pretraining: {bundle: mae_vit_pretraining, epochs: 3}
finetuning: {bundle: unetr_segmentation, epochs: 10}
arms: {scratch: {}, mae: {pretraining: {}}}
labels: [2, 4]
seeds: [0, 1]
"""
StudyFile = Callable[..., Path]


@pytest.fixture
def study_file(tmp_path: Path) -> StudyFile:
    """Writes a small study file, with other text for some of its lines: ``study_file(grid="{...}", seeds="[0]")``."""

    def write(**lines: str) -> Path:
        content = {line.split(":")[0]: line.split(": ", 1)[1] for line in STUDY.splitlines()} | lines
        content["common"] = content["common"].replace("{", "{warmup_epochs: 0, ", 1)
        path = tmp_path / "small.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in content.items()))
        return path

    return write


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Studies run a stand-in for the bundle runner; gives the starts as ``<cell>|train or evaluate|GPU|threads``."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "stand_in_runner.py"
    monkeypatch.setattr("tools.study_run.RUNNER", [sys.executable, "-S", str(script)])
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "starts.txt"))
    monkeypatch.setattr("tools.study.visible_gpus", list)

    def starts() -> list[str]:
        path = tmp_path / "starts.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line.replace(f"{tmp_path}/out/", "") for line in lines]

    return starts
