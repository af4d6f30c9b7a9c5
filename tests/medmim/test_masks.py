"""Random masks: exact counts, whole units, equal chances, seeds."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor

from medmim.transforms import RandPatchMaskd, hidden_count

CASES = [  # spatial size, patch_size, mask_unit, ratio
    ((16, 24, 8), 8, None, 0.5),
    ((16, 24, 8), (4, 4, 8), 8, 0.34),
    ((12, 10, 6), (2, 5, 3), (4, 5, 6), 0.75),
    ((24, 16), 4, 8, 0.6),
    ((9, 15), (3, 5), None, 0.1),
    ((32, 32, 32), 8, 16, 0.5),
]


def image_of(path: str, size: tuple = (16, 24, 8)) -> MetaTensor:
    return MetaTensor(torch.zeros(1, *size), meta={"filename_or_obj": path})


@pytest.mark.parametrize(
    ("ratio", "n_units", "count"),
    [
        (0.145, 100, 15),  # 14.499999999999998 in binary
        (0.5, 27, 14),
        (0.5, 5, 3),
        (0.25, 2, 1),
        (0.75, 216, 162),
        (0.6, 216, 130),
        (0.125, 216, 27),
        (0.1, 4, 0),
        (0.0, 8, 0),
        (0.015, 100, 2),
        (0.285, 1000, 285),
        (np.float64(0.145), 100, 15),
    ],
)
def test_hidden_count_rounds_halves_up(ratio, n_units, count):
    assert hidden_count(ratio, n_units) == count


@pytest.mark.parametrize("ratio", [1, 1.2, -0.1, float("nan")])
def test_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio must lie in \[0, 1\), found {ratio}"):
        hidden_count(ratio, 100)
    with pytest.raises(ValueError, match="mask_ratio"):
        RandPatchMaskd("image", 8, ratio)


def test_hiding_everything_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio 0\.9 hides all 4 units: lower it, or take a smaller mask_unit"):
        hidden_count(0.9, 4)
    with pytest.raises(ValueError, match="hides all 1 units"):
        RandPatchMaskd("image", 8, 0.75)({"image": torch.zeros(1, 8, 8, 8)})


@pytest.mark.parametrize(("size", "patch_size", "mask_unit", "ratio"), CASES)
def test_whole_units_and_an_exact_number_are_hidden(size, patch_size, mask_unit, ratio):
    transform = RandPatchMaskd("image", patch_size, ratio, mask_unit).set_random_state(3)
    patch = (patch_size,) * len(size) if isinstance(patch_size, int) else patch_size
    unit = patch if mask_unit is None else (mask_unit,) * len(size) if isinstance(mask_unit, int) else mask_unit
    units = [n // u for n, u in zip(size, unit, strict=True)]
    tokens_of_unit = [u // p for u, p in zip(unit, patch, strict=True)]
    for _ in range(10):
        mask = transform({"image": torch.zeros(2, *size)})["mask"]
        assert mask.dtype == torch.bool
        assert mask.shape == tuple(n // p for n, p in zip(size, patch, strict=True))
        n_hidden = 0
        for cell in product(*map(range, units)):
            start = [c * t for c, t in zip(cell, tokens_of_unit, strict=True)]
            inside = mask[tuple(slice(s, s + t) for s, t in zip(start, tokens_of_unit, strict=True))]
            assert bool(inside.all()) or not bool(inside.any())
            n_hidden += bool(inside.any())
        assert n_hidden == int(np.floor(ratio * np.prod(units) + 0.5 + 1e-9))


def test_each_unit_is_equally_likely():
    transform = RandPatchMaskd("image", 1, 0.4).set_random_state(0)
    draws = 3000
    counts = sum(transform({"image": torch.zeros(1, 3, 5)})["mask"].int() for _ in range(draws))
    sigma = (draws * 0.4 * 0.6) ** 0.5
    assert int(counts.sum()) == draws * 6
    assert float((counts - draws * 0.4).abs().max()) < 4.5 * sigma


def test_each_set_of_units_is_equally_likely():
    transform = RandPatchMaskd("image", 2, 0.5, mask_unit=(4, 2)).set_random_state(0)
    counts = dict.fromkeys(combinations(range(4), 2), 0)
    for _ in range(3000):
        mask = transform({"image": torch.zeros(1, 8, 4)})["mask"]
        counts[tuple(mask[::2].flatten().nonzero().flatten().tolist())] += 1
    chi_square = sum((n - 500) ** 2 / 500 for n in counts.values())
    assert chi_square < 25.7  # one in ten thousand, 5 degrees of freedom


def test_same_seed_same_masks_another_seed_others():
    def draw(seed):
        transform = RandPatchMaskd("image", 4, 0.5).set_random_state(seed)
        return torch.stack([transform({"image": torch.zeros(1, 16, 24, 8)})["mask"] for _ in range(4)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len({tuple(mask.flatten().tolist()) for mask in draw(1)}) == 4


def test_fixed_seed_depends_on_the_name_of_the_file_only():
    transform = RandPatchMaskd("image", 4, 0.5, fixed_seed=7)
    first = transform({"image": image_of("/data/a.nii.gz")})["mask"]
    transform.set_random_state(99)
    assert torch.equal(transform({"image": image_of("/other/place/a.nii.gz") + 1})["mask"], first)
    assert not torch.equal(transform({"image": image_of("/data/b.nii.gz")})["mask"], first)
    again = RandPatchMaskd("image", 4, 0.5, fixed_seed=7)
    assert torch.equal(again({"image": image_of("/data/a.nii.gz")})["mask"], first)
    other = RandPatchMaskd("image", 4, 0.5, fixed_seed=8)
    assert not torch.equal(other({"image": image_of("/data/a.nii.gz")})["mask"], first)


def test_fixed_seed_without_a_file_name():
    transform = RandPatchMaskd("image", 4, 0.5, fixed_seed=7)
    data = {"image": torch.zeros(1, 16, 24, 8)}
    assert torch.equal(transform(data)["mask"], transform(data)["mask"])


def test_image_and_other_entries_stay():
    image = torch.rand(1, 8, 8)
    data = {"image": image, "case": "a"}
    result = RandPatchMaskd("image", 4, 0.5, mask_key="hidden")(data)
    assert result["image"] is image
    assert result["case"] == "a"
    assert result["hidden"].shape == (2, 2)
    assert set(data) == {"image", "case"}


def test_several_keys_share_a_mask():
    data = {"t1": torch.rand(1, 8, 8), "t2": torch.rand(1, 8, 8)}
    assert set(RandPatchMaskd(["t1", "t2"], 4, 0.5)(data)) == {"t1", "t2", "mask"}


def test_batches_hold_plain_boolean_masks_that_differ():
    transform = RandPatchMaskd("image", 4, 0.5)
    data = [{"image": torch.zeros(1, 16, 24, 8)}] * 4
    batch = next(iter(DataLoader(Dataset(data, transform), batch_size=4)))
    assert type(batch["mask"]) is torch.Tensor
    assert batch["mask"].shape == (4, 4, 6, 2)
    assert len({tuple(mask.flatten().tolist()) for mask in batch["mask"]}) == 4


def test_size_that_does_not_divide_by_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"size \(16, 20\) is not divisible by \(8, 8\)"):
        RandPatchMaskd("image", 8, 0.5)({"image": torch.zeros(1, 16, 20)})


def test_size_that_does_not_divide_by_the_unit_is_refused():
    with pytest.raises(ValueError, match=r"size \(16, 24\) is not divisible by \(16, 16\)"):
        RandPatchMaskd("image", 8, 0.5, 16)({"image": torch.zeros(1, 16, 24)})


@pytest.mark.parametrize("unit", [4, (12, 8)])
def test_unit_that_is_no_multiple_of_the_patch_is_refused(unit):
    with pytest.raises(ValueError, match=r"must be a multiple of patch_size \(8, 8\) along each axis"):
        RandPatchMaskd("image", 8, 0.5, unit)({"image": torch.zeros(1, 24, 24)})
