"""Pretext networks, decoders and the networks that take a pre-trained encoder."""

from medmim.networks.feature_extractor import FeatureExtractor
from medmim.networks.masked_autoencoder import MaskedAutoencoder
from medmim.networks.patches import patchify, token_ids, unpatchify
from medmim.networks.positions import sincos_position_embedding
from medmim.networks.unetr import UNETR
from medmim.networks.vit import checkpoint_activations

__all__ = [
    "UNETR",
    "FeatureExtractor",
    "MaskedAutoencoder",
    "checkpoint_activations",
    "checkpoint_activations",
    "patchify",
    "sincos_position_embedding",
    "token_ids",
    "unpatchify",
]
