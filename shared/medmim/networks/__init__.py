"""Pretext networks, decoders and the networks that take a pre-trained encoder."""

from medmim.networks.convvit import ConvViT
from medmim.networks.convvit_classifier import ConvViTClassifier
from medmim.networks.convvit_unetr import ConvViTUNETR
from medmim.networks.feature_extractor import FeatureExtractor
from medmim.networks.mask_in_mask import MaskInMask
from medmim.networks.masked_autoencoder import MaskedAutoencoder
from medmim.networks.patches import patchify, token_ids, unpatchify
from medmim.networks.positions import sincos_position_embedding
from medmim.networks.simclr import SimCLR
from medmim.networks.simmim import SimMIM
from medmim.networks.unetr import UNETR
from medmim.networks.vit import checkpoint_activations
from medmim.networks.vit_classifier import ViTClassifier

__all__ = [
    "UNETR",
    "ConvViT",
    "ConvViTClassifier",
    "ConvViTUNETR",
    "FeatureExtractor",
    "MaskInMask",
    "MaskedAutoencoder",
    "SimCLR",
    "SimMIM",
    "ViTClassifier",
    "checkpoint_activations",
    "patchify",
    "sincos_position_embedding",
    "token_ids",
    "unpatchify",
]
