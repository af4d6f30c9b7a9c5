"""What the package does to and knows about MONAI's ViT."""

import pytest
import torch

from medmim.networks import patchify, sincos_position_embedding
from medmim.networks.vit import embed_patches, prepare_vit_blocks, set_position_embedding, vit_channels, vit_patch_size


def test_fused_attention_gives_the_same_output(tiny_vit):
    vit = tiny_vit().eval()
    image = torch.rand(2, 1, 16, 24, 8)
    before = vit(image)[0]
    prepare_vit_blocks(vit.blocks)
    assert all(block.attn.use_flash_attention for block in vit.blocks)
    torch.testing.assert_close(vit(image)[0], before, rtol=1e-5, atol=1e-5)


def test_every_trainable_parameter_gets_a_gradient(tiny_vit):
    vit = tiny_vit()
    prepare_vit_blocks(vit.blocks)
    vit(torch.rand(1, 1, 16, 24, 8))[0].square().sum().backward()
    trainable = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []
    frozen = {name for name, _ in vit.named_parameters()} - trainable.keys()
    assert frozen == {f"blocks.{i}.norm_cross_attn.{kind}" for i in range(2) for kind in ("weight", "bias")}


def test_blocks_that_save_attention_keep_the_plain_path(tiny_vit):
    vit = tiny_vit(save_attn=True)
    prepare_vit_blocks(vit.blocks)
    vit(torch.rand(1, 1, 16, 24, 8))
    assert not vit.blocks[0].attn.use_flash_attention
    assert vit.blocks[0].attn.att_mat.shape == (1, 2, 6, 6)


def test_dropout_is_refused(tiny_vit):
    with pytest.raises(ValueError, match=r"dropout_rate must be 0 with fused attention, found 0\.1"):
        prepare_vit_blocks(tiny_vit(dropout_rate=0.1).blocks)


@pytest.mark.parametrize(("img_size", "patch_size"), [((16, 24, 8), (8, 4, 2)), ((12, 10), (3, 5))])
def test_patch_size_and_channels(tiny_vit, img_size, patch_size):
    vit = tiny_vit(3, img_size, patch_size)
    assert vit_patch_size(vit) == patch_size
    assert vit_channels(vit) == 3


def test_perceptron_embedding_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="must have proj_type 'conv'"):
        vit_patch_size(tiny_vit(proj_type="perceptron"))


def test_learnable_positions_stay(tiny_vit):
    vit = tiny_vit()
    positions = vit.patch_embedding.position_embeddings
    before = positions.detach().clone()
    set_position_embedding(vit, (16, 24, 8), "learnable")
    assert vit.patch_embedding.position_embeddings is positions
    assert torch.equal(positions, before)
    assert positions.requires_grad


@pytest.mark.parametrize("img_size", [(16, 24, 8), (24, 16)])
def test_sincos_positions_are_set_and_frozen(tiny_vit, img_size):
    vit = tiny_vit(1, img_size)
    set_position_embedding(vit, img_size, "sincos")
    positions = vit.patch_embedding.position_embeddings
    assert torch.equal(positions, sincos_position_embedding([n // 8 for n in img_size], 24))
    assert not positions.requires_grad


def test_unknown_positions_are_refused(tiny_vit):
    with pytest.raises(ValueError, match="position_embedding must be learnable or sincos, found 'fourier'"):
        set_position_embedding(tiny_vit(), (16, 24, 8), "fourier")


@pytest.mark.parametrize("kind", ["learnable", "sincos"])
def test_positions_for_another_size_are_refused(tiny_vit, kind):
    with pytest.raises(ValueError, match=r"img_size \(16, 16, 8\) gives \(2, 2, 1\) patches, but the ViT has 6"):
        set_position_embedding(tiny_vit(), (16, 16, 8), kind)


@pytest.mark.parametrize(
    ("channels", "img_size", "patch_size"), [(1, (16, 24, 8), 8), (3, (8, 6, 4), (4, 3, 2)), (2, (12, 10), (3, 5))]
)
def test_embedding_single_patches_equals_the_convolution(tiny_vit, channels, img_size, patch_size):
    vit = tiny_vit(channels, img_size, patch_size)
    image = torch.rand(2, channels, *img_size)
    expected = vit.patch_embedding.patch_embeddings(image).flatten(2).transpose(1, 2)
    patches = patchify(image, vit_patch_size(vit))
    torch.testing.assert_close(embed_patches(vit, patches), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embed_patches(vit, patches[:, 1:3]), expected[:, 1:3], rtol=1e-5, atol=1e-5)
