"""UNETR, against MONAI's where MONAI has one."""

import monai.networks.nets
import pytest
import torch

from medmim.networks import UNETR

SMALL = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}


@pytest.mark.parametrize(
    ("img_size", "channels", "options"),
    [
        ((32, 16, 48), 1, {}),
        ((32, 48), 2, {"spatial_dims": 2}),
        ((16, 32, 16), 3, {"qkv_bias": True, "norm_name": "batch"}),
    ],
)
def test_patch_16_with_12_layers_is_monais(img_size, channels, options):
    theirs = monai.networks.nets.UNETR(channels, 3, img_size, **SMALL, **options).eval()
    ours = UNETR(channels, 3, img_size, 16, num_layers=12, **SMALL, **options).eval()
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert list(ours.state_dict()) == list(expected)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.rand(2, channels, *img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "skips"), [(4, [1, 2, 3]), (6, [1, 3, 4]), (8, [2, 4, 6]), (12, [3, 6, 9]), (24, [6, 12, 18])]
)
def test_skips_come_from_the_quarters_of_the_depth(num_layers, skips):
    assert UNETR(1, 2, (16, 16, 8), 8, num_layers=num_layers, **SMALL).skip_ids == skips


@pytest.mark.parametrize("num_layers", [4, 6, 12])
@pytest.mark.parametrize(
    ("patch_size", "img_size"),
    [
        (8, (16, 24, 8)),
        (16, (32, 16, 48)),
        (32, (64, 32, 32)),
        (8, (24, 16)),
        (16, (16, 32)),
        ((32, 32), (64, 96)),
    ],
)
def test_every_patch_size_and_depth(patch_size, img_size, num_layers):
    unetr = UNETR(2, 3, img_size, patch_size, num_layers=num_layers, spatial_dims=len(img_size), **SMALL)
    with torch.no_grad():
        logits = unetr(torch.rand(1, 2, *img_size))
    assert logits.shape == (1, 3, *img_size)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(("patch_size", "img_size"), [(8, (16, 24, 8)), (16, (32, 16, 16)), (32, (64, 32))])
def test_every_trainable_parameter_gets_a_gradient(patch_size, img_size):
    unetr = UNETR(1, 2, img_size, patch_size, num_layers=4, spatial_dims=len(img_size), **SMALL)
    unetr(torch.rand(2, 1, *img_size)).square().sum().backward()
    assert [name for name, p in unetr.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [name for name, p in unetr.named_parameters() if not p.requires_grad]
    assert all("norm_cross_attn" in name for name in frozen)


@pytest.mark.parametrize("patch_size", [8, 16])
def test_torchscript(patch_size):
    unetr = UNETR(1, 2, (16, 32, 16), patch_size, num_layers=4, **SMALL).eval()
    image = torch.rand(1, 1, 16, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(unetr)(image), unetr(image), rtol=1e-5, atol=1e-5)


def test_tokens_return_to_their_place_on_the_grid():
    unetr = UNETR(1, 2, (16, 24, 16), 8, num_layers=4, **SMALL)
    tokens = torch.rand(2, 12, 5)
    grid = unetr.to_map(tokens)
    assert grid.shape == (2, 5, 2, 3, 2)
    for h in range(2):
        for w in range(3):
            for d in range(2):
                assert torch.equal(grid[:, :, h, w, d], tokens[:, (h * 3 + w) * 2 + d])


@pytest.mark.parametrize("patch_size", [4, 12, (8, 8, 16)])
def test_patch_size_without_a_rule_is_refused(patch_size):
    with pytest.raises(ValueError, match="patch_size of 8, 16 or 32, the same on each axis, found"):
        UNETR(1, 2, (48, 48, 48), patch_size, **SMALL)


def test_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 40, 32\) is not divisible by \(16, 16, 16\)"):
        UNETR(1, 2, (32, 40, 32), 16, **SMALL)


def test_one_patch_is_refused():
    with pytest.raises(ValueError, match=r"roi_size \(16, 16, 16\) holds one patch of 16 voxels"):
        UNETR(1, 2, 16, 16, **SMALL)


def test_fewer_than_4_layers_are_refused():
    with pytest.raises(ValueError, match="num_layers 3 is below 4"):
        UNETR(1, 2, 32, 16, num_layers=3, **SMALL)
