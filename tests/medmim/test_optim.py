"""Parameter groups: each parameter's own rate and decay."""

import re

import pytest
import torch

from medmim.networks import UNETR, MaskedAutoencoder
from medmim.optim import freeze_encoder, parameter_groups

LAYERS = 4


@pytest.fixture
def unetr():
    return UNETR(1, 2, (16, 24, 8), 8, 4, 24, 32, LAYERS, 2, norm_name=("group", {"num_groups": 2}))


def settings(network, groups):
    """Name of each parameter and its (learning rate, weight decay)."""
    names = {id(p): name for name, p in network.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("decay", [0.75, 1.0, 0.5])
def test_each_parameter_of_unetr(unetr, decay):
    found = settings(unetr, parameter_groups(unetr, 0.01, 0.05, decay))
    trainable = {name: p for name, p in unetr.named_parameters() if p.requires_grad}
    assert found.keys() == trainable.keys()
    for name, parameter in trainable.items():
        if name.startswith("vit.patch_embedding."):
            layer = 0
        elif block := re.match(r"vit\.blocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        else:
            layer = LAYERS + 1
        rate = 0.01 * decay ** (LAYERS + 1 - layer)
        plain = "norm" in name or name.endswith("bias") or "position" in name or parameter.ndim == 1
        assert found[name] == (pytest.approx(rate), 0.0 if plain else 0.05), name


def test_some_rates_by_hand(unetr):
    found = settings(unetr, parameter_groups(unetr, 1.0, 0.05, 0.75))
    assert found["vit.patch_embedding.position_embeddings"] == (pytest.approx(0.75**5), 0.0)
    assert found["vit.patch_embedding.patch_embeddings.weight"] == (pytest.approx(0.75**5), 0.05)
    assert found["vit.patch_embedding.patch_embeddings.bias"] == (pytest.approx(0.75**5), 0.0)
    assert found["vit.blocks.0.attn.qkv.weight"] == (pytest.approx(0.75**4), 0.05)
    assert found["vit.blocks.3.mlp.linear2.weight"] == (pytest.approx(0.75), 0.05)
    assert found["vit.blocks.3.norm1.weight"] == (pytest.approx(0.75), 0.0)
    assert found["vit.norm.weight"] == (1.0, 0.0)
    assert found["encoder1.layer.conv1.conv.weight"] == (1.0, 0.05)
    assert found["out.conv.conv.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("positions", ["learnable", "sincos"])
def test_mask_token_and_positions_do_not_decay(tiny_vit, positions):
    mae = MaskedAutoencoder(tiny_vit(), (16, 24, 8), "transformer", 12, 1, 2, positions)
    found = settings(mae, parameter_groups(mae, 0.01, 0.05))
    assert found["decoder.mask_token"] == (0.01, 0.0)
    assert found["decoder.head.weight"] == (0.01, 0.05)
    names = {"encoder.patch_embedding.position_embeddings", "decoder.position_embeddings"}
    assert found.keys() & names == (names if positions == "learnable" else set())
    assert all(found[name] == (0.01, 0.0) for name in found.keys() & names)
    assert found.keys() == {name for name, p in mae.named_parameters() if p.requires_grad}


def test_frozen_encoder_is_left_out(unetr):
    encoder = freeze_encoder(unetr)
    assert encoder is unetr.vit
    assert not any(p.requires_grad for p in unetr.vit.parameters())
    found = settings(unetr, parameter_groups(unetr, 0.01, 0.05, 0.75))
    assert found.keys() == {name for name, _ in unetr.named_parameters() if not name.startswith("vit.")}


def test_groups_run_and_are_in_the_order_of_the_layers(unetr):
    groups = parameter_groups(unetr, 0.01, 0.05, 0.75)
    rates = [group["lr"] for group in groups]
    assert rates == sorted(rates)
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    before = {name: p.detach().clone() for name, p in unetr.named_parameters() if p.requires_grad}
    unetr(torch.rand(2, 1, 16, 24, 8)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in unetr.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("decay", [0, -0.5, 1.01])
def test_faulty_decay(unetr, decay):
    with pytest.raises(ValueError, match=rf"layer_decay must lie in \(0, 1\], found {decay}"):
        parameter_groups(unetr, 0.01, 0.05, decay)


def test_network_without_an_encoder_is_refused():
    with pytest.raises(ValueError, match="holds 0 ViT encoders"):
        parameter_groups(torch.nn.Linear(2, 2), 0.01, 0.05)
    with pytest.raises(ValueError, match="holds 0 ViT encoders"):
        freeze_encoder(torch.nn.Linear(2, 2))
