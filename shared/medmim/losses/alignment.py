"""Alignment of a sub-volume's feature with what its parent predicted for the region that it was cut from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


def projector(feature_size: int) -> nn.Sequential:
    """Two linear layers with a GELU between them, all of the same width."""
    return nn.Sequential(nn.Linear(feature_size, feature_size), nn.GELU(), nn.Linear(feature_size, feature_size))


class ContrastiveAlignment(nn.Module):
    """Find one's own region among those of the parent: cross-entropy of cosine similarities.

    Of Mask in Mask (Zhuang et al., TMI 2025, arXiv 2404.15580). The query is the projected feature of the child, the
    keys are the projected features of all regions of its parent; the child's own region is the positive, the other
    regions of the same parent are the negatives. The gradient stops at the parents' features: the projector of
    the keys is trained, the network gets its gradient through the child alone.

    With R regions and random features the loss starts near ``ln R``; it cannot fall below
    ``ln(1 + (R - 1) exp(-2 / temperature))`` where only one key can agree and all others are opposite.

    Args:
        feature_size: F of the features.
        temperature: divides the cosine.

    Raises:
        ValueError: when the temperature is not positive.
    """

    def __init__(self, feature_size: int, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.query = projector(feature_size)
        self.key = projector(feature_size)
        self.temperature = temperature

    def forward(self, children: Tensor, parents: Tensor, parent_ids: Tensor, regions: Tensor) -> Tensor:
        """Error of each child.

        Args:
            children: ``(M, F)``, pooled features of the sub-volumes.
            parents: ``(P, R, F)``, pooled features of the regions of their parents.
            parent_ids: ``(M,)``, which parent a child has.
            regions: ``(M,)``, which of its parent's regions it is.

        Returns:
            ``(M,)``, float32.
        """
        queries = self.query(children)
        keys = self.key(parents.detach())
        with torch.autocast(children.device.type, enabled=False):  # a cosine over 0.1 needs more than 8 bits
            queries, keys = normalize(queries.float(), dim=-1), normalize(keys.float(), dim=-1)
            similarity = torch.einsum("mf,mrf->mr", queries, keys[parent_ids])
            return cross_entropy(similarity / self.temperature, regions, reduction="none")


class PredictiveAlignment(nn.Module):
    """Predict the feature of one's own region: ``2 - 2 cos(query, key)``, without negatives.

    The BYOL-style variant of Mask in Mask (Zhuang et al., TMI 2025, arXiv 2404.15580; the loss of Grill et al.,
    NeurIPS 2020). The gradient stops at the key, after its projector: so that projector is a fixed random one, and
    the child's projector is the predictor (as in Chen and He, CVPR 2021).

    The regions of a parent share most of their feature. A constant query is then nearly right, and where this loss
    outweighs reconstruction the features collapse. ``center_keys`` takes the mean over the regions of the parent from
    each key, so that what tells the regions apart has to be predicted.

    Args:
        feature_size: F of the features.
        center_keys: whether the keys of a parent are centred; False is the plain loss.
    """

    def __init__(self, feature_size: int, center_keys: bool = True) -> None:
        super().__init__()
        self.query = projector(feature_size)
        self.key = projector(feature_size).requires_grad_(False)
        self.center_keys = center_keys

    def forward(self, children: Tensor, parents: Tensor, parent_ids: Tensor, regions: Tensor) -> Tensor:
        """Error of each child, between 0 and 4; arguments and result as in :class:`ContrastiveAlignment`."""
        queries = self.query(children).float()
        keys = self.key(parents.detach()).float()
        with torch.autocast(children.device.type, enabled=False):
            if self.center_keys:
                keys = keys - keys.mean(dim=1, keepdim=True)
            cosine = (normalize(queries, dim=-1) * normalize(keys[parent_ids, regions], dim=-1)).sum(-1)
            return 2 - 2 * cosine


def build_alignment(kind: str, feature_size: int, temperature: float) -> nn.Module:
    """Alignment by name: ``contrastive`` or ``byol``; the latter has no use for a temperature.

    Raises:
        ValueError: when the name is unknown.
    """
    if kind == "contrastive":
        return ContrastiveAlignment(feature_size, temperature)
    if kind == "byol":
        return PredictiveAlignment(feature_size)
    raise ValueError(f"alignment must be contrastive or byol, found {kind!r}")
