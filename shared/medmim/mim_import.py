"""Import of checkpoints that the public code of MiM wrote.

Zhuang et al., "MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image Analysis" (TMI 2025, arXiv
2404.15580). Its checkpoints hold ``{"model": state_dict}``; :func:`medmim.state_dicts.read_checkpoint` reads them. ::

    state_dict, _ = read_checkpoint("checkpoint.pth")
    encoder, report = import_mim_encoder(state_dict)
    decoder, report = import_mim_decoder(state_dict)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medmim.networks.convvit import SIZES, ConvViT
from medmim.networks.decoders import TransformerDecoder
from medmim.networks.positions import sincos_position_embedding

IMG_SIZE = (96, 96, 96)  # voxels of the published encoders' input
DECODER_HEAD_SIZE = 36  # features of an attention head; no shape tells it

# beginnings of our names and of the published ones
ENCODER_NAMES = {
    **{f"embeddings.{i}.conv.": f"patch_embed{i + 1}.proj." for i in range(4)},
    **{f"embeddings.{i}.norm.": f"patch_embed{i + 1}.norm." for i in range(4)},
    **{f"stages.{i}.": f"blocks{i + 1}." for i in range(3)},
    **{f"fusion.{i}.": f"stage{i + 1}_output_decode." for i in range(3)},
    "token_embedding.": "patch_embed5.",
    "blocks.": "blocks4.",
}
ENCODER_PARTS = re.compile(r"patch_embed|blocks|stage\d+_output_decode|norm|cls_token|pos_embed")
DECODER_PARTS = re.compile(r"decoder_|mask_token")
ADVICE = "give a pre-training checkpoint of the public code, made with the published sizes"
DECODER_NAMES = {
    "embed.": "decoder_embed.",
    "blocks.": "decoder_blocks.",
    "norm.": "decoder_norm.",
    "head.": "decoder_pred.",
}
INNER_NAMES = {  # of a block
    ".depthwise.": ".attn.",
    ".out_proj.": ".proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
    ".mlp.linear": ".mlp.fc",
}
POINTWISE = r"\.(conv[12]|fc[12])\.weight$"  # published as convolutions of one voxel, ours are matrices


@dataclass
class ImportReport:
    """What became of each tensor of a published checkpoint; names are those of the checkpoint.

    Attributes:
        part: what was built.
        size: ``tiny`` or ``base``.
        loaded: published name and the name here, of each tensor taken over.
        computed: positions, which were compared with the table that is computed here.
        unused: tensors that this part has no use for.
        precision: number formats other than float32 among the tensors taken over, which all become float32.
    """

    part: str
    size: str
    loaded: dict[str, str] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    precision: str = ""

    def __str__(self) -> str:
        rounded = f"; the file holds {self.precision}, written as float32" if self.precision else ""
        more = f" and {len(self.unused) - 3} more" if len(self.unused) > 3 else ""
        return (
            f"MiM {self.size}: {len(self.loaded)} tensors loaded into {self.part}, "
            f"{len(self.computed)} computed anew and equal ({', '.join(self.computed) or 'none'}), "
            f"{len(self.unused)} unused ({', '.join(self.unused[:3]) or 'none'}{more}){rounded}"
        )


def mim_size(state_dict: Mapping[str, Tensor]) -> str:
    """Size of a published encoder, told by its shapes: a key of ``medmim.networks.convvit.SIZES``.

    Raises:
        ValueError: when it has no encoder of MiM, or one of another size.
    """
    stems = [state_dict.get(f"patch_embed{i}.proj.weight") for i in (1, 2, 3, 4)]
    if any(stem is None for stem in stems):
        raise ValueError(
            "not a checkpoint of the public MiM code: it lacks patch_embed1.proj.weight … patch_embed4.proj.weight, "
            f"its first tensor is {next(iter(state_dict), 'none')}: {ADVICE}"
        )
    found = tuple(stem.shape[0] if stem.ndim else 0 for stem in stems if stem is not None)
    for size, options in SIZES.items():
        if options["embed_dims"] == found:
            return size
    known = ", ".join(f"{options['embed_dims']} ({size})" for size, options in SIZES.items())
    raise ValueError(f"the published encoder has features {found}, known are {known}: {ADVICE}")


def import_mim_encoder(state_dict: Mapping[str, Tensor]) -> tuple[ConvViT, ImportReport]:
    """The encoder of a published pre-training checkpoint.

    Args:
        state_dict: of the public code; names may stand behind ``module.``.

    Returns:
        ``ConvViT`` with ``fusion`` and without a fifth stage, and the report.

    Raises:
        ValueError: naming the first tensor that is missing, unknown in an encoder or has another shape, or when the
            positions are not the fixed sine-cosine table.
    """
    source = _without_wrapper(state_dict)
    size = mim_size(source)
    stem = source["patch_embed1.proj.weight"]
    in_channels = stem.shape[1] if stem.ndim == 5 else 1  # of another one the shape is told below
    encoder = ConvViT(in_channels=in_channels, fifth_stage=False, **SIZES[size])
    report = ImportReport("ConvViT", size)
    _check_positions(source, "pos_embed", report)
    _load(encoder, source, ENCODER_NAMES, report)
    _refuse_unknown(ENCODER_PARTS, "encoder", report)
    return encoder, report


def import_mim_decoder(state_dict: Mapping[str, Tensor]) -> tuple[TransformerDecoder, ImportReport]:
    """The decoder of a published pre-training checkpoint, for its input of 6 tokens along each axis.

    Args:
        state_dict: of the public code; names may stand behind ``module.``.

    Returns:
        ``TransformerDecoder`` and the report.

    Raises:
        ValueError: naming the first tensor that is missing, unknown in a decoder or has another shape, or when the
            positions are not the fixed sine-cosine table.
    """
    source = _without_wrapper(state_dict)
    report = ImportReport("TransformerDecoder", mim_size(source))
    embed, head = source.get("decoder_embed.weight"), source.get("decoder_pred.weight")
    if embed is None or head is None:
        raise ValueError("the checkpoint holds no decoder: decoder_embed.weight or decoder_pred.weight is missing")
    depth = len({name.split(".")[1] for name in source if name.startswith("decoder_blocks.")})
    decoder = TransformerDecoder(
        encoder_size=embed.shape[1],
        out_size=head.shape[0],
        grid=tuple(size // 16 for size in IMG_SIZE),
        hidden_size=embed.shape[0],
        num_layers=depth,
        num_heads=embed.shape[0] // DECODER_HEAD_SIZE,
    )
    _check_positions(source, "decoder_pos_embed", report)
    _load(decoder, source, DECODER_NAMES, report)
    _refuse_unknown(DECODER_PARTS, "decoder", report)
    return decoder, report


def _without_wrapper(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as they stand in the network itself, not in DistributedDataParallel."""
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def _check_positions(source: Mapping[str, Tensor], name: str, report: ImportReport) -> None:
    """Refuse positions that are not the table which is computed here."""
    positions = source.get(name)
    if positions is None:
        return
    expected = sincos_position_embedding([size // 16 for size in IMG_SIZE], positions.shape[-1])
    rounding = torch.finfo(positions.dtype).eps if positions.is_floating_point() else 0.0
    if positions.shape != expected.shape or not torch.allclose(positions.float(), expected, atol=max(1e-3, rounding)):
        raise ValueError(
            f"{name} of shape {tuple(positions.shape)} is not the fixed sine-cosine table of 6 x 6 x 6 tokens: "
            "positions that were learned, or of another grid, cannot be taken over; give a pre-training checkpoint"
        )
    report.computed.append(name)


def _refuse_unknown(parts: re.Pattern[str], what: str, report: ImportReport) -> None:
    """Refuse tensors that are of this part and were not taken over: their network computes something else."""
    unknown = [name for name in report.unused if parts.match(name)]
    if unknown:
        raise ValueError(
            f"its {what} holds tensors that MiM {report.size} has no place for ({len(unknown)}, first: {unknown[0]}), "
            f"expected the {len(report.loaded)} of the published network alone: it is deeper or has other parts "
            f"(--sr_ratio 2 of the public code); {ADVICE}"
        )


def _published_name(name: str, beginnings: Mapping[str, str]) -> str:
    for ours, published in beginnings.items():
        if name.startswith(ours):
            name = published + name.removeprefix(ours)
            break
    for ours, published in INNER_NAMES.items():
        name = name.replace(ours, published)
    return name


def _load(network: nn.Module, source: Mapping[str, Tensor], names: Mapping[str, str], report: ImportReport) -> None:
    """Fill a network from tensors under published names, and complete the report."""
    target, faults = network.state_dict(), []
    for name, value in target.items():
        if "norm_cross_attn" in name or name == "position_embeddings":
            continue  # the one is left over in MONAI's blocks, the other was compared
        published = _published_name(name, names)
        found = source.get(published)
        if found is None:
            faults.append(f"{published} is missing")
            continue
        matrix = re.search(POINTWISE, published) is not None and found.ndim == 5
        if (tuple(found.shape[:2]) if matrix and found.shape[2:] == (1, 1, 1) else tuple(found.shape)) != value.shape:
            faults.append(f"{published} is {tuple(found.shape)}, expected {tuple(value.shape)}")
            continue
        if not found.is_floating_point():
            faults.append(f"{published} is {_format(found)}, expected floating point")
            continue
        target[name] = found.reshape(value.shape)
        report.loaded[published] = name
    if faults:
        count = f"{len(faults)} tensor{' does' if len(faults) == 1 else 's do'} not fit"
        raise ValueError(f"{count} {report.part} of size {report.size}, first: {faults[0]}: {ADVICE}")
    network.load_state_dict(target, strict=True)
    report.precision = ", ".join(sorted({_format(source[name]) for name in report.loaded} - {"float32"}))
    report.unused = [name for name in source if name not in report.loaded and name not in report.computed]


def _format(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
