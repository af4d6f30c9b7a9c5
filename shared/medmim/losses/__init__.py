"""Losses of the pretext tasks."""

from medmim.losses.alignment import ContrastiveAlignment, PredictiveAlignment
from medmim.losses.classification import ClassificationLoss
from medmim.losses.contrastive import NTXentLoss, pair_scores
from medmim.losses.curricula import curriculum_factors
from medmim.losses.reconstruction import MaskedReconstructionLoss

__all__ = [
    "ClassificationLoss",
    "ContrastiveAlignment",
    "MaskedReconstructionLoss",
    "NTXentLoss",
    "PredictiveAlignment",
    "curriculum_factors",
    "pair_scores",
]
