"""Mask in Mask (MiM): masked autoencoding of nested sub-volumes with one encoder and one decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import ViT
from torch import Tensor, nn

from medmim.losses.alignment import build_alignment
from medmim.networks.convvit_blocks import AttentionBlock
from medmim.networks.nested_levels import Level, nested_levels
from medmim.networks.patches import gather_tokens, patchify, token_ids
from medmim.networks.sub_volumes import cut_sub_volumes, pool_regions, resize_sub_volumes
from medmim.networks.vit import encode_patches, prepare_vit_blocks, set_position_embedding

if TYPE_CHECKING:
    from medmim.losses import MaskedReconstructionLoss


@dataclass(eq=False)
class SubVolumes:
    """Some sub-volumes of one level, and what their share of the loss depends on.

    Attributes:
        number: of the level, from 1.
        image: ``(M, C, *img_size)``.
        mask: boolean ``(M, *grid)``, where the batch's masks are (the host).
        padding: boolean ``(M, *grid)``, on the device of the image.
        weight: of the level's reconstruction loss; 0 leaves it out.
        share: part of the level's scored tokens that these sub-volumes have.
        parents: pooled features of the parents' regions ``(P, R, F)``; ``None`` leaves alignment out.
        parent_ids, regions: ``(M,)``, see :class:`medmim.losses.ContrastiveAlignment`.
        counts: ``(M,)``, weight of each sub-volume in the mean over the level.
        pool: whether the next level needs these sub-volumes' region features.
        touch_all: whether the loss must depend, with factor 0, on every parameter.
    """

    number: int
    image: Tensor
    mask: Tensor
    padding: Tensor
    weight: float
    share: float
    parents: Tensor | None
    parent_ids: Tensor
    regions: Tensor | None
    counts: Tensor
    pool: bool
    touch_all: bool


Share = tuple[Tensor, dict[str, Tensor]]


class MaskInMask(nn.Module):
    """Masked autoencoding at nested scales, with the features of adjacent scales aligned.

    Zhuang et al., "MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image Analysis" (TMI 2025,
    arXiv 2404.15580). What the mask of one level hides is cut out of the original image, brought to the network's
    input size and masked again. All levels pass the same encoder and decoder. A batch holds ``image``
    ``(B, C, *crop_size)`` and what :class:`medmim.transforms.RandNestedMaskd` writes: ``mask_l``, ``region_l`` and,
    optionally, ``padding_l``.

    The loss is the sum, weighted, of named terms: ``reconstruction_l``, the error over the hidden tokens of level
    ``l``; and ``alignment_l_m``, between a sub-volume's feature (mean of all its tokens after the decoder's final
    norm, those at hidden positions too) and the features of its parent's regions. Sub-volumes of padding alone are in
    no term. A weight of 0 leaves a term and its work out, and a pair of levels without alignment has no parameters.

    The loss is computed in *shares*, ``chunk_size`` sub-volumes at a time: terms are means, and parents stand under a
    stop-gradient, so each share can be taken backward and forgotten before the next, which
    :class:`medmim.mim_step.MaskInMaskStep` does. Memory depends on ``chunk_size``, not on the number of levels,
    sub-volumes or images. Between the shares only the pooled features of the parents' regions are kept.

    Args:
        encoder: called ``encoder(image, mask)`` it returns the latents of the visible tokens ``(M, N_visible, F)`` in
            raster order; or a MONAI ``ViT`` without class token and dropout.
        decoder: :class:`medmim.networks.decoders.TransformerDecoder`, or another whose
            ``features(latent, visible, hidden)`` are those of all tokens ``(M, N, F)`` after its final ``norm``, and
            whose ``head(features)`` are the patches.
        levels: see :func:`medmim.networks.nested_levels`, the same as for the masks.
        reconstruction_loss: error of the predicted patches; it knows the patch size.
        level_weights: of the reconstruction losses; default all 1.
        alignment_weights: of the adjacent pairs of levels, one less than levels; default all 0.1.
        alignment: ``contrastive`` or ``byol``.
        temperature: of the contrastive alignment.
        chunk_size: sub-volumes that pass the network at a time.
        position_embedding: of a MONAI ViT, ``sincos`` or ``learnable``; other encoders have their own.

    Raises:
        ValueError: when sizes or numbers of weights do not fit, or nothing is left to learn from.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        levels: Sequence[Mapping[str, Any] | Level],
        reconstruction_loss: MaskedReconstructionLoss,
        level_weights: Sequence[float] | None = None,
        alignment_weights: Sequence[float] | None = None,
        alignment: str = "contrastive",
        temperature: float = 0.1,
        chunk_size: int = 4,
        position_embedding: str = "sincos",
    ) -> None:
        super().__init__()
        self.patch_size = tuple(reconstruction_loss.patch_size)
        self.levels = nested_levels(levels, self.patch_size, len(self.patch_size))
        self.img_size = self.levels[0].img_size
        if any(level.img_size != self.img_size for level in self.levels):
            sizes = [level.img_size for level in self.levels]
            raise ValueError(f"all levels must have the same img_size, because they share a network, found {sizes}")
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be a whole number above 0, found {chunk_size}")
        n = len(self.levels)
        feature_size = _feature_size(decoder)
        self.level_weights = _weights("level_weights", level_weights, n, 1.0)
        self.alignment_weights = _weights("alignment_weights", alignment_weights, n - 1, 0.1)
        self.chunk_size = chunk_size
        self.encoder = encoder
        self.decoder: Any = decoder
        self.reconstruction_loss = reconstruction_loss
        if isinstance(encoder, ViT):
            if encoder.classification:
                raise ValueError("the encoder must be a ViT with classification=False: there is no class token")
            prepare_vit_blocks(encoder.blocks)
            set_position_embedding(encoder, self.img_size, position_embedding)
        self.alignment = nn.ModuleDict(
            {
                f"{number}_{number + 1}": build_alignment(alignment, feature_size, temperature)
                for number, weight in enumerate(self.alignment_weights, 1)
                if weight > 0
            }
        )
        self._check_weights(self.level_weights)

    @property
    def term_names(self) -> list[str]:
        """Names of the terms that have a weight above 0."""
        levels = range(1, len(self.levels) + 1)
        reconstruction = [f"reconstruction_{n}" for n in levels if self.level_weights[n - 1] > 0]
        return reconstruction + [f"alignment_{pair}" for pair in self.alignment]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` each transformer block of encoder and decoder.

        Equal blocks share what was compiled, so this takes seconds where the whole network takes many minutes.
        """
        for module in self.modules():
            if isinstance(module, TransformerBlock | AttentionBlock):
                module.compile(*args, **kwargs)

    def forward(self, data: Mapping[str, Tensor] | SubVolumes) -> Any:
        """Loss of a whole batch; or of one share, for :meth:`shares`.

        Args:
            data: batch.

        Returns:
            ``loss``, the weighted sum, and each term by name, without weight and gradient; scalars, float32. A term of
            weight 0 is not among them.

        Raises:
            ValueError: when the batch does not fit the levels.
        """
        if isinstance(data, SubVolumes):
            return self._loss_of(data)
        total = {"loss": torch.zeros((), device=data["image"].device)}
        for loss, terms in self.shares(data):
            total["loss"] = total["loss"] + loss
            for name, value in terms.items():
                total[name] = total.get(name, 0) + value
        return total

    def shares(
        self,
        batch: Mapping[str, Tensor],
        level_weights: Sequence[float] | None = None,
        run: Callable[[SubVolumes], Any] | None = None,
    ) -> Iterator[Share]:
        """The loss of a batch, share by share; each can be taken backward before the next is asked for.

        Args:
            batch: see above; the masks, the regions and the padding may stay on the host.
            level_weights: instead of the network's own, for curricula.
            run: what passes sub-volumes through the network: the ``DistributedDataParallel`` around it. The last
                share then depends on every parameter, so that gradients can be exchanged with it alone.

        Yields:
            share of the weighted loss, and shares of the terms by name without weight and gradient. There are
            :meth:`n_shares` of them, and each sum is that of the batch.

        Raises:
            ValueError: when the batch does not fit the levels, or every weight is 0.
        """
        weights = self.level_weights if level_weights is None else tuple(level_weights)
        self._check_batch(batch)
        left = self.n_shares(len(batch["image"]), weights)
        parents: Tensor | None = None
        for number in range(1, len(self.levels) + 1):
            learns, pool = self._learns(number, weights), self._is_aligned(number)
            pooled = []
            for start, stop in self._chunks(len(batch["image"]), number) if learns or pool else ():
                part = self._part(batch, number, start, stop, weights[number - 1], parents)
                if learns:
                    left -= 1
                    part.touch_all = run is not None and left == 0
                    loss, terms, features = (self if run is None else run)(part)
                    yield loss, terms
                else:
                    with torch.no_grad():
                        features = self._loss_of(part)[2]
                pooled.append(features)
            parents = torch.cat(pooled) if pool else None

    def n_shares(self, n_images: int, level_weights: Sequence[float] | None = None) -> int:
        """How many shares the loss of ``n_images`` images has.

        Raises:
            ValueError: when every weight is 0.
        """
        weights = self.level_weights if level_weights is None else level_weights
        self._check_weights(weights)
        numbers = [number for number in range(1, len(self.levels) + 1) if self._learns(number, weights)]
        return sum(len(self._chunks(n_images, number)) for number in numbers)

    def level_images(self, batch: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
        """Inputs of level ``number`` (from 1): all its images ``(M, C, *img_size)`` and masks ``(M, *grid)``."""
        self._check_batch(batch)
        stop = len(batch["image"]) * self._n_sub_volumes(number)
        image = resize_sub_volumes(self._crops(batch, number, 0, stop), self.img_size)
        return image, _flat(batch, f"mask_{number}", number)

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted patches ``(M, N, voxels * C)`` of images ``(M, C, *img_size)`` with masks ``(M, *grid)``."""
        return self.decoder.head(self._features(image, mask))

    def _features(self, image: Tensor, mask: Tensor) -> Tensor:
        visible, hidden = (ids.to(image.device, non_blocking=True) for ids in token_ids(mask))
        if isinstance(self.encoder, ViT):
            latent = encode_patches(self.encoder, gather_tokens(patchify(image, self.patch_size), visible), visible)
        else:
            latent = self.encoder(image, mask)
        return self.decoder.features(latent, visible, hidden)

    def _loss_of(self, part: SubVolumes) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        features = self._features(part.image, part.mask)
        loss = torch.zeros((), device=features.device)
        terms = {}
        if part.weight > 0:
            mask = part.mask.to(features.device, non_blocking=True)
            prediction = self.decoder.head(features)
            error = self.reconstruction_loss(prediction, part.image, mask, part.padding) * part.share
            loss = loss + part.weight * error
            terms[f"reconstruction_{part.number}"] = error.detach()
        if part.parents is not None:
            pair = f"{part.number - 1}_{part.number}"
            children = features.float().mean(dim=1)
            errors = self.alignment[pair](children, part.parents, part.parent_ids, part.regions)
            error = (errors * part.counts).sum()
            loss = loss + self.alignment_weights[part.number - 2] * error
            terms[f"alignment_{pair}"] = error.detach()
        if part.touch_all:
            loss = loss + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        level = self.levels[part.number - 1]
        pooled = pool_regions(features.detach().float(), level.grid, level.region_tokens) if part.pool else None
        return loss, terms, pooled

    def _part(
        self,
        batch: Mapping[str, Tensor],
        number: int,
        start: int,
        stop: int,
        weight: float,
        parents: Tensor | None,
    ) -> SubVolumes:
        image = resize_sub_volumes(self._crops(batch, number, start, stop), self.img_size)
        device = image.device
        masks = _flat(batch, f"mask_{number}", number)
        key = f"padding_{number}"
        padding = _flat(batch, key, number) if key in batch else torch.zeros_like(masks)
        scored = self.reconstruction_loss.scored(masks, padding).flatten(1).sum(1)
        holds_image = (~padding).flatten(1).any(1)
        counts = holds_image[start:stop] / holds_image.sum().clamp(min=1)
        first, last = self._parents(number, start, stop)
        regions = (
            _flat(batch, f"region_{number}", number)[start:stop].to(device, non_blocking=True) if number > 1 else None
        )
        return SubVolumes(
            number=number,
            image=image,
            mask=masks[start:stop],
            padding=padding[start:stop].to(device, non_blocking=True),
            weight=weight,
            share=float(scored[start:stop].sum() / scored.sum().clamp(min=1)),
            parents=None if parents is None else parents[first:last],
            parent_ids=self._parent_ids(number, start, stop, device),
            regions=regions,
            counts=counts.to(device, non_blocking=True),
            pool=self._is_aligned(number),
            touch_all=False,
        )

    def _crops(self, batch: Mapping[str, Tensor], number: int, start: int, stop: int) -> Tensor:
        """Sub-volumes ``start … stop`` of a level, in the image's own resolution: ``(M, C, *crop_size)``."""
        if number == 1:
            return batch["image"][start:stop]
        parents = self._crops(batch, number - 1, *self._parents(number, start, stop))
        regions = _flat(batch, f"region_{number}", number)[start:stop]
        parent_ids = self._parent_ids(number, start, stop, regions.device)
        return cut_sub_volumes(parents, self.levels[number - 2].regions, regions, parent_ids)

    def _parents(self, number: int, start: int, stop: int) -> tuple[int, int]:
        """First and last plus one of the parents of the sub-volumes ``start … stop``."""
        samples = self.levels[number - 1].samples
        return start // samples, (stop - 1) // samples + 1

    def _parent_ids(self, number: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Parents of the sub-volumes ``start … stop``, counted from their first parent: ``(M,)``."""
        samples = self.levels[number - 1].samples
        return torch.arange(start, stop, device=device) // samples - start // samples

    def _n_sub_volumes(self, number: int) -> int:
        """Sub-volumes of a level in one image."""
        return prod(level.samples for level in self.levels[:number])

    def _chunks(self, n_images: int, number: int) -> list[tuple[int, int]]:
        n = n_images * self._n_sub_volumes(number)
        return [(start, min(start + self.chunk_size, n)) for start in range(0, n, self.chunk_size)]

    def _is_aligned(self, number: int) -> bool:
        """Whether a level is aligned with the one below it."""
        return f"{number}_{number + 1}" in self.alignment

    def _learns(self, number: int, level_weights: Sequence[float]) -> bool:
        return level_weights[number - 1] > 0 or self._is_aligned(number - 1)

    def _check_weights(self, level_weights: Sequence[float]) -> None:
        if not self.alignment and not any(weight > 0 for weight in level_weights):
            raise ValueError("every weight is 0: set one of level_weights or alignment_weights above 0")

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        n = len(batch["image"])
        expected = {"image": (n, batch["image"].shape[1], *self.levels[0].crop_size)}
        for number, level in enumerate(self.levels, 1):
            sub_volumes = (self._n_sub_volumes(number),) if number > 1 else ()
            expected[f"mask_{number}"] = (n, *sub_volumes, *level.grid)
            if number > 1:
                expected[f"region_{number}"] = (n, *sub_volumes)
        for key, shape in expected.items():
            found = tuple(batch[key].shape) if key in batch else None
            if found != shape:
                raise ValueError(
                    f"the batch's {key} has shape {found}, expected {shape}: "
                    "give network and RandNestedMaskd the same levels"
                )


def _flat(batch: Mapping[str, Tensor], key: str, number: int) -> Tensor:
    """Entry of a level with one axis for images and sub-volumes: ``(B, n, …)`` becomes ``(B * n, …)``."""
    return batch[key].flatten(0, 1) if number > 1 else batch[key]


def _feature_size(decoder: nn.Module) -> int:
    norm = getattr(decoder, "norm", None)
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"a {type(decoder).__name__} has no final norm: take the transformer decoder")
    return norm.normalized_shape[0]


def _weights(name: str, values: Sequence[float] | None, n: int, default: float) -> tuple[float, ...]:
    weights = (default,) * n if values is None else tuple(values)
    if len(weights) != n or not all(weight >= 0 for weight in weights):
        raise ValueError(f"{name} must be {n} numbers of 0 or more, found {list(weights)}")
    return weights
