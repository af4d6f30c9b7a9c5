"""The masked autoencoder, against a plain computation with MONAI's own modules."""

import pytest
import torch
from monai.networks.nets import UNETR, ViT

from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskedAutoencoder, unpatchify

KINDS = ["transformer", "mlp", "linear"]
SIZES = [  # channels, img_size, patch_size
    (1, (16, 24, 8), (8, 8, 8)),
    (2, (8, 12, 4), (4, 6, 2)),
    (1, (16, 24), (8, 8)),
    (3, (10, 12), (5, 4)),
]


def random_mask(grid: tuple, n_hidden: int, batch: int = 2) -> torch.Tensor:
    n_tokens = torch.Size(grid).numel()
    scores = torch.rand(batch, n_tokens)
    return (scores.argsort(1).argsort(1) < n_hidden).reshape(batch, *grid)


@pytest.fixture
def tiny_mae(tiny_vit):
    def make(channels=1, img_size=(16, 24, 8), patch_size=(8, 8, 8), decoder="transformer", **arguments):
        encoder = tiny_vit(channels, img_size, patch_size, **arguments.pop("vit", {}))
        small = {"decoder_hidden_size": 12, "decoder_num_layers": 1, "decoder_num_heads": 2}
        return MaskedAutoencoder(encoder, img_size, decoder, **(small | arguments))

    return make


def latents(mae: MaskedAutoencoder, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the decoder is given."""
    seen = []
    hook = mae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mae(image, mask)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("channels", "img_size", "patch_size"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_shape(tiny_mae, channels, img_size, patch_size, kind):
    mae = tiny_mae(channels, img_size, patch_size, kind)
    mask = random_mask(mae.grid, 2)
    prediction = mae(torch.rand(2, channels, *img_size), mask)
    assert prediction.shape == (2, mask[0].numel(), torch.Size(patch_size).numel() * channels)
    assert bool(prediction.isfinite().all())


@pytest.mark.parametrize(("channels", "img_size", "patch_size"), SIZES)
@pytest.mark.parametrize("positions", ["learnable", "sincos"])
def test_with_all_visible_the_latents_are_the_vits_output(tiny_mae, channels, img_size, patch_size, positions):
    mae = tiny_mae(channels, img_size, patch_size, position_embedding=positions).eval()
    image = torch.rand(2, channels, *img_size)
    found = latents(mae, image, torch.zeros(2, *mae.grid, dtype=torch.bool))
    torch.testing.assert_close(found, mae.encoder(image)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "img_size", "patch_size"), SIZES)
def test_latents_equal_monais_blocks_on_the_visible_tokens(tiny_mae, channels, img_size, patch_size):
    mae = tiny_mae(channels, img_size, patch_size).eval()
    image, mask = torch.rand(2, channels, *img_size), random_mask(mae.grid, 2)
    found = latents(mae, image, mask)
    stock = ViT(channels, img_size, patch_size, 24, 32, 2, 2, spatial_dims=len(img_size)).eval()
    stock.load_state_dict(mae.encoder.state_dict(), strict=True)
    for b in range(2):
        tokens = stock.patch_embedding(image[b : b + 1])
        tokens = tokens[:, [i for i, hidden in enumerate(mask[b].flatten().tolist()) if not hidden]]
        for block in stock.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(found[b : b + 1], stock.norm(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "img_size", "patch_size"), [SIZES[1], SIZES[2]])
def test_hidden_voxels_are_never_read(tiny_mae, kind, channels, img_size, patch_size):
    mae = tiny_mae(channels, img_size, patch_size, kind)
    image, mask = torch.rand(2, channels, *img_size), random_mask(mae.grid, 3)
    voxels = mask.flatten(1).unsqueeze(-1).expand(-1, -1, torch.Size(patch_size).numel())
    hidden = unpatchify(voxels, patch_size, mae.grid)
    for other in (torch.rand_like(image), torch.full_like(image, float("nan"))):
        changed = torch.where(hidden, other, image)
        assert torch.equal(latents(mae, image, mask), latents(mae, changed, mask))
        assert torch.equal(mae(image, mask), mae(changed, mask))
    moved = torch.where(hidden, image, image + 0.1)
    assert not torch.equal(mae(image, mask), mae(moved, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_zero_at_hidden_voxels_only(tiny_mae, kind):
    mae = tiny_mae(2, (8, 12, 4), (4, 6, 2), kind)
    image = torch.rand(1, 2, 8, 12, 4, requires_grad=True)
    mask = random_mask(mae.grid, 5, batch=1)
    mae(image, mask).square().sum().backward()
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(6, 2).repeat_interleave(2, 3).expand(2, -1, -1, -1)
    assert bool((image.grad[0][hidden] == 0).all())
    assert bool((image.grad[0][~hidden] != 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["learnable", "sincos"])
@pytest.mark.parametrize("img_size", [(16, 24, 8), (16, 24)])
def test_every_trainable_parameter_learns_from_hidden_tokens(tiny_mae, kind, positions, img_size):
    """So DistributedDataParallel needs no find_unused_parameters."""
    patch_size = (8,) * len(img_size)
    mae = tiny_mae(1, img_size, patch_size, kind, position_embedding=positions)
    image, mask = torch.rand(2, 1, *img_size), random_mask(mae.grid, 3)
    MaskedReconstructionLoss(patch_size)(mae(image, mask), image, mask).backward()
    idle = [n for n, p in mae.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.any()))]
    assert idle == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_and_backward(tiny_mae, kind, dtype):
    mae = tiny_mae(2, (16, 24, 8), (8, 8, 8), kind)
    image, mask = torch.rand(2, 2, 16, 24, 8), random_mask(mae.grid, 4)
    loss = MaskedReconstructionLoss((8, 8, 8))
    exact = loss(mae(image, mask), image, mask)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(mae(image, mask), image, mask)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=0.02)
    found.backward()
    assert all(bool(p.grad.isfinite().all()) for p in mae.parameters() if p.requires_grad)


def test_encoder_loads_strictly_into_monais_vit(tiny_mae):
    mae = tiny_mae(2).eval()
    vit = ViT(2, (16, 24, 8), 8, 24, 32, 2, 2).eval()
    vit.load_state_dict(mae.encoder.state_dict(), strict=True)
    image = torch.rand(1, 2, 16, 24, 8)
    torch.testing.assert_close(vit(image)[0], mae.encoder(image)[0], rtol=1e-5, atol=1e-5)


def test_encoder_loads_strictly_into_monais_unetr(tiny_mae):
    img_size = (32, 48, 16)
    mae = tiny_mae(1, img_size, (16, 16, 16), vit={"num_layers": 12}).eval()
    unetr = UNETR(1, 2, img_size, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2).eval()
    unetr.vit.load_state_dict(mae.encoder.state_dict(), strict=True)
    image = torch.rand(1, 1, *img_size)
    ours, theirs = mae.encoder(image), unetr.vit(image)
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_image_or_mask_of_another_size_is_refused(tiny_mae):
    mae = tiny_mae()
    with pytest.raises(ValueError, match=r"\(16, 16, 8\) voxels .* expected \(16, 24, 8\) and \(2, 3, 1\)"):
        mae(torch.rand(1, 1, 16, 16, 8), torch.zeros(1, 2, 3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask of \(3, 2, 1\) tokens, expected"):
        mae(torch.rand(1, 1, 16, 24, 8), torch.zeros(1, 3, 2, 1, dtype=torch.bool))


def test_samples_that_hide_different_numbers_are_refused(tiny_mae):
    mask = torch.zeros(2, 2, 3, 1, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match=r"same number of tokens, found \[3, 0\]"):
        tiny_mae()(torch.rand(2, 1, 16, 24, 8), mask)


def test_image_size_that_does_not_divide_is_refused(tiny_vit):
    with pytest.raises(ValueError, match=r"\(16, 20, 8\) is not divisible by \(8, 8, 8\)"):
        MaskedAutoencoder(tiny_vit(), (16, 20, 8))


def test_class_token_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="no class token"):
        MaskedAutoencoder(tiny_vit(classification=True), (16, 24, 8))


def test_dropout_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="dropout_rate must be 0"):
        MaskedAutoencoder(tiny_vit(dropout_rate=0.1), (16, 24, 8))


@pytest.mark.parametrize("knob", ["decoder", "position_embedding"])
def test_unknown_option_is_refused(tiny_mae, knob):
    with pytest.raises(ValueError, match=f"{knob} must be .*found 'none'"):
        tiny_mae(**{knob: "none"})
