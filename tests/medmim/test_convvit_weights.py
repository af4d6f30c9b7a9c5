"""A ConvViT travels: description, ``encoder.pt``, loading into a dense network, parameter groups."""

import re
from copy import deepcopy

import pytest
import torch

from medmim.description import build_network, describe, describe_network, read_preset
from medmim.losses import MaskedReconstructionLoss
from medmim.networks import ConvViT, ConvViTUNETR, FeatureExtractor, MaskInMask, checkpoint_activations
from medmim.networks.decoders import TransformerDecoder
from medmim.optim import freeze_encoder, parameter_groups
from medmim.weights import build_encoder, find_encoder, load_encoder, save_encoder

SIZES = {"embed_dims": (6, 6, 12, 12), "depths": (1, 2, 1, 2), "num_heads": 2}
SIZE = (32, 16, 32)


def pretraining(**options):
    return filled(ConvViT(**{**SIZES, "fifth_stage": False, **options}))


def dense(**options):
    return ConvViT(**{**SIZES, "fusion": False, "layer_scale": 1.0, "img_size": SIZE, **options})


def filled(network, seed=0):
    """With other values in each tensor, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data + 0.1 * torch.rand(tensor.shape, generator=generator)
    return network.eval()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def saved(tmp_path, preset):
    """Writes an encoder as ``encoder.pt``."""

    def save(encoder=None, img_size=SIZE):
        save_encoder(tmp_path / "encoder.pt", encoder or pretraining(), img_size, preset)
        return tmp_path / "encoder.pt"

    return save


@pytest.fixture
def refused(record_property):
    """The message with which a file is refused; the network stays as it was."""

    def load(network, path, **options):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            load_encoder(network, path, **options)
        assert same(before, network.state_dict())
        message = str(error.value)
        assert "\n" not in message
        record_property("error", message)
        return message.removeprefix(f"{path}: ")

    return load


# ------------------------------------------------------------------------------------------------ description, features


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fifth_stage": False},
        {"fusion": False, "layer_scale": 1.0},
        {"fusion": False, "relative_position_bias": True, "img_size": SIZE},
        {"in_channels": 3, "mlp_ratio": 2.0},
        {"spatial_dims": 2, "img_size": SIZE[:2], "relative_position_bias": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_description_builds_the_encoder(options):
    encoder = filled(ConvViT(**SIZES, **options))
    size = SIZE[: options.get("spatial_dims", 3)]
    network = describe_network(encoder, size)
    assert network["name"] == "ConvViT"
    assert network["arguments"]["img_size"] == list(size)
    built = build_network({"network": network}).eval()
    built.load_state_dict(encoder.state_dict(), strict=True)
    assert describe_network(built, size) == network
    image = torch.rand(2, options.get("in_channels", 1), *size)
    for ours, theirs in zip(built(image), encoder(image), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_description_of_the_published_sizes(size):
    with torch.device("meta"):
        arguments = describe_network(getattr(ConvViT, size)(), (96, 96, 96))["arguments"]
    expected = {"tiny": ([12, 24, 48, 96], 3), "base": ([48, 96, 192, 384], 12)}[size]
    assert (arguments["embed_dims"], arguments["num_heads"]) == expected
    assert (arguments["depths"], arguments["mlp_ratio"], arguments["in_channels"]) == ([2, 2, 2, 11], 4.0, 1)


def test_features_are_the_latents_of_all_tokens():
    encoder = pretraining()
    extractor = FeatureExtractor(encoder, SIZE)
    image = torch.rand(2, 1, *SIZE)
    features = extractor(image)
    assert features.shape == (2, 12, 2, 1, 2)
    latents = encoder(image, torch.zeros(2, 2, 1, 2, dtype=torch.bool))  # the masked way, with nothing hidden
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), latents)
    torch.testing.assert_close(features[:, :, 1, 0, 0], latents[:, 2])
    assert (extractor.patch_size, extractor.feature_size, extractor.grid) == ((16, 16, 16), 12, (2, 1, 2))


def test_features_need_latents():
    with pytest.raises(ValueError, match="the encoder must be a ConvViT with fusion=True"):
        FeatureExtractor(dense(), SIZE)
    with pytest.raises(ValueError, match="divisible"):
        FeatureExtractor(pretraining(), (32, 24, 32))


def test_description_builds_the_feature_extractor(preset):
    extractor = filled(FeatureExtractor(pretraining(), SIZE))
    description = describe(extractor, SIZE, preset)
    assert description["network"]["name"] == "FeatureExtractor"
    assert description["network"]["arguments"]["encoder"] == "ConvViT"
    assert read_preset(description) == preset
    built = build_network(description).eval()
    built.load_state_dict(extractor.state_dict(), strict=True)
    image = torch.rand(1, 1, *SIZE)
    torch.testing.assert_close(built(image), extractor(image))


def test_description_of_a_vit_inside_is_as_before(tiny_vit):
    extractor = FeatureExtractor(tiny_vit(), (16, 24, 8))
    arguments = describe_network(extractor, (16, 24, 8))["arguments"]
    assert "encoder" not in arguments
    assert type(build_network({"network": describe_network(extractor, (16, 24, 8))}).encoder).__name__ == "ViT"


@pytest.mark.parametrize("bias", [False, True])
def test_description_builds_the_segmentation_network(bias):
    network = filled(ConvViTUNETR(1, 3, SIZE, **SIZES, relative_position_bias=bias))
    described = describe_network(network, SIZE)
    built = build_network({"network": described}).eval()
    built.load_state_dict(network.state_dict(), strict=True)
    assert describe_network(built, SIZE) == described
    image = torch.rand(1, 1, *SIZE)
    torch.testing.assert_close(built(image), network(image))


# ----------------------------------------------------------------------------------------------------------- encoder.pt


def test_encoder_comes_back(saved):
    encoder = pretraining(in_channels=2)
    built = build_encoder(saved(encoder))
    assert type(built) is ConvViT
    assert same(built.state_dict(), encoder.state_dict())


def test_pretrained_encoder_in_a_dense_one(saved, capsys):
    encoder = pretraining()
    network = ConvViTUNETR(1, 3, SIZE, **SIZES, relative_position_bias=True).eval()
    report = load_encoder(network, saved(encoder))
    target = network.encoder.state_dict()
    assert set(report.new) == {
        *(name for name in target if name.startswith("fifth_stage.")),
        *(f"blocks.{i}.scale{j}.factor" for i in (0, 1) for j in (1, 2)),
        *(f"blocks.{i}.attn.position_bias.table" for i in (0, 1)),
    }
    assert set(report.unused) == {name for name in encoder.state_dict() if name.startswith(("fusion.", "norm."))}
    assert set(report.loaded) == set(target) - set(report.new)
    assert not report.resized
    assert not report.adapted
    assert all(torch.equal(target[name], encoder.state_dict()[name]) for name in report.loaded)
    assert capsys.readouterr().out.strip() == str(report)
    assert f"{len(report.new)} new (" in str(report)
    assert f"{len(report.unused)} unused (" in str(report)
    # layer scale 1 and a bias of zeros change nothing
    image = torch.rand(1, 1, *SIZE)
    for ours, theirs in zip(network.encoder(image)[:4], encoder(image), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_encoder_of_a_pretraining_checkpoint(tmp_path):
    """Behind a prefix, beside decoder and projectors, without a description."""
    levels = [
        {"crop_size": 64, "img_size": 32, "mask_unit": 16, "mask_ratio": 0.5},
        {"img_size": 32, "mask_ratio": 0.5, "samples": 2},
    ]
    decoder = TransformerDecoder(12, 16**3, (2, 2, 2), 12, 1, 2)
    network = filled(MaskInMask(pretraining(), decoder, levels, MaskedReconstructionLoss((16, 16, 16))))
    torch.save({"network": network.state_dict()}, tmp_path / "checkpoint.pt")
    target = dense()
    report = load_encoder(target, tmp_path / "checkpoint.pt")
    assert torch.equal(target.blocks[1].attn.qkv.weight, network.encoder.blocks[1].attn.qkv.weight)
    beside = {name.split(".")[0] for name in report.unused if not name.startswith("encoder.")}
    assert beside == {"decoder", "alignment"}
    assert find_encoder(network) is network.encoder


def test_dense_encoder_in_a_dense_one(saved):
    """Fine-tuned weights once more: the running statistics of the fifth stage come along."""
    encoder = filled(dense(relative_position_bias=True))
    target = dense(relative_position_bias=True, drop_path_rate=0.1)
    report = load_encoder(target, saved(encoder))
    assert not report.new
    assert not report.unused
    assert same(target.state_dict(), encoder.state_dict())


def test_other_input_size(saved):
    """Positions are computed, so nothing has a size."""
    encoder = pretraining()
    target = pretraining(img_size=(48, 48, 48))
    assert not load_encoder(target, saved(encoder)).new
    image = torch.rand(1, 1, 48, 32, 16)
    torch.testing.assert_close(target.encode(image), encoder.encode(image))


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1)])
def test_other_channels(saved, theirs, ours):
    encoder, target = pretraining(in_channels=theirs), pretraining(in_channels=ours)
    report = load_encoder(target, saved(encoder))
    assert report.adapted == ["embeddings.0.conv.weight"]
    image = torch.rand(1, 1, *SIZE)
    expected = encoder(image.expand(-1, theirs, -1, -1, -1))
    for found, value in zip(target(image.expand(-1, ours, -1, -1, -1)), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"embed_dims": (6, 6, 12, 24)}, "embed_dims [6, 6, 12, 12], expected [6, 6, 12, 24]"),
        ({"depths": (1, 2, 1, 3)}, "depths [1, 2, 1, 2], expected [1, 2, 1, 3]"),
        ({"depths": (1, 1, 1, 2)}, "stages.1.1.norm1.weight has no place"),
        ({"num_heads": 3}, "num_heads 2, expected 3. The file was made with --num_heads 2"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 4.0, expected 2.0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_another_architecture(saved, refused, options, says):
    message = refused(dense(**options), saved())
    assert message.startswith("another architecture than the network's: ")
    assert says in message


def test_latents_need_their_tensors(saved, refused):
    encoder = dense(layer_scale=None, fifth_stage=False)
    message = refused(FeatureExtractor(pretraining(), SIZE), saved(encoder))
    assert "8 tensors do not fit, first: fusion.0.weight is missing" in message
    report = load_encoder(pretraining(), saved(encoder), allow_new=("fusion", "norm."))
    assert len(report.new) == 8


def test_layer_scale_is_not_left_out(saved, refused):
    message = refused(dense(layer_scale=None), saved(filled(dense())))
    assert "4 tensors do not fit, first: blocks.0.scale1.factor has no place" in message


def test_a_vits_file(tiny_vit, tmp_path, refused):
    torch.save(tiny_vit().state_dict(), tmp_path / "vit.pt")
    message = refused(dense(), tmp_path / "vit.pt")
    assert message.startswith("holds a ViT, but the network's encoder is a ConvViT: give a file of a ConvViT")


# --------------------------------------------------------------------------------------------------------- optimisation


def settings(network, groups):
    """Name of each parameter and its (learning rate, weight decay)."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_seventeen_layers():
    network = ConvViTUNETR(1, 2, 32, (12, 12, 12, 12), num_heads=2, relative_position_bias=True)
    found = settings(network, parameter_groups(network, 1.0, 0.05, 0.75))
    assert found.keys() == dict(network.named_parameters()).keys()
    layers = {
        "embeddings.0.conv.weight": 0,
        "stages.0.0.depthwise.weight": 1,
        "stages.0.1.mlp.0.weight": 2,
        "embeddings.1.conv.weight": 3,
        "stages.1.0.conv1.weight": 3,
        "stages.1.1.conv2.weight": 4,
        "embeddings.2.conv.weight": 5,
        "stages.2.1.conv1.weight": 6,
        "embeddings.3.conv.weight": 7,
        "token_embedding.weight": 7,
        "blocks.0.attn.qkv.weight": 7,
        "blocks.1.mlp.2.weight": 8,
        "blocks.10.attn.proj.weight": 17,
        "fifth_stage.0.weight": 18,
    }
    for name, layer in layers.items():
        assert found[f"encoder.{name}"] == (pytest.approx(0.75 ** (18 - layer)), 0.05), name
    assert found["decoder5.transp_conv.conv.weight"] == (1.0, 0.05)
    assert len({rate for rate, _ in found.values()}) == 19
    for name, (_, decay) in found.items():
        parameter = network.get_parameter(name)
        plain = parameter.ndim == 1 or "position_bias" in name
        assert decay == (0.0 if plain else 0.05), name


def test_pretraining_groups():
    network = pretraining()
    found = settings(network, parameter_groups(network, 0.1, 0.05))
    assert {rate for rate, _ in found.values()} == {0.1}
    assert found["fusion.2.weight"] == (0.1, 0.05)
    assert found["norm.weight"] == (0.1, 0.0)


def test_frozen_encoder():
    network = ConvViTUNETR(1, 2, **SIZES)
    assert freeze_encoder(network) is network.encoder
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    new = ("fifth_stage.", ".scale1.", ".scale2.", ".position_bias.")  # which no pre-training gives
    given = {name for name, _ in network.named_parameters() if name.startswith("encoder.")}
    given = {name for name in given if not any(part in name for part in new)}
    assert learning == {name for name, _ in network.named_parameters()} - given
    assert set(settings(network, parameter_groups(network, 0.1, 0.05, 0.75))) == learning


def test_checkpointed_activations_change_nothing():
    image = torch.rand(2, 1, *SIZE)
    mask = torch.tensor([[True, False], [False, True]]).view(2, 2, 1, 1).expand(2, 2, 1, 2)
    original, gradients = pretraining(), []
    for checkpointed in (False, True):
        encoder = deepcopy(original)
        names = encoder.state_dict().keys()
        if checkpointed:
            checkpoint_activations(encoder)
        encoder(image, mask).square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
        assert encoder.state_dict().keys() == names
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
