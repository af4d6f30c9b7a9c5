"""Weights that travel: ``encoder.pt``, and how it gets into another network without losing a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from monai.utils import ensure_tuple, ensure_tuple_rep
from torch import Tensor, nn

from medmim.datasets import Preset
from medmim.description import build_network, describe
from medmim.encoders import KINDS, EncoderKind, kind_of
from medmim.files import save_tensors
from medmim.state_dicts import (
    as_knob,
    count_faults,
    load_checkpoint,
    load_model,
    load_strictly,
    read_checkpoint,
    save_safetensors,
)

__all__ = [
    "LoadReport",
    "build_encoder",
    "find_encoder",
    "load_checkpoint",
    "load_encoder",
    "load_model",
    "read_checkpoint",
    "save_encoder",
    "save_safetensors",
]


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


def save_encoder(
    path: str | Path,
    encoder: nn.Module,
    img_size: Sequence[int],
    preset: Preset,
    kept_apart: Mapping[str, str] | None = None,
) -> None:
    """Write ``encoder.pt``: ``{"state_dict": MONAI's own names, "description": ...}``.

    Args:
        path: the file; replaced in one step.
        encoder: MONAI ``ViT`` or ``SwinTransformer``, or ``ConvViT``.
        img_size: voxels along each axis that it was built for.
        preset: the data that it was trained on.
        kept_apart: what tells the scans that it has not seen, see :func:`medmim.image_splits.kept_apart`.
    """
    state_dict = {name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()}
    further = {} if kept_apart is None else {"kept_apart": dict(kept_apart)}
    content = {"state_dict": state_dict, "description": describe(encoder, img_size, preset) | further}
    save_tensors(path, content)


def build_encoder(path: str | Path) -> nn.Module:
    """The encoder that an ``encoder.pt`` describes, with its weights.

    Raises:
        ValueError: when the file is not readable or carries no description.
    """
    state_dict, description = read_checkpoint(path)
    if description is None:
        raise ValueError(f"{path}: carries no description: build the network yourself and use load_encoder")
    try:
        network = build_network(description)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its description makes no network ({error}): save it again, or train again"
        ) from error
    load_strictly(network, state_dict, path)
    return find_encoder(network)


def find_encoder(network: nn.Module) -> Any:
    """The one encoder inside a network (or the network itself): MONAI ``ViT`` or ``SwinTransformer``, or ``ConvViT``.

    Raises:
        ValueError: when there is none, or more than one.
    """
    found = [module for module in network.modules() if kind_of(module) is not None]
    if len(found) != 1:
        counts = ", ".join(f"{sum(kind_of(m) is kind for m in found)} {kind.name} encoders" for kind in KINDS)
        raise ValueError(f"{type(network).__name__} holds {counts}: expected one encoder")
    return found[0]


def load_encoder(
    network: nn.Module,
    path: str | Path,
    img_size: Sequence[int] | int | None = None,
    allow_new: str | Sequence[str] = (),
) -> LoadReport:
    """Load pre-trained weights into the encoder of a network; nothing is skipped silently.

    Position embeddings are resized (linearly) to another grid. A stem for one channel is repeated and divided by the
    number of channels; one for several channels is summed for a single-channel network. What a dense ConvViT has beyond
    a pre-trained one (fifth stage, layer scale, relative position bias) is new; the latter two start without effect.

    Args:
        network: holds one MONAI ``ViT`` or ``SwinTransformer``, or one ``ConvViT``: the encoder itself, MONAI's
            ``UNETR`` or ``SwinUNETR``, a network of this package.
        path: ``encoder.pt``, or any checkpoint that holds one such encoder with MONAI's names behind any prefix; also
            safetensors, and MONAI's published Swin weights (``model_swinvit.pt``, ``ssl_pretrained_weights.pth``).
        img_size: voxels that the network was built for; needed only for a bare ``ViT``, which does not know its grid,
            when it has another one than the file (as many tokens are taken for the same grid without it).
        allow_new: beginnings of tensor names that may stay as they are when the file has nothing for them (for
            example ``patch_embedding.patch_embeddings`` between stems of 2 and 4 channels).

    Returns:
        report, which is also printed.

    Raises:
        ValueError: when a tensor of the encoder would stay unloaded, naming it and the reason; the network is then
            as it was.
    """
    allowed = ensure_tuple(allow_new)
    if "" in allowed:
        raise ValueError("allow_new: an empty beginning would allow every tensor: name those that may stay")
    source, description = read_checkpoint(path)
    encoder = find_encoder(network)
    kind = next(kind for kind in KINDS if isinstance(encoder, kind.encoder_class))
    names = _names_of_encoder(source, kind, path)
    tensors = {name: source[original] for name, original in names.items()}
    arguments = None if description is None else description["network"]["arguments"]
    _check_architecture(tensors, arguments, encoder, kind, allowed, path)

    report = LoadReport(str(path))
    target = encoder.state_dict()
    for name, current in target.items():
        value = tensors.get(name)
        if value is None:
            report.new.append(name)
        elif name == kind.positions:
            grid = _network_grid(network, encoder, kind, img_size)
            target[name], resized = _fit_positions(value, current, _file_grid(kind, arguments, path), grid, path)
            (report.resized if resized else report.loaded).append(name)
        elif name == kind.stem and value.shape != current.shape:
            adapted = _adapt_stem(value, current.shape[1])
            target[name] = current if adapted is None else adapted
            (report.new if adapted is None else report.adapted).append(name)
        else:
            target[name] = value
            report.loaded.append(name)
    taken = {original for name, original in names.items() if name in target}
    report.unused = [name for name in source if name not in taken]
    encoder.load_state_dict(target, strict=True)
    print(report)
    return report


def _names_of_encoder(source: Mapping[str, Tensor], wanted: EncoderKind, path: str | Path) -> dict[str, str]:
    """The encoder's names for the tensors of the one encoder in a file, each with the file's own name."""
    found = []
    for kind in KINDS:
        originals = {kind.rename(name): name for name in source}
        found += [(kind, prefix, originals) for prefix in kind.prefixes(originals)]
    if not found:
        anchors = " or ".join(f"…{kind.anchor} ({kind.name})" for kind in KINDS)
        raise ValueError(f"{path}: 0 tensors are named {anchors}: give a file that holds a {wanted.name}")
    if len(found) > 1:
        places = ", ".join(f"{kind.name} at {prefix or 'the top'}" for kind, prefix, _ in found)
        raise ValueError(f"{path}: holds {len(found)} encoders ({places}), expected one: save the one alone")
    kind, prefix, originals = found[0]
    if kind is not wanted:
        raise ValueError(
            f"{path}: holds a {kind.name}, but the network's encoder is a {wanted.name}: "
            f"give a file of a {wanted.name}, or build the network with a {kind.name}"
        )
    return {name.removeprefix(prefix): original for name, original in originals.items() if name.startswith(prefix)}


def _check_architecture(
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any] | None,
    encoder: nn.Module,
    kind: EncoderKind,
    allowed: tuple[str, ...],
    path: str | Path,
) -> None:
    """Refuse another architecture before any tensor is changed.

    Args:
        tensors: of the file, under the encoder's names.
        arguments: constructor arguments that the file describes; None when it has no description.
        encoder: the network's, of this ``kind``.
        allowed: beginnings of names that may stay.
        path: the file.
    """
    faults = _faults(tensors, encoder, kind, allowed)
    read = kind.sizes(tensors)
    theirs = read if arguments is None else dict(arguments)
    ours = kind.describe(encoder, theirs.get("img_size", ())) if arguments else kind.sizes(encoder.state_dict())
    fitted = ("img_size", "in_channels", "in_chans", *kind.options)  # positions are resized, the stem is adapted
    different = [key for key in ours if key in theirs and theirs[key] != ours[key] and key not in fitted]
    hidden = [key for key in different if key not in read]  # no shape tells it, like the number of heads of a ViT
    if not faults and not hidden:
        return
    told = [f"{key} {theirs[key]}, expected {ours[key]}" for key in different]
    told += [count_faults(faults)] if faults else []
    knobs = " ".join(as_knob(dict(kind.knobs).get(key, key), theirs[key]) for key in different if key != "spatial_dims")
    raise ValueError(
        f"{path}: another architecture than the network's: {'; '.join(told)}."
        + (f" The file was made with {knobs}" if knobs else "")
    )


def _faults(
    tensors: Mapping[str, Tensor], encoder: nn.Module, kind: EncoderKind, allowed: tuple[str, ...]
) -> list[str]:
    """Why tensors of a file do not fit the encoder, one text for each that does not."""
    target = encoder.state_dict()
    found = []
    for name, value in target.items():
        may_stay = name.startswith(allowed) or any(re.search(p, name) for p in (kind.optional, kind.new))
        found.append(_fault(name, tensors.get(name), value, kind, may_stay))
    for name, value in encoder.named_buffers():
        computed = name in tensors and re.search(kind.optional, name) and tensors[name].shape == value.shape
        if computed and not torch.equal(tensors[name].to(value), value):
            found.append(f"{name} holds other values than the network's, which are computed from its arguments")
    for name in tensors:
        if name not in target and re.match(kind.body, name) and not re.search(kind.optional, name):
            found.append(f"{name} has no place")
    return [fault for fault in found if fault is not None]


def _fault(name: str, found: Tensor | None, value: Tensor, kind: EncoderKind, may_stay: bool) -> str | None:
    """Why a tensor of the file cannot become ``value``, the encoder's tensor; None when it can, or need not."""
    if found is None:
        return None if may_stay else f"{name} is missing"
    if name == kind.positions:
        same = found.shape[-1] == value.shape[-1]
        return None if same else f"{name} has {found.shape[-1]} features, expected {value.shape[-1]}"
    if found.shape == value.shape:
        return None
    if name == kind.stem and found.shape[:1] + found.shape[2:] == value.shape[:1] + value.shape[2:]:
        adapts = may_stay or _adapt_stem(found, value.shape[1]) is not None
        channels = f"{name} takes {found.shape[1]} channels, the network {value.shape[1]}"
        return (
            None
            if adapts
            else f"{channels}: take an encoder of 1 or as many channels (in Python, allow_new="
            f"[{name.removesuffix('.weight')!r}] keeps the network's own)"
        )
    return f"{name} is {tuple(found.shape)}, expected {tuple(value.shape)}"


def _network_grid(
    network: nn.Module, encoder: nn.Module, kind: EncoderKind, img_size: Sequence[int] | int | None
) -> tuple[int, ...] | None:
    """Token grid of the network, None when it cannot be known."""
    if img_size is not None and kind.grid is not None:
        spatial_dims = encoder.state_dict()[kind.stem].ndim - 2
        return kind.grid(kind.describe(encoder, ensure_tuple_rep(img_size, spatial_dims)))
    for name in ("grid", "feat_size"):  # ours, MONAI's UNETR
        if hasattr(network, name):
            return tuple(getattr(network, name))
    return None


def _file_grid(kind: EncoderKind, arguments: Mapping[str, Any] | None, path: str | Path) -> tuple[int, ...] | None:
    """Token grid that a file describes, None when it does not."""
    if arguments is None or kind.grid is None:
        return None
    try:
        return kind.grid(arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description lacks img_size or patch_size: train again") from error


def _fit_positions(
    positions: Tensor,
    current: Tensor,
    source_grid: tuple[int, ...] | None,
    target_grid: tuple[int, ...] | None,
    path: str | Path,
) -> tuple[Tensor, bool]:
    """Position embedding on the network's grid, and whether it had to be resized; grids are None when unknown."""
    if source_grid is None and target_grid is not None and positions.shape[1] != current.shape[1]:
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
