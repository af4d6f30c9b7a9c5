"""Cutting, resizing and pooling of regions, against loops."""

from itertools import product

import pytest
import torch

from medmim.networks.sub_volumes import cut_sub_volumes, pool_regions, resize_reach, resize_sub_volumes

CASES = [  # volumes (P, C, *spatial), regions along each axis
    ((3, 2, 12, 8, 6), (2, 4, 3)),
    ((1, 1, 6, 6, 6), (6, 6, 6)),
    ((2, 3, 10, 9), (5, 3)),
    ((1, 1, 7, 4), (1, 2)),
    ((2, 1, 8, 8, 8), (1, 1, 1)),
]


def slow_cut(volume, grid, region):
    place = list(product(*map(range, grid)))[region]
    size = [n // g for n, g in zip(volume.shape[1:], grid, strict=True)]
    return volume[(slice(None), *(slice(p * s, (p + 1) * s) for p, s in zip(place, size, strict=True)))]


@pytest.mark.parametrize(("shape", "grid"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_regions_are_exact_copies(shape, grid, dtype):
    volumes = (torch.rand(shape) * 1000).to(dtype) if dtype != torch.bool else torch.rand(shape) < 0.5
    n_regions = torch.Size(grid).numel()
    regions = torch.randint(n_regions, (9,))
    parents = torch.randint(shape[0], (9,))
    cut = cut_sub_volumes(volumes, grid, regions, parents)
    assert cut.dtype == dtype
    for piece, region, parent in zip(cut, regions.tolist(), parents.tolist(), strict=True):
        assert torch.equal(piece, slow_cut(volumes[parent], grid, region))


def test_a_volume_that_is_a_view_can_be_cut():
    volumes = torch.rand(4, 1, 6, 6, 6).transpose(2, 4)[1:3]
    cut = cut_sub_volumes(volumes, (2, 3, 1), torch.tensor([4]), torch.tensor([1]))
    assert torch.equal(cut[0], slow_cut(volumes[1], (2, 3, 1), 4))


@pytest.mark.parametrize("grid", [(4, 2, 2), (2, 2)])
def test_a_volume_that_does_not_divide_is_refused(grid):
    with pytest.raises(ValueError, match=r"a volume of \(6, 6, 6\) voxels does not divide into"):
        cut_sub_volumes(torch.zeros(1, 1, 6, 6, 6), grid, torch.tensor([0]), torch.tensor([0]))


def test_halving_averages_pairs():
    volumes = torch.rand(2, 1, 8, 6, 4)
    expected = volumes.reshape(2, 1, 4, 2, 3, 2, 2, 2).mean(dim=(3, 5, 7))
    torch.testing.assert_close(resize_sub_volumes(volumes, (4, 3, 2)), expected)


def test_enlarging_interpolates_between_centres_of_voxels():
    line = torch.tensor([0.0, 6.0]).reshape(1, 1, 2, 1)
    enlarged = resize_sub_volumes(line, (12, 1)).flatten()
    expected = [6 * min(max((i + 0.5) / 6 - 0.5, 0), 1) for i in range(12)]
    torch.testing.assert_close(enlarged, torch.tensor(expected))


def test_native_resolution_is_passed_on_as_it_is():
    volumes = torch.rand(1, 1, 4, 5)
    assert resize_sub_volumes(volumes, (4, 5)) is volumes


@pytest.mark.parametrize(
    ("n_voxels", "n_resized", "n_tokens"), [(12, 6, 3), (2, 12, 6), (8, 8, 4), (5, 12, 4), (9, 12, 2), (16, 96, 6)]
)
def test_reach_holds_every_voxel_that_enters_a_token(n_voxels, n_resized, n_tokens):
    resized = resize_sub_volumes(torch.eye(n_voxels)[:, None], (n_resized,))
    entering = resized.reshape(n_voxels, n_tokens, -1).amax(-1).T > 0
    assert torch.equal(resize_reach(n_voxels, n_resized, n_tokens), entering)


def test_reach_of_a_reduction_that_skips_voxels_has_no_gaps():
    assert resize_reach(12, 4, 2).int().tolist() == [[0, 1, 1, 1, 1] + [0] * 7, [0] * 7 + [1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("grid", "region_tokens"), [((6, 6, 6), (3, 3, 3)), ((4, 6, 2), (2, 1, 2)), ((3, 4), (1, 1)), ((3, 4), (3, 2))]
)
def test_pooling_is_the_mean_of_a_regions_tokens(grid, region_tokens):
    features = torch.rand(2, torch.Size(grid).numel(), 5)
    pooled = pool_regions(features, grid, region_tokens)
    regions = [g // t for g, t in zip(grid, region_tokens, strict=True)]
    assert pooled.shape == (2, torch.Size(regions).numel(), 5)
    places = list(product(*map(range, grid)))
    for index, region in enumerate(product(*map(range, regions))):
        inside = [
            i
            for i, place in enumerate(places)
            if all(p // t == r for p, t, r in zip(place, region_tokens, region, strict=True))
        ]
        torch.testing.assert_close(pooled[:, index], features[:, inside].mean(1))
