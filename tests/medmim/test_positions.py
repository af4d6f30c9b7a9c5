"""The sine-cosine table, against the formula (papers.md 1.5) and a slice of the published system's."""

import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from medmim.networks import sincos_position_embedding

CASES = [((3, 4, 2), 12, 10000.0), ((6, 6, 6), 36, 10000.0), ((5, 2), 16, 10000.0), ((2, 3, 1), 6, 100.0)]


@pytest.mark.parametrize(("grid", "size", "temperature"), CASES)
def test_table_equals_the_formula(grid, size, temperature):
    block = size // len(grid)
    half = block // 2
    expected = []
    for cell in product(*map(range, grid)):
        row = []
        for position in cell:
            frequencies = [temperature ** (-j / half) for j in range(half)]
            row += [math.sin(position * w) for w in frequencies] + [math.cos(position * w) for w in frequencies]
        expected.append(row)
    table = sincos_position_embedding(grid, size, temperature)
    assert table.shape == (1, math.prod(grid), size)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(3, 4, 2), (5, 2)])
def test_block_of_an_axis_varies_only_along_it(grid):
    block = 8
    table = sincos_position_embedding(grid, block * len(grid)).reshape(*grid, -1)
    for axis in range(len(grid)):
        part = table[..., axis * block : (axis + 1) * block]
        for other in range(len(grid)):
            spread = (part - part.narrow(other, 0, 1)).abs().max()
            assert (spread > 0.1) if other == axis else (spread == 0)


@pytest.mark.parametrize(("grid", "size"), [((6, 6, 6), 64), ((4, 4), 6)])
def test_width_that_does_not_divide_is_refused(grid, size):
    with pytest.raises(ValueError, match=f"hidden_size {size} is not divisible by {2 * len(grid)}, .*learnable"):
        sincos_position_embedding(grid, size)


@pytest.mark.parametrize(("name", "size"), [("pos_embed", 96), ("decoder_pos_embed", 576)])
def test_table_equals_the_published_systems(name, size):
    if "MEDMIM_TEST_DATA" not in os.environ:
        pytest.skip("MEDMIM_TEST_DATA is not set: no golden numbers")
    golden = np.load(Path(os.environ["MEDMIM_TEST_DATA"]) / "golden" / "mim_tiny_pretrain.npz")[name]
    table = sincos_position_embedding((6, 6, 6), size)
    np.testing.assert_allclose(table[0, ::7, ::5].numpy(), golden, atol=1e-5)
