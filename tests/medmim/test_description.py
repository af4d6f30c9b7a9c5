"""Descriptions: a network is read off and built again."""

import json

import pytest
import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import PatchMerging, SwinTransformer

from medmim.datasets import preset_table
from medmim.description import (
    BUILDERS,
    TASKS,
    build_network,
    check_version,
    describe,
    describe_network,
    describe_vit,
    read_description,
    read_preset,
    write_description,
)
from medmim.encoders import KINDS
from medmim.networks import UNETR, FeatureExtractor, MaskedAutoencoder
from medmim.version import FORMAT_VERSION, __version__
from tests.common import FILES as ALL

SMALL = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 4, "num_heads": 3, "qkv_bias": True}


def test_arguments_are_read_off_the_network():
    vit = ViT(3, (16, 24), (8, 4), 24, 40, 3, 2, spatial_dims=2)
    assert describe_vit(vit, (16, 24)) == {
        "in_channels": 3,
        "img_size": [16, 24],
        "patch_size": [8, 4],
        "hidden_size": 24,
        "mlp_dim": 40,
        "num_layers": 3,
        "num_heads": 2,
        "qkv_bias": False,
        "spatial_dims": 2,
    }


@pytest.mark.parametrize(
    ("network", "channels", "img_size"),
    [
        (lambda: ViT(1, (16, 24, 8), 8, **SMALL), 1, (16, 24, 8)),
        (lambda: FeatureExtractor(ViT(2, (16, 24), (8, 4), spatial_dims=2, **SMALL), (16, 24)), 2, (16, 24)),
        (lambda: UNETR(2, 5, (16, 24, 8), 8, 6, **SMALL), 2, (16, 24, 8)),
        (lambda: UNETR(1, 3, (32, 64), 32, 4, spatial_dims=2, **SMALL), 1, (32, 64)),
    ],
)
def test_a_network_built_from_its_description_is_the_same(network, channels, img_size):
    network = network().eval()
    description = json.loads(json.dumps({"network": describe_network(network, img_size)}))
    built = build_network(description).eval()
    assert type(built) is type(network)
    built.load_state_dict(network.state_dict(), strict=True)
    scan = torch.rand(1, channels, *img_size)
    found, expected = built(scan), network(scan)
    if isinstance(network, ViT):
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_networks_are_refused(tiny_vit):
    known = "ViT, SwinTransformer, ConvViT, FeatureExtractor, UNETR"
    with pytest.raises(ValueError, match=f"cannot describe a MaskedAutoencoder: expected {known}"):
        describe_network(MaskedAutoencoder(tiny_vit(), (16, 24, 8), "linear"), (16, 24, 8))
    with pytest.raises(ValueError, match=f"unknown network 'Swin', known are {known}"):
        build_network({"network": {"name": "Swin", "arguments": {}}})


@pytest.mark.parametrize("preset", preset_table().values(), ids=lambda preset: preset.name)
def test_file_keeps_network_and_preset(tmp_path, tiny_vit, preset):
    description = describe(tiny_vit(), (16, 24, 8), preset)
    write_description(description, tmp_path / "model.json")
    found = read_description(tmp_path / "model.json")
    assert found["format_version"] == FORMAT_VERSION
    assert found["medmim_version"] == __version__
    assert found["network"] == description["network"]
    assert read_preset(found) == preset


def test_reading_a_preset_leaves_the_description(tiny_vit, preset):
    description = describe(tiny_vit(), (16, 24, 8), preset)
    read_preset(description)
    assert description["preset"]["name"] == preset.name


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"model\.json: no such file: train first .* or give --models_dir$"):
        read_description(tmp_path / "model.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'{"network": {}}', b'{"preset": {}}', b"\xff\xfe"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json: not a description of a network .*: train again$") as error:
        read_description(tmp_path / "model.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (FORMAT_VERSION + 1, "update medmim"),
        ("1", "update medmim"),
        (0, r"train again, or use it with medmim 9\.0"),
        (None, r"train again, or use it with medmim 9\.0"),
    ],
)
def test_other_format_versions_are_refused(tmp_path, version, advice):
    content = {"network": {}, "preset": {}, "format_version": version, "medmim_version": "9.0"}
    (tmp_path / "model.json").write_text(json.dumps(content))
    written = f"format version {'missing' if version is None else version} \\(written by medmim 9\\.0\\)"
    reads = f"this is medmim {__version__}, which reads version {FORMAT_VERSION}: {advice}$"
    with pytest.raises(ValueError, match=rf"model\.json: {written}, {reads}"):
        read_description(tmp_path / "model.json")
    with pytest.raises(ValueError, match=r"^w\.pt: format version"):
        check_version(content, "w.pt")


SWIN = {"in_chans": 2, "embed_dim": 12, "depths": [1, 2, 1, 1], "num_heads": [2, 3, 4, 6]}


@pytest.mark.parametrize(
    "arguments",
    [
        {"window_size": [3, 3, 3], "patch_size": [2, 2, 2], "mlp_ratio": 3.3, "qkv_bias": False},
        {"window_size": [2, 3, 4], "patch_size": [2, 1, 4], "downsample": "mergingv2", "patch_norm": True},
        {"window_size": [4, 3], "patch_size": [2, 4], "spatial_dims": 2, "use_v2": True},
    ],
)
def test_swin_built_from_its_description_is_the_same(arguments):
    arguments = SWIN | arguments
    swin = SwinTransformer(**arguments).eval()
    description = json.loads(json.dumps({"network": describe_network(swin, (16, 16, 16))}))
    assert description["network"]["name"] == "SwinTransformer"
    defaults = {"mlp_ratio": 4.0, "qkv_bias": True, "patch_norm": False, "spatial_dims": 3, "downsample": "merging"}
    assert description["network"]["arguments"] == defaults | {"use_v2": False} | arguments
    built = build_network(description).eval()
    built.load_state_dict(swin.state_dict(), strict=True)
    scan = torch.rand(1, 2, *(37, 22, 18)[: len(arguments["window_size"])])
    for found, expected in zip(built(scan), swin(scan), strict=True):
        torch.testing.assert_close(found, expected)


def test_swin_of_another_make_is_not_described():
    class Merging(PatchMerging):
        pass

    swin = SwinTransformer(window_size=[2, 2], patch_size=[2, 2], spatial_dims=2, downsample=Merging, **SWIN)
    with pytest.raises(ValueError, match="cannot describe a SwinTransformer with Hyena blocks, or with a downsampling"):
        describe_network(swin, (16, 16))


def test_each_network_of_a_model_has_a_task():
    encoders = {kind.name for kind in KINDS}
    assert TASKS.keys() == BUILDERS.keys() - encoders
    written = {"pretraining", "segmentation", "classification"}
    assert set(TASKS.values()) == {name.rsplit("_", 1)[1] for name in ALL} == written
