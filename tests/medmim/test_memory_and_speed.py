"""Activation checkpointing and ``torch.compile``: the same numbers and names."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from medmim.commands import compile_network
from medmim.networks import UNETR, MaskedAutoencoder, checkpoint_activations

SIZE = (16, 16, 16)


def mae() -> nn.Module:
    torch.manual_seed(0)
    vit = ViT(1, SIZE, 8, hidden_size=24, mlp_dim=48, num_layers=3, num_heads=2)
    return MaskedAutoencoder(vit, SIZE, decoder_hidden_size=24, decoder_num_layers=2, decoder_num_heads=2)


def unetr() -> nn.Module:
    torch.manual_seed(0)
    return UNETR(1, 3, SIZE, 8, feature_size=4, hidden_size=24, mlp_dim=48, num_layers=4, num_heads=2)


def inputs(network: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 1, *SIZE, generator=generator)
    mask = torch.rand(2, 8, generator=generator).argsort(1) < 5
    return (image, mask.reshape(2, 2, 2, 2)) if isinstance(network, MaskedAutoencoder) else (image,)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    network(*inputs(network)).square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def saved_bytes(network: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # an address is not used twice
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*inputs(network))
    return sum(kept.values())


@pytest.mark.parametrize("build", [mae, unetr])
def test_activation_checkpointing_changes_memory_only(build: Callable[[], nn.Module]) -> None:
    plain, saving = build(), build()
    checkpoint_activations(saving)
    assert list(saving.state_dict()) == list(plain.state_dict())
    assert torch.equal(saving(*inputs(saving)), plain(*inputs(plain)))
    ours, theirs = gradients(saving), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    less = saved_bytes(plain) - saved_bytes(saving)
    if build is mae:
        assert less > 0.3 * saved_bytes(plain)
    else:  # most of it is the decoder's
        assert less > 0.5 * saved_bytes(plain.vit)
    with torch.no_grad():
        assert torch.equal(saving.eval()(*inputs(saving)), plain.eval()(*inputs(plain)))
    saving.load_state_dict(plain.state_dict(), strict=True)
    assert list(deepcopy(saving).state_dict()) == list(plain.state_dict())


def test_blocks_are_computed_again_in_the_backward_pass() -> None:
    network = mae()
    calls: list[int] = []
    for block in network.encoder.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    gradients(network)
    assert len(calls) == 3
    checkpoint_activations(network)
    calls.clear()
    gradients(network)
    assert len(calls) == 6


def test_network_without_transformer_blocks() -> None:
    with pytest.raises(ValueError, match=r"^Sequential has no transformer block"):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [mae, unetr])
def test_compiled_network(build: Callable[[], Any], checkpointing: bool) -> None:
    plain, compiled = build(), build()
    if checkpointing:
        checkpoint_activations(compiled)
    compile_network(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(compiled(*inputs(plain)), plain(*inputs(plain)), atol=1e-4, rtol=1e-4)
    ours, theirs = gradients(compiled), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-3)
