"""SimMIM against plain loops, on ViT and Swin, in 2D and 3D."""

from itertools import product

import pytest
import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn

from medmim.losses import MaskedReconstructionLoss
from medmim.networks import SimMIM, patchify
from medmim.networks.reconstruction_heads import HEADS, TokenHead, UpsamplingHead, build_head
from medmim.networks.swin import encode_tokens, swin_stride
from medmim.transforms import RandPatchMaskd

every_head = pytest.mark.parametrize("head", HEADS)
SIZES = {"decoder_hidden_size": 24, "decoder_num_layers": 1, "decoder_num_heads": 2}


def tiny_swin(channels: int = 1, dims: int = 3, **arguments) -> SwinTransformer:
    sizes = {"embed_dim": 6, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2), "spatial_dims": dims}
    return SwinTransformer(channels, window_size=(3,) * dims, patch_size=(2,) * dims, **sizes | arguments)


def draw(grid: tuple[int, ...], n: int, ratio: float = 0.5) -> torch.Tensor:
    """Masks with equally many hidden ones."""
    cells = torch.Size(grid).numel()
    return torch.stack([torch.randperm(cells) < round(ratio * cells) for _ in range(n)]).reshape(n, *grid)


def networks(tiny_vit, head: str = "linear") -> list[tuple[SimMIM, torch.Tensor]]:
    """SimMIM networks of each kind, and images for them."""
    vit = SimMIM(tiny_vit(2, (16, 24, 8)), (16, 24, 8), decoder=head, **SIZES)
    flat = SimMIM(tiny_vit(1, (16, 24), 8), (16, 24), decoder=head, **SIZES)
    swin = SimMIM(tiny_swin(2), (64, 32, 32), 8, head, **SIZES)
    return [
        (vit, torch.rand(2, 2, 16, 24, 8)),
        (flat, torch.rand(1, 1, 16, 24)),
        (swin, torch.rand(1, 2, 64, 32, 32)),
    ]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_head
def test_hidden_voxels_do_not_leak(tiny_vit, head):
    for network, image in networks(tiny_vit, head):
        mask = draw(network.grid, len(image))
        other = image.clone()
        patches = patchify(other, network.patch_size)
        for sample, patch in mask.flatten(1).nonzero().tolist():
            patches[sample, patch] = 100 * torch.rand(patches.shape[-1])
        other = refold(patches, network)
        assert not torch.equal(other, image)
        network.eval()
        with torch.no_grad():
            assert torch.equal(network(image, mask), network(other, mask))
            assert not torch.equal(network(image, mask), network(image, ~mask))


def refold(patches: torch.Tensor, network: SimMIM) -> torch.Tensor:
    """Patches put into an image one by one."""
    channels = patches.shape[-1] // torch.Size(network.patch_size).numel()
    image = torch.zeros(len(patches), channels, *network.img_size)
    for number, cell in enumerate(product(*map(range, network.grid))):
        place = tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, network.patch_size, strict=True))
        voxels = patches[:, number].reshape(len(patches), *network.patch_size, channels)
        image[(slice(None), slice(None), *place)] = voxels.movedim(-1, 1)
    return image


def test_a_vits_tokens_are_replaced_one_by_one(tiny_vit):
    vit = tiny_vit(2, (16, 24, 8), (8, 8, 4))
    network = SimMIM(vit, (16, 24, 8)).eval()
    image, mask = torch.rand(2, 2, 16, 24, 8), draw((2, 3, 2), 2)
    stem, positions = vit.patch_embedding.patch_embeddings, vit.patch_embedding.position_embeddings
    expected = torch.zeros(2, 12, 8 * 8 * 4 * 2)
    for sample in range(2):
        tokens = []
        for number, (i, j, k) in enumerate(product(range(2), range(3), range(2))):
            patch = image[sample, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8, 4 * k : 4 * k + 4]
            token = (stem.weight * patch).sum(dim=(1, 2, 3, 4)) + stem.bias
            if mask[sample, i, j, k]:
                token = network.mask_token.flatten()
            tokens.append(token + positions[0, number])
        x = torch.stack(tokens)[None]
        for block in vit.blocks:
            x = block(x)
        expected[sample] = network.decoder.layers(vit.norm(x))[0]
    torch.testing.assert_close(network(image, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_v2", [False, True])
@pytest.mark.parametrize(("dims", "size"), [(3, (64, 32, 32)), (2, (32, 96))])
def test_a_swin_with_nothing_hidden_is_the_stock_one(dims, size, use_v2):
    swin = tiny_swin(1, dims, use_v2=use_v2).eval()
    network = SimMIM(swin, size, 16).eval()
    image = torch.rand(2, 1, *size)
    with torch.no_grad():
        features = swin(image)[-1]
        assert torch.equal(encode_tokens(swin, swin.patch_embed(image)), features)
        expected = patchify(network.decoder(features), network.patch_size)
        assert torch.equal(network(image, torch.zeros(2, *network.grid, dtype=torch.bool)), expected)
    assert swin_stride(swin) == (32,) * dims


def test_a_unit_hides_all_its_tokens_and_no_other():
    swin = tiny_swin()
    network = SimMIM(swin, (64, 32, 32), 16)
    mask = draw((4, 2, 2), 2)
    seen = {}
    swin.pos_drop.register_forward_hook(lambda module, args, output: seen.update(tokens=args[0]))
    image = torch.rand(2, 1, 64, 32, 32)
    network(image, mask)
    embedded = swin.patch_embed(image)
    for sample, i, j, k in product(range(2), range(32), range(16), range(16)):
        hidden = mask[sample, i // 8, j // 8, k // 8]
        expected = network.mask_token.flatten() if hidden else embedded[sample, :, i, j, k]
        assert torch.equal(seen["tokens"][sample, :, i, j, k], expected)


def test_published_count_of_hidden_units():
    """Swin, 96³ voxels in units of 16³, ratio 0.6: the public code takes the ceiling, which here is the same."""
    mask = RandPatchMaskd("image", 16, 0.6)({"image": torch.zeros(1, 96, 96, 96)})["mask"]
    assert mask.shape == (6, 6, 6)
    assert int(mask.sum()) == 130


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_loss_is_the_mean_over_hidden_voxels(norm):
    size, unit = (32, 64, 32), (16, 16, 8)
    image, mask = torch.rand(2, 2, *size), draw((2, 4, 4), 2, 0.6)
    predicted = torch.rand(2, 2, *size)
    loss = MaskedReconstructionLoss(unit, norm, normalize_target=False)(patchify(predicted, unit), image, mask)
    total, count = 0.0, 0
    for sample, i, j, k in product(range(2), range(2), range(4), range(4)):
        if mask[sample, i, j, k]:
            place = (
                sample,
                slice(None),
                slice(16 * i, 16 * i + 16),
                slice(16 * j, 16 * j + 16),
                slice(8 * k, 8 * k + 8),
            )
            difference = (predicted[place] - image[place]).double()
            total += float((difference.abs() if norm == "l1" else difference**2).sum())
            count += difference.numel()
    assert float(loss) == pytest.approx(total / count, rel=1e-6)


@every_head
def test_every_parameter_learns(tiny_vit, head):
    for network, image in networks(tiny_vit, head):
        mask = draw(network.grid, len(image))
        loss = MaskedReconstructionLoss(network.patch_size, "l1", normalize_target=False)
        loss(network(image, mask), image, mask).backward()
        asking = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
        assert [name for name, grad in asking.items() if grad is None or not grad.abs().sum() > 0] == []


@every_head
def test_mixed_precision_on_the_cpu(tiny_vit, head):
    for network, image in networks(tiny_vit, head):
        with torch.autocast("cpu", torch.bfloat16):
            prediction = network(image, draw(network.grid, len(image)))
        assert prediction.shape == patchify(image, network.patch_size).shape
        assert torch.isfinite(prediction).all()


def test_a_linear_head_puts_each_voxel_at_its_place():
    head = TokenHead(5, 2, (2, 4, 2), (3, 1, 2))
    features = torch.rand(2, 5, 3, 1, 2)
    image = head(features)
    assert image.shape == (2, 2, 6, 4, 4)
    for sample, channel, x, y, z in product(range(2), range(2), range(6), range(4), range(4)):
        row = ((x % 2 * 4 + y % 4) * 2 + z % 2) * 2 + channel  # voxels in raster order, the channel last
        weight, bias = head.layers.weight[row], head.layers.bias[row]
        expected = (weight * features[sample, :, x // 2, y // 4, z // 2]).sum() + bias
        torch.testing.assert_close(image[sample, channel, x, y, z], expected)


def test_heads_grow_from_linear_to_transformer():
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 2}
    linear, mlp, transformer = (
        build_head(kind, 24, 1, (4, 4, 4), (2, 2, 2), **sizes) for kind in ("linear", "mlp", "transformer")
    )
    blocks = [sum(isinstance(module, nn.Linear) for module in head.modules()) for head in (linear, mlp, transformer)]
    assert blocks[0] == 1
    assert blocks[1] == 2
    assert blocks[2] > 6


def test_upsampling_ends_at_the_voxels():
    assert UpsamplingHead(64, 2, (8, 8, 8))(torch.rand(1, 64, 1, 3, 2)).shape == (1, 2, 8, 24, 16)
    assert UpsamplingHead(64, 1, (4, 4))(torch.rand(2, 64, 3, 2)).shape == (2, 1, 12, 8)


def test_what_does_not_fit_is_refused(tiny_vit):
    network = SimMIM(tiny_vit(1, (16, 24, 8)), (16, 24, 8))
    image, mask = torch.rand(1, 1, 16, 24, 8), torch.zeros(1, 2, 3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of \(2, 3, 2\) patches, expected \(16, 24, 8\) and \(2, 3, 1\)"):
        network(image, torch.zeros(1, 2, 3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"image of \(16, 24, 16\) voxels"):
        network(torch.rand(1, 1, 16, 24, 16), mask)
    with pytest.raises(ValueError, match=r"boolean.*found torch.float32"):
        network(image, mask.float())
    with pytest.raises(ValueError, match="no class token"):
        SimMIM(ViT(1, (16, 16, 16), 8, 24, 32, 1, 2, classification=True), 16)
    with pytest.raises(ValueError, match=r"\(12, 12, 12\) is not divisible by \(8, 8, 8\)"):
        SimMIM(tiny_vit(1, (24, 24, 24)), 24, 12)
    with pytest.raises(ValueError, match=r"\(64, 48, 32\) is not divisible by \(32, 32, 32\)"):
        SimMIM(tiny_swin(), (64, 48, 32), 16)
    with pytest.raises(ValueError, match="linear, mlp, upsampling, transformer, found 'vae'"):
        SimMIM(tiny_vit(1, (16, 24, 8)), (16, 24, 8), decoder="vae")
    with pytest.raises(ValueError, match=r"power of two voxels, found \(6, 6, 6\)"):
        SimMIM(tiny_vit(1, (12, 12, 12), 6), 12, decoder="upsampling")
