"""What several test files share."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import ViT
from monai.utils import set_determinism

from medmim.datasets import Preset, get_preset
from medmim.phantom import write_phantom
from medmim.phantom_brain import write_phantom_brain
from medmim.phantom_lesions import write_phantom_lesions
from medmim.phantom_radiographs import write_phantom_radiographs
from tests.common import BRAIN, BUNDLES, CONVVIT_CT, RADIOGRAPHS, TINY, TINY_OF

N_CASES = 6  # fold 0 of 5: four for training, two for validation
COARSE_PRESET = """\
channels: [CT]
spacing: [8.0, 8.0, 8.0]
window: [-175.0, 250.0]
crop_foreground: true
roi_size: [16, 24, 16]
patch_size: 8
labels: {1: liver, 2: spleen, 3: left kidney, 4: right kidney, 5: spine}
surface_tolerance: 8.0
"""
COARSE_HEADS = """\
channels: [FLAIR, T1, T1c, T2]
spacing: [6.0, 6.0, 6.0]
z_score: nonzero
crop_foreground: true
roi_size: [16, 24, 16]
patch_size: 8
labels: {1: edema, 2: non-enhancing tumour, 3: enhancing tumour}
regions: {whole tumour: [1, 2, 3], tumour core: [2, 3], enhancing tumour: [3]}
surface_tolerance: 6.0
"""


@pytest.fixture
def tiny_vit() -> Callable[..., ViT]:
    """Makes small ViTs: ``tiny_vit(in_channels, img_size, patch_size, **arguments of ViT)``."""

    def make(in_channels: int = 1, img_size: tuple = (16, 24, 8), patch_size: int | tuple = 8, **arguments) -> ViT:
        sizes = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "spatial_dims": len(img_size)}
        return ViT(in_channels=in_channels, img_size=img_size, patch_size=patch_size, **(sizes | arguments))

    return make


@pytest.fixture
def preset() -> Preset:
    return get_preset("phantom")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Several threads only wait for one another in tiny networks, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _strict_configs() -> None:
    os.environ["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom data set, six cases; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, N_CASES)
    return folder


@pytest.fixture(scope="session")
def coarse_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset file of one's own: the phantom at 8 mm, so that a scan is a few windows only."""
    path = tmp_path_factory.mktemp("presets") / "coarse.yaml"
    path.write_text(COARSE_PRESET)
    return path


@pytest.fixture(scope="session")
def heads_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic heads of four channels with a tumour, six cases; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("heads")
    write_phantom_brain(folder, N_CASES)
    return folder


@pytest.fixture(scope="session")
def coarse_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset file of one's own: the heads at 6 mm."""
    path = tmp_path_factory.mktemp("presets") / "heads.yaml"
    path.write_text(COARSE_HEADS)
    return path


@pytest.fixture(scope="session")
def radiographs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic radiographs, 19 patients, 22 images for training in fold 0; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("radiographs")
    write_phantom_radiographs(folder, 19)
    return folder


@pytest.fixture(scope="session")
def lesions_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic scans with and without lesions, 14 patients, 16 for training in fold 0; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("lesions")
    write_phantom_lesions(folder, 14)
    return folder


@pytest.fixture(scope="session")
def data_of(request: pytest.FixtureRequest, phantom_dir: Path, coarse_preset: Path) -> Callable[[str], dict[str, str]]:
    """The knobs ``dataset`` and ``dataset_dir`` that suit a bundle."""

    def knobs(bundle: str) -> dict[str, str]:
        if bundle == BRAIN:
            heads, preset = map(request.getfixturevalue, ("heads_dir", "coarse_heads"))
            return {"dataset": str(preset), "dataset_dir": str(heads)}
        if bundle in RADIOGRAPHS:
            return {"dataset": "phantom_cxr", "dataset_dir": str(request.getfixturevalue("radiographs_dir"))}
        if bundle == CONVVIT_CT:
            return {"dataset": "phantom_ct", "dataset_dir": str(request.getfixturevalue("lesions_dir"))}
        return {"dataset": str(coarse_preset), "dataset_dir": str(phantom_dir)}

    return knobs


@pytest.fixture(scope="session")
def run_bundle(data_of: Callable[[str], dict[str, str]]) -> Callable[..., ConfigWorkflow]:
    """Runs a bundle as ``python -m monai.bundle run`` does, in this process, on the CPU.

    ``run_bundle(bundle, "train", "evaluate", folder=tmp_path, epochs=1)`` merges ``train.yaml`` and ``evaluate.yaml``
    with the knobs of a tiny network on phantom data, and writes below ``folder``.
    """

    def run(bundle: str, *configs: str, folder: Path, **knobs: Any) -> ConfigWorkflow:
        settings: dict[str, Any] = {"dataset_dir": data_of(bundle)["dataset_dir"], "num_workers": 0}
        settings |= {"output_dir": str(folder / "output"), "models_dir": str(folder / "models")}
        settings |= {"device": "$torch.device('cpu')", "amp": False}
        if "train" in configs:
            settings |= data_of(bundle) | TINY | TINY_OF[bundle]
        settings |= {key: str(value) if isinstance(value, Path) else value for key, value in knobs.items()}
        search_path = sys.path.copy()
        with chdir(BUNDLES / bundle):
            workflow = ConfigWorkflow(
                config_file=[f"configs/{name}.yaml" for name in configs],
                logging_file=False,
                workflow_type="train" if "train" in configs else "infer",
                **settings,
            )
            try:
                workflow.initialize()
                workflow.run()
                workflow.finalize()
            finally:
                stop_workers(workflow)
                sys.path[:] = search_path
                set_determinism(None)
        return workflow

    return run


def stop_workers(workflow: ConfigWorkflow) -> None:
    """Stop a loader's workers now: collected later, as cyclic garbage, each would keep the tests waiting for 5 s."""
    loader = workflow.parser.ref_resolver.resolved_content.get("train::dataloader")
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator._shutdown_workers()


@pytest.fixture(scope="session")
def command_line() -> Callable[..., subprocess.CompletedProcess]:
    """Starts ``python -m monai.bundle run`` in a bundle's folder: ``command_line(bundle, *configs, knob=value)``."""

    def start(bundle: str, *configs: str, **knobs: Any) -> subprocess.CompletedProcess:
        files = [f"configs/{name}.yaml" for name in configs]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
        for key, value in knobs.items():
            command += [f"--{key}", str(value)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            command, cwd=BUNDLES / bundle, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return start


@pytest.fixture(scope="session")
def pretrained(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short pre-training: ``output`` and ``models``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_bundle("mae_vit_pretraining", "train", folder=folder, epochs=8, learning_rate=0.003, val_interval=4)
    return folder


@pytest.fixture(scope="session")
def pretrained_mim(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short Mask in Mask pre-training: ``output`` and ``models``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("pretrained_mim")
    knobs = {"epochs": 8, "learning_rate": 0.01, "val_interval": 4, "checkpoint_interval": 4}
    run_bundle("mim_convvit_pretraining", "train", folder=folder, **knobs)
    return folder


@pytest.fixture(scope="session")
def pretrained_simclr(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short SimCLR pre-training: ``output`` and ``models``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("pretrained_simclr")
    knobs = {"epochs": 8, "learning_rate": 0.001, "val_interval": 4}
    run_bundle("simclr_vit_pretraining", "train", folder=folder, **knobs)
    return folder


@pytest.fixture(scope="session")
def pretrained_simmim_vit(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short SimMIM pre-training of a ViT: ``output`` and ``models``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("pretrained_simmim_vit")
    run_bundle("simmim_vit_pretraining", "train", folder=folder, epochs=8, learning_rate=0.003, val_interval=4)
    return folder


@pytest.fixture(scope="session")
def pretrained_simmim_swin(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short SimMIM pre-training of a Swin: ``output`` and ``models``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("pretrained_simmim_swin")
    run_bundle("simmim_swin_pretraining", "train", folder=folder, epochs=8, learning_rate=0.003, val_interval=4)
    return folder


@pytest.fixture(scope="session")
def finetuned(
    run_bundle: Callable[..., ConfigWorkflow], pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a short fine-tuning from ``pretrained``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("finetuned")
    encoder = pretrained / "models" / "encoder.pt"
    knobs = {"epochs": 20, "learning_rate": 0.01, "val_interval": 10, "layer_decay": 1.0}
    run_bundle("unetr_segmentation", "train", folder=folder, pretrained_encoder=encoder, **knobs)
    return folder


@pytest.fixture(scope="session")
def convvit_from_scratch(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short training of ``convvit_unetr_segmentation``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("convvit_from_scratch")
    knobs = {"epochs": 12, "learning_rate": 0.005, "val_interval": 6, "overlap": 0.0}
    run_bundle("convvit_unetr_segmentation", "train", folder=folder, **knobs)
    return folder


@pytest.fixture(scope="session")
def swin_from_scratch(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short training of ``swin_unetr_segmentation``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("swin_from_scratch")
    knobs = {"epochs": 8, "learning_rate": 0.005, "val_interval": 4, "overlap": 0.0}
    run_bundle("swin_unetr_segmentation", "train", folder=folder, **knobs)
    return folder


@pytest.fixture(scope="session")
def brain_from_scratch(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short training of ``unetr_brain_tumor_segmentation``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("brain_from_scratch")
    run_bundle(BRAIN, "train", folder=folder, epochs=8, learning_rate=0.02, val_interval=8)
    return folder


@pytest.fixture(scope="session")
def pretrained_cxr(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short pre-training on radiographs: ``output`` and ``models``; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("pretrained_cxr")
    run_bundle("mae_vit_cxr_pretraining", "train", folder=folder, epochs=8, learning_rate=0.003, val_interval=4)
    return folder


@pytest.fixture(scope="session")
def classified(
    run_bundle: Callable[..., ConfigWorkflow], pretrained_cxr: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a short classification from ``pretrained_cxr``, fold 1 for testing; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("classified")
    knobs = {"epochs": 8, "learning_rate": 0.003, "val_interval": 4, "test_fold": 1, "layer_decay": 1.0}
    encoder = pretrained_cxr / "models" / "encoder.pt"
    run_bundle("vit_cxr_classification", "train", folder=folder, pretrained_encoder=encoder, **knobs)
    return folder


@pytest.fixture(scope="session")
def classified_ct(run_bundle: Callable[..., ConfigWorkflow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short classification of volumes, fold 1 for testing; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("classified_ct")
    knobs = {"epochs": 4, "learning_rate": 0.003, "val_interval": 2, "test_fold": 1}
    run_bundle("convvit_ct_classification", "train", folder=folder, **knobs)
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the message of each error that was provoked, as a user sees it."""
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    messages = [
        (r.nodeid.split("::", 1)[-1], value) for r in reports for key, value in r.user_properties if key == "error"
    ]
    if messages:
        terminalreporter.section("error messages")
    for name, message in messages:
        terminalreporter.write_line(f"{name}\n    " + message.replace("\n", "\n    "))
