"""Contrastive loss between two views of each sample, and how well the embeddings do."""

from __future__ import annotations

import ignite.distributed as idist
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

EPSILON = 1e-5  # of a standard deviation that is 0
CHUNK = 1024  # anchors compared at a time where no gradient is needed


class NTXentLoss(nn.Module):
    """Normalised, temperature-scaled cross-entropy: find the other view of a sample among all other views.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020); in 3D Chen et al.
    (WACV 2023). Equal to ``monai.losses.ContrastiveLoss`` in one process. N pairs with random embeddings give about
    ``ln(2 N - 1)``.

    In training (where the embeddings ask for a gradient) the pairs of all processes are negatives of one another, so
    every process must come with as many pairs; value, and gradient after ``DistributedDataParallel`` has averaged it,
    are those of one process with all pairs. Without a gradient nothing is exchanged: in an evaluation processes may
    have other numbers of batches, and would wait for each other for ever; see
    :class:`medmim.contrastive.PairScores` for the loss over all of them.

    Args:
        temperature: divides the cosine.
        standardize: whether each feature of the embeddings is standardised over the views of all pairs before they are
            compared, as by a batch norm without scale and shift at the end of the projector. A network that is not
            trained yet puts all images close together; the loss then sees in what they differ.

    Raises:
        ValueError: when the temperature is not positive.
    """

    def __init__(self, temperature: float = 0.5, standardize: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.temperature = temperature
        self.standardize = standardize

    def forward(self, embeddings: Tensor, targets: object = None) -> Tensor:
        """Mean over both views of all pairs as anchors.

        Args:
            embeddings: ``(B, 2, F)``, two views of each sample.
            targets: not used; MONAI's engines give them.

        Returns:
            scalar, float32, also inside autocast.

        Raises:
            ValueError: when there is only one pair in all processes: it has no negatives.
        """
        with torch.autocast(embeddings.device.type, enabled=False):  # a cosine over 0.1 needs more than 8 bits
            pairs = embeddings.float()
            processes = idist.get_world_size() if embeddings.requires_grad else 1
            everyone = _with_other_processes(pairs) if processes > 1 else pairs
            if len(everyone) < 2:
                raise ValueError("one pair of views has no negatives: a batch must hold two samples or more")
            everyone = directions(everyone, self.standardize)
            anchors = torch.arange(2 * len(everyone), device=pairs.device)
            loss = cross_entropy(_cosines(everyone, anchors) / self.temperature, anchors ^ 1)
            # Each process computes the loss L of all pairs, but its gradient through its own z_r only. The sum of those
            # over W processes is the gradient of L, and DistributedDataParallel takes the mean: so times W.
            return loss + (processes - 1) * (loss - loss.detach())


def directions(pairs: Tensor, standardize: bool) -> Tensor:
    """What is compared: ``(N, 2, F)`` of length 1, standardised over the 2N views before if asked for."""
    if standardize:
        std, mean = torch.std_mean(pairs, dim=(0, 1))
        pairs = (pairs - mean) / (std + EPSILON)
    return normalize(pairs, dim=-1)


def _with_other_processes(pairs: Tensor) -> Tensor:
    """Pairs of all processes in order of their ranks, ``(W B, 2, F)``; a gradient flows to this process's only."""
    gathered = gather_pairs(pairs)
    start = idist.get_rank() * len(pairs)
    return torch.cat([gathered[:start], pairs, gathered[start + len(pairs) :]])


def gather_pairs(pairs: Tensor) -> Tensor:
    """Pairs of all processes, each with as many, in order of their ranks, without gradient."""
    gathered = idist.all_gather(pairs.detach().contiguous())
    assert isinstance(gathered, Tensor)
    return gathered


def _cosines(pairs: Tensor, anchors: Tensor) -> Tensor:
    """``(M, 2N)`` cosines of M of the 2N views with all; -inf with itself. View i's positive is view ``i ^ 1``."""
    views = pairs.flatten(0, 1)
    own = anchors.unsqueeze(1) == torch.arange(len(views), device=views.device)
    return (views[anchors] @ views.T).masked_fill(own, float("-inf"))


@torch.no_grad()
def pair_scores(embeddings: Tensor, temperature: float, standardize: bool = False) -> dict[str, Tensor]:
    """How embeddings of pairs of views do; all in float32.

    Args:
        embeddings: ``(N, 2, F)``, at least two pairs.
        temperature, standardize: of the loss.

    Returns:
        ``loss``: :class:`NTXentLoss` of these pairs.
        ``accuracy``: share of the views whose nearest view is their positive; ``1 / (2 N - 1)`` by chance.
        ``alignment``: mean cosine of the two views of a pair.
        ``spread``: standard deviation of each feature of the normalised embeddings over the samples, mean over the
        features, times ``sqrt(F)``: 1 when they point everywhere, 0 when all are the same (Chen and He, "Exploring
        Simple Siamese Representation Learning", CVPR 2021). Of the embeddings as they are, never standardised.

    Raises:
        ValueError: when there is only one pair.
    """
    if len(embeddings) < 2:
        raise ValueError("one pair of views has no negatives: two samples or more are needed")
    with torch.autocast(embeddings.device.type, enabled=False):
        pairs = directions(embeddings.float(), standardize)
        loss, hits = pairs.new_zeros(()), pairs.new_zeros(())
        for anchors in torch.arange(2 * len(pairs), device=pairs.device).split(CHUNK):
            cosines = _cosines(pairs, anchors)
            loss += cross_entropy(cosines / temperature, anchors ^ 1, reduction="sum")
            hits += (cosines.argmax(dim=1) == anchors ^ 1).sum()
        return {
            "loss": loss / (2 * len(pairs)),
            "accuracy": hits / (2 * len(pairs)),
            "alignment": (pairs[:, 0] * pairs[:, 1]).sum(-1).mean(),
            "spread": directions(embeddings.float(), False).std(dim=0).mean() * pairs.shape[-1] ** 0.5,
        }
