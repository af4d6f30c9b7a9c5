"""What mattered in an image: attention rollout against loops, occlusion, and their overlays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medmim.networks import ViTClassifier
from medmim.networks.vit import checkpoint_activations
from medmim.overlays import attention_rollout, draw_overlay, occlusion, relevance

SIZES = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 3, "num_heads": 2}


def make(pooling="mean", img_size=(16, 24), patch_size=8, n_outputs=2) -> ViTClassifier:
    """With attention that is far from even, which a fresh network's is not."""
    network = ViTClassifier(1, n_outputs, img_size, patch_size, pooling, **SIZES).eval()
    for block in network.vit.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return network


def naive_attention(attention: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Mean over the heads of softmax(q k / sqrt(d)), row by row, from the weights of q, k and v."""
    n, width = tokens.shape
    heads = attention.num_heads
    size = width // heads
    qkv = (tokens @ attention.qkv.weight.T).reshape(n, 3, heads, size)
    found = np.zeros((n, n))
    for head in range(heads):
        for i in range(n):
            scores = [float(qkv[i, 0, head] @ qkv[j, 1, head]) / size**0.5 for j in range(n)]
            powers = np.exp(np.array(scores) - max(scores))
            found[i] += powers / powers.sum() / heads
    return found


def naive_rollout(network: ViTClassifier, image: torch.Tensor) -> np.ndarray:
    tokens = network.vit.patch_embedding(image)[0]
    if network.has_class_token:
        tokens = torch.cat((network.class_token[0], tokens))
    product = np.eye(len(tokens))
    for block in network.vit.blocks:
        attention = naive_attention(block.attn, block.norm1(tokens))
        product = (0.5 * attention + 0.5 * np.eye(len(tokens))) @ product
        tokens = block(tokens[None])[0]
    return product[0, 1:] if network.has_class_token else product.mean(axis=0)


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
@pytest.mark.parametrize(("img_size", "patch_size"), [((16, 24), 8), ((12, 5), (3, 5)), ((24, 24), 8)])
@torch.no_grad()
def test_rollout_equals_loops(pooling, img_size, patch_size):
    network = make(pooling, img_size, patch_size)
    image = torch.rand(1, 1, *img_size)
    found = attention_rollout(network, image)
    assert found.shape == network.grid
    np.testing.assert_allclose(found.flatten().numpy(), naive_rollout(network, image), rtol=1e-4, atol=1e-6)
    total = float(found.sum())
    assert total == pytest.approx(1, abs=1e-5) if pooling == "mean" else 0 < total < 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_rollout_leaves_the_network_as_it_was(checkpointed):
    network = make()
    if checkpointed:
        checkpoint_activations(network)
    network.vit.blocks[1].attn.use_flash_attention = False
    image = torch.rand(1, 1, 16, 24)
    before = network(image)
    assert bool(attention_rollout(network, image).isfinite().all())
    flags = [(block.attn.save_attn, block.attn.use_flash_attention) for block in network.vit.blocks]
    assert flags == [(False, True), (False, False), (False, True)]
    assert all(block.attn.att_mat.numel() == 0 for block in network.vit.blocks)
    assert torch.equal(network(image), before)


def test_rollout_restores_the_flags_after_a_failure():
    network = make()
    with pytest.raises(Exception, match=r"."):
        attention_rollout(network, torch.rand(1, 2, 16, 24))
    assert all(block.attn.use_flash_attention and not block.attn.save_attn for block in network.vit.blocks)


class Corner(nn.Module):
    """Its second output looks at the upper left 8 x 8 pixels, its first one at nothing."""

    grid = (4, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert not self.training
        seen = image[:, 0, :8, :8].mean(dim=(1, 2)) * 2
        return torch.stack((torch.zeros_like(seen), seen), dim=1)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_occlusion_is_highest_where_the_network_looks(task):
    image = torch.ones(1, 1, 32, 48)
    with torch.no_grad():
        found = occlusion(Corner().eval(), image, 1, task, 8)
        opposite = occlusion(Corner().eval(), image, 0, task, 8)
    assert found.shape == (32, 48)
    row, column = divmod(int(found.argmax()), 48)
    assert row < 8
    assert column < 8
    assert float(found[:8, :8].min()) > 0.02
    assert float(found[16:].abs().max()) < 1e-5  # the whole image's probability is taken away
    assert float(found[:, 16:].abs().max()) < 1e-5
    if task == "multiclass":
        torch.testing.assert_close(opposite, -found, rtol=1e-4, atol=1e-5)
    else:
        assert float(opposite.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["attention", "occlusion"])
@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_maps_have_the_size_of_the_image(kind, pooling):
    network, image = make(pooling, (24, 48)).train(), torch.rand(1, 1, 24, 48)
    found = relevance(network, image, kind, 1, "multilabel")
    assert found.shape == (24, 48)
    assert np.isfinite(found).all()
    if kind == "attention":  # the middle of each patch lies between pixels: their mean is about the patch's value
        grid = attention_rollout(network, image)
        peak = np.unravel_index(found.argmax(), found.shape)
        assert (peak[0] // 8, peak[1] // 8) == np.unravel_index(int(grid.argmax()), (3, 6))
    corner = relevance(Corner().train(), torch.ones(1, 1, 32, 48), "occlusion", 1, "multiclass")
    assert corner.argmax() // 48 < 16
    assert corner.argmax() % 48 < 16


@pytest.mark.parametrize("score", ["random", "negative", "nothing"])
def test_overlay_shows_image_and_map(score, tmp_path: Path):
    image = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    scores = {"random": np.random.default_rng(1).random((16, 24)), "negative": -np.ones((16, 24))}
    figure = draw_overlay(image, scores.get(score, np.zeros((16, 24))), "a.png: nodule 0.90", "occlusion, nodule")
    assert [axis.get_title() for axis in figure.axes] == ["image", "occlusion, nodule"]
    assert figure.get_suptitle() == "a.png: nodule 0.90"
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), image)
    blended = np.asarray(figure.axes[1].images[0].get_array())
    assert blended.shape == (16, 24, 3)
    assert np.isfinite(blended).all()
    assert blended.min() >= 0
    assert blended.max() <= 1


def test_overlay_is_red_where_it_matters():
    """The map's upper right corner; rows of the figure are rows of the image."""
    score = np.zeros((16, 24))
    score[:4, 20:] = 1
    blended = np.asarray(draw_overlay(np.zeros((16, 24)), score, "", "").axes[1].images[0].get_array())
    redder = blended[..., 0] > blended[..., 2]
    np.testing.assert_array_equal(redder, score > 0)
