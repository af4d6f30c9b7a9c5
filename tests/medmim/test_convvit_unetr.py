"""Segmentation network around the hybrid encoder."""

import pytest
import torch
from torch import nn

from medmim.networks import ConvViTUNETR

SMALL = {"embed_dims": (4, 8, 8, 12), "depths": (1, 1, 1, 1), "num_heads": 2}


@pytest.mark.parametrize(
    ("size", "channels", "classes"),
    [((32, 64, 32), 1, 2), ((33, 20, 48), 2, 3), ((64, 32), 1, 4), ((50, 70), 3, 2), ((16, 16, 16), 1, 2)],
)
@pytest.mark.parametrize("training", [True, False])
def test_any_size_gives_logits_of_that_size(size, channels, classes, training):
    network = ConvViTUNETR(channels, classes, spatial_dims=len(size), **SMALL).train(training)
    with torch.no_grad():
        logits = network(torch.rand(1, channels, *size))
    assert logits.shape == (1, classes, *size)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("size", "padded", "before"),
    [((48, 40), (64, 64), (8, 12)), ((31, 65), (32, 96), (0, 15)), ((20, 9), (32, 64), (6, 27))],
)
def test_an_image_is_padded_with_zeros_on_both_sides_and_the_logits_cropped(size, padded, before):
    network = ConvViTUNETR(1, 2, spatial_dims=2, **SMALL).eval()
    image = torch.rand(2, 1, *size)
    whole = torch.zeros(2, 1, *padded)
    inside = (..., *[slice(start, start + n) for start, n in zip(before, size, strict=True)])
    whole[inside] = image
    with torch.no_grad():
        torch.testing.assert_close(network(image), network(whole)[inside])


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32, 64), {}),
        ((64, 32), {"layer_scale": None}),
        ((32, 64), {"relative_position_bias": True, "img_size": (32, 64), "norm_name": "batch"}),
    ],
)
def test_every_parameter_gets_a_gradient(size, options):
    network = ConvViTUNETR(2, 3, spatial_dims=len(size), **SMALL, **options)
    network(torch.rand(2, 2, *size)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_each_map_goes_normed_into_its_own_branch():
    network = ConvViTUNETR(1, 2, spatial_dims=2, **SMALL).eval()
    seen = {}
    for name in ("encoder1", "encoder2", "encoder3", "encoder4", "encoder5"):
        module = getattr(network, name)
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    network.decoder5.register_forward_pre_hook(lambda _, inputs: seen.update(fourth=inputs[1]))
    image = torch.rand(2, 1, 64, 32)
    with torch.no_grad():
        network(image)
        maps = network.encoder(image)
    assert torch.equal(seen["encoder1"], image)
    for name, x in zip(("encoder2", "encoder3", "encoder4", "fourth", "encoder5"), maps, strict=True):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        torch.testing.assert_close(seen[name], (x - mean) / (variance + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)


def test_published_number_of_parameters():
    with torch.device("meta"):
        network = ConvViTUNETR(1, 14, img_size=96, relative_position_bias=True)
    published = 78.26e6 - 216 * 384  # which counts the positions
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(published, abs=1e4)


def test_mixed_precision():
    network = ConvViTUNETR(1, 2, spatial_dims=2, **SMALL)
    image = torch.rand(2, 1, 64, 48)
    expected = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(image)
        found.float().square().sum().backward()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_it_learns():
    network = ConvViTUNETR(1, 2, spatial_dims=2, **SMALL)
    label = torch.zeros(2, 64, 32, dtype=torch.long)
    label[:, 20:40, 8:20] = 1
    image = label.unsqueeze(1) + 0.1 * torch.randn(2, 1, 64, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(image), label)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2, 64, 64), r"expected \(B, 1\) and 2 spatial axes"), ((1, 1, 64, 64, 64), r"and 2 spatial axes")],
)
def test_another_image_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        ConvViTUNETR(1, 2, spatial_dims=2, **SMALL)(torch.rand(shape))
