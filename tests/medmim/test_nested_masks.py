"""Nested random masks: what goes down was hidden as a whole; counts, chances, seeds, padding, errors."""

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, RandFlipd

from medmim.networks.nested_levels import DEFAULT_LEVELS, nested_levels
from medmim.transforms import PaddingTokensd, RandNestedMaskd

EIGHTH = [  # the default levels, all sizes divided by 8
    {"crop_size": 24, "img_size": 12, "mask_unit": 6, "mask_ratio": 0.5},
    {"img_size": 12, "mask_ratio": 0.6, "samples": 4},
    {"img_size": 12, "mask_ratio": 0.5, "samples": 4},
]
TWO_2D = [
    {"crop_size": (16, 24), "img_size": 8, "mask_unit": 4, "mask_ratio": 0.75},
    {"img_size": 8, "mask_ratio": 0.3, "samples": 2},
]
THREE_ODD = [  # no cube, patches of three lengths, regions of different sizes along the axes
    {"crop_size": (12, 24, 8), "img_size": (6, 12, 8), "mask_unit": (2, 6, 8), "mask_ratio": 0.5},
    {"img_size": (6, 12, 8), "mask_unit": (6, 6, 4), "mask_ratio": 0.5, "samples": 3},
    {"img_size": (6, 12, 8), "mask_ratio": 0.2, "samples": 2},
]
FOUR_2D = [
    {"crop_size": (64, 32), "img_size": 16, "mask_unit": 8, "mask_ratio": 0.5},
    {"img_size": 16, "mask_unit": 4, "mask_ratio": 0.4, "samples": 2},
    {"img_size": 16, "mask_unit": 8, "mask_ratio": 0.5, "samples": 1},
    {"img_size": 16, "mask_ratio": 0.25, "samples": 2},
]
CASES = [(EIGHTH, 2, 3), (TWO_2D, (4, 2), 2), (THREE_ODD, (2, 3, 4), 3), (FOUR_2D, 4, 2)]


def image_of(path, size):
    return MetaTensor(torch.zeros(1, *size), meta={"filename_or_obj": path})


def region_of(index, regions):
    """Place of a region on the grid of regions, by counting in raster order."""
    return list(product(*map(range, regions)))[index]


def tokens_of(place, size):
    return tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, size, strict=True))


def draw(transform, image):
    result = transform({"image": image})
    return [result[f"mask_{n}"] for n in range(1, len(transform.levels) + 1)], [
        result[f"region_{n}"] for n in range(2, len(transform.levels) + 1)
    ]


def test_default_levels():
    levels = nested_levels(DEFAULT_LEVELS, 16)
    assert [level.crop_size for level in levels] == [(192,) * 3, (96,) * 3, (16,) * 3]
    assert {level.img_size for level in levels} == {(96,) * 3}
    assert [level.regions for level in levels] == [(2,) * 3, (6,) * 3, (6,) * 3]
    assert [level.region_tokens for level in levels] == [(3,) * 3, (1,) * 3, (1,) * 3]
    result = RandNestedMaskd("image")({"image": torch.zeros(1, 192, 192, 192)})
    assert set(result) == {"image", *(f"{key}_{n}" for key in ("mask", "padding", "region") for n in (1, 2, 3))} - {
        "region_1"
    }
    assert result["mask_1"].shape == result["padding_1"].shape == (6, 6, 6)
    assert result["mask_2"].shape == result["padding_2"].shape == (4, 6, 6, 6)
    assert result["mask_3"].shape == result["padding_3"].shape == (16, 6, 6, 6)
    assert result["region_2"].shape == (4,)
    assert result["region_3"].shape == (16,)
    assert int(result["mask_1"].sum()) == 108
    assert result["mask_2"].flatten(1).sum(1).tolist() == [130] * 4
    assert result["mask_3"].flatten(1).sum(1).tolist() == [108] * 16
    assert not any(result[f"padding_{n}"].any() for n in (1, 2, 3))


@pytest.mark.parametrize(("levels", "patch_size", "dims"), CASES)
def test_regions_are_hidden_as_a_whole_and_only_hidden_ones_go_down(levels, patch_size, dims):
    transform = RandNestedMaskd("image", levels, patch_size, dims).set_random_state(1)
    image = torch.zeros(2, *transform.levels[0].crop_size)
    for _ in range(40):
        masks, regions = draw(transform, image)
        for number, (level, mask) in enumerate(zip(transform.levels, masks, strict=True)):
            assert mask.dtype == torch.bool
            parents = mask if number else mask[None]
            assert parents.shape[1:] == tuple(
                i // p for i, p in zip(level.img_size, np.broadcast_to(patch_size, dims), strict=True)
            )
            hidden = []
            for parent in parents:
                inside = [
                    parent[tokens_of(place, level.region_tokens)] for place in product(*map(range, level.regions))
                ]
                assert all(bool(cell.all()) or not bool(cell.any()) for cell in inside)
                hidden.append({i for i, cell in enumerate(inside) if bool(cell.all())})
                assert len(hidden[-1]) == int(np.floor(level.mask_ratio * prod(level.regions) + 0.5 + 1e-9))
            if number + 1 < len(masks):
                samples = transform.levels[number + 1].samples
                chosen = regions[number].reshape(len(parents), samples).tolist()
                assert len(masks[number + 1]) == len(parents) * samples
                for of_parent, allowed in zip(chosen, hidden, strict=True):
                    assert len(set(of_parent)) == samples
                    assert set(of_parent) <= allowed
                    assert of_parent == sorted(of_parent)


def test_an_octant_is_a_block_of_the_token_grid_not_27_tokens_in_a_row():
    transform = RandNestedMaskd("image", EIGHTH, 2).set_random_state(0)
    masks, regions = draw(transform, torch.zeros(1, 24, 24, 24))
    octants = masks[0].reshape(2, 3, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(8, 27)
    hidden = [i for i in range(8) if octants[i].all()]
    assert hidden == [i for i in range(8) if octants[i].any()]
    assert regions[0].tolist() == hidden  # four hidden, four asked for


def test_each_region_is_hidden_and_chosen_equally_often():
    transform = RandNestedMaskd("image", TWO_2D, (4, 2), 2).set_random_state(0)
    image, n = torch.zeros(1, 16, 24), 3000
    hidden, chosen, tokens = torch.zeros(4), torch.zeros(4), torch.zeros(2, 4)
    for _ in range(n):
        masks, regions = draw(transform, image)
        hidden += torch.stack([masks[0][0, 0], masks[0][0, 2], masks[0][1, 0], masks[0][1, 2]])
        chosen[regions[0]] += 1
        tokens += masks[1].sum(0)
    assert float((hidden - n * 0.75).abs().max()) < 4.5 * (n * 0.75 * 0.25) ** 0.5
    assert float((chosen - n * 0.5).abs().max()) < 4.5 * (n * 0.5 * 0.5) ** 0.5
    assert float((tokens - 2 * n * 0.25).abs().max()) < 4.5 * (2 * n * 0.25 * 0.75) ** 0.5


def test_same_seed_same_draws_another_seed_others():
    def several(seed):
        transform = RandNestedMaskd("image", EIGHTH, 2).set_random_state(seed)
        draws = [draw(transform, torch.zeros(1, 24, 24, 24)) for _ in range(3)]
        return [torch.cat([x.flatten() for x in masks + regions]).tolist() for masks, regions in draws]

    assert several(1) == several(1)
    assert several(1) != several(2)
    assert len({tuple(x) for x in several(1)}) == 3


def test_seed_of_a_pipeline_reaches_the_transform():
    def run(seed):
        pipeline = Compose([RandFlipd("image", 0.5), RandNestedMaskd("image", EIGHTH, 2)]).set_random_state(seed)
        return pipeline({"image": torch.zeros(1, 24, 24, 24)})["mask_3"]

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_fixed_seed_depends_on_the_name_of_the_file_only():
    def all_of(transform, path):
        masks, regions = draw(transform, image_of(path, (24, 24, 24)))
        return torch.cat([x.flatten() for x in masks + regions]).tolist()

    transform = RandNestedMaskd("image", EIGHTH, 2, fixed_seed=7)
    first = all_of(transform, "/data/a.nii.gz")
    transform.set_random_state(99)
    assert all_of(transform, "/other/place/a.nii.gz") == first
    assert all_of(transform, "/data/b.nii.gz") != first
    assert all_of(RandNestedMaskd("image", EIGHTH, 2, fixed_seed=8), "/data/a.nii.gz") != first


def test_batches_are_plain_tensors_with_one_more_axis():
    data = [{"image": image_of("a", (24, 24, 24))}] * 3
    batch = next(iter(DataLoader(Dataset(data, RandNestedMaskd("image", EIGHTH, 2)), batch_size=3)))
    assert batch["mask_1"].shape == (3, 6, 6, 6)
    assert batch["mask_3"].shape == (3, 16, 6, 6, 6)
    assert batch["region_3"].shape == (3, 16)
    assert batch["region_3"].dtype == torch.int64
    assert all(type(batch[key]) is torch.Tensor for key in batch if key.startswith(("mask", "region", "padding")))
    assert len({tuple(mask.flatten().tolist()) for mask in batch["mask_2"].flatten(0, 1)}) == 12


def test_image_and_other_entries_stay():
    image = torch.rand(1, 24, 24, 24)
    data = {"image": image, "case": "a"}
    result = RandNestedMaskd("image", EIGHTH, 2)(data)
    assert result["image"] is image
    assert result["case"] == "a"
    assert set(data) == {"image", "case"}


@pytest.mark.parametrize(("levels", "patch_size", "dims"), CASES)
def test_padding_of_each_level_is_found_as_by_resizing_the_content(levels, patch_size, dims):
    transform = RandNestedMaskd("image", levels, patch_size, dims, fill=0.5).set_random_state(2)
    size = transform.levels[0].crop_size
    image = torch.rand(2, *size)
    image[(slice(None), *(slice(0, n - n // 3 - 1) for n in size[:1]))] = torch.nan
    image[..., size[-1] - size[-1] // 4 :] = torch.nan
    padded = image.isnan()
    result = transform({"image": image})
    assert bool((result["image"][padded] == 0.5).all())
    assert torch.equal(result["image"][~padded], image[~padded])
    assert result["padding_1"].any()
    content = [(~padded).all(0)]
    for number, level in enumerate(transform.levels, 1):
        found = result[f"padding_{number}"] if number > 1 else result["padding_1"][None]
        for sub_volume, padding in zip(content, found, strict=True):
            whole = torch.nn.functional.interpolate(
                sub_volume[None, None].float(), level.img_size, mode={2: "bilinear", 3: "trilinear"}[dims]
            )[0, 0]
            for place in product(*map(range, level.grid)):
                token = whole[tokens_of(place, level.patch_size)]
                assert bool(padding[place]) == (float(token.max()) == 0)
        if number < len(transform.levels):
            regions = result[f"region_{number + 1}"].reshape(len(content), -1).tolist()
            cell = [c // r for c, r in zip(level.crop_size, level.regions, strict=True)]
            content = [
                parent[tokens_of(region_of(region, level.regions), cell)]
                for parent, chosen in zip(content, regions, strict=True)
                for region in chosen
            ]


def test_padding_of_the_first_level_agrees_with_that_of_other_pretext_tasks():
    levels = [{"crop_size": 12, "img_size": 12, "mask_ratio": 0.5}]
    image = torch.full((1, 12, 12, 12), torch.nan)
    image[:, 3:8, 1:11, 5:] = 1
    expected = PaddingTokensd("image", 2)({"image": image})
    result = RandNestedMaskd("image", levels, 2)({"image": image})
    assert torch.equal(result["padding_1"], expected["padding"])
    assert torch.equal(result["image"], expected["image"])


def test_regions_of_padding_alone_go_down_last():
    transform = RandNestedMaskd("image", [*EIGHTH[:1], {**EIGHTH[1], "samples": 2}], 2).set_random_state(0)
    image = torch.full((1, 24, 24, 24), torch.nan)
    image[:, :10] = 1  # octants 0 to 3
    n_hidden_with_content = set()
    for _ in range(60):
        result = transform({"image": image})
        hidden = result["mask_1"][::3, ::3, ::3].flatten()
        chosen = result["region_2"].tolist()
        n_hidden_with_content.add(int(hidden[:4].sum()))
        assert sum(region < 4 for region in chosen) == min(2, int(hidden[:4].sum()))
        assert all(bool(hidden[region]) for region in chosen)
    assert {1, 2, 3} <= n_hidden_with_content


def test_several_keys_share_masks_and_padding_is_filled_in_all():
    image = torch.full((1, 24, 24, 24), torch.nan)
    image[:, :20] = 1
    result = RandNestedMaskd(["t1", "t2"], EIGHTH, 2)({"t1": image, "t2": image + 1})
    assert not result["t1"].isnan().any()
    assert not result["t2"].isnan().any()
    assert sum(key.startswith("mask") for key in result) == 3


def changed(levels, number, **entries):
    return [{**level, **entries} if n == number else level for n, level in enumerate(levels, 1)]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "levels is empty: give at least one"),
        (
            changed(EIGHTH, 1, crop_size=25),
            r"level 1: crop_size \(25, 25, 25\) does not divide into \(2, 2, 2\) regions "
            r"\(img_size \(12, 12, 12\) / mask_unit \(6, 6, 6\)\): change crop_size or mask_unit",
        ),
        (changed(EIGHTH, 1, crop_size=None), "level 1 has no crop_size: the entries are crop_size, img_size"),
        (changed(EIGHTH, 2, img_size=None), "level 2 has no img_size"),
        (changed(EIGHTH, 2, ratio=0.5), "level 2 has unknown entry 'ratio'"),
        (
            changed(EIGHTH, 2, crop_size=14),
            r"level 2: crop_size \(14, 14, 14\) must be \(12, 12, 12\), a region of level",
        ),
        (changed(EIGHTH, 2, crop_size=(12, 12)), r"level 2: crop_size \(12, 12\) must be one number or 3"),
        (
            changed(EIGHTH, 3, img_size=13),
            r"level 3: img_size \(13, 13, 13\) is not divisible by mask_unit \(2, 2, 2\)",
        ),
        (changed(EIGHTH, 1, mask_unit=3), r"level 1: mask_unit \(3, 3, 3\) is not divisible by patch_size \(2, 2, 2\)"),
        (
            changed(EIGHTH, 1, mask_unit=8),
            r"level 1: img_size \(12, 12, 12\) is not divisible by mask_unit \(8, 8, 8\)",
        ),
        (changed(EIGHTH, 1, mask_unit=0), r"level 1: mask_unit \(0, 0, 0\) must be 3 whole numbers above 0"),
        (changed(EIGHTH, 1, crop_size=24.0), r"level 1: crop_size \(24.0, 24.0, 24.0\) must be 3 whole numbers"),
        (changed(EIGHTH, 1, samples=2), "level 1: samples must be 1 at the first level: draw more crops in the data"),
        (changed(EIGHTH, 3, samples=0), "level 3: samples must be a whole number above 0, found 0"),
        (
            changed(EIGHTH, 2, samples=5),
            r"level 2 asks for 5 samples, but level 1 hides only 4 of 8 regions \(mask_ratio 0.5\): "
            "lower samples of level 2, or raise mask_ratio of level 1",
        ),
        (changed(EIGHTH, 2, mask_ratio=0.01), "level 3 asks for 4 samples, but level 2 hides only 2 of 216 regions"),
        (changed(EIGHTH, 1, mask_ratio=0.99), "level 1: mask_ratio 0.99 hides all 8 units"),
        (changed(EIGHTH, 3, mask_ratio=1.5), r"level 3: mask_ratio must lie in \[0, 1\), found 1.5"),
    ],
)
def test_levels_that_do_not_fit_are_refused_with_the_numbers(levels, message):
    with pytest.raises(ValueError, match=message) as error:
        RandNestedMaskd("image", levels, 2)
    assert "\n" not in str(error.value)


def test_a_grid_of_regions_that_splits_tokens_is_refused():
    plan_b = [{**DEFAULT_LEVELS[0], "crop_size": (384, 384, 192), "mask_unit": (24, 24, 48)}, *DEFAULT_LEVELS[1:]]
    with pytest.raises(ValueError, match=r"level 1: mask_unit \(24, 24, 48\) is not divisible by patch_size"):
        RandNestedMaskd("image", plan_b)


def test_image_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"an image of \(24, 24, 20\) voxels, but level 1 has crop_size \(24, 24, 24\)"
    ):
        RandNestedMaskd("image", EIGHTH, 2)({"image": torch.zeros(1, 24, 24, 20)})
