"""ConvViTClassifier, against sums over the feature maps of its encoder."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from medmim.classification_scores import ClassificationScores
from medmim.datasets import get_preset
from medmim.description import build_network, describe_network, read_description, read_preset, read_thresholds
from medmim.handlers import SaveBestModel
from medmim.networks import ConvViT, ConvViTClassifier, checkpoint_activations
from medmim.optim import freeze_encoder, parameter_groups
from medmim.weights import load_checkpoint, load_encoder, save_encoder

SMALL = {"embed_dims": (4, 4, 8, 12), "depths": (1, 2, 1, 2), "num_heads": 2}
SIZE = (32, 16, 48)
SHAPES = [  # batch, channels, size
    (1, 1, (32, 48, 16)),
    (3, 2, (16, 16, 16)),
    (2, 1, (16, 32, 32)),
    (1, 3, (48, 32)),
    (3, 1, (16, 80)),
]
shapes = pytest.mark.parametrize(("batch", "channels", "size"), SHAPES)
PARTS = [  # learned parts that can be switched on and off
    {"layer_scale": 1.0, "relative_position_bias": False},
    {"layer_scale": None, "relative_position_bias": False},
    {"layer_scale": 1.0, "relative_position_bias": True},
    {"layer_scale": None, "relative_position_bias": True},
]
parts = pytest.mark.parametrize(
    "options", PARTS, ids=lambda options: f"scale={options['layer_scale']},bias={options['relative_position_bias']}"
)


def make(channels=1, n_outputs=3, img_size=SIZE, **options) -> ConvViTClassifier:
    """With other values in each tensor, so that each of them counts."""
    network = ConvViTClassifier(channels, n_outputs, img_size, spatial_dims=len(img_size), **(SMALL | options))
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    return network.eval()


def by_hand(network: ConvViTClassifier, image: Tensor) -> Tensor:
    """Logits from the feature maps: stages added to the deepest, normed, averaged, times the matrix."""
    *stages, deepest = network.encoder.feature_maps(image)
    for convolution, stage in zip(network.encoder.fusion, stages, strict=True):
        deepest = deepest + convolution(stage)  # its stride is its kernel
    latents = deepest.flatten(2).transpose(1, 2)
    centred = latents - latents.sum(dim=2, keepdim=True) / latents.shape[2]
    deviation = (centred.square().sum(dim=2, keepdim=True) / latents.shape[2] + 1e-6).sqrt()
    normed = centred / deviation * network.encoder.norm.weight + network.encoder.norm.bias
    mean = sum(normed[:, i] for i in range(normed.shape[1])) / normed.shape[1]
    return (mean[:, None] * network.head.weight).sum(dim=2) + network.head.bias


@shapes
@parts
def test_mean_of_the_normed_latents(batch, channels, size, options):
    network = make(channels, img_size=size, **options)
    image = torch.rand(batch, channels, *size)
    with torch.no_grad():
        found = network(image)
        expected = by_hand(network, image)
        alone = torch.cat([network(image[i : i + 1]) for i in range(batch)])
    assert found.shape == (batch, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_other_sizes_than_the_one_that_it_was_built_for(bias):
    network = make(relative_position_bias=bias)
    with torch.no_grad():
        for size in ((16, 16, 16), (48, 16, 32), (16, 64, 16)):
            image = torch.rand(2, 1, *size)
            torch.testing.assert_close(network(image), by_hand(network, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 32, 16, 40), r"size \(32, 16, 40\) is not divisible by \(16, 16, 16\): change roi_size"),
        ((1, 1, 8, 16, 16), r"size \(8, 16, 16\) is not divisible by \(16, 16, 16\)"),
        ((1, 2, 32, 16, 48), r"expected \(B, 1\) and 3 spatial axes"),
        ((1, 1, 32, 16), r"expected \(B, 1\) and 3 spatial axes"),
    ],
)
def test_another_image_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.rand(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative_position_bias": True, "img_size": None}, "relative_position_bias needs img_size"),
        ({"relative_position_bias": True, "img_size": (32, 32, 20)}, r"size \(32, 32, 20\) is not divisible"),
        ({"num_heads": 5}, r"embed_dims\[3\] 12 is not divisible by 5"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3"),
    ],
)
def test_faulty_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvViTClassifier(1, 2, **(SMALL | options))


def test_only_what_is_used_is_built():
    with torch.device("meta"):
        encoder = ConvViTClassifier(1, 2).encoder
    assert encoder.fifth_stage is None
    assert len(encoder.fusion) == 3
    assert [len(stage) for stage in encoder.stages] + [len(encoder.blocks)] == [2, 2, 2, 11]
    assert encoder.token_embedding.out_features == 384


@parts
@pytest.mark.parametrize("size", [(32, 16, 32), (48, 32)])
def test_every_parameter_gets_a_gradient(options, size):
    network = make(2, img_size=size, **options).train()
    network(torch.rand(2, 2, *size)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_nearly_equal_probabilities_at_the_start():
    for seed in range(4):
        torch.manual_seed(seed)
        network = ConvViTClassifier(1, 4, **SMALL)
        assert not network.head.bias.any()
        assert network.head.weight.any()
        probabilities = network(torch.rand(2, 1, *SIZE)).softmax(1)
        assert bool((probabilities - 0.25).abs().max() < 0.1)


def test_drop_path_changes_no_names_and_nothing_in_eval():
    plain, dropping = make(), make(drop_path_rate=0.5)
    assert list(dropping.state_dict()) == list(plain.state_dict())
    dropping.load_state_dict(plain.state_dict(), strict=True)
    image = torch.rand(4, 1, *SIZE)
    with torch.no_grad():
        expected = plain.eval()(image)
        assert torch.equal(dropping.eval()(image), expected)
        assert torch.equal(plain.train()(image), expected)  # without drop path, training is the same
        assert not torch.allclose(dropping.train()(image), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_checkpointed_activations_give_the_same_gradients(bias):
    image = torch.rand(2, 1, *SIZE)
    plain = make(relative_position_bias=bias, drop_path_rate=0.5)
    saving = make(relative_position_bias=bias, drop_path_rate=0.5)
    saving.load_state_dict(plain.state_dict())
    checkpoint_activations(saving)
    gradients = []
    for network in (plain.train(), saving.train()):
        torch.manual_seed(1)
        network(image).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_bfloat16():
    network = make(drop_path_rate=0.1, relative_position_bias=True)
    image = torch.rand(2, 1, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        network.train()(image).float().square().sum().backward()
        half = network.eval()(image)
    assert half.dtype == torch.bfloat16
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())
    torch.testing.assert_close(half.float(), network(image), rtol=0.1, atol=0.05)


def test_torchscript(tmp_path):
    network = make(relative_position_bias=True)
    torch.jit.trace(network, torch.rand(2, 1, *SIZE), check_trace=False).save(str(tmp_path / "model.ts"))
    image = torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        found = torch.jit.load(str(tmp_path / "model.ts"))(image)
        torch.testing.assert_close(found, network(image), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- its files


@parts
@pytest.mark.parametrize("size", [SIZE, (32, 48)])
def test_a_network_built_from_its_description_is_the_same(options, size):
    network = make(2, 5, size, **options)
    description = json.loads(json.dumps({"network": describe_network(network, size)}))
    assert description["network"]["name"] == "ConvViTClassifier"
    assert description["network"]["arguments"]["n_outputs"] == 5
    built = build_network(description).eval()
    assert isinstance(built, ConvViTClassifier)
    built.load_state_dict(network.state_dict(), strict=True)
    assert describe_network(built, size) == describe_network(network, size)
    image = torch.rand(2, 2, *size)
    with torch.no_grad():
        assert torch.equal(built(image), network(image))


def test_model_is_saved_with_its_thresholds(tmp_path: Path):
    preset = get_preset("adrenalmnist3d")
    scores = ClassificationScores(preset.classification, {"hyperplasia": 0.25})
    network = make(n_outputs=1, relative_position_bias=True)
    handler = SaveBestModel(str(tmp_path), network, SIZE, preset, scores=scores)
    state = SimpleNamespace(epoch=3, best_metric_epoch=3, best_metric=0.9, key_metric_name="mean_auc")
    handler(SimpleNamespace(state=state))
    assert read_thresholds(tmp_path / "model.json") == {"hyperplasia": 0.25}
    description = read_description(tmp_path / "model.json")
    assert read_preset(description) == preset
    built = build_network(description).eval()
    load_checkpoint(built, tmp_path / "model.pt")
    image = torch.rand(1, 1, *SIZE)
    assert torch.equal(built(image), network(image))


@parts
def test_encoder_of_a_pretraining(tmp_path, preset, options):
    """Of Mask in Mask: every tensor is taken; what is new changes nothing at its start."""
    pretrained = ConvViT(fifth_stage=False, **SMALL).eval()
    save_encoder(tmp_path / "encoder.pt", pretrained, (16, 16, 16), preset)
    network = ConvViTClassifier(1, 3, SIZE, **SMALL, **options).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = load_encoder(network, tmp_path / "encoder.pt")
    theirs, ours = pretrained.state_dict(), network.encoder.state_dict()
    new = [f".scale{i}.factor" for i in (1, 2)] if options["layer_scale"] else []
    new += [".attn.position_bias.table"] if options["relative_position_bias"] else []
    assert sorted(report.new) == sorted(f"blocks.{i}{name}" for i in (0, 1) for name in new)
    assert report.unused == report.resized == report.adapted == []
    assert set(report.loaded) == set(theirs) == set(ours) - set(report.new)
    for name in report.loaded:
        assert torch.equal(ours[name], theirs[name]), name
    for name in before.keys() - {f"encoder.{name}" for name in report.loaded}:  # the head among them
        assert torch.equal(network.state_dict()[name], before[name]), name
    image = torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(network.encoder.encode(image), pretrained.encode(image))


def test_another_architecture_is_refused(tmp_path, preset):
    save_encoder(tmp_path / "encoder.pt", ConvViT(fifth_stage=False, **(SMALL | {"num_heads": 3})), SIZE, preset)
    with pytest.raises(ValueError, match="num_heads 3, expected 2"):
        load_encoder(make(), tmp_path / "encoder.pt")


# ------------------------------------------------------------------------------------------------------ optimisation


def test_layer_decay():
    """Blocks 1 to 6 after the embedding: one, two and one of the stages, two of the transformer; then the head."""
    network = make(relative_position_bias=True)
    groups = parameter_groups(network, 0.01, 0.05, 0.5)
    names = {id(p): name for name, p in network.named_parameters()}
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names.values())  # each once
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    layers = {"embeddings.0": 0, "stages.0.0": 1, "stages.1.0": 2, "stages.1.1": 3, "stages.2.0": 4}
    layers |= {"embeddings.1": 2, "embeddings.2": 4, "embeddings.3": 5, "token_embedding": 5}
    layers |= {"blocks.0": 5, "blocks.1": 6}
    for name, (rate, decay) in found.items():
        place = re.match(r"encoder\.((?:stages\.\d+\.\d+|embeddings\.\d+|blocks\.\d+|token_embedding))\.", name)
        layer = layers[place[1]] if place else 7
        assert rate == pytest.approx(0.01 * 0.5 ** (7 - layer)), name
        plain = network.get_parameter(name).ndim == 1 or name.endswith("position_bias.table")
        assert decay == (0.0 if plain else 0.05), name
    assert found["head.weight"] == (0.01, 0.05)
    assert found["head.bias"] == found["encoder.norm.weight"] == found["encoder.norm.bias"] == (0.01, 0.0)


@parts
def test_frozen_encoder_leaves_the_head(options):
    network = make(**options)
    assert freeze_encoder(network) is network.encoder
    new = (".scale1.", ".scale2.", ".position_bias.")  # which no pre-training gives
    expected = {name for name, _ in network.named_parameters() if any(part in name for part in new)}
    assert bool(expected) is (options != PARTS[1])
    expected |= {"head.weight", "head.bias"}
    assert {name for name, p in network.named_parameters() if p.requires_grad} == expected
