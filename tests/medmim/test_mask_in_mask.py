"""Mask in Mask: against a slow computation of the whole loss, geometry of 500 draws, alignment, errors."""

from math import log

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskInMask
from medmim.networks.decoders import TokenwiseDecoder
from medmim.networks.patches import patchify, token_ids
from medmim.transforms import RandNestedMaskd
from tests.medmim.nested import (
    EIGHTH,
    FOUR_2D,
    SMALL,
    TWO_2D,
    PatchEncoder,
    batch_of,
    crop_of,
    gradients,
    gradients_of_shares,
    make,
    tokens_in,
)

CASES = [SMALL, TWO_2D, FOUR_2D]


def slow_terms(network, batch):
    """All terms from single sub-volumes, one after the other, following the definition."""
    levels, n_levels = network.levels, len(network.levels)
    sums, counts = {}, {}

    def add(name, value, count):
        sums[name] = sums.get(name, 0) + value
        counts[name] = counts.get(name, 0) + count

    def visit(number, volume, path, sample, parent):
        level = levels[number - 1]
        mode = {2: "bilinear", 3: "trilinear"}[volume.ndim - 1]
        image = interpolate(volume[None], level.img_size, mode=mode, align_corners=False)
        index = (sample,) if number == 1 else (sample, path)
        mask, padding = batch[f"mask_{number}"][index][None], batch[f"padding_{number}"][index][None]
        visible, hidden = token_ids(mask)
        latent = network.encoder(image, mask)
        features = network.decoder.features(latent, visible, hidden)[0]
        prediction = network.decoder(latent, visible, hidden)[0]
        for token in range(len(prediction)):
            if mask.flatten()[token] and not padding.flatten()[token]:
                target = patchify(image, network.patch_size)[0, token]
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                add(f"reconstruction_{number}", (prediction[token] - target).square().mean(), 1)
        if parent is not None and not padding.all():
            region, parents_features = parent
            loss = network.alignment[f"{number - 1}_{number}"]
            query = loss.query(features.mean(0))
            n_regions = torch.Size(levels[number - 2].regions).numel()
            keys = [
                loss.key(parents_features[tokens_in(levels, number - 1, r)].mean(0).detach()) for r in range(n_regions)
            ]
            if getattr(loss, "center_keys", False):
                keys = [key - sum(keys) / n_regions for key in keys]
            cosines = torch.stack([torch.cosine_similarity(query, key, dim=0) for key in keys])
            if hasattr(loss, "temperature"):
                error = -torch.log_softmax(cosines / loss.temperature, 0)[region]
            else:
                error = 2 - 2 * cosines[region]
            add(f"alignment_{number - 1}_{number}", error, 1)
        if number < n_levels:
            samples = levels[number].samples
            for child in range(samples):
                below = path * samples + child
                region = int(batch[f"region_{number + 1}"][sample, below])
                visit(number + 1, crop_of(volume, levels, number + 1, region), below, sample, (region, features))

    for sample, image in enumerate(batch["image"]):
        visit(1, image, 0, sample, None)
    return {name: sums[name] / counts[name] for name in sums}


@pytest.mark.parametrize("levels", CASES)
@pytest.mark.parametrize("alignment", ["contrastive", "byol"])
@pytest.mark.parametrize("padding", [False, True])
def test_loss_and_gradients_against_single_sub_volumes(levels, alignment, padding):
    n = len(levels)
    weights = {"level_weights": [1.0, 0.5, 2.0, 0.7][:n], "alignment_weights": [0.3, 0.2, 0.1][: n - 1]}
    network = make(levels, alignment=alignment, temperature=0.5, chunk_size=3, **weights)
    batch = batch_of(network, 2, padding)
    assert bool(batch["padding_2"].any()) == padding
    expected = slow_terms(network, batch)
    found = network(batch)
    assert set(found) == {"loss", *expected}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), abs=2e-6)
    whole = sum(w * expected[f"reconstruction_{i}"] for i, w in enumerate(weights["level_weights"], 1))
    whole = whole + sum(w * expected[f"alignment_{i}_{i + 1}"] for i, w in enumerate(weights["alignment_weights"], 1))
    assert float(found["loss"]) == pytest.approx(float(whole), abs=5e-6)
    expected_gradients = gradients(network, whole)
    _, found_gradients = gradients_of_shares(network, batch)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=2e-6, rtol=1e-5)


def test_500_draws_hand_down_hidden_regions_and_the_positive_is_their_own():
    network = make(EIGHTH, chunk_size=7)
    levels = network.levels
    image = torch.arange(24.0**3, dtype=torch.float64).reshape(1, 24, 24, 24)  # a voxel is known by its value
    transform = RandNestedMaskd("image", levels, 2).set_random_state(0)
    tokens = {n: [tokens_in(levels, n, r) for r in range(8 if n == 1 else 216)] for n in (1, 2)}
    seen = set()

    def run(part):
        """In place of the network: the feature of a region is the mean of its voxels."""
        if part.number > 1:
            own = part.parents[part.parent_ids, part.regions, 0]
            torch.testing.assert_close(own, part.image.flatten(1).mean(1), rtol=1e-12, atol=1e-8)
        side = levels[part.number - 1].regions[0]
        cells = part.image.reshape(-1, side, 12 // side, side, 12 // side, side, 12 // side)
        return None, None, cells.mean((2, 4, 6)).flatten(1)[..., None]

    for _ in range(500):
        batch = {key: value[None] for key, value in transform({"image": image}).items()}
        parents = [image]
        for number in (2, 3):
            masks, regions = batch[f"mask_{number - 1}"].reshape(-1, 216), batch[f"region_{number}"][0].tolist()
            crops = [crop_of(parents[i // 4], levels, number, region) for i, region in enumerate(regions)]
            assert torch.equal(network._crops(batch, number, 0, len(regions)), torch.stack(crops))
            assert all(bool(masks[i // 4][tokens[number - 1][region]].all()) for i, region in enumerate(regions))
            parents = crops
            seen |= {(number, region) for region in regions}
        assert len(list(network.shares(batch, run=run))) == 1 + 1 + 3
    assert len(seen) == 8 + 216  # every region went down at some time


def test_loss_starts_near_the_log_of_the_number_of_regions():
    network = make(EIGHTH, temperature=1, level_weights=[0, 0, 0], alignment_weights=[1, 1])
    with torch.no_grad():
        terms = network(batch_of(network, 4))
    assert set(terms) == {"loss", "alignment_1_2", "alignment_2_3"}
    assert float(terms["alignment_1_2"]) == pytest.approx(log(8), abs=0.2)
    assert float(terms["alignment_2_3"]) == pytest.approx(log(216), abs=0.2)


def test_a_vit_of_monai_as_encoder(tiny_vit):
    vit = tiny_vit(img_size=(8, 8, 8), patch_size=(4, 4, 2), hidden_size=12)
    names = set(vit.state_dict())
    network = make(SMALL, encoder=vit)
    assert set(network.encoder.state_dict()) == names
    batch = batch_of(network, 2)
    before = network(batch)["loss"].item()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        for loss, _ in network.shares(batch):
            loss.backward()
        optimizer.step()
    assert network(batch)["loss"].item() < before
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_hidden_voxels_of_the_scan_are_in_no_visible_token():
    """Of the default geometry, halved at level 1 and native at level 2: resizing blends nothing across tokens."""
    network = make(EIGHTH)
    batch = batch_of(network, 2)
    patch_size = network.patch_size
    for number, factor in ((1, 2), (2, 1)):
        image, mask = network.level_images(batch, number)
        seen = patchify(image, patch_size)[~mask.flatten(1)]
        hidden = mask.unsqueeze(1)
        for axis in (2, 3, 4):
            hidden = hidden.repeat_interleave(patch_size[axis - 2] * factor, dim=axis)
        other = {key: value.clone() for key, value in batch.items()}
        if number == 1:
            other["image"][hidden] = 7.0
        else:  # back to the places in the scan that the regions were cut from
            half = network.levels[1].crop_size
            for i, region in enumerate(batch["region_2"].flatten()):
                corner = [int(n) * size for n, size in zip(torch.unravel_index(region, (2, 2, 2)), half, strict=True)]
                slices = [slice(start, start + size) for start, size in zip(corner, half, strict=True)]
                other["image"][i // 4, 0][tuple(slices)][hidden[i, 0]] = 7.0
        assert not torch.equal(other["image"], batch["image"])
        assert torch.equal(patchify(network.level_images(other, number)[0], patch_size)[~mask.flatten(1)], seen)


def test_hidden_voxels_of_a_vit_reach_no_latent(tiny_vit):
    network = make(SMALL, encoder=tiny_vit(img_size=(8, 8, 8), patch_size=(4, 4, 2), hidden_size=12))
    batch = batch_of(network, 2)
    for number in (1, 2, 3):
        image, mask = network.level_images(batch, number)
        assert len(image) == len(mask) == {1: 2, 2: 6, 3: 12}[number]
        patches = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(2, 3).unsqueeze(1)
        with torch.no_grad():
            expected = network.predict(image, mask)
            changed = network.predict(torch.where(patches, torch.randn_like(image), image), mask)
        assert expected.shape == (len(image), 16, 32)
        assert torch.equal(expected, changed)


def test_byol_depends_on_the_coarse_level():
    network = make(SMALL, alignment="byol", level_weights=[0, 0, 0])
    images = torch.rand(2, 1, 16, 8, 8)
    before = network(batch_of(network, 2, images=images.clone()))
    batch = batch_of(network, 2, images=images.clone())
    visible = ~batch["mask_1"].repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(2, 3).unsqueeze(1)
    visible = interpolate(visible.float(), (16, 8, 8)).bool()
    batch["image"] = torch.where(visible, torch.rand_like(batch["image"]), batch["image"])  # no child sees these
    after = network(batch)
    assert float((after["alignment_1_2"] - before["alignment_1_2"]).abs()) > 1e-4
    assert torch.equal(after["alignment_2_3"], before["alignment_2_3"])


@pytest.mark.parametrize(
    ("reconstruction", "alignment", "center_keys"), [(0, 1, True), (1, 0.1, True), (1, 0.1, False), (0, 1, False)]
)
def test_features_do_not_collapse_in_200_steps_of_byol(reconstruction, alignment, center_keys):
    weights = {"level_weights": [reconstruction] * 2, "alignment_weights": [alignment]}
    network = make(TWO_2D, alignment="byol", chunk_size=24, **weights)
    network.alignment["1_2"].center_keys = center_keys
    brightness = interpolate(torch.randn(8, 1, 2, 3), (16, 24))
    batch = batch_of(network, 8, images=brightness + 0.1 * torch.randn(8, 1, 16, 24))
    image, mask = network.level_images(batch, 2)

    def variance():
        with torch.no_grad():
            features = network._features(image, mask).mean(1)
        return float(nn.functional.normalize(features, dim=-1).var(0).sum())

    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-3)
    before, losses = variance(), []
    for _ in range(200):
        optimizer.zero_grad()
        for loss, terms in network.shares(batch):
            loss.backward()
            if "alignment_1_2" in terms:
                losses.append(terms["alignment_1_2"].item())
        optimizer.step()
    after = variance()
    print(f"alignment {losses[0]:.3f} to {losses[-1]:.4f}, variance {before:.4f} to {after:.4f}")
    assert losses[-1] < 0.8 * losses[0]
    if reconstruction or center_keys:
        assert after > before
    else:  # alone, the plain loss is content with one feature for all
        assert after < 0.1 * before


def test_padding_changes_nothing_that_is_scored():
    network = make(SMALL)
    batch = batch_of(network, 2, padding=True)
    alone = batch["padding_2"].flatten(2).all(-1)
    assert bool(alone.any())
    before = network(batch)
    without = network({key: value for key, value in batch.items() if not key.startswith("padding")})
    assert before["loss"] != without["loss"]
    network.alignment_weights = (0.0, 0.0)
    for loss, _ in network.shares({**batch, "padding_1": torch.ones_like(batch["padding_1"])}):
        assert bool(loss.isfinite())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level_weights": [1, 1]}, r"level_weights must be 3 numbers of 0 or more, found \[1, 1\]"),
        ({"alignment_weights": [0.1, -1]}, r"alignment_weights must be 2 numbers of 0 or more, found \[0.1, -1\]"),
        ({"level_weights": [0, 0, 0], "alignment_weights": [0, 0]}, "every weight is 0: set one of level_weights or"),
        ({"alignment": "moco"}, "alignment must be contrastive or byol, found 'moco'"),
        ({"chunk_size": 0}, "chunk_size must be a whole number above 0, found 0"),
        ({"temperature": 0}, "temperature must be above 0, found 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(SMALL, **options)


def test_levels_of_different_input_sizes_are_refused():
    levels = [TWO_2D[0], {**TWO_2D[1], "img_size": 8}]
    with pytest.raises(ValueError, match="all levels must have the same img_size, because they share a network"):
        make(levels, patch_size=(4, 4))


def test_a_vit_with_class_token_and_a_decoder_without_norm_are_refused(tiny_vit):
    with pytest.raises(ValueError, match="classification=False"):
        make(SMALL, encoder=tiny_vit(img_size=(8, 8, 8), patch_size=(4, 4, 2), classification=True))
    with pytest.raises(ValueError, match="TokenwiseDecoder has no final norm: take the transformer decoder"):
        MaskInMask(PatchEncoder((4, 4)), TokenwiseDecoder(12, 16, (2, 3)), TWO_2D, MaskedReconstructionLoss((4, 4)))


@pytest.mark.parametrize("key", ["image", "mask_2", "region_2", "mask_3"])
def test_a_batch_that_does_not_fit_the_levels_is_refused(key):
    network = make(SMALL)
    batch = batch_of(network, 2)
    shape = tuple(batch[key].shape)
    for wrong, found in (
        ({**batch, key: batch[key][..., 1:]}, r"\("),
        ({k: batch[k] for k in batch if k != key}, "None"),
    ):
        if key == "image" and found == "None":
            continue
        with pytest.raises(ValueError, match=f"the batch's {key} has shape {found}.*, expected .*: give network and"):
            network(wrong)
    assert shape == tuple(batch[key].shape)
