"""ViTClassifier, against stock MONAI ViTs and hand-written sums."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import ViT

from medmim.classes import Classification
from medmim.classification_scores import ClassificationScores
from medmim.datasets import get_preset
from medmim.description import build_network, describe_network, read_description, read_preset, read_thresholds
from medmim.handlers import SaveBestModel
from medmim.networks import MaskedAutoencoder, ViTClassifier, patchify
from medmim.networks.vit import checkpoint_activations, embed_patches
from medmim.optim import freeze_encoder, parameter_groups
from medmim.weights import load_checkpoint, load_encoder, save_encoder

SIZES = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 3, "num_heads": 2}
SHAPES = [  # channels, img_size, patch_size
    (1, (16, 16), (8, 8)),
    (3, (12, 20), (4, 5)),
    (2, (21, 6), (3, 2)),
    (1, (7, 35), (7, 5)),
]
both = pytest.mark.parametrize("pooling", ["mean", "class_token"])
shapes = pytest.mark.parametrize(("channels", "img_size", "patch_size"), SHAPES)


def make(pooling="mean", channels=1, img_size=(16, 24), patch_size=8, n_outputs=3, **options) -> ViTClassifier:
    return ViTClassifier(channels, n_outputs, img_size, patch_size, pooling, **(SIZES | options))


def stock(channels=1, img_size=(16, 24), patch_size=8, **options) -> ViT:
    return ViT(channels, img_size, patch_size, spatial_dims=2, **(SIZES | options))


@shapes
def test_patches_have_the_order_of_pre_training(channels, img_size, patch_size):
    """What the autoencoder embeds patch by patch is, token for token, what the classifier's convolution makes."""
    encoder = stock(channels, img_size, patch_size)
    pretraining = MaskedAutoencoder(encoder, img_size, "linear", position_embedding="learnable")
    classifier = make("mean", channels, img_size, patch_size)
    classifier.vit.load_state_dict(encoder.state_dict(), strict=True)
    image = torch.rand(2, channels, *img_size)
    patches = patchify(image, pretraining.patch_size)
    with torch.no_grad():
        expected = embed_patches(pretraining.encoder, patches) + encoder.patch_embedding.position_embeddings
        found = classifier.vit.patch_embedding(image)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # and each token by hand, so that both cannot be wrong alike
        stem = encoder.patch_embedding.patch_embeddings
        (rows, columns), (height, width) = classifier.grid, patch_size
        for row in range(rows):
            for column in range(columns):
                box = image[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
                token = (box[:, None] * stem.weight[None]).sum(dim=(2, 3, 4)) + stem.bias
                at = row * columns + column
                position = encoder.patch_embedding.position_embeddings[0, at]
                torch.testing.assert_close(found[:, at], token + position, rtol=1e-5, atol=1e-5)


@shapes
@both
def test_encoder_file_fits_stock_monai_and_the_classifier(tmp_path, preset, pooling, channels, img_size, patch_size):
    encoder = stock(channels, img_size, patch_size)
    pretraining = MaskedAutoencoder(encoder, img_size, "linear")
    path = tmp_path / "encoder.pt"
    save_encoder(path, pretraining.encoder, img_size, preset)
    state_dict = torch.load(path, weights_only=True)["state_dict"]
    stock(channels, img_size, patch_size).load_state_dict(state_dict, strict=True)
    classifier = make(pooling, channels, img_size, patch_size)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    report = load_encoder(classifier, path)
    assert sorted(report.loaded) == sorted(state_dict) == sorted(classifier.vit.state_dict())
    assert report.resized == report.adapted == report.new == report.unused == []
    for name, tensor in classifier.state_dict().items():
        expected = state_dict[name.removeprefix("vit.")] if name.startswith("vit.") else before[name]
        assert torch.equal(tensor, expected), name


@both
def test_positions_of_another_grid_are_resized(tmp_path, preset, pooling):
    """A ramp along the columns stays one, with the ends of linear resizing without aligned corners."""
    encoder = stock(1, (16, 32), 8)  # 2 x 4 tokens
    ramp = torch.arange(4.0).repeat(2)[None, :, None].expand(1, 8, 24)
    encoder.patch_embedding.position_embeddings.data.copy_(ramp)
    save_encoder(tmp_path / "encoder.pt", encoder, (16, 32), preset)
    classifier = make(pooling, 1, (32, 64), 8)  # 4 x 8
    report = load_encoder(classifier, tmp_path / "encoder.pt")
    assert report.resized == ["patch_embedding.position_embeddings"]
    assert len(report.loaded) == len(encoder.state_dict()) - 1
    found = classifier.vit.patch_embedding.position_embeddings.reshape(4, 8, 24)
    expected = torch.tensor([min(max((i + 0.5) / 2 - 0.5, 0.0), 3.0) for i in range(8)])
    torch.testing.assert_close(found, expected[None, :, None].expand(4, 8, 24))


def test_another_architecture_is_refused(tmp_path, preset):
    save_encoder(tmp_path / "encoder.pt", stock(num_heads=4), (16, 24), preset)
    with pytest.raises(ValueError, match="num_heads 4, expected 2"):
        load_encoder(make(), tmp_path / "encoder.pt")


@shapes
@pytest.mark.parametrize("batch", [1, 3])
def test_mean_of_the_normed_tokens_of_a_stock_vit(channels, img_size, patch_size, batch):
    classifier = make("mean", channels, img_size, patch_size).eval()
    theirs = stock(channels, img_size, patch_size).eval()
    theirs.load_state_dict(classifier.vit.state_dict(), strict=True)
    image = torch.rand(batch, channels, *img_size)
    with torch.no_grad():
        tokens = theirs(image)[0]
        pooled = sum(tokens[:, i] for i in range(tokens.shape[1])) / tokens.shape[1]
        expected = pooled @ classifier.head.weight.T + classifier.head.bias
        found = classifier(image)
    assert found.shape == (batch, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@shapes
@pytest.mark.parametrize("batch", [1, 3])
def test_class_token_of_a_stock_vit(channels, img_size, patch_size, batch):
    """MONAI's own ViT with ``classification=True`` has its class token first, too."""
    classifier = make("class_token", channels, img_size, patch_size).eval()
    torch.nn.init.normal_(classifier.class_token)
    theirs = stock(channels, img_size, patch_size, classification=True, num_classes=3, post_activation=None).eval()
    tensors = classifier.vit.state_dict() | {"cls_token": classifier.class_token}
    tensors |= {f"classification_head.{name}": value for name, value in classifier.head.state_dict().items()}
    theirs.load_state_dict(tensors, strict=True)
    image = torch.rand(batch, channels, *img_size)
    with torch.no_grad():
        torch.testing.assert_close(classifier(image), theirs(image)[0], rtol=1e-4, atol=1e-6)
        other = classifier(torch.rand_like(image))
    assert not torch.allclose(classifier(image), other)  # the image reaches the token


@both
def test_nearly_equal_probabilities_at_the_start(pooling):
    probabilities = make(pooling, n_outputs=4).eval()(torch.rand(2, 1, 16, 24)).softmax(1)
    assert bool((probabilities - 0.25).abs().max() < 0.1)


def test_faulty_arguments_are_refused():
    with pytest.raises(ValueError, match="pooling must be mean or class_token, found 'max'"):
        make("max")
    with pytest.raises(ValueError, match=r"\(16, 25\) is not divisible by \(8, 8\)"):
        make(img_size=(16, 25))


@both
def test_drop_path_changes_no_names_and_nothing_in_eval(pooling):
    plain, dropping = make(pooling), make(pooling, drop_path_rate=0.5)
    assert list(dropping.state_dict()) == list(plain.state_dict())
    dropping.load_state_dict(plain.state_dict(), strict=True)
    image = torch.rand(4, 1, 16, 24)
    with torch.no_grad():
        assert torch.equal(dropping.eval()(image), plain.eval()(image))
        assert torch.equal(plain.train()(image), plain.eval()(image))  # without drop path, training is the same
        assert not torch.equal(dropping.train()(image), plain.eval()(image))


def test_drop_path_grows_linearly_and_keeps_the_mean():
    """Each block's branches are left out for whole samples, at 0, 0.25 and 0.5, and else enlarged."""
    network = make("mean", drop_path_rate=0.5).train()
    tokens = torch.rand(4000, 2, 24)
    for block, rate in zip(network.vit.blocks, (0.0, 0.25, 0.5), strict=True):
        for branch in (block.attn, block.mlp):
            with torch.no_grad():
                found, whole = branch.train()(tokens), branch.eval()(tokens)
            branch.train()
            left_out = (found == 0).flatten(1).all(dim=1)
            assert float(left_out.float().mean()) == pytest.approx(rate, abs=0.04)
            torch.testing.assert_close(found[~left_out], whole[~left_out] / (1 - rate), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.mean(0), whole.mean(0), rtol=0.15, atol=0.02)


@both
def test_layer_decay(pooling):
    network = make(pooling)
    groups = parameter_groups(network, 0.01, 0.05, 0.5)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, p in network.named_parameters() if p.requires_grad}
    for name, settings in found.items():
        block = re.match(r"vit\.blocks\.(\d+)\.", name)
        layer = 0 if "patch_embedding" in name else int(block[1]) + 1 if block else 4
        plain = "norm" in name or name.endswith("bias") or "position" in name or name == "class_token"
        assert settings == (pytest.approx(0.01 * 0.5 ** (4 - layer)), 0.0 if plain else 0.05), name
    assert found["head.weight"] == (0.01, 0.05)
    if pooling == "class_token":
        assert found["class_token"] == (0.01, 0.0)


@both
def test_frozen_encoder_leaves_head_and_class_token(pooling):
    network = make(pooling)
    freeze_encoder(network)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trainable == {"head.weight", "head.bias"} | ({"class_token"} if pooling == "class_token" else set())


@both
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_network_built_from_its_description_is_the_same(pooling, qkv_bias):
    network = make(pooling, 3, (12, 20), (4, 5), 5, qkv_bias=qkv_bias).eval()
    description = json.loads(json.dumps({"network": describe_network(network, (12, 20))}))
    assert description["network"]["arguments"]["pooling"] == pooling
    built = build_network(description).eval()
    assert isinstance(built, ViTClassifier)
    built.load_state_dict(network.state_dict(), strict=True)
    image = torch.rand(2, 3, 12, 20)
    assert torch.equal(built(image), network(image))


@both
def test_torchscript(pooling, tmp_path):
    network = make(pooling).eval()
    image = torch.rand(2, 1, 16, 24)
    torch.jit.script(network).save(str(tmp_path / "model.ts"))
    with torch.no_grad():
        found = torch.jit.load(str(tmp_path / "model.ts"))(image)
        torch.testing.assert_close(found, network(image), rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_checkpointed_activations_give_the_same_gradients(pooling, drop_path_rate):
    image = torch.rand(4, 1, 16, 24)
    plain, saving = make(pooling, drop_path_rate=drop_path_rate), make(pooling, drop_path_rate=drop_path_rate)
    saving.load_state_dict(plain.state_dict())
    checkpoint_activations(saving)
    gradients = []
    for network in (plain.train(), saving.train()):
        torch.manual_seed(1)
        network(image).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@both
def test_bfloat16(pooling):
    network = make(pooling, drop_path_rate=0.1)
    image = torch.rand(2, 1, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.train()(image)
        logits.float().square().sum().backward()
        half = network.eval()(image)
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.requires_grad)
    torch.testing.assert_close(half.float(), network(image), rtol=0.1, atol=0.05)


@both
def test_model_is_saved_with_its_thresholds(tmp_path: Path, pooling):
    preset = get_preset("phantom_cxr")
    assert isinstance(preset.classification, Classification)
    scores = ClassificationScores(preset.classification, {"effusion": 0.25})
    network = make(pooling, n_outputs=2).eval()
    handler = SaveBestModel(str(tmp_path), network, (16, 24), preset, scores=scores)
    state = SimpleNamespace(epoch=3, best_metric_epoch=2, best_metric=0.9, key_metric_name="mean_auc")
    handler(SimpleNamespace(state=state))
    assert not any(tmp_path.iterdir())  # not the best
    state.best_metric_epoch = 3
    handler(SimpleNamespace(state=state))
    assert read_thresholds(tmp_path / "model.json") == {"effusion": 0.25, "nodule": 0.5}
    description = read_description(tmp_path / "model.json")
    assert read_preset(description) == preset
    built = build_network(description).eval()
    load_checkpoint(built, tmp_path / "model.pt")
    image = torch.rand(1, 1, 16, 24)
    assert torch.equal(built(image), network(image))


def test_model_without_thresholds_is_refused(tmp_path: Path, preset):
    handler = SaveBestModel(str(tmp_path), make(), (16, 24), preset)
    state = SimpleNamespace(epoch=1, best_metric_epoch=1, best_metric=0.9, key_metric_name="dice")
    handler(SimpleNamespace(state=state))
    with pytest.raises(ValueError, match=r"model\.json: holds no thresholds: expected the model of a classification"):
        read_thresholds(tmp_path / "model.json")
    with pytest.raises(ValueError, match=r"other\.json: no such file: train first"):
        read_thresholds(tmp_path / "other.json")
