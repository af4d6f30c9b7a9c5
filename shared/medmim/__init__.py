"""Masked image modelling on 3D medical images: the package that the MONAI bundles share."""

from medmim.version import __version__
from medmim.weights import build_encoder, load_encoder

__all__ = ["__version__", "build_encoder", "load_encoder"]
