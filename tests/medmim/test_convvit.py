"""The hybrid encoder, against a dense masked computation with PyTorch's own layers."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medmim.networks import ConvViT
from medmim.networks.convvit_blocks import AttentionBlock, ConvBlock

SMALL = {"embed_dims": (4, 6, 8, 12), "depths": (1, 2, 1, 2), "num_heads": 2}
CASES = [((32, 48, 16), 1, 0.5), ((16, 32, 32), 2, 0.75), ((48, 32), 1, 0.5), ((32, 80), 3, 0.3)]


def make(dims=3, channels=1, **options) -> ConvViT:
    """A small encoder with nothing left at zero or one, so that each tensor matters."""
    encoder = ConvViT(channels, dims, **{**SMALL, **options})
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return encoder


def make_mask(grid, ratio, batch=2):
    n = math.prod(grid)
    return (torch.rand(batch, n).argsort(1).argsort(1) < round(ratio * n)).view(batch, *grid)


def channel_norm(x, norm):
    return F.layer_norm(x.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, norm.eps).movedim(-1, 1)


def pointwise(x, linear):
    return torch.einsum("bi...,oi->bo...", x, linear.weight) + linear.bias.view(1, -1, *[1] * (x.ndim - 2))


def dense_maps(encoder, image, mask=None):
    """Feature maps at all positions: masks multiply the input of the depthwise convolutions."""
    convolve = {4: F.conv2d, 5: F.conv3d}[image.ndim]
    x, maps = image, []
    for stage, embedding in enumerate(encoder.embeddings):
        x = convolve(x, embedding.conv.weight, embedding.conv.bias, stride=2)
        x = F.gelu(channel_norm(x, embedding.norm))
        if stage == 3:
            break
        visible = torch.ones_like(x[:, :1])
        if mask is not None:
            visible = (~mask).unsqueeze(1).to(x.dtype)
            for axis in range(2, x.ndim):
                visible = visible.repeat_interleave(2 ** (3 - stage), dim=axis)
        for block in encoder.stages[stage]:
            y = visible * pointwise(channel_norm(x, block.norm1), block.conv1)
            y = convolve(y, block.depthwise.weight, block.depthwise.bias, padding=2, groups=x.shape[1])
            x = x + pointwise(y, block.conv2)
            y = F.gelu(pointwise(channel_norm(x, block.norm2), block.mlp[0]))
            x = x + pointwise(y, block.mlp[2])
        maps.append(x)
    grid = x.shape[2:]
    x = pointwise(x, encoder.token_embedding)
    return [*maps, x + sincos(grid, x.shape[1]).float().to(x.dtype)]


def sincos(grid, size):
    table = torch.zeros(size, *grid, dtype=torch.float64)
    n = size // (2 * len(grid))
    for axis, length in enumerate(grid):
        for j in range(n):
            for p in range(length):
                angle = p * 10000 ** (-j / n)
                table[2 * n * axis + j].select(axis, p)[...] = math.sin(angle)
                table[2 * n * axis + n + j].select(axis, p)[...] = math.cos(angle)
    return table


def transform(encoder, tokens):
    """The transformer by its formula."""
    for block in encoder.blocks:
        size, heads = tokens.shape[-1], block.attn.num_heads
        y = F.layer_norm(tokens, (size,), block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
        mixed = []
        for h in range(heads):
            part = slice(h * size // heads, (h + 1) * size // heads)
            scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(size // heads)
            mixed.append(scores.softmax(-1) @ v[..., part])
        tokens = tokens + block.attn.proj(torch.cat(mixed, dim=-1))
        y = F.layer_norm(tokens, (size,), block.norm2.weight, block.norm2.bias, 1e-6)
        tokens = tokens + block.mlp[2](F.gelu(block.mlp[0](y)))
    return tokens


def dense_latents(encoder, image, mask):
    """Everything at all positions, the visible tokens picked where the transformer begins and at the end."""
    convolve = {4: F.conv2d, 5: F.conv3d}[image.ndim]
    *maps, x = dense_maps(encoder, image, mask)
    visible = [(~m).flatten().nonzero().squeeze(1) for m in mask]

    def pick(volume):
        return torch.stack([volume[b].flatten(1).T[ids] for b, ids in enumerate(visible)])

    tokens = transform(encoder, pick(x))
    for stage, (x, projection) in enumerate(zip(maps, encoder.fusion, strict=True)):
        tokens = tokens + pick(convolve(x, projection.weight, projection.bias, stride=2 ** (3 - stage)))
    return F.layer_norm(tokens, tokens.shape[-1:], encoder.norm.weight, encoder.norm.bias, 1e-6)


@pytest.mark.parametrize(("size", "channels", "ratio"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_visible_computation_equals_the_dense_masked_one(size, channels, ratio, dtype, tolerance):
    encoder = make(len(size), channels, fifth_stage=False).to(dtype)
    image = torch.rand(2, channels, *size, dtype=dtype, requires_grad=True)
    mask = make_mask([n // 16 for n in size], ratio)
    found, expected = encoder(image, mask), dense_latents(encoder, image, mask)
    assert found.shape == (2, int((~mask[0]).sum()), 12)
    assert (found - expected).norm() < tolerance * expected.norm()
    weight = torch.rand_like(found)
    inputs = [image, *encoder.parameters()]
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    largest = max(float(g.norm()) for g in theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).norm() < 10 * tolerance * max(float(reference.norm()), 1e-3 * largest)


@pytest.mark.parametrize(("size", "channels"), [((32, 16, 48), 2), ((48, 32), 1)])
def test_feature_maps_equal_the_dense_computation(size, channels):
    encoder = make(len(size), channels, fusion=False).eval()
    image = torch.rand(2, channels, *size)
    with torch.no_grad():
        found, expected = encoder(image), dense_maps(encoder, image)
        tokens = transform(encoder, expected[3].flatten(2).transpose(1, 2))
    expected[3] = tokens.transpose(1, 2).view(expected[3].shape)
    assert [x.shape[1] for x in found] == [4, 6, 8, 12, 24]
    for ours, theirs in zip(found[:4], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "channels", "ratio"), CASES)
def test_hidden_voxels_reach_no_latent(size, channels, ratio):
    encoder = make(len(size), channels)
    mask = make_mask([n // 16 for n in size], ratio)
    hidden = mask.unsqueeze(1)
    for axis in range(2, hidden.ndim):
        hidden = hidden.repeat_interleave(16, dim=axis)
    image = torch.rand(2, channels, *size, requires_grad=True)
    latent = encoder(image, mask)
    for value in (7.0, math.nan):
        assert torch.equal(encoder(image.masked_fill(hidden, value), mask), latent)
    (gradient,) = torch.autograd.grad(latent.square().sum(), image)
    hidden = hidden.expand_as(image)
    assert bool((gradient[hidden] == 0).all())
    assert float((gradient[~hidden] != 0).float().mean()) > 0.99


def test_gradients_of_air_and_padding_are_as_small_as_those_of_tissue():
    """A norm of zero vectors would multiply them by 300 at each stage, more than float16 holds."""
    torch.manual_seed(0)
    encoder = ConvViT(1, 3, **SMALL)
    mask = make_mask((2, 2, 2), 0.5, batch=1)
    tissue = torch.rand(1, 1, 32, 32, 32)
    air = torch.cat([tissue[:, :, :20], torch.zeros(1, 1, 12, 32, 32)], dim=2)
    largest = []
    for image in (tissue, air):
        encoder.zero_grad()
        encoder(image, mask).square().mean().backward()
        largest.append(max(p.grad.abs().max() for p in encoder.parameters() if p.grad is not None))
    assert largest[1] < 3 * largest[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    encoder = make().eval()
    image, mask = torch.rand(2, 1, 32, 32, 16), make_mask((2, 2, 1), 0.5)
    latent, maps = encoder(image, mask), encoder(image)
    encoder.to(dtype)
    atol = 0.2 if dtype == torch.bfloat16 else 1e-4
    rounded = image.to(dtype)
    for found, expected in zip([encoder(rounded, mask), *encoder(rounded)], [latent, *maps], strict=True):
        assert found.dtype == dtype
        assert (found.float() - expected).abs().mean() < atol * expected.abs().mean()


def test_positions_that_are_kept_are_those_of_the_input():
    encoder = make().eval()
    images = [torch.rand(1, 1, 32, 32, 16), torch.rand(1, 1, 16, 48, 16)]
    with torch.inference_mode():
        first = [encoder.encode(image) for image in images]
    for image, expected in [*zip(images, first, strict=True)] * 2:
        assert torch.equal(encoder.encode(image), expected)
    encoder.encode(images[0]).sum().backward()
    assert encoder.double().encode(images[1].double()).dtype == torch.float64
    torch.testing.assert_close(encoder.encode(images[1].double()).float(), first[1], atol=1e-4, rtol=1e-4)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"^a mask must be boolean, True where a token is hidden, found torch.float32"):
        make()(torch.rand(1, 1, 32, 32, 16), torch.tensor([[[0.0], [1.0]], [[1.0], [0.0]]])[None, ..., 0].unsqueeze(-1))


@pytest.mark.parametrize("n_hidden", [2, 4])
def test_pointwise_layers_see_visible_positions_only(n_hidden):
    encoder = make()
    rows = []
    for stage in encoder.stages:
        for layer in stage.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.register_forward_hook(lambda module, _, output: rows.append(output.shape[:-1].numel()))
    mask = make_mask((2, 1, 3), n_hidden / 6)
    encoder(torch.rand(2, 1, 32, 16, 48), mask)
    visible = 2 * (6 - n_hidden)
    assert rows == [n * visible for n in [512] * 6 + [64] * 12 + [8] * 6]


def test_tokens_in_any_order():
    encoder = make()
    image = torch.rand(2, 1, 32, 32, 16)
    every = encoder.encode(image, torch.arange(4).expand(2, -1))
    torch.testing.assert_close(encoder.encode(image), every)
    torch.testing.assert_close(encoder(image, torch.zeros(2, 2, 2, 1, dtype=torch.bool)), every)
    ids = torch.tensor([[3, 0], [1, 2]])
    mask = torch.ones(2, 4).scatter(1, ids, 0).bool().view(2, 2, 2, 1)
    latent = encoder(image, mask)
    order = ids.argsort(1).unsqueeze(-1).expand(-1, -1, 12)
    torch.testing.assert_close(encoder.encode(image, ids).gather(1, order), latent)


@pytest.mark.parametrize("size", [(16, 16, 48), (32, 48, 80), (16, 48), (32, 32)])
def test_five_maps_of_any_size(size):
    maps = make(len(size), 2).eval()(torch.rand(1, 2, *size))
    for k, x in enumerate(maps, 1):
        assert tuple(x.shape) == (1, (4, 6, 8, 12, 24)[k - 1], *[math.ceil(n / 2**k) for n in size])
        assert bool(x.isfinite().all())


def test_fifth_map_is_a_convolution_of_the_fourth():
    encoder = make().eval()
    *_, fourth, fifth = encoder(torch.rand(2, 1, 48, 32, 16))
    convolution, norm, _ = encoder.fifth_stage
    padded = torch.zeros(2, 12, 4, 2, 2)
    padded[:, :, :3, :, :1] = fourth
    x = F.conv3d(padded, convolution.weight, convolution.bias, stride=2) / math.sqrt(1 + norm.eps)
    expected = F.gelu(x * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1))
    torch.testing.assert_close(fifth, expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.1, "relative_position_bias": True, "img_size": 32}])
def test_every_parameter_of_what_is_used_gets_a_gradient(masked, options):
    encoder = make(fusion=masked, fifth_stage=not masked, **options)
    image = torch.rand(2, 1, 32, 32, 32)
    found = encoder(image, make_mask((2, 2, 2), 0.5)) if masked else encoder(image)
    loss = found.square().sum() if masked else sum(x.square().sum() for x in found)
    loss.backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_part_that_is_off_has_no_tensors():
    names = set(make(fusion=False, fifth_stage=False).state_dict())
    assert not any("fusion" in n or "fifth" in n or "scale" in n or "bias.table" in n for n in names)
    assert "norm.weight" not in names
    assert set(make().state_dict()) - names == {
        "norm.weight",
        "norm.bias",
        *[f"fusion.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")],
        *[f"fifth_stage.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")],
        *[f"fifth_stage.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")],
    }


@pytest.mark.parametrize("size", [(32, 16, 32), (48, 32)])
def test_layer_scale_one_and_relative_bias_zero_change_nothing(size):
    plain = make(len(size))
    tuned = make(len(size), layer_scale=1.0, relative_position_bias=True, img_size=size)
    for name, parameter in tuned.named_parameters():
        if "scale" in name or "table" in name:
            nn.init.constant_(parameter, float("scale" in name))
    missing = tuned.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    image, mask = torch.rand(2, 1, *size), make_mask([n // 16 for n in size], 0.5)
    torch.testing.assert_close(tuned(image, mask), plain(image, mask), rtol=1e-5, atol=1e-5)
    nn.init.normal_(tuned.blocks[0].attn.position_bias.table)
    assert not torch.allclose(tuned(image, mask), plain(image, mask), atol=1e-3)
    assert tuned.eval()(torch.rand(1, 1, *[n + 16 for n in size]))[3].shape[2:] == tuple(n // 16 + 1 for n in size)


def test_drop_path_rises_and_is_off_in_evaluation():
    encoder = make(drop_path_rate=0.5)
    blocks = [m for m in encoder.modules() if isinstance(m, ConvBlock | AttentionBlock)]
    assert [m.drop_path.drop_prob for m in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    image = torch.rand(4, 1, 16, 32, 16)
    torch.manual_seed(1)
    first = encoder.encode(image)
    assert not torch.equal(first, encoder.encode(image))
    torch.manual_seed(1)
    assert torch.equal(first, encoder.encode(image))
    encoder.eval()
    assert torch.equal(encoder.encode(image), encoder.encode(image))


def test_same_seed_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        encoder = ConvViT(**SMALL)
        image, mask = torch.rand(2, 1, 32, 32, 16), make_mask((2, 2, 1), 0.5)
        latent = encoder(image, mask)
        latent.square().sum().backward()
        results.append([latent, *[p.grad for p in encoder.parameters() if p.grad is not None]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_activations_can_be_left_out():
    encoder = make(fifth_stage=False, drop_path_rate=0.3)
    image, mask = torch.rand(2, 1, 32, 32, 16), make_mask((2, 2, 1), 0.5)

    def gradients():
        torch.manual_seed(0)
        encoder.zero_grad()
        encoder(image, mask).square().sum().backward()
        return [p.grad for p in encoder.parameters()]

    expected = gradients()
    for block in [m for m in encoder.modules() if isinstance(m, ConvBlock | AttentionBlock)]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("size", [(32, 32, 16), (32, 48)])
def test_mixed_precision(size):
    encoder = make(len(size), fifth_stage=False)
    image, mask = torch.rand(2, 1, *size), make_mask([n // 16 for n in size], 0.5)
    expected = encoder(image, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(image, mask)
        found.square().sum().backward()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())


def test_compiles():
    encoder = make(2, fifth_stage=False, depths=(1, 1, 1, 1))
    image, mask = torch.rand(2, 1, 32, 32), make_mask((2, 2), 0.5)
    gradients = []
    for network in (encoder, torch.compile(encoder, backend="aot_eager")):
        encoder.zero_grad()
        loss = network(image, mask).square().sum()
        loss.backward()
        gradients.append([loss.detach(), *[p.grad for p in encoder.parameters()]])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 1_566_135), ("base", 24_049_116)])
def test_published_sizes(size, parameters):
    with torch.device("meta"):
        build = {"tiny": ConvViT.tiny, "base": ConvViT.base}[size]
        encoder = build(fusion=False, layer_scale=1.0, relative_position_bias=True, img_size=96)
    assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, found 1"),
        ({"depths": (1, 1)}, "embed_dims and depths need 4 numbers each"),
        ({"num_heads": 5}, r"embed_dims\[3\] 12 is not divisible by 5 \(attention heads\)"),
        ({"embed_dims": (2, 2, 2, 16)}, r"embed_dims\[3\] 16 is not divisible by 6 \(needed by the position"),
        ({"relative_position_bias": True}, "relative_position_bias needs img_size"),
        ({"relative_position_bias": True, "img_size": 40}, r"\(40, 40, 40\) is not divisible by \(16, 16, 16\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvViT(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((1, 1, 40, 32, 32), None, r"\(40, 32, 32\) is not divisible by \(16, 16, 16\)"),
        ((1, 2, 32, 32, 32), None, r"image of shape \(1, 2, 32, 32, 32\), expected \(B, 1\) and 3 spatial axes"),
        ((1, 1, 32, 32), None, r"image of shape \(1, 1, 32, 32\), expected \(B, 1\) and 3 spatial axes"),
        ((1, 1, 32, 32, 32), (1, 2, 2, 1), r"mask of shape \(1, 2, 2, 1\) for an image with 1 samples of \(2, 2, 2\)"),
        ((2, 1, 32, 32, 32), (1, 2, 2, 2), r"mask of shape \(1, 2, 2, 2\) for an image with 2 samples of \(2, 2, 2\)"),
        ((1, 1, 32, 16, 16), (1, 2, 1, 1), "the mask hides every token"),
    ],
)
def test_input_that_does_not_fit_is_refused(shape, mask, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.rand(shape), None if mask is None else torch.ones(mask, dtype=torch.bool))


def test_samples_that_hide_different_numbers_are_refused():
    mask = torch.zeros(2, 2, 1, 1, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match=r"the same number of tokens, found \[1, 0\]"):
        make()(torch.rand(2, 1, 32, 16, 16), mask)


def test_latents_need_the_fusion():
    with pytest.raises(ValueError, match="built with fusion=False"):
        make(fusion=False)(torch.rand(1, 1, 16, 16, 32), torch.zeros(1, 1, 1, 2, dtype=torch.bool))
