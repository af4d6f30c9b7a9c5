"""Parameter groups of AdamW."""

from __future__ import annotations

import re
from typing import Any

from monai.networks.nets import ViT
from torch import nn

from medmim.weights import find_encoder


def parameter_groups(
    network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise learning rates and no weight decay on norms, biases and positions.

    With ``layer_decay`` d and an encoder of L blocks, the embedding learns at ``learning_rate * d**(L + 1)``, block i
    (from 0) at ``d**(L - i)``, and all that comes after the encoder at the full rate (Clark et al., ICLR 2020; as
    used by Zhou et al., ISBI 2023). Frozen parameters are left out.

    Args:
        network: holds one MONAI ViT.
        learning_rate: of the last layers.
        weight_decay: of matrices and kernels.
        layer_decay: factor from one block to the one before it, in (0, 1].

    Returns:
        groups for ``torch.optim``, in the order of the layers.

    Raises:
        ValueError: when ``layer_decay`` lies outside (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], found {layer_decay}")
    encoder = find_encoder(network)
    depth = len(encoder.blocks)
    encoder_layer = {id(p): _layer(name) for name, p in encoder.named_parameters()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = encoder_layer.get(id(parameter), -1)
        layer = depth + 1 if layer < 0 else layer
        decays = parameter.ndim > 1 and not name.endswith(("position_embeddings", "mask_token"))
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer(name: str) -> int:
    """Layer of a ViT's parameter: 0 embedding, i + 1 block i, -1 the final norm, which counts as after the encoder."""
    if name.startswith("patch_embedding."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else -1


def freeze_encoder(network: nn.Module) -> ViT:
    """Stop the encoder from learning (linear-probe style); returns the encoder."""
    encoder = find_encoder(network)
    encoder.requires_grad_(False)
    return encoder
