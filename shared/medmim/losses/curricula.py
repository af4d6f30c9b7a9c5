"""Curricula over the levels of nested sub-volumes."""

from __future__ import annotations

from math import cos, pi, sin

CURRICULA = ("concurrent", "coarse_to_fine", "fine_to_coarse")


def curriculum_factors(curriculum: str, epoch: int, epochs: int, n_levels: int = 3) -> tuple[float, ...]:
    """What the weight of each level's reconstruction loss is multiplied by, coarsest level first.

    ``concurrent`` leaves the weights as they are. ``coarse_to_fine`` lets the factor of the coarsest level fall from
    2 to 1 as ``1 + cos(a)`` and that of the finest rise from 0 to 1 as ``sin(a)``, ``a = pi/2 * epoch / epochs``;
    ``fine_to_coarse`` exchanges the two. Levels between them keep their weight, and so does alignment.

    Args:
        curriculum: one of :data:`CURRICULA`.
        epoch: epochs done, from 0.
        epochs: of the whole training.
        n_levels: how many levels there are.

    Raises:
        ValueError: when the curriculum is unknown, needs more than one level, or the epoch lies outside the training.

    Example::

        >>> [round(factor, 3) for factor in curriculum_factors("coarse_to_fine", 200, 800)]
        [1.924, 1.0, 0.383]
    """
    if curriculum not in CURRICULA:
        raise ValueError(f"curriculum must be one of {', '.join(CURRICULA)}, found {curriculum!r}")
    if not 0 <= epoch <= epochs or epochs < 1:
        raise ValueError(f"epoch {epoch} lies outside a training of {epochs} epochs")
    if curriculum == "concurrent":
        return (1.0,) * n_levels
    if n_levels < 2:
        raise ValueError(f"curriculum {curriculum} needs two levels or more, found {n_levels}: take concurrent")
    angle = pi / 2 * epoch / epochs
    factors = (1 + cos(angle), *(1.0,) * (n_levels - 2), sin(angle))
    return factors if curriculum == "coarse_to_fine" else factors[::-1]
