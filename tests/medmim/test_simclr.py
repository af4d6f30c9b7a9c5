"""SimCLR around a ViT."""

from collections.abc import Callable

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from medmim.losses import NTXentLoss
from medmim.networks import FeatureExtractor, SimCLR, sincos_position_embedding

SIZE = (16, 24, 8)


def views(n: int = 3, channels: int = 1, size: tuple = SIZE) -> list[torch.Tensor]:
    return [torch.randn(n, channels, *size) for _ in range(2)]


@pytest.mark.parametrize(
    ("size", "patch_size", "channels", "hidden"),
    [(SIZE, 8, 1, 24), ((12, 20), (4, 10), 3, 24), ((18, 7), (6, 7), 2, 24), ((10, 9, 7), (5, 3, 7), 2, 36)],
    ids=str,
)
def test_embeddings(tiny_vit: Callable, size: tuple, patch_size: int, channels: int, hidden: int) -> None:
    """Also in two dimensions and with odd sizes: projector of the mean of the normed tokens of each view by itself."""
    network = SimCLR(tiny_vit(channels, size, patch_size, hidden_size=hidden), size, 10, 6)
    pair = views(3, channels, size)
    found = network(*pair)
    assert found.shape == (3, 2, 6)
    for number, view in enumerate(pair):
        features = FeatureExtractor(network.encoder, size)(view)
        pooled = features.flatten(2).mean(2)
        torch.testing.assert_close(found[:, number], network.projector(pooled))
        first, _, last = network.projector
        by_hand = last(torch.nn.functional.gelu(pooled @ first.weight.T + first.bias))
        torch.testing.assert_close(found[:, number], by_hand)
    torch.testing.assert_close(network(*pair[::-1]), found.flip(1))


def test_a_sample_is_embedded_whatever_the_batch(tiny_vit: Callable) -> None:
    network = SimCLR(tiny_vit(), SIZE)
    pair = views()
    torch.testing.assert_close(network(*pair)[:1], network(*[view[:1] for view in pair]))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_of_the_projector(tiny_vit: Callable, layers: int) -> None:
    network = SimCLR(tiny_vit(), SIZE, 10, 6, layers)
    linear = [module for module in network.projector if isinstance(module, torch.nn.Linear)]
    assert [module.in_features for module in linear] == [24, 10, 10][:layers]
    assert linear[-1].out_features == 6


@pytest.mark.parametrize("kind", ["sincos", "learnable"])
def test_every_learning_parameter_gets_a_gradient(tiny_vit: Callable, kind: str) -> None:
    network = SimCLR(tiny_vit(), SIZE, position_embedding=kind)
    NTXentLoss()(network(*views())).backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    fixed = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert without == fixed
    positions = network.encoder.patch_embedding.position_embeddings
    assert torch.equal(positions, sincos_position_embedding((2, 3, 1), 24)) is (kind == "sincos")
    assert positions.requires_grad is (kind == "learnable")


def test_it_learns_to_tell_samples_apart(tiny_vit: Callable) -> None:
    network = SimCLR(tiny_vit(), SIZE, 24, 8)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 0.003)
    samples = torch.randn(8, 1, *SIZE)
    losses = []
    for _ in range(40):
        pair = [samples + 0.3 * torch.randn_like(samples) for _ in range(2)]
        loss = NTXentLoss()(network(*pair))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_refusals(tiny_vit: Callable) -> None:
    with pytest.raises(ValueError, match="must be a MONAI ViT, found SwinTransformer"):
        SimCLR(SwinTransformer(1, 12, (7, 7, 7), (2, 2, 2), (1, 1, 1, 1), (1, 1, 1, 1)), (32, 32, 32))
    with pytest.raises(ValueError, match="classification=False"):
        SimCLR(tiny_vit(classification=True), SIZE)
    with pytest.raises(ValueError, match="dropout_rate must be 0"):
        SimCLR(tiny_vit(dropout_rate=0.1), SIZE)
    with pytest.raises(ValueError, match="projector_num_layers must be 1 or more, found 0"):
        SimCLR(tiny_vit(), SIZE, projector_num_layers=0)
    with pytest.raises(ValueError, match="gives"):
        SimCLR(tiny_vit(), (16, 16, 16))
    network = SimCLR(tiny_vit(), SIZE)
    with pytest.raises(ValueError, match=r"view of \(16, 16, 16\) voxels, expected \(16, 24, 8\)"):
        network(torch.rand(1, 1, *SIZE), torch.rand(1, 1, 16, 16, 16))
