"""Masked reconstruction of whole scans."""

from pathlib import Path

import pytest
import torch
from monai.data import DataLoader, MetaTensor, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, DivisiblePad, Flip, SpatialPad

from medmim.figures import reconstruction_figure as real
from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskedAutoencoder, patchify
from medmim.reconstruct import SplitReconstructiond, WindowReconstructor, without_padding


@pytest.fixture
def reconstructor(tiny_vit):
    def make(channels=1, img_size=(16, 24, 8), ratio=0.5, seed=0, unit=None, normalize=True):
        torch.manual_seed(0)
        network = MaskedAutoencoder(tiny_vit(channels, img_size), img_size, "linear")
        loss = MaskedReconstructionLoss(network.patch_size, normalize_target=normalize)
        return WindowReconstructor(network, loss, ratio, unit, seed).eval()

    return make


@pytest.mark.parametrize(("channels", "img_size"), [(1, (16, 24, 8)), (2, (16, 24, 8)), (3, (16, 24))])
@pytest.mark.parametrize("normalize", [True, False])
def test_parts_of_a_window(reconstructor, channels, img_size, normalize):
    module = reconstructor(channels, img_size, normalize=normalize)
    scan = torch.rand(2, channels, *img_size)
    with torch.no_grad():
        image, masked, reconstruction = module(scan).chunk(3, dim=1)
    assert torch.equal(image, scan)
    hidden = masked.isnan()
    tokens = patchify(hidden, module.network.patch_size)
    assert torch.equal(tokens.all(-1), tokens.any(-1))
    assert tokens.all(-1).sum(1).tolist() == [3, 3]
    assert torch.equal(masked[~hidden], scan[~hidden])
    assert torch.equal(reconstruction[~hidden], scan[~hidden])
    mask = tokens.all(-1).reshape(2, *module.network.grid)
    with torch.no_grad():
        expected = module.loss.to_image(module.network(scan, mask), scan)
    assert torch.equal(reconstruction[hidden], expected[hidden])


def test_seed_and_unit(reconstructor):
    scan = torch.rand(4, 1, 16, 24, 8)

    def hidden(**options):
        with torch.no_grad():
            return reconstructor(**options)(scan)[:, 1:2].isnan()

    assert torch.equal(hidden(seed=1), hidden(seed=1))
    assert not torch.equal(hidden(seed=1), hidden(seed=2))
    whole = hidden(unit=(16, 8, 8), ratio=0.3).flatten(1).float().mean(1)
    torch.testing.assert_close(whole, torch.full((4,), 1 / 3))


def test_whole_scan_window_by_window(reconstructor):
    module = reconstructor()
    scan = torch.rand(1, 1, 32, 48, 8)
    with torch.no_grad():
        output = SlidingWindowInferer((16, 24, 8), sw_batch_size=3, overlap=0)(scan, module)
    image, masked, reconstruction = output.chunk(3, dim=1)
    torch.testing.assert_close(image, scan)
    assert float(masked.isnan().float().mean()) == pytest.approx(0.5)
    assert bool(reconstruction.isfinite().all())
    torch.testing.assert_close(reconstruction[~masked.isnan()], scan[~masked.isnan()])


@pytest.mark.parametrize(("name", "picture"), [("/data/a.b.nii.gz", "a.b"), ("c.nii", "c")])
@pytest.mark.parametrize("size", [(8, 6, 4), (8, 6)])
def test_split(tmp_path, name, picture, size):
    parts = torch.rand(3, 2, *size)
    parts[1, :, :3] = float("nan")
    output = MetaTensor(parts.flatten(0, 1), meta={"filename_or_obj": name})
    result = SplitReconstructiond("pred", str(tmp_path / "out"), str(Path(name).parent), "title")(
        {"pred": output, "case": 1}
    )
    torch.testing.assert_close(torch.as_tensor(result["masked"]), parts[1].nan_to_num(0.0))
    assert torch.equal(torch.as_tensor(result["reconstruction"]), parts[2])
    assert result["masked"].meta["filename_or_obj"] == name
    assert result["case"] == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{picture}_reconstruction.png"]


@pytest.mark.parametrize(("size", "roi_size"), [((10, 30, 8), (16, 24, 8)), ((18, 25), (16, 24)), ((32, 24), (16, 24))])
def test_picture_shows_the_scan_without_padding(tmp_path, monkeypatch, size, roi_size):
    """Padding on both sides, then at the end, through loader, windows and decollation."""
    scan = torch.rand(1, *size)
    prepare = Compose([Flip(0), SpatialPad(roi_size), DivisiblePad(roi_size, method="end")])
    padded = prepare(MetaTensor(scan, meta={"filename_or_obj": "/data/a.nii"}))
    batch = next(iter(DataLoader([padded], batch_size=1)))
    output = SlidingWindowInferer(roi_size, overlap=0)(batch, lambda x: torch.cat([x, x + 1, x + 2], 1))
    output = decollate_batch(output)[0]
    assert all(n % m == 0 for n, m in zip(output.shape[1:], roi_size, strict=True))
    expected = scan.flip(1)
    assert torch.equal(torch.as_tensor(output[:1][(slice(None), *without_padding(output))]), expected)
    shown = []
    monkeypatch.setattr(
        "medmim.reconstruct.reconstruction_figure", lambda columns, *a: shown.append(columns) or real(columns, *a)
    )
    result = SplitReconstructiond("pred", str(tmp_path), "/data")({"pred": output})
    assert result["reconstruction"].shape == (1, *output.shape[1:])  # the file stays on the network's grid
    for number, volume in enumerate(shown[0].values()):
        torch.testing.assert_close(torch.as_tensor(volume), torch.as_tensor(expected[0] + number))


def test_without_padding_of_an_image_that_was_not_padded():
    image = MetaTensor(torch.rand(1, 4, 6))
    assert torch.equal(image[0][without_padding(image)], image[0])
    flipped_after = Flip(0)(SpatialPad((8, 8))(image))
    assert without_padding(flipped_after) == (slice(0, 8), slice(0, 8))
