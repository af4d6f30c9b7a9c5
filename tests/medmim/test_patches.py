"""Patches, token indices and statistics, against loops over voxels."""

from itertools import product

import pytest
import torch

from medmim.networks.patches import (
    gather_tokens,
    grid_size,
    patch_mean_and_std,
    patchify,
    token_ids,
    unpatchify,
)

SHAPES = [
    ((2, 1, 6, 4), (3, 2)),
    ((1, 3, 5, 7), (5, 1)),
    ((2, 2, 4, 6, 3), (2, 3, 1)),
    ((1, 1, 8, 4, 12), (4, 4, 4)),
    ((1, 4, 2, 2, 2), (2, 2, 2)),
]


def naive_patchify(image: torch.Tensor, patch_size: tuple) -> torch.Tensor:
    """One voxel at a time, in the documented order: tokens in raster order, voxels in raster order, channel last."""
    batch, channels, *spatial = image.shape
    grid = [s // p for s, p in zip(spatial, patch_size, strict=True)]
    samples = []
    for b in range(batch):
        tokens = []
        for cell in product(*map(range, grid)):
            token = []
            for offset in product(*map(range, patch_size)):
                voxel = tuple(c * p + o for c, p, o in zip(cell, patch_size, offset, strict=True))
                token += [float(image[(b, c, *voxel)]) for c in range(channels)]
            tokens.append(token)
        samples.append(tokens)
    return torch.tensor(samples)


@pytest.mark.parametrize(("shape", "patch_size"), SHAPES)
def test_patchify_equals_loops_over_voxels(shape, patch_size):
    image = torch.rand(shape)
    assert torch.equal(patchify(image, patch_size), naive_patchify(image, patch_size))


@pytest.mark.parametrize(("shape", "patch_size"), SHAPES)
def test_unpatchify_is_the_inverse(shape, patch_size):
    image = torch.rand(shape)
    grid = [s // p for s, p in zip(shape[2:], patch_size, strict=True)]
    assert torch.equal(unpatchify(naive_patchify(image, patch_size), patch_size, grid), image)


def test_patchify_keeps_booleans():
    image = torch.rand(1, 1, 4, 4) > 0.5
    assert patchify(image, (2, 2)).dtype == torch.bool


@pytest.mark.parametrize(
    ("size", "patch_size", "grid"), [((96, 96, 64), (16, 16, 16), (6, 6, 4)), ((10, 3), (5, 3), (2, 1))]
)
def test_grid_size(size, patch_size, grid):
    assert grid_size(size, patch_size) == grid


def test_grid_size_refuses_an_axis_that_does_not_divide():
    with pytest.raises(ValueError, match=r"size \(96, 90\) is not divisible by \(16, 16\): change roi_size or patch_s"):
        grid_size((96, 90), (16, 16))


def test_grid_size_refuses_zero():
    with pytest.raises(ValueError, match="not divisible"):
        grid_size((96, 96), (16, 0))


def test_grid_size_refuses_another_number_of_axes():
    with pytest.raises(ValueError, match=r"\(96, 96, 96\) and patch_size \(16, 16\) differ in dimensions"):
        grid_size((96, 96, 96), (16, 16))


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4), (1, 1, 7)])
@pytest.mark.parametrize("n_hidden", [0, 1, 6])
def test_token_ids_are_in_raster_order(grid, n_hidden):
    n_tokens = torch.Size(grid).numel()
    hidden = torch.stack([torch.randperm(n_tokens)[:n_hidden] for _ in range(3)])
    mask = torch.zeros(3, n_tokens, dtype=torch.bool)
    for row, ids in zip(mask, hidden, strict=True):
        for i in ids:
            row[i] = True
    visible_ids, hidden_ids = token_ids(mask.reshape(3, *grid))
    for row, seen, unseen in zip(mask.tolist(), visible_ids.tolist(), hidden_ids.tolist(), strict=True):
        assert seen == [i for i, is_hidden in enumerate(row) if not is_hidden]
        assert unseen == [i for i, is_hidden in enumerate(row) if is_hidden]


def test_token_ids_refuse_samples_that_hide_different_numbers():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match=r"same number of tokens, found \[1, 2\]"):
        token_ids(mask)


def test_gather_tokens_picks_by_index():
    tokens = torch.rand(2, 5, 3)
    ids = torch.tensor([[4, 0, 0], [1, 2, 3]])
    picked = gather_tokens(tokens, ids)
    assert picked.shape == (2, 3, 3)
    for b in range(2):
        for m in range(3):
            assert torch.equal(picked[b, m], tokens[b, ids[b, m]])


@pytest.mark.parametrize("unbiased", [True, False])
def test_patch_mean_and_std_equal_loops(unbiased):
    patches = torch.rand(2, 3, 7)
    mean, std = patch_mean_and_std(patches, unbiased, eps=0.01)
    assert mean.shape == std.shape == (2, 3, 1)
    for b in range(2):
        for n in range(3):
            values = patches[b, n].tolist()
            average = sum(values) / 7
            variance = sum((x - average) ** 2 for x in values) / (6 if unbiased else 7)
            assert float(mean[b, n]) == pytest.approx(average, abs=1e-6)
            assert float(std[b, n]) == pytest.approx((variance + 0.01) ** 0.5, abs=1e-6)
