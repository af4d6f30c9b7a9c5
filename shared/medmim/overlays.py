"""What in an image mattered to a ViT: attention rollout, and MONAI's occlusion sensitivity, laid over the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.visualize import OcclusionSensitivity, blend_images
from torch import Tensor, nn

from medmim.classification import to_probabilities
from medmim.classification_figures import examples_figure
from medmim.networks.vit_classifier import ViTClassifier

OVERLAYS = ("attention", "occlusion")


def attention_rollout(network: ViTClassifier, image: Tensor) -> Tensor:
    """How much of each patch reaches the pooled token through all blocks (Abnar and Zuidema, ACL 2020).

    In each block the attention is averaged over the heads, half of it replaced by the identity for the residual path,
    and multiplied with that of the blocks before. It is the same for every class.

    Args:
        network: in ``eval()``.
        image: ``(1, C, *img_size)``.

    Returns:
        ``(*grid)``, adding up to 1 (less what the class token keeps to itself).
    """
    blocks: Any = network.vit.blocks
    before = [(block.attn.save_attn, block.attn.use_flash_attention) for block in blocks]
    try:
        for block in blocks:
            block.attn.save_attn, block.attn.use_flash_attention = True, False
        with torch.no_grad():
            network(image)
        rollout: Any = None
        for block in blocks:
            attention = block.attn.att_mat.mean(dim=1)[0].float()
            attention = (attention + torch.eye(len(attention), device=attention.device)) / 2
            rollout = attention if rollout is None else attention @ rollout
    finally:
        for block, (save, flash) in zip(blocks, before, strict=True):
            block.attn.save_attn, block.attn.use_flash_attention = save, flash
            block.attn.att_mat = torch.Tensor()
    pooled = rollout[0, 1:] if network.has_class_token else rollout.mean(dim=0)
    return pooled.reshape(network.grid)


def occlusion(network: nn.Module, image: Tensor, output: int, task: str, mask_size: int) -> Tensor:
    """Fall of a class's probability when a square of the image is hidden (Zeiler and Fergus, ECCV 2014), by MONAI.

    Args:
        network: in ``eval()``.
        image: ``(1, C, *spatial)``.
        output: number of the class.
        task: of the classification.
        mask_size: pixels of the square.

    Returns:
        ``(*spatial)``; above 0 where the class needs what is there.
    """
    sensitivity = OcclusionSensitivity(
        network, mask_size=mask_size, verbose=False, activate=lambda logits: to_probabilities(logits, task)
    )
    with torch.no_grad():
        whole = to_probabilities(network(image), task)[0, output]
        hidden, _ = sensitivity(image)
    return whole - torch.as_tensor(hidden)[0, output]


def relevance(network: Any, image: Tensor, kind: str, output: int, task: str) -> np.ndarray:
    """Map of one kind at the size of the image ``(1, C, *spatial)``."""
    network.eval()
    if kind == "attention":
        grid = attention_rollout(network, image)[None, None]
        found = nn.functional.interpolate(grid, size=image.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    else:
        patch = max(n // g for n, g in zip(image.shape[2:], network.grid, strict=True))
        found = occlusion(network, image, output, task, min(2 * patch, *image.shape[2:]))
    return found.float().cpu().numpy()


def draw_overlay(image: np.ndarray, score: np.ndarray, title: str, caption: str) -> Figure:
    """Image ``(rows, columns)`` alone, and with a map of the same size over it (negative values count as 0)."""
    positive = np.clip(score, 0, None)
    blended = blend_images(image[None], positive[None], alpha=0.5, cmap="jet", transparent_background=False)
    return examples_figure([image, np.moveaxis(np.asarray(blended), 0, -1)], ["image", caption], title)
