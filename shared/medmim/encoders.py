"""Kinds of encoder: all that describing, finding and loading one needs to know of its class stands here.

A new kind is a new entry of ``KINDS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import MERGING_MODE, SwinTransformer
from torch import Tensor, nn

from medmim.networks.convvit import ConvViT
from medmim.networks.convvit_blocks import LayerScale
from medmim.networks.vit import prepare_vit_blocks, vit_patch_size

StateDict = Mapping[str, Tensor]
NOTHING = r"(?!)"  # pattern that is found nowhere


@dataclass(frozen=True)
class EncoderKind:
    """One class of encoder; names of tensors are those of its own state dict.

    Attributes:
        encoder_class: the class.
        anchor: a tensor that each such encoder has, under a name that nothing else has; tells its prefix in a file.
        stem: weight of the first convolution, ``(features, channels, *patch)``.
        body: pattern; a tensor of a file that matches it and has no place tells of another architecture.
        sizes: constructor arguments as far as the shapes of a state dict tell them.
        describe: all constructor arguments, from the encoder and the voxels along each axis that it was built for.
        build: the encoder from these arguments, as this package uses it.
        optional: pattern of tensors that a file may lack or have too many of: unused, or computed by the constructor.
        new: pattern of tensors that a file may lack: they belong to a task, or change nothing at their start.
        options: constructor arguments that may differ from those of a file: which parts are built, and regularisation.
        layers: beginnings of tensor names and the layer that they count to, from 0 for the embedding on, for
            layer-wise learning rates; all else counts as after the encoder.
        renames: pattern and replacement of names under which published files hold the same tensors.
        knobs: arguments that the command line knows under another name.
        positions: position embeddings ``(1, tokens, features)``, if it has any.
        grid: tokens along each axis, from the constructor arguments; needed where there are positions.
    """

    encoder_class: type[nn.Module]
    anchor: str
    stem: str
    body: str
    sizes: Callable[[StateDict], dict[str, Any]]
    describe: Callable[[Any, Sequence[int]], dict[str, Any]]
    build: Callable[..., nn.Module]
    optional: str = NOTHING
    new: str = NOTHING
    options: tuple[str, ...] = ()
    layers: Callable[[Any], dict[str, int]] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    knobs: tuple[tuple[str, str], ...] = ()
    positions: str | None = None
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]] | None = None

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.encoder_class.__name__

    def rename(self, name: str) -> str:
        """Name of a file's tensor as MONAI gives it; a prefix stays."""
        name = name.replace("_orig_mod.", "")  # of torch.compile, which may wrap any part
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """What stands before the names of each encoder of this kind in a state dict."""
        found = [name for name in names if f".{name}".endswith(f".{self.anchor}")]
        return [name.removesuffix(self.anchor) for name in found]


def kind_of(module: nn.Module) -> EncoderKind | None:
    """The kind of an encoder; None for any other module."""
    for kind in KINDS:
        if isinstance(module, kind.encoder_class):
            return kind
    return None


def _vit_sizes(tensors: StateDict) -> dict[str, Any]:
    width, mlp_bias = tensors.get("norm.weight"), tensors.get("blocks.0.mlp.linear1.bias")
    return _stem_sizes(tensors.get(VIT_STEM), "in_channels") | {
        **({} if width is None else {"hidden_size": len(width)}),
        **({} if mlp_bias is None else {"mlp_dim": len(mlp_bias)}),
        "num_layers": _count(r"blocks\.(\d+)\.", tensors),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }


def describe_vit(vit: ViT, img_size: Sequence[int]) -> dict[str, Any]:
    """Constructor arguments of a MONAI ViT, read off the network itself.

    Raises:
        ValueError: when the patch embedding is not a convolution.
    """
    vit_patch_size(vit)
    block: Any = vit.blocks[0]
    return {"img_size": list(img_size), "num_heads": block.attn.num_heads} | _vit_sizes(vit.state_dict())


def _build_vit(**arguments: Any) -> ViT:
    vit = ViT(**arguments)
    prepare_vit_blocks(vit.blocks)
    return vit


def _vit_grid(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(s // p for s, p in zip(arguments["img_size"], arguments["patch_size"], strict=True))


def _swin_sizes(tensors: StateDict) -> dict[str, Any]:
    tables = [tensors.get(f"layers{i}.0.blocks.0.attn.relative_position_bias_table") for i in (1, 2, 3, 4)]
    stem = tensors.get(SWIN_STEM)
    sizes = _stem_sizes(stem, "in_chans") | {
        "depths": [_count(rf"layers{i}\.0\.blocks\.(\d+)\.", tensors) for i in (1, 2, 3, 4)],
        "qkv_bias": "layers1.0.blocks.0.attn.qkv.bias" in tensors,
        "patch_norm": "patch_embed.norm.weight" in tensors,
        "use_v2": any(name.startswith("layers1c.") for name in tensors),
    }
    if stem is not None:
        sizes["embed_dim"] = len(stem)
    if all(table is not None for table in tables):
        sizes["num_heads"] = [table.shape[1] for table in tables if table is not None]
    if tables[0] is not None and stem is not None:
        side = round(len(tables[0]) ** (1 / (stem.ndim - 2)))
        if side ** (stem.ndim - 2) == len(tables[0]):  # else the window is no cube, and its sizes cannot be told
            sizes["window_size"] = [(side + 1) // 2] * (stem.ndim - 2)
    return sizes


def describe_swin(swin: SwinTransformer, img_size: Sequence[int] = ()) -> dict[str, Any]:
    """Constructor arguments of a MONAI SwinTransformer, read off the network itself; it takes any ``img_size``.

    Raises:
        ValueError: when a part of it is none of MONAI's Swin.
    """
    layer: Any = swin.layers1[0]
    merging = [name for name, merging_class in MERGING_MODE.items() if type(layer.downsample) is merging_class]
    if not merging or not hasattr(layer.blocks[0], "window_size"):
        raise ValueError("cannot describe a SwinTransformer with Hyena blocks, or with a downsampling of its own")
    return _swin_sizes(swin.state_dict()) | {
        "window_size": list(layer.blocks[0].window_size),
        "mlp_ratio": layer.blocks[0].mlp_ratio,
        "downsample": merging[0],
    }


def _swin_layers(swin: SwinTransformer) -> dict[str, int]:
    """A stage's downsampling counts to its last block, as in SimMIM (Xie et al., CVPR 2022), the convolution of the
    second version to its first.
    """
    layers = {"patch_embed.": 0}
    for number in range(1, swin.num_layers + 1):
        first, stage = max(layers.values()) + 1, f"layers{number}"
        depth = len(getattr(swin, stage)[0].blocks)
        layers[f"{stage}c."] = first
        layers |= {f"{stage}.0.blocks.{i}.": first + i for i in range(depth)}
        layers[f"{stage}.0.downsample."] = first + depth - 1
    return layers


def _vit_layers(vit: ViT) -> dict[str, int]:
    return {"patch_embedding.": 0} | {f"blocks.{i}.": i + 1 for i in range(len(vit.blocks))}


def _convvit_sizes(tensors: StateDict) -> dict[str, Any]:
    stems = [tensors.get(f"embeddings.{i}.conv.weight") for i in range(4)]
    hidden = tensors.get("stages.0.0.mlp.0.bias")
    sizes: dict[str, Any] = {"depths": [_count(rf"stages\.{i}\.(\d+)\.", tensors) for i in range(3)]}
    sizes["depths"].append(_count(r"blocks\.(\d+)\.", tensors))
    if stems[0] is not None:
        sizes |= {"in_channels": stems[0].shape[1], "spatial_dims": stems[0].ndim - 2}
        if hidden is not None:
            sizes["mlp_ratio"] = len(hidden) / len(stems[0])
    if all(stem is not None for stem in stems):
        sizes["embed_dims"] = [len(stem) for stem in stems if stem is not None]
    return sizes


def describe_convvit(convvit: ConvViT, img_size: Sequence[int]) -> dict[str, Any]:
    """Constructor arguments of a ConvViT, read off the network itself; ``layer_scale`` is 1 wherever it is built."""
    block: Any = convvit.blocks[0]
    return _convvit_sizes(convvit.state_dict()) | {
        "img_size": list(img_size),
        "num_heads": block.attn.num_heads,
        "fusion": convvit.fusion is not None,
        "fifth_stage": convvit.fifth_stage is not None,
        "layer_scale": 1.0 if isinstance(block.scale1, LayerScale) else None,
        "relative_position_bias": block.attn.position_bias is not None,
    }


def _convvit_layers(convvit: ConvViT) -> dict[str, int]:
    """An embedding counts to the layer of the block that follows it."""
    layers = {"embeddings.0.": 0}
    for i, stage in enumerate(convvit.stages):
        first = max(layers.values()) + 1
        layers |= {f"embeddings.{i}.": first} if i else {}
        layers |= {f"stages.{i}.{j}.": first + j for j in range(len(stage))}  # type: ignore[arg-type]
    first = max(layers.values()) + 1
    layers |= {"embeddings.3.": first, "token_embedding.": first}
    return layers | {f"blocks.{i}.": first + i for i in range(len(convvit.blocks))}


def _stem_sizes(stem: Tensor | None, channels_name: str) -> dict[str, Any]:
    if stem is None:
        return {}
    return {channels_name: stem.shape[1], "patch_size": list(stem.shape[2:]), "spatial_dims": stem.ndim - 2}


def _count(pattern: str, names: Iterable[str]) -> int:
    """Members of a ModuleList: one more than the largest number that the pattern finds."""
    found = [re.match(pattern, name) for name in names]
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


VIT_STEM = "patch_embedding.patch_embeddings.weight"
SWIN_STEM = "patch_embed.proj.weight"

KINDS = (
    EncoderKind(
        encoder_class=ViT,
        anchor="patch_embedding.position_embeddings",
        stem=VIT_STEM,
        body=r"patch_embedding\.|blocks\.",
        sizes=_vit_sizes,
        describe=describe_vit,
        build=_build_vit,
        optional=r"cross_attn",  # left over in MONAI's blocks, some versions with and some without it
        layers=_vit_layers,
        positions="patch_embedding.position_embeddings",
        grid=_vit_grid,
    ),
    EncoderKind(
        encoder_class=SwinTransformer,
        anchor="layers1.0.blocks.0.norm1.weight",
        stem=SWIN_STEM,
        body=r"patch_embed\.|layers\d",
        sizes=_swin_sizes,
        describe=describe_swin,
        build=SwinTransformer,
        optional=r"relative_position_index",
        layers=_swin_layers,
        renames=(
            (r"\bmlp\.fc([12])\.", r"mlp.linear\1."),  # model_swinvit.pt (Tang et al., CVPR 2022)
            (r"\b(layers\d\.0)\.0\.", r"\1."),  # ssl_pretrained_weights.pth (Valanarasu et al., 2023)
        ),
        knobs=(("embed_dim", "feature_size"),),
    ),
    EncoderKind(
        encoder_class=ConvViT,
        anchor="stages.0.0.depthwise.weight",
        stem="embeddings.0.conv.weight",
        body=r"embeddings\.|stages\.|token_embedding\.|blocks\.",
        sizes=_convvit_sizes,
        describe=describe_convvit,
        build=ConvViT,
        new=r"^fifth_stage\.|\.scale[12]\.factor$|\.position_bias\.table$",
        options=("fusion", "fifth_stage", "layer_scale", "relative_position_bias", "drop_path_rate"),
        layers=_convvit_layers,
    ),
)
