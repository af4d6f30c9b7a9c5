"""Constants and small functions that several test files use."""

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
MAE, UNETR = "mae_vit_pretraining", "unetr_segmentation"
CONVVIT_UNETR = "convvit_unetr_segmentation"
SWIN_UNETR = "swin_unetr_segmentation"
BRAIN = "unetr_brain_tumor_segmentation"
MIM = "mim_convvit_pretraining"
SIMMIM_VIT, SIMMIM_SWIN = "simmim_vit_pretraining", "simmim_swin_pretraining"
SIMCLR = "simclr_vit_pretraining"
MAE_CXR, VIT_CXR = "mae_vit_cxr_pretraining", "vit_cxr_classification"
CONVVIT_CT = "convvit_ct_classification"
RADIOGRAPHS = (MAE_CXR, VIT_CXR)
CLASSIFICATION = (VIT_CXR, CONVVIT_CT)
WHOLE = (*RADIOGRAPHS, CONVVIT_CT)  # see an image at once, without crops
PRETRAINING = (MAE, MAE_CXR, MIM, SIMCLR, SIMMIM_VIT, SIMMIM_SWIN)
OTHERS = (MIM, SIMCLR, SIMMIM_VIT, SIMMIM_SWIN, CONVVIT_UNETR, SWIN_UNETR, BRAIN, MAE_CXR)
OTHERS += CLASSIFICATION  # run by the slow tests
both = pytest.mark.parametrize("bundle", [MAE, UNETR])
slow_ones = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
every = pytest.mark.parametrize("bundle", [MAE, UNETR, *slow_ones])
TINY = {  # knobs of a training that takes seconds, with those of its network below
    "epochs": 2,
    "warmup_epochs": 0,
    "batch_size": 2,
    "val_interval": 1,
}
TINY_VIT = {
    "roi_size": [16, 24, 16],
    "patch_size": 8,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_layers": 4,
    "num_heads": 4,
    "crops_per_scan": 2,
}
TINY_2D = {
    "roi_size": [32, 24],
    "patch_size": 8,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_layers": 2,
    "num_heads": 4,
    "batch_size": 8,
}
TINY_OF = {
    MAE: TINY_VIT | {"decoder_hidden_size": 24, "decoder_num_layers": 1, "decoder_num_heads": 4},
    UNETR: TINY_VIT | {"feature_size": 4, "overlap": 0.25},
    CONVVIT_UNETR: {
        "roi_size": [32, 32, 16],
        "embed_dims": [6, 6, 6, 12],
        "depths": [1, 1, 1, 2],
        "num_heads": 2,
        "drop_path_rate": 0.0,
        "crops_per_scan": 1,
        "overlap": 0.25,
    },
    SWIN_UNETR: {
        "roi_size": [64, 32, 32],
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 3, 4],
        "window_size": 3,
        "crops_per_scan": 1,
        "overlap": 0.25,
    },
    BRAIN: TINY_VIT | {"feature_size": 4, "overlap": 0.25},
    MAE_CXR: TINY_2D | {"decoder_hidden_size": 24, "decoder_num_layers": 1, "decoder_num_heads": 4},
    VIT_CXR: TINY_2D | {"drop_path_rate": 0.0},
    CONVVIT_CT: {
        "roi_size": [32, 32, 16],
        "embed_dims": [6, 6, 6, 12],
        "depths": [1, 1, 1, 2],
        "num_heads": 2,
        "drop_path_rate": 0.0,
        "batch_size": 4,
    },
    SIMCLR: TINY_VIT | {"projector_hidden_size": 24, "projector_out_size": 16},
    SIMMIM_VIT: TINY_VIT | {"decoder_hidden_size": 24, "decoder_num_heads": 4},
    SIMMIM_SWIN: {
        "roi_size": [64, 32, 32],
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 3, 4],
        "window_size": 3,
        "decoder_hidden_size": 24,
        "decoder_num_heads": 2,
        "crops_per_scan": 1,
    },
    MIM: {
        "roi_size": [32, 32, 32],
        "crop_size": [32, 32, 32],
        "patch_size": 16,
        "levels::1::samples": 2,
        "levels::2::samples": 1,
        "embed_dims": [6, 6, 12, 12],
        "depths": [1, 1, 1, 1],
        "num_heads": 2,
        "decoder_hidden_size": 12,
        "decoder_num_layers": 1,
        "decoder_num_heads": 2,
        "crops_per_scan": 1,
    },
}


_SMALL = {"phantom_cases": 5, "epochs": 2, "warmup_epochs": 1, "crops_per_scan": 1, "batch_size": 2}
_SMALL |= {"roi_size": "[48,48,32]"}
_VIT = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
_CONVVIT = {"embed_dims": "[6,6,12,12]", "depths": "[1,1,1,2]", "num_heads": 2}
_SWIN = {"roi_size": "[64,64,32]", "feature_size": 12, "depths": "[1,1,1,1]", "num_heads": "[1,2,3,4]"}
_SCORED = {"overlap": 0.0, "label_fraction": 1.0}
_IMAGES = {"phantom_patients": 20, "epochs": 2, "warmup_epochs": 1, "batch_size": 8, "roi_size": "[32,48]"}
_VOLUMES = {"phantom_patients": 15, "epochs": 2, "warmup_epochs": 1, "batch_size": 4, "roi_size": "[32,48,32]"}
_LEVELS = {"roi_size": "[32,32,32]", "crop_size": "[32,32,32]", "levels::1::samples": 1, "levels::2::samples": 1}
DEMO_KNOBS: dict[str, dict] = {  # of a demo that takes seconds
    MAE: _SMALL | _VIT | {"decoder_hidden_size": 24, "decoder_num_layers": 1},
    # patch 16 and 12 blocks: MONAI's UNETR serves
    UNETR: _SMALL | _VIT | _SCORED | {"feature_size": 4, "patch_size": 16, "num_layers": 12},
    MIM: _SMALL | _CONVVIT | _LEVELS | {"decoder_hidden_size": 12, "decoder_num_layers": 1, "decoder_num_heads": 2},
    SIMCLR: _SMALL | _VIT | {"projector_hidden_size": 24, "phantom_cases": 6},  # a validation of one pair is none
    CONVVIT_UNETR: _SMALL | _CONVVIT | _SCORED,
    SWIN_UNETR: _SMALL | _SWIN | _SCORED,
    BRAIN: _SMALL | _VIT | _SCORED | {"feature_size": 4, "num_layers": 4},
    SIMMIM_VIT: _SMALL | _VIT,
    SIMMIM_SWIN: _SMALL | _SWIN,
    MAE_CXR: _IMAGES | _VIT | {"decoder_hidden_size": 24, "decoder_num_layers": 1},
    VIT_CXR: _IMAGES | _VIT | {"label_fraction": 1.0},
    CONVVIT_CT: _VOLUMES | _CONVVIT,
}

FILES = {  # that travel
    MAE: ["encoder.pt", "model.pt", "model.json"],
    UNETR: ["model.pt", "model.json"],
    CONVVIT_UNETR: ["model.pt", "model.json"],
    SWIN_UNETR: ["model.pt", "model.json"],
    BRAIN: ["model.pt", "model.json"],
    MIM: ["encoder.pt", "model.pt", "model.json"],
    SIMMIM_VIT: ["encoder.pt", "model.pt", "model.json"],
    SIMMIM_SWIN: ["encoder.pt", "model.pt", "model.json"],
    SIMCLR: ["encoder.pt", "model.pt", "model.json"],
    MAE_CXR: ["encoder.pt", "model.pt", "model.json"],
    VIT_CXR: ["model.pt", "model.json"],
    CONVVIT_CT: ["model.pt", "model.json"],
}


def of_knobs(knobs: dict) -> str:
    """Name of a test case."""
    return ",".join(f"{name}={value}" for name, value in knobs.items())


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tensorboard_names(folder: Path, kind: str = "scalars") -> set[str]:
    """Names of the scalars (or ``images``) that all the event files of a folder hold."""
    names: set[str] = set()
    for path in folder.glob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        names |= set(events.Tags()[kind])
    return names


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spoil(path: Path, how: str) -> None:
    """Damage a file."""
    content = path.read_bytes()
    if how == "garbage":
        path.write_bytes(b"this is not a scan" * 100)
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")


def change_image(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a NIfTI file again, with other voxels."""
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj).astype(np.float32)), image.affine), path)


def models_of(bundle: str, pretrained: Path, finetuned: Path) -> Path:
    """Folder of the models that a bundle's training has written."""
    return {MAE: pretrained, UNETR: finetuned}[bundle] / "models"


def assert_same_end(bundle: str, first: Path, second: Path) -> None:
    """Two trainings, each in a folder with ``output`` and ``models``, have ended alike, to the bit."""
    hashes = [{name: sha256(folder / "models" / name) for name in FILES[bundle]} for folder in (first, second)]
    print(f"{bundle}: {hashes[0]} {hashes[1]}")
    assert hashes[0] == hashes[1]
    one, other = (torch.load(f / "output" / "checkpoint.pt", weights_only=True) for f in (first, second))
    for name in ("network", "optimizer"):
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0)
    for name in ("lr_scheduler", "best", "epoch", "made_with", "run_with"):
        assert other[name] == one[name]
    scalars = [rows(folder / "output" / "scalars.csv") for folder in (first, second)]
    assert len(scalars[0]) == one["epoch"]
    for before, after in zip(*scalars, strict=True):
        assert before | {"seconds": ""} == after | {"seconds": ""}
