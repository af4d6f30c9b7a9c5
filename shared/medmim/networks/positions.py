"""Fixed sine-cosine position embedding for token grids of any dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sincos_position_embedding(grid: Sequence[int], hidden_size: int, temperature: float = 10000.0) -> Tensor:
    """Sine-cosine table as the 3D masked autoencoders of MiM and SelfMedMAE use it.

    The features are split into one block for each axis; the block of an axis with position ``p`` is
    ``[sin(p w), cos(p w)]`` with ``w_j = temperature ** (-j / n)``, ``n`` frequencies. (MONAI's own table orders
    axes and frequencies in another way.)

    Args:
        grid: tokens along each axis.
        hidden_size: features of a token, divisible by twice the number of axes.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        ``(1, N, hidden_size)`` in raster order.

    Raises:
        ValueError: when ``hidden_size`` does not divide.
    """
    dims = len(grid)
    if hidden_size % (2 * dims):
        raise ValueError(
            f"hidden_size {hidden_size} is not divisible by {2 * dims}, which a sincos position embedding over "
            f"{dims} axes needs: change it, or set position_embedding to learnable"
        )
    n_frequencies = hidden_size // (2 * dims)
    exponent = torch.arange(n_frequencies, dtype=torch.float64) / n_frequencies
    frequencies = temperature**-exponent
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
    blocks = []
    for positions in axes:
        angles = positions.reshape(-1, 1) * frequencies
        blocks += [angles.sin(), angles.cos()]
    return torch.cat(blocks, dim=1).unsqueeze(0).float()
