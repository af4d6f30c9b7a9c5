"""Losses of the pretext tasks."""

from medmim.losses.reconstruction import MaskedReconstructionLoss

__all__ = ["MaskedReconstructionLoss"]
