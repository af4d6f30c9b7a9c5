"""Levels, a small network and batches for the tests of Mask in Mask."""

from itertools import product

import torch
from monai.data import list_data_collate
from torch import nn

from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskInMask
from medmim.networks.decoders import TransformerDecoder
from medmim.networks.patches import gather_tokens, patchify, token_ids
from medmim.transforms import RandNestedMaskd

EIGHTH = [  # the default levels, all sizes divided by 8
    {"crop_size": 24, "img_size": 12, "mask_unit": 6, "mask_ratio": 0.5},
    {"img_size": 12, "mask_ratio": 0.6, "samples": 4},
    {"img_size": 12, "mask_ratio": 0.5, "samples": 4},
]
SMALL = [
    {"crop_size": (16, 8, 8), "img_size": 8, "mask_unit": 4, "mask_ratio": 0.5},
    {"img_size": 8, "mask_ratio": 0.5, "samples": 3},
    {"img_size": 8, "mask_ratio": 0.25, "samples": 2},
]
TWO_2D = [
    {"crop_size": (16, 24), "img_size": (8, 12), "mask_unit": 4, "mask_ratio": 0.5},
    {"img_size": (8, 12), "mask_ratio": 0.4, "samples": 3},
]
FOUR_2D = [
    {"crop_size": (64, 32), "img_size": 16, "mask_unit": 8, "mask_ratio": 0.5},
    {"img_size": 16, "mask_unit": 8, "mask_ratio": 0.5, "samples": 2},
    {"img_size": 16, "mask_unit": 8, "mask_ratio": 0.5, "samples": 1},
    {"img_size": 16, "mask_ratio": 0.25, "samples": 2},
]
PATCHES = {id(EIGHTH): (2, 2, 2), id(SMALL): (4, 4, 2), id(TWO_2D): (4, 4), id(FOUR_2D): (4, 4)}


class PatchEncoder(nn.Module):
    """Stand-in for an encoder: embeds visible patches, and mixes each with the mean of all."""

    def __init__(self, patch_size, features=12):
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Linear(torch.Size(patch_size).numel(), features)
        self.mix = nn.Linear(features, features)
        self.calls = 0

    def forward(self, image, mask):
        self.calls += 1
        tokens = self.embed(gather_tokens(patchify(image, self.patch_size), token_ids(mask)[0]))
        return torch.tanh(tokens + self.mix(tokens.mean(1, keepdim=True)))


def make(levels, encoder=None, **options):
    patch_size = PATCHES[id(levels)] if id(levels) in PATCHES else options.pop("patch_size")
    draw = RandNestedMaskd("image", levels, patch_size, len(patch_size))
    encoder = encoder or PatchEncoder(patch_size)
    decoder = TransformerDecoder(12, torch.Size(patch_size).numel(), draw.levels[0].grid, 12, 1, 2)
    return MaskInMask(encoder, decoder, levels, MaskedReconstructionLoss(patch_size), **options)


def batch_of(network, n, padding=False, seed=0, images=None):
    transform = RandNestedMaskd("image", network.levels, network.patch_size, len(network.patch_size))
    transform.set_random_state(seed)
    images = torch.rand(n, 1, *network.levels[0].crop_size) if images is None else images
    if padding:
        images[0, :, 3:] = torch.nan
    return list_data_collate([transform({"image": image}) for image in images])


def crop_of(volume, levels, number, region):
    """The region of a parent ``(C, *crop_size)`` at level ``number - 1``, by slicing."""
    level = levels[number - 2]
    place = list(product(*map(range, level.regions)))[region]
    size = levels[number - 1].crop_size
    return volume[(slice(None), *(slice(p * s, (p + 1) * s) for p, s in zip(place, size, strict=True)))]


def tokens_in(levels, number, region):
    """Tokens that a region holds, and whether they are in it by its place on the token grid."""
    level = levels[number - 1]
    place = list(product(*map(range, level.regions)))[region]
    return [
        i
        for i, token in enumerate(product(*map(range, level.grid)))
        if all(t // s == p for t, s, p in zip(token, level.region_tokens, place, strict=True))
    ]


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


def gradients_of_shares(network, batch):
    network.zero_grad()
    total = 0.0
    for loss, _ in network.shares(batch):
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}
