"""What several test files share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from monai.networks.nets import ViT

# pytest's default import mode puts this folder on sys.path, where tests/medmim would hide an editable install
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from medmim.datasets import Preset, get_preset  # noqa: E402


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
