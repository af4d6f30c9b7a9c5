"""Pictures and files of nested sub-volumes: what is shown lies where it belongs."""

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from medmim.mim_reconstruct import NestedPreview, draw_item, reconstruct_levels, write_reconstructions
from medmim.networks.patches import hidden_voxels
from medmim.transforms import RandNestedMaskd
from tests.medmim.nested import FOUR_2D, SMALL, TWO_2D, make

AFFINE = torch.tensor([[2.0, 0, 0, -7], [0, 3.0, 0, 5], [0, 0, 1.5, 11], [0, 0, 0, 1]], dtype=torch.float64)


def item_of(network, image, name="/data/site/scan.nii.gz"):
    """An item as a dataset gives it."""
    image = MetaTensor(image, affine=AFFINE, meta={"filename_or_obj": name})
    draw = RandNestedMaskd("image", network.levels, network.patch_size, image.ndim - 1, fixed_seed=0)
    return draw({"image": image})


def coordinates(shape, affine):
    """Millimetres of each voxel's centre, ``(3, *shape)``."""
    voxels = np.stack([*np.indices(shape), np.ones(shape)])
    return np.einsum("ij,j...->i...", np.asarray(affine), voxels)[:3]


def inner(volume):
    """Without the voxels at the border, which linear resizing repeats."""
    return volume[(..., *[slice(4, -4)] * 3)]


def test_volumes_lie_where_their_affine_says(tmp_path):
    """An image of its own coordinates: resizing keeps them linear, so each file must hold those of its voxels."""
    levels = [
        {"crop_size": 32, "img_size": 16, "mask_unit": 8, "mask_ratio": 0.5},
        {"img_size": 16, "mask_unit": 8, "mask_ratio": 0.5, "samples": 3},
        {"img_size": 16, "mask_ratio": 0.5, "samples": 2},
    ]
    network = make(levels, patch_size=(4, 4, 4))
    for axis in range(3):
        ramp = torch.from_numpy(coordinates((32, 32, 32), AFFINE)[axis]).float().unsqueeze(0)
        item = item_of(network, ramp)
        write_reconstructions(network, [item], 5, tmp_path, "/data", "cpu")
        for number in (1, 2, 3):
            masked, whole = (
                nib.load(tmp_path / "site" / f"scan_level_{number}_{what}.nii.gz")
                for what in ("masked", "reconstruction")
            )
            np.testing.assert_allclose(masked.affine, whole.affine)
            found, expected = masked.get_fdata(), coordinates((16, 16, 16), masked.affine)[axis]
            visible = inner(found != 0)
            assert 0.2 < visible.mean() < 0.8
            np.testing.assert_allclose(inner(found)[visible], inner(expected)[visible], atol=1e-3)
            np.testing.assert_allclose(inner(whole.get_fdata())[visible], inner(expected)[visible], atol=1e-3)
    assert (tmp_path / "site" / "scan_reconstruction.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.rglob("*.*"))) == 7


@pytest.mark.parametrize("levels", [SMALL, TWO_2D, FOUR_2D], ids=["SMALL", "TWO_2D", "FOUR_2D"])
def test_each_level_lies_in_the_one_before(levels):
    network = make(levels).train()
    image = torch.rand(1, *network.levels[0].crop_size)
    item = item_of(network, image)
    batch = {key: torch.as_tensor(value).unsqueeze(0) for key, value in item.items()}
    found = reconstruct_levels(network, batch)
    assert network.training
    assert [level.level for level in found] == list(network.levels)
    for number, level in enumerate(found, 1):
        original, masked, whole = (level.volumes[name] for name in ("original", "masked", "reconstruction"))
        cut = [slice(corner, corner + size) for corner, size in zip(level.corner, level.level.crop_size, strict=True)]
        if level.level.crop_size == level.level.img_size:
            assert torch.equal(original, image[(slice(None), *cut)])
        hidden = torch.isnan(masked)
        assert torch.equal(whole[~hidden], original[~hidden])
        assert not torch.equal(whole[hidden], original[hidden])
        masks = batch[f"mask_{number}"].reshape(-1, *level.level.grid)
        assert any(torch.equal(hidden_voxels(mask[None], network.patch_size)[0, 0], hidden[0]) for mask in masks)


def test_the_sub_volume_with_most_contrast_is_shown():
    network = make(SMALL)
    image = torch.zeros(1, *network.levels[0].crop_size)
    item = item_of(network, image)
    regions = item["region_2"].tolist()
    for region in regions:
        index = np.unravel_index(region, network.levels[0].regions)
        size = network.levels[1].crop_size
        cut = [slice(int(i) * n, int(i) * n + n) for i, n in zip(index, size, strict=True)]
        batch = {key: torch.as_tensor(value).unsqueeze(0) for key, value in item.items()}
        batch["image"] = torch.zeros_like(batch["image"])
        batch["image"][(..., *cut)] = torch.rand(size)
        assert reconstruct_levels(network, batch)[1].corner == tuple(s.start for s in cut)


def test_figure_has_a_row_for_each_level_and_frames():
    network = make(SMALL)
    figure, levels = draw_item(network, item_of(network, torch.rand(1, *network.levels[0].crop_size)), "cpu", "epoch 3")
    assert figure.get_suptitle() == "epoch 3; target: patches normalised, mean and contrast from the original"
    axes = np.array(figure.axes).reshape(3, 9)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == [
        f"level {number}: {' x '.join(map(str, level.level.crop_size))}" for number, level in enumerate(levels, 1)
    ]
    assert [len(axis.patches) for axis in axes[:, 0]] == [1, 1, 0]
    # the frame, in the axial picture (the first axis across, the second up): the region that the next level shows
    (frame,) = axes[0, 6].patches
    scale = levels[0].scale
    start = [round(c / s) for c, s in zip(levels[1].corner, scale, strict=True)]
    height = levels[0].level.img_size[1]
    unit = levels[0].level.mask_unit
    assert frame.get_xy() == (start[0] - 0.5, height - start[1] - unit[1] - 0.5)
    assert (frame.get_width(), frame.get_height()) == (unit[0], unit[1])
    # the picture shows the slice through the middle of that region
    shown = np.asarray(axes[0, 6].images[0].get_array())
    volume = levels[0].volumes["original"][0].numpy()
    np.testing.assert_allclose(shown, np.rot90(volume[:, :, start[2] + unit[2] // 2]))


def test_preview_is_drawn_when_it_is_due(tmp_path):
    network = make(TWO_2D)
    dataset = [item_of(network, torch.rand(1, *network.levels[0].crop_size))]
    engine = Engine(lambda engine, batch: None)
    preview = NestedPreview(network=network, dataset=dataset, output_dir=str(tmp_path), interval=2, device="cpu")
    preview.attach(engine)
    engine.run([0], max_epochs=3)
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["epoch_0002.png", "epoch_0003.png"]
    assert list((tmp_path / "tensorboard").glob("events*"))
