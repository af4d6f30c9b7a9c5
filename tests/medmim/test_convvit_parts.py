"""Parts of the hybrid encoder, against plain loops and PyTorch."""

from itertools import product

import pytest
import torch
from torch import nn

from medmim.networks import convvit_blocks, depthwise, patchify
from medmim.networks.convvit_blocks import RelativePositionBias, by_rows
from medmim.networks.depthwise import depthwise_convolution, weight_gradient
from medmim.networks.visible_tokens import nested_order, places, to_map, token_coordinates

CONVOLVE = {2: nn.functional.conv2d, 3: nn.functional.conv3d}


def sites(batch, grid, n_visible, side, kernel_size):
    """Visible tokens of each sample, and the places of their positions."""
    n_tokens = torch.Size(grid).numel()
    ids = torch.stack([torch.randperm(n_tokens)[:n_visible] for _ in range(batch)])
    return ids, places(ids, grid, side, kernel_size)


@pytest.mark.parametrize(
    ("grid", "n_visible", "side", "kernel_size"),
    [((2, 1, 3), 4, 2, 3), ((2, 2, 1), 4, 2, 5), ((2, 3), 3, 4, 5), ((1, 2, 2), 1, 4, 3)],
)
def test_convolution_equals_pytorchs_on_a_volume_with_zeros(grid, n_visible, side, kernel_size):
    batch, channels, dims = 2, 3, len(grid)
    _, where = sites(batch, grid, n_visible, side, kernel_size)
    spatial = [side * size for size in grid]
    rows = torch.randn(where.shape[1], channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 1, *[kernel_size] * dims, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    found = depthwise_convolution(rows, weight, bias, (batch, *spatial), where)

    volume = torch.zeros(batch * torch.Size(spatial).numel(), channels, dtype=torch.float64)
    volume = volume.index_put((where[0],), rows).view(batch, *spatial, channels).movedim(-1, 1)
    dense = CONVOLVE[dims](volume, weight, bias, padding=kernel_size // 2, groups=channels)
    expected = dense.movedim(1, -1).reshape(-1, channels)[where[0]]
    torch.testing.assert_close(found, expected)
    loss = torch.randn_like(found)
    inputs = (rows, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad((found * loss).sum(), inputs),
        torch.autograd.grad((expected * loss).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("grid", [(2, 1, 1), (2, 2)])
def test_gradients_by_finite_differences(grid):
    _, where = sites(1, grid, 2, 2, 3)
    rows = torch.randn(where.shape[1], 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, *[3] * len(grid), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    spatial = (1, *[2 * size for size in grid])
    assert torch.autograd.gradcheck(lambda *x: depthwise_convolution(*x, spatial, where), (rows, weight, bias))


@pytest.mark.parametrize("frozen", ["rows", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    _, where = sites(1, (2, 2), 2, 2, 3)
    inputs = {"rows": torch.randn(where.shape[1], 2), "weight": torch.randn(2, 1, 3, 3), "bias": torch.randn(2)}
    for name, value in inputs.items():
        value.requires_grad_(name != frozen)
    depthwise_convolution(*inputs.values(), (1, 4, 4), where).sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == set(inputs) - {frozen}


@pytest.mark.parametrize(("spatial", "tile"), [((5, 7, 6), (2, 3, 4)), ((8, 8, 8), (8, 4, 9)), ((9, 5), (4, 5))])
def test_weight_gradient_as_a_sum_over_tiles(monkeypatch, spatial, tile):
    monkeypatch.setitem(depthwise.CPU_TILE, len(spatial), tile)
    inputs = torch.randn(2, 3, *[size + 4 for size in spatial], dtype=torch.float64)
    weight = torch.randn(3, 1, *[5] * len(spatial), dtype=torch.float64, requires_grad=True)
    output = CONVOLVE[len(spatial)](inputs, weight, groups=3)
    gradient = torch.randn_like(output)
    expected = torch.autograd.grad(output, weight, gradient)[0]
    torch.testing.assert_close(weight_gradient(inputs, gradient, weight.shape), expected)


@pytest.mark.parametrize("grid", [(2, 3, 1), (3, 2)])
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_positions_of_a_map_come_back(grid, side):
    volume = torch.rand(2, 3, *[side * size for size in grid])
    blocks = patchify(volume, [side] * len(grid)).unflatten(-1, (*[side] * len(grid), 3))
    assert torch.equal(to_map(nested_order(blocks, leading=2), grid), volume)


@pytest.mark.parametrize("dims", [2, 3])
def test_children_of_a_position_are_neighbours_at_every_scale(dims):
    block = torch.cartesian_prod(*[torch.arange(8)] * dims).view(*[8] * dims, dims)
    order = nested_order(block, leading=0)
    assert sorted(map(tuple, order.tolist())) == list(product(range(8), repeat=dims))
    for scale in (2, 4):
        groups = order.unflatten(0, (-1, scale**dims))
        parents = groups // scale
        assert bool((parents == parents[:, :1]).all())
    corners = order[: 2**dims].tolist()
    assert list(map(tuple, corners)) == list(product(range(2), repeat=dims))


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("grid", [(3, 1, 2), (2, 3)])
def test_places_point_at_the_positions_of_the_tokens(grid, kernel_size):
    side, margin = 4, kernel_size // 2
    ids, (plain, padded) = sites(2, grid, 3, side, kernel_size)
    spatial = [side * size for size in grid]
    volume = torch.arange(2 * torch.Size(spatial).numel()).view(2, *spatial)
    wide = nn.functional.pad(volume, [margin] * (2 * len(grid)), value=-1)
    assert torch.equal(volume.flatten()[plain], wide.flatten()[padded])
    blocks = patchify(volume.unsqueeze(1), [side] * len(grid))
    rows = plain.view(2, 3, -1)
    for b, n in product(range(2), range(3)):
        assert set(rows[b, n].tolist()) == set(blocks[b, ids[b, n]].tolist())


def test_coordinates_of_tokens():
    grid = (2, 3, 4)
    expected = torch.tensor(list(product(*map(range, grid))))
    assert torch.equal(token_coordinates(torch.arange(24), grid), expected)
    assert token_coordinates(torch.tensor([[5, 23]]), grid).tolist() == [[[0, 1, 1], [1, 2, 3]]]


@pytest.mark.parametrize("grid", [(2, 3, 2), (3, 4)])
def test_relative_bias_is_that_of_the_offset(grid):
    bias = RelativePositionBias(grid, 2)
    assert bool((bias.table == 0).all())
    nn.init.normal_(bias.table)
    coordinates = token_coordinates(torch.tensor([[5, 0, 3], [1, 2, 4]]), grid)
    found = bias(coordinates, grid)
    assert found.shape == (2, 2, 3, 3)
    for b, i, j in product(range(2), range(3), range(3)):
        offset = [int(n) for n in coordinates[b, i] - coordinates[b, j]]
        entry = bias.table[(slice(None), *[n + size - 1 for n, size in zip(offset, grid, strict=True)])]
        assert torch.equal(found[b, :, i, j], entry)


def test_relative_bias_on_another_grid_interpolates_offsets():
    bias = RelativePositionBias((3, 2), 1)
    with torch.no_grad():
        bias.table.copy_(torch.arange(-2.0, 3.0).view(1, 5, 1).expand(1, 5, 3))  # the offset along the first axis
    coordinates = token_coordinates(torch.arange(10).unsqueeze(0), (5, 2))
    found = bias(coordinates, (5, 2))[0, 0]
    offsets = coordinates[0, :, None, 0] - coordinates[0, None, :, 0]
    torch.testing.assert_close(found, offsets * (2 / 4))  # the ends of the table stay the ends


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    monkeypatch.setattr(convvit_blocks, "CPU_ROWS", 7)
    layers = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 5)).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    seen = []
    layers[1].register_forward_hook(lambda module, _, output: seen.append(len(output)))
    inputs = [x, *layers.parameters()]
    found = by_rows(layers, x)
    assert seen == [7, 7, 7, 7, 2]
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    expected = layers(x)
    torch.testing.assert_close(found, expected)
    for mine, reference in zip(ours, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, reference)
