"""Weights that travel: ``encoder.pt``, and how it gets into another network without losing a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import ViT
from monai.utils import ensure_tuple, ensure_tuple_rep
from torch import Tensor, nn

from medmim.datasets import Preset
from medmim.description import build_network, check_version, describe, describe_vit, read_description
from medmim.files import replace_file
from medmim.networks.vit import vit_patch_size

POSITIONS = "patch_embedding.position_embeddings"
STEM = "patch_embedding.patch_embeddings.weight"
NESTED_KEYS = ("state_dict", "model", "network")


@dataclass
class LoadReport:
    """What became of each tensor; names are those of the encoder (``unused``: those of the file).

    Attributes:
        loaded: taken over as they are.
        resized: position embeddings brought to another grid.
        adapted: stem brought to another number of channels.
        new: tensors of the encoder that the file does not hold; they keep their values.
        unused: tensors of the file that the encoder does not have.
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        taken = len(self.loaded) + len(self.resized) + len(self.adapted)
        parts = [f"{self.path}: {taken} of {taken + len(self.new)} encoder tensors loaded"]
        for word in ("resized", "adapted", "new", "unused"):
            names = getattr(self, word)
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{len(names)} {word} ({', '.join(names[:3])}{more})")
        return ", ".join(parts)


def save_encoder(path: str | Path, encoder: ViT, img_size: Sequence[int], preset: Preset) -> None:
    """Write ``encoder.pt``: ``{"state_dict": MONAI's own names, "description": ...}``.

    Args:
        path: the file; replaced in one step.
        encoder: MONAI ViT.
        img_size: voxels along each axis that it was built for.
        preset: the data that it was trained on.
    """
    state_dict = {name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()}
    content = {"state_dict": state_dict, "description": describe(encoder, img_size, preset)}
    replace_file(path, lambda temporary: torch.save(content, temporary))


def build_encoder(path: str | Path) -> nn.Module:
    """The encoder that an ``encoder.pt`` describes, with its weights.

    Raises:
        ValueError: when the file is not readable or carries no description.
    """
    state_dict, description = read_checkpoint(path)
    if description is None:
        raise ValueError(f"{path}: carries no description: build the network yourself and use load_encoder")
    encoder = build_network(description)
    _load_strictly(encoder, state_dict, path)
    return encoder


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """State dict of a checkpoint, and its description when it is one of ours.

    The state dict may be the file's content itself, or stand under ``state_dict``, ``model`` or ``network``.
    Files are read with ``weights_only=True``: code in a pickle is never run.

    Raises:
        ValueError: when the file is missing, damaged, holds code, or no tensors are found.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file: train first, or correct the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything, also IndexError or struct.error
        reason = " ".join(str(error).split()).split(". ")[0][:150]
        raise ValueError(f"{path}: not readable as a checkpoint of plain tensors ({reason}): get it again") from error
    description = content.get("description") if isinstance(content, dict) else None
    if not isinstance(description, dict) or "format_version" not in description:
        description = None  # none of ours
    for key in NESTED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds no state dict (looked at top level and under {', '.join(NESTED_KEYS)})")
    if description is not None:
        check_version(description, path)
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, description


def find_encoder(network: nn.Module) -> ViT:
    """The one ViT inside a network (or the network itself).

    Raises:
        ValueError: when there is none, or more than one.
    """
    found = [module for module in network.modules() if isinstance(module, ViT)]
    if len(found) != 1:
        raise ValueError(f"{type(network).__name__} holds {len(found)} ViT encoders, expected one")
    return found[0]


def load_encoder(
    network: nn.Module,
    path: str | Path,
    img_size: Sequence[int] | int | None = None,
    allow_new: str | Sequence[str] = (),
) -> LoadReport:
    """Load pre-trained weights into the encoder of a network; nothing is skipped silently.

    Position embeddings are resized (linearly) to another grid. A stem for one channel is repeated and divided by the
    number of channels; one for several channels is summed for a single-channel network.

    Args:
        network: holds one MONAI ``ViT``: a ``ViT`` itself, MONAI's or our ``UNETR``, a pretext network.
        path: ``encoder.pt``, or a checkpoint that holds a ViT with MONAI's names behind any prefix.
        img_size: voxels that the network was built for; needed only for a bare ``ViT``, which does not know its grid,
            when it has another one than the file (as many tokens are taken for the same grid without it).
        allow_new: beginnings of tensor names that may stay as they are when the file has nothing for them (for
            example ``patch_embedding.patch_embeddings`` between stems of 2 and 4 channels).

    Returns:
        report, which is also printed.

    Raises:
        ValueError: when a tensor of the encoder would stay unloaded, naming it and the reason.
    """
    if "" in ensure_tuple(allow_new):
        raise ValueError("allow_new: an empty beginning would allow every tensor: name those that may stay")
    source, description = read_checkpoint(path)
    encoder = find_encoder(network)
    report = LoadReport(str(path))
    prefix = _encoder_prefix(source, path)
    tensors = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
    target_grid = _network_grid(network, encoder, img_size)
    target = encoder.state_dict()
    _check_architecture(tensors, target, encoder, description, path, allow_new)

    for name, current in target.items():
        value = tensors.get(name)
        if value is None:
            report.new.append(name)
        elif name == POSITIONS:
            target[name], resized = _fit_positions(value, current, description, target_grid, path)
            (report.resized if resized else report.loaded).append(name)
        elif name == STEM and value.shape != current.shape:
            adapted = _adapt_stem(value, current.shape[1])
            target[name] = current if adapted is None else adapted
            (report.new if adapted is None else report.adapted).append(name)
        else:
            target[name] = value
            report.loaded.append(name)
    report.unused = [name for name in source if name.removeprefix(prefix) not in target or not name.startswith(prefix)]
    encoder.load_state_dict(target, strict=True)
    print(report)
    return report


def load_checkpoint(network: nn.Module, path: str | Path, made_with: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint into exactly the network that it was saved from.

    Args:
        network: the network.
        path: ``checkpoint.pt`` or ``model.pt``.
        made_with: knobs that must be those of the training; compared with what ``checkpoint.pt`` says of it.

    Raises:
        ValueError: when a knob, a name or a shape differs.
    """
    state_dict, _ = read_checkpoint(path)
    if made_with is not None:
        recorded = torch.load(path, map_location="cpu", weights_only=True).get("made_with", {})
        _check_same(recorded, made_with, path)
    _load_strictly(network, state_dict, path)


def load_model(network: nn.Module, models_dir: str | Path, img_size: Sequence[int], preset: Preset) -> None:
    """Load ``model.pt`` into the network, after ``model.json`` was compared with network and preset.

    Args:
        network: UNETR or feature extractor of this package.
        models_dir: folder of the two files.
        img_size: voxels along each axis that the network was built for.
        preset: the data that it is to be used on.

    Raises:
        ValueError: when preset, a knob, a name or a shape differs.
    """
    path = Path(models_dir) / "model.json"
    theirs = read_description(path)
    ours = json.loads(json.dumps(describe(network, img_size, preset)))  # as read: no tuples, keys are text
    if theirs["preset"] != ours["preset"]:
        raise ValueError(
            f"{path}: trained with preset {theirs['preset']['name']}, whose fields differ from those of --dataset "
            f"{preset.name}: give the preset that it was trained with"
        )
    recorded, found = theirs["network"]["arguments"], ours["network"]["arguments"]
    recorded["roi_size"], found["roi_size"] = recorded.pop("img_size"), found.pop("img_size")
    _check_same(recorded, found, path)
    load_checkpoint(network, Path(models_dir) / "model.pt")


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str | Path) -> None:
    different = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if different:
        wanted = " ".join(f"--{key} {_knob(theirs[key])}" for key in different)
        raise ValueError(f"{path}: other knobs than it was trained with: give {wanted}")


def _load_strictly(network: nn.Module, state_dict: dict[str, Tensor], path: str | Path) -> None:
    expected = network.state_dict()
    faults = [f"{name} is missing" for name in expected.keys() - state_dict.keys()]
    faults += [f"{name} is unknown" for name in state_dict.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state_dict and state_dict[name].shape != value.shape
    ]
    if faults:
        raise ValueError(
            f"{path}: {len(faults)} tensors do not fit a {type(network).__name__}, first: {sorted(faults)[0]}: "
            "give the knobs that it was trained with"
        )
    network.load_state_dict(state_dict, strict=True)


def _encoder_prefix(source: dict[str, Tensor], path: str | Path) -> str:
    prefixes = [name.removesuffix(POSITIONS) for name in source if name.endswith(POSITIONS)]
    if len(prefixes) != 1:
        raise ValueError(f"{path}: {len(prefixes)} tensors are named …{POSITIONS}, expected the one of a MONAI ViT")
    return prefixes[0]


def _network_grid(network: nn.Module, encoder: ViT, img_size: Sequence[int] | int | None) -> tuple[int, ...] | None:
    """Token grid of the network, None when it cannot be known."""
    patch_size = vit_patch_size(encoder)
    if img_size is not None:
        sizes = ensure_tuple_rep(img_size, len(patch_size))
        return tuple(size // patch for size, patch in zip(sizes, patch_size, strict=True))
    for name in ("grid", "feat_size"):  # ours, MONAI's UNETR
        if hasattr(network, name):
            return tuple(getattr(network, name))
    return None


def _check_architecture(
    tensors: dict[str, Tensor],
    target: dict[str, Tensor],
    encoder: ViT,
    description: dict[str, Any] | None,
    path: str | Path,
    allow_new: str | Sequence[str],
) -> None:
    """Refuse another architecture before any tensor is changed."""
    faults = []
    for name, value in target.items():
        found = tensors.get(name)
        allowed = name.startswith(ensure_tuple(allow_new)) or "norm_cross_attn" in name  # which nothing uses
        if found is None:
            if not allowed:
                faults.append(f"{name} is missing")
        elif name == POSITIONS:
            if found.shape[-1] != value.shape[-1]:
                faults.append(f"{name} has {found.shape[-1]} features, expected {value.shape[-1]}")
        elif name == STEM:
            if found.shape[:1] + found.shape[2:] != value.shape[:1] + value.shape[2:]:
                faults.append(f"{name} is {tuple(found.shape)}, expected {tuple(value.shape)}")
            elif _adapt_stem(found, value.shape[1]) is None and found.shape != value.shape and not allowed:
                faults.append(f"{name} takes {found.shape[1]} channels, the network {value.shape[1]}")
        elif found.shape != value.shape:
            faults.append(f"{name} is {tuple(found.shape)}, expected {tuple(value.shape)}")
    surplus = [name for name in tensors if name.startswith("blocks.") and name not in target]
    faults += [f"{name} has no place" for name in surplus if "cross_attn" not in name]  # stale in old MONAI files
    knobs = ""
    if description is not None:
        theirs = description["network"]["arguments"]
        ours = describe_vit(encoder, theirs["img_size"])
        if theirs["num_heads"] != ours["num_heads"]:  # which no tensor's shape tells
            faults.append(f"blocks have {theirs['num_heads']} heads, expected {ours['num_heads']}")
        different = [key for key in ours if key not in ("img_size", "in_channels") and theirs.get(key) != ours[key]]
        if different:
            knobs = " The file was made with " + " ".join(f"--{key} {_knob(theirs.get(key))}" for key in different)
    if not faults:
        return
    raise ValueError(
        f"{path}: another architecture than the network's: {len(faults)} tensors do not fit, first: {faults[0]}.{knobs}"
    )


def _knob(value: Any) -> str:
    """A value as one types it on the command line; equal sizes of all axes as one number."""
    if isinstance(value, list):
        return str(value[0]) if len(set(value)) == 1 else f'"{value}"'
    return str(value)


def _fit_positions(
    positions: Tensor,
    current: Tensor,
    description: dict[str, Any] | None,
    target_grid: tuple[int, ...] | None,
    path: str | Path,
) -> tuple[Tensor, bool]:
    """Position embedding on the network's grid, and whether it had to be resized."""
    source_grid = None
    if description is not None:
        arguments = description["network"]["arguments"]
        source_grid = tuple(s // p for s, p in zip(arguments["img_size"], arguments["patch_size"], strict=True))
    elif target_grid is not None and positions.shape[1] != current.shape[1]:
        side = round(positions.shape[1] ** (1 / len(target_grid)))
        if side ** len(target_grid) == positions.shape[1]:
            source_grid = (side,) * len(target_grid)
            print(f"{path}: does not say its grid; its {positions.shape[1]} positions are taken for {source_grid}")
    unknown = source_grid is None or target_grid is None  # then as many tokens are taken for the same grid
    if positions.shape == current.shape and (unknown or source_grid == target_grid):
        return positions, False
    if source_grid is None or target_grid is None or prod(target_grid) != current.shape[1]:
        raise ValueError(
            f"{path}: positions of a grid {source_grid or positions.shape[1]} for a network with {current.shape[1]} "
            "tokens: give img_size, so that they can be resized"
        )
    features = positions.shape[-1]
    grid = positions.reshape(1, *source_grid, features).movedim(-1, 1)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(target_grid)]
    resized = nn.functional.interpolate(grid.float(), size=target_grid, mode=mode, align_corners=False)
    return resized.movedim(1, -1).reshape(1, -1, features).to(positions.dtype), True


def _adapt_stem(weight: Tensor, channels: int) -> Tensor | None:
    """Stem for another number of channels; None between two different numbers above 1, where there is no rule."""
    if weight.shape[1] == 1:
        return weight.repeat(1, channels, *[1] * (weight.ndim - 2)) / channels
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return None
