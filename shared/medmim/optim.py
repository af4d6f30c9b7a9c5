"""Parameter groups of AdamW."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from medmim.encoders import kind_of
from medmim.weights import find_encoder

# besides norms, biases and factors
UNDECAYED = ("position_embeddings", "mask_token", "class_token", "position_bias.table", "position_bias_table")


def parameter_groups(
    network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise learning rates and no weight decay on norms, biases and positions.

    With ``layer_decay`` d and an encoder of L blocks, the embedding learns at ``learning_rate * d**(L + 1)``, block i
    (from 0) at ``d**(L - i)``, and all that comes after the encoder at the full rate (Clark et al., ICLR 2020; as
    used by Zhou et al., ISBI 2023). The blocks of a ConvViT are those of its three stages and of its transformer, and
    an embedding between them learns like the block after it. Those of a Swin are counted through its four stages; a
    stage's downsampling learns like its last block. Frozen parameters are left out.

    Args:
        network: holds one encoder; a MONAI ViT or SwinTransformer, or a ConvViT.
        learning_rate: of the last layers.
        weight_decay: of matrices and kernels.
        layer_decay: factor from one block to the one before it, in (0, 1].

    Returns:
        groups for ``torch.optim``, in the order of the layers.

    Raises:
        ValueError: when ``layer_decay`` lies outside (0, 1], or the encoder's layers have no order here.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], found {layer_decay}")
    encoder = find_encoder(network)
    kind = kind_of(encoder)
    if kind is None or (kind.layers is None and layer_decay < 1):
        raise ValueError(f"layer_decay {layer_decay}: expected 1 with a {type(encoder).__name__}")
    layers = {} if kind.layers is None else kind.layers(encoder)
    after = max(layers.values(), default=-1) + 1
    encoder_layer = {
        id(p): next((layer for beginning, layer in layers.items() if name.startswith(beginning)), after)
        for name, p in encoder.named_parameters()
    }
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = encoder_layer.get(id(parameter), after)
        decays = parameter.ndim > 1 and not name.endswith(UNDECAYED)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (after - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def freeze_encoder(network: nn.Module) -> nn.Module:
    """Stop the encoder from learning (linear-probe style); returns the encoder.

    What pre-training does not give, such as a ConvViT's fifth stage, goes on learning.
    """
    encoder = find_encoder(network)
    kind: Any = kind_of(encoder)
    for name, parameter in encoder.named_parameters():
        if not re.search(kind.new, name):
            parameter.requires_grad_(False)
    return encoder
