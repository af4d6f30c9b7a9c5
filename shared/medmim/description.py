"""Description of a network: enough to build it again, to check it against another, and to prepare its input.

It travels in ``encoder.pt`` and, as ``model.json``, beside ``model.pt``: plain values only. ::

    {"format_version": 1, "medmim_version": "0.1.0",
     "network": {"name": "ViT", "arguments": {"in_channels": 1, "img_size": [96, 96, 96], ...}},
     "preset": {... the fields of presets.yaml ...},
     "pretrained_on": [{"name": "btcv", "license": ..., "citation": ..., "source": ...}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from monai.networks.nets import SwinUNETR, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn

from medmim.datasets import Preset
from medmim.encoders import KINDS, describe_convvit, describe_swin, describe_vit, kind_of
from medmim.files import replace_file
from medmim.networks import UNETR, ConvViT, ConvViTClassifier, ConvViTUNETR, FeatureExtractor, ViTClassifier
from medmim.networks.vit_classifier import POOLING
from medmim.version import FORMAT_VERSION, __version__

OLDEST_FORMAT = 1  # the oldest layout that is still read


def describe_network(network: nn.Module, img_size: Sequence[int]) -> dict[str, Any]:
    """Name and constructor arguments of a network of this project.

    Args:
        network: MONAI ``ViT`` or ``SwinTransformer``, or ``ConvViT``, ``FeatureExtractor``, ``UNETR``,
            ``ConvViTUNETR``, ``ViTClassifier`` or ``ConvViTClassifier`` of this package, or MONAI's ``SwinUNETR``.
        img_size: voxels along each axis that it was built for.

    Raises:
        ValueError: when the class is another one.
    """
    kind = kind_of(network)
    if kind is not None:
        return {"name": kind.name, "arguments": kind.describe(network, img_size)}
    if isinstance(network, FeatureExtractor):
        inside = describe_network(network.encoder, img_size)
        own = {} if inside["name"] == "ViT" else {"encoder": inside["name"]}
        return {"name": "FeatureExtractor", "arguments": own | inside["arguments"] | {"img_size": list(img_size)}}
    if isinstance(network, UNETR):
        head = network.out.conv.conv
        own = {"out_channels": head.out_channels, "feature_size": head.in_channels, "norm_name": network.norm_name}
        return {"name": "UNETR", "arguments": describe_vit(network.vit, img_size) | own}
    if isinstance(network, ViTClassifier):
        own = {"n_outputs": network.head.out_features, "pooling": POOLING[network.has_class_token]}
        return {"name": "ViTClassifier", "arguments": describe_vit(network.vit, img_size) | own}
    if isinstance(network, ConvViTUNETR | ConvViTClassifier):
        sizes = describe_convvit(network.encoder, img_size)
        arguments = {key: value for key, value in sizes.items() if key not in ("fusion", "fifth_stage", "mlp_ratio")}
        if isinstance(network, ConvViTClassifier):
            return {"name": "ConvViTClassifier", "arguments": arguments | {"n_outputs": network.head.out_features}}
        own = {"out_channels": network.out.conv.conv.out_channels, "norm_name": network.norm_name}
        return {"name": "ConvViTUNETR", "arguments": arguments | own}
    if isinstance(network, SwinUNETR):
        return {"name": "SwinUNETR", "arguments": _describe_swin_unetr(network, img_size)}
    raise ValueError(f"cannot describe a {type(network).__name__}: expected {', '.join(BUILDERS)}")


def describe(
    network: nn.Module, img_size: Sequence[int], preset: Preset, pretrained_on: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """Whole description of a network and of the data that it was trained on.

    Args:
        network: see :func:`describe_network`.
        img_size: voxels along each axis that it was built for.
        preset: the data that it was trained on last.
        pretrained_on: data that it had seen before; see :func:`name_data`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "medmim_version": __version__,
        "network": describe_network(network, img_size),
        "preset": preset.to_dict(),
        "pretrained_on": list(pretrained_on),
    }


def name_data(description: dict[str, Any] | None, path: str | Path) -> list[dict[str, str]]:
    """Name, licence, citation and source of all data that described weights have seen, the last first.

    Args:
        description: of the weights; ``None`` when their file carries none.
        path: of the file, which then stands for what is not known.
    """
    if description is None:
        return [{"name": Path(path).name, "license": "not said in the file", "citation": "", "source": ""}]
    seen = {key: description["preset"].get(key, "") for key in ("name", "license", "citation", "source")}
    return [seen, *description.get("pretrained_on", [])]


def _build_feature_extractor(encoder: str = "ViT", **arguments: Any) -> FeatureExtractor:
    if encoder == "SwinTransformer":  # takes any size
        img_size = arguments.pop("img_size")
        return FeatureExtractor(SwinTransformer(**arguments), img_size)
    encoder_class: Any = {"ViT": ViT, "ConvViT": ConvViT}[encoder]
    return FeatureExtractor(encoder_class(**arguments), arguments["img_size"])


def _describe_swin_unetr(network: SwinUNETR, img_size: Sequence[int]) -> dict[str, Any]:
    """Arguments of MONAI's constructor, and the voxels that it was trained on; other norms than the default show in
    the names of the tensors.
    """
    sizes = describe_swin(network.swinViT)
    names = {"in_chans": "in_channels", "embed_dim": "feature_size"}
    if len(set(sizes["window_size"])) == 1:  # as the knob of the bundle
        sizes["window_size"] = sizes["window_size"][0]
    own = {"patch_size": network.patch_size, "normalize": network.normalize, "img_size": list(img_size)}
    out_channels = network.out.conv.conv.out_channels
    return {names.get(key, key): value for key, value in sizes.items()} | own | {"out_channels": out_channels}


def _build_swin_unetr(img_size: Sequence[int], **arguments: Any) -> SwinUNETR:
    """It takes any ``img_size``."""
    return SwinUNETR(**arguments)


BUILDERS: dict[str, Callable[..., nn.Module]] = {kind.name: kind.build for kind in KINDS} | {
    "FeatureExtractor": _build_feature_extractor,
    "UNETR": UNETR,
    "ViTClassifier": ViTClassifier,
    "ConvViTClassifier": ConvViTClassifier,
    "ConvViTUNETR": ConvViTUNETR,
    "SwinUNETR": _build_swin_unetr,
}


TASKS = {  # kind of bundle that writes a model.pt of each network
    "FeatureExtractor": "pretraining",
    "UNETR": "segmentation",
    "SwinUNETR": "segmentation",
    "ConvViTUNETR": "segmentation",
    "ViTClassifier": "classification",
    "ConvViTClassifier": "classification",
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


def is_description(value: Any) -> bool:
    """Whether a value that stands under ``description`` in a file was written by this package, in any version."""
    return isinstance(value, dict) and bool(value.keys() & {"format_version", "medmim_version"})


def check_description(description: dict[str, Any], path: str | Path) -> None:
    """Refuse a description of another version, or one that has lost a part.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    check_version(description, path)
    network, preset = description.get("network"), description.get("preset")
    whole = isinstance(network, dict) and isinstance(network.get("arguments"), dict) and "name" in network
    if not whole or not isinstance(preset, dict):
        raise ValueError(f"{path}: its description lacks the network's name or arguments, or the preset: train again")


def check_version(description: dict[str, Any], path: str | Path) -> None:
    """Refuse a description that a newer package wrote, or one too old to be read.

    Raises:
        ValueError: naming both versions.
    """
    found, writer = description.get("format_version"), description.get("medmim_version", "of an unknown version")
    if isinstance(found, int) and OLDEST_FORMAT <= found <= FORMAT_VERSION:
        return
    old = found is None or (isinstance(found, int) and found < OLDEST_FORMAT)
    known = f"{OLDEST_FORMAT}" if OLDEST_FORMAT == FORMAT_VERSION else f"{OLDEST_FORMAT} to {FORMAT_VERSION}"
    raise ValueError(
        f"{path}: format version {'missing' if found is None else found} (written by medmim {writer}), this is medmim "
        f"{__version__}, which reads version {known}: "
        + (f"train again, or use it with medmim {writer}" if old else "update medmim")
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


def read_thresholds(path: str | Path) -> dict[str, float]:
    """Thresholds of a classification, which training chose on its validation images; see ``model.json``.

    Raises:
        ValueError: when the description holds none.
    """
    thresholds = read_description(path).get("thresholds")
    if not isinstance(thresholds, dict):
        raise ValueError(f"{path}: holds no thresholds: expected the model of a classification: train again")
    return thresholds


def read_preset(description: dict[str, Any]) -> Preset:
    """The preset inside a description."""
    body = dict(description["preset"])
    return Preset.from_dict(body.pop("name"), body)
