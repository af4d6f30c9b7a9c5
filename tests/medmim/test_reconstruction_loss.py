"""The reconstruction loss, against loops over tokens and voxels."""

import math
from itertools import product

import pytest
import torch

from medmim.losses import MaskedReconstructionLoss

SIZES = [  # batch, channels, img_size, patch_size
    (2, 1, (4, 6, 2), (2, 3, 1)),
    (1, 3, (4, 6), (2, 2)),
    (3, 2, (2, 4, 6), (2, 2, 2)),
]


def naive_target(image, patch_size, normalize, unbiased, eps):
    """Per sample a list of tokens, each a list of values."""
    grid = [n // p for n, p in zip(image.shape[2:], patch_size, strict=True)]
    samples = []
    for sample in image:
        tokens = []
        for cell in product(*map(range, grid)):
            values = []
            for offset in product(*map(range, patch_size)):
                voxel = tuple(c * p + o for c, p, o in zip(cell, patch_size, offset, strict=True))
                values += [float(channel[voxel]) for channel in sample]
            if normalize:
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - unbiased)
                values = [(v - mean) / math.sqrt(variance + eps) for v in values]
            tokens.append(values)
        samples.append(tokens)
    return samples


def case(batch, channels, img_size, patch_size, n_hidden=2):
    grid = [n // p for n, p in zip(img_size, patch_size, strict=True)]
    n_tokens = math.prod(grid)
    image = torch.rand(batch, channels, *img_size) * 5 - 1
    prediction = torch.randn(batch, n_tokens, math.prod(patch_size) * channels)
    mask = (torch.rand(batch, n_tokens).argsort(1).argsort(1) < n_hidden).reshape(batch, *grid)
    padding = torch.rand(batch, *grid) < 0.3
    return prediction, image, mask, padding


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("region", ["hidden", "all"])
@pytest.mark.parametrize(("normalize", "unbiased"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_equals_loops(size, norm, region, normalize, unbiased, padded):
    prediction, image, mask, padding = case(*size)
    patch_size = size[3]
    loss = MaskedReconstructionLoss(patch_size, norm, region, normalize, unbiased, eps=1e-3)
    errors = []
    target = naive_target(image, patch_size, normalize, unbiased, 1e-3)
    for b, tokens in enumerate(target):
        for t, values in enumerate(tokens):
            if padded and bool(padding[b].flatten()[t]):
                continue
            if region == "all" or bool(mask[b].flatten()[t]):
                differences = [p - v for p, v in zip(prediction[b, t].tolist(), values, strict=True)]
                errors.append(sum(abs(d) if norm == "l1" else d * d for d in differences) / len(differences))
    found = loss(prediction, image, mask, padding) if padded else loss(prediction, image, mask)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_perfect_prediction_costs_nothing(size, normalize, norm):
    _, image, mask, _ = case(*size)
    loss = MaskedReconstructionLoss(size[3], norm, "all", normalize)
    assert float(loss(loss.target(image), image, mask)) == 0


def test_default_is_the_normalised_hidden_mean_square():
    """As papers.md 1.6: own mean, unbiased variance, 1e-6 under the root."""
    _, image, _, _ = case(2, 1, (4, 6, 2), (2, 3, 1))
    target = MaskedReconstructionLoss((2, 3, 1)).target(image)
    assert target.dtype == torch.float32
    torch.testing.assert_close(
        target, torch.tensor(naive_target(image, (2, 3, 1), True, True, 1e-6)), rtol=1e-4, atol=1e-4
    )


def test_random_prediction_of_a_normalised_target_costs_its_variance():
    """A prediction of zero misses each value by one standard deviation."""
    image = torch.rand(1, 1, 16, 16, 16)
    loss = MaskedReconstructionLoss((8, 8, 8))
    mask = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    assert float(loss(torch.zeros(1, 8, 512), image, mask)) == pytest.approx(511 / 512, abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_visible_predictions_do_not_count(size):
    prediction, image, mask, padding = case(*size)
    loss = MaskedReconstructionLoss(size[3])
    changed = prediction + 100 * (~mask).flatten(1).unsqueeze(-1)
    assert torch.equal(loss(changed, image, mask), loss(prediction, image, mask))
    everywhere = MaskedReconstructionLoss(size[3], region="all")
    assert not torch.equal(everywhere(changed, image, mask), everywhere(prediction, image, mask))
    changed = prediction + 100 * padding.flatten(1).unsqueeze(-1)
    assert torch.equal(everywhere(changed, image, mask, padding), everywhere(prediction, image, mask, padding))


def test_gradient_reaches_scored_tokens_only():
    prediction, image, mask, padding = case(2, 1, (4, 6, 2), (2, 3, 1), n_hidden=4)
    prediction.requires_grad_()
    MaskedReconstructionLoss((2, 3, 1))(prediction, image, mask, padding).backward()
    assert torch.equal(prediction.grad.abs().sum(-1) > 0, (mask & ~padding).flatten(1))


@pytest.mark.parametrize("region", ["hidden", "all"])
def test_nothing_to_score_costs_nothing(region):
    prediction, image, mask, _ = case(*SIZES[0])
    prediction.requires_grad_()
    found = MaskedReconstructionLoss(SIZES[0][3], region=region)(prediction, image, mask, torch.ones_like(mask))
    found.backward()
    assert float(found) == 0
    assert not bool(prediction.grad.any())


def test_constant_patch_has_a_finite_target():
    target = MaskedReconstructionLoss((2, 2)).target(torch.full((1, 1, 4, 4), 7.0))
    assert torch.equal(target, torch.zeros(1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    prediction, image, mask, _ = case(*SIZES[0])
    loss = MaskedReconstructionLoss(SIZES[0][3])
    image = image.to(dtype)
    found = loss(prediction.to(dtype), image, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(prediction.to(dtype).float(), image.float(), mask))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("normalize", "unbiased"), [(False, True), (True, True), (True, False)])
def test_to_image_inverts_the_target(size, normalize, unbiased):
    _, image, _, _ = case(*size)
    loss = MaskedReconstructionLoss(size[3], normalize_target=normalize, unbiased=unbiased)
    torch.testing.assert_close(loss.to_image(loss.target(image), image), image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("knob", "name"), [("norm", "loss_norm"), ("region", "loss_region")])
def test_unknown_option_is_refused(knob, name):
    with pytest.raises(ValueError, match=f"{name} must be .* or .*, found 'huber'"):
        MaskedReconstructionLoss((2, 2), **{knob: "huber"})


def test_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible"):
        MaskedReconstructionLoss((2, 3)).target(torch.rand(1, 1, 4, 4))
