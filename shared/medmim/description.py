"""Description of a network: enough to build it again, to check it against another, and to prepare its input.

It travels in ``encoder.pt`` and, as ``model.json``, beside ``model.pt``: plain values only. ::

    {"format_version": 1, "medmim_version": "0.1.0",
     "network": {"name": "ViT", "arguments": {"in_channels": 1, "img_size": [96, 96, 96], ...}},
     "preset": {... the fields of presets.yaml ...}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from monai.networks.nets import ViT
from torch import nn

from medmim.datasets import Preset
from medmim.files import replace_file
from medmim.networks import UNETR, FeatureExtractor
from medmim.networks.vit import prepare_vit_blocks, vit_channels, vit_patch_size
from medmim.version import FORMAT_VERSION, __version__


def describe_vit(vit: ViT, img_size: Sequence[int]) -> dict[str, Any]:
    """Constructor arguments of a MONAI ViT, read off the network itself."""
    block: Any = vit.blocks[0]
    return {
        "in_channels": vit_channels(vit),
        "img_size": list(img_size),
        "patch_size": list(vit_patch_size(vit)),
        "hidden_size": vit.norm.normalized_shape[0],
        "mlp_dim": block.mlp.linear1.out_features,
        "num_layers": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "qkv_bias": block.attn.qkv.bias is not None,
        "spatial_dims": len(img_size),
    }


def describe_network(network: nn.Module, img_size: Sequence[int]) -> dict[str, Any]:
    """Name and constructor arguments of a network of this project.

    Args:
        network: MONAI ``ViT``, or ``FeatureExtractor`` or ``UNETR`` of this package.
        img_size: voxels along each axis that it was built for.

    Raises:
        ValueError: when the class is another one.
    """
    if isinstance(network, ViT):
        return {"name": "ViT", "arguments": describe_vit(network, img_size)}
    if isinstance(network, FeatureExtractor):
        return {"name": "FeatureExtractor", "arguments": describe_vit(network.encoder, img_size)}
    if isinstance(network, UNETR):
        head = network.out.conv.conv
        own = {"out_channels": head.out_channels, "feature_size": head.in_channels, "norm_name": network.norm_name}
        return {"name": "UNETR", "arguments": describe_vit(network.vit, img_size) | own}
    raise ValueError(f"cannot describe a {type(network).__name__}: expected ViT, FeatureExtractor or UNETR")


def describe(network: nn.Module, img_size: Sequence[int], preset: Preset) -> dict[str, Any]:
    """Whole description of a network and of the data that it was trained on."""
    return {
        "format_version": FORMAT_VERSION,
        "medmim_version": __version__,
        "network": describe_network(network, img_size),
        "preset": preset.to_dict(),
    }


def _build_vit(**arguments: Any) -> ViT:
    vit = ViT(**arguments)
    prepare_vit_blocks(vit.blocks)
    return vit


def _build_feature_extractor(**arguments: Any) -> FeatureExtractor:
    return FeatureExtractor(ViT(**arguments), arguments["img_size"])


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "ViT": _build_vit,
    "FeatureExtractor": _build_feature_extractor,
    "UNETR": UNETR,
}


def build_network(description: dict[str, Any]) -> nn.Module:
    """Build the network that a description speaks of, with fresh weights.

    Raises:
        ValueError: when its name is unknown.
    """
    network = description["network"]
    if network["name"] not in BUILDERS:
        raise ValueError(f"description of an unknown network {network['name']!r}, known are {', '.join(BUILDERS)}")
    return BUILDERS[network["name"]](**network["arguments"])


def check_version(description: dict[str, Any], path: str | Path) -> None:
    """Refuse a description that a newer package wrote.

    Raises:
        ValueError: naming both versions.
    """
    found = description.get("format_version")
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {found} (medmim {description.get('medmim_version')}), "
            f"this is medmim {__version__} with format version {FORMAT_VERSION}: update medmim"
        )


def write_description(description: dict[str, Any], path: str | Path) -> None:
    """Write a description as JSON."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(description, indent=2) + "\n"))


def read_description(path: str | Path) -> dict[str, Any]:
    """Read the description that training wrote beside ``model.pt``.

    Raises:
        ValueError: when the file is missing, damaged or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file: train first (configs/train.yaml writes it), or give --models_dir")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        description["network"], description["preset"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a description of a network ({error!r}): train again") from error
    check_version(description, path)
    return description


def read_preset(description: dict[str, Any]) -> Preset:
    """The preset inside a description."""
    body = dict(description["preset"])
    return Preset.from_dict(body.pop("name"), body)
