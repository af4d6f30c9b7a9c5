"""Every form of file that ``load_encoder`` takes: all tensors arrive, and the encoder computes the same as its source.

Files are written here by hand, as others would write them.
"""

import json
import sys

import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR, ViT
from monai.networks.nets.swin_unetr import SwinTransformer, filter_swinunetr
from monai.networks.utils import copy_model_state

import medmim.networks
from medmim.datasets import get_preset
from medmim.description import describe
from medmim.weights import (
    build_encoder,
    find_encoder,
    load_checkpoint,
    load_encoder,
    read_checkpoint,
    save_encoder,
    save_safetensors,
)

SWIN_STEM = "patch_embed.proj.weight"
SWIN = {"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (2, 3, 4, 6), "patch_size": (2, 2, 2)}
PRESET = get_preset("phantom")


def make_vit(channels=1):
    return ViT(channels, (12, 8, 20), (6, 4, 4), 24, 32, 3, 2)


def make_swin(channels=1, window_size=(3, 3, 3), **arguments):
    spatial_dims = len(window_size)
    return SwinTransformer(
        channels,
        window_size=window_size,
        spatial_dims=spatial_dims,
        **SWIN | {"patch_size": (2,) * spatial_dims} | arguments,
    )


def make_swin_unetr(spatial_dims=3):
    sizes = {"depths": (1, 2, 1, 1), "num_heads": (2, 3, 4, 6), "window_size": 3, "spatial_dims": spatial_dims}
    return SwinUNETR(1, 2, feature_size=12, **sizes)


MAKERS = {
    "ViT": make_vit,
    "ViT 2D": lambda: ViT(1, (12, 20), (6, 4), 24, 32, 2, 2, spatial_dims=2),
    "UNETR": lambda: UNETR(1, 2, (32, 16, 48), 4, hidden_size=24, mlp_dim=32, num_heads=2),
    "UNETR 2D": lambda: UNETR(1, 2, (32, 48), 4, hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=2),
    "SwinTransformer": make_swin,
    "SwinTransformer 2D": lambda: make_swin(window_size=(3, 4)),
    "SwinUNETR": make_swin_unetr,
    "SwinUNETR 2D": lambda: make_swin_unetr(spatial_dims=2),
}
SIZES = {  # of an image for the bare encoder; a Swin takes any
    "ViT": (12, 8, 20),
    "ViT 2D": (12, 20),
    "UNETR": (32, 16, 48),
    "UNETR 2D": (32, 48),
    "SwinTransformer": (19, 13, 10),
    "SwinTransformer 2D": (37, 22),
    "SwinUNETR": (9, 22, 13),
    "SwinUNETR 2D": (23, 38),
}


@pytest.fixture(scope="module")
def networks():
    """Source and target of each class; a target is to be filled, a source not to be changed."""
    torch.manual_seed(5)
    pairs = {}
    for name, maker in MAKERS.items():
        pairs[name] = scatter(maker()), maker().eval()
    return pairs


def scatter(network):
    """Weights and norms that are nowhere near their start."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def image(size, channels=1):
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(3))


def outputs(network, scan):
    """All that the encoder inside a network returns."""
    with torch.no_grad():
        result = find_encoder(network).eval()(scan)
    return [result[0], *result[1]] if isinstance(result, tuple) else result


def assert_same_encoder(found, expected, scan):
    theirs = outputs(expected, scan)
    assert all(tensor.std() > 0.01 for tensor in theirs if tensor[0, 0].numel() > 1)
    for ours, other in zip(outputs(found, scan), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def fresh(networks, name):
    """The target with weights of its own; buffers as the constructor computes them."""
    source, target = networks[name]
    buffers = dict(source.named_buffers())
    for tensor_name, tensor in target.state_dict().items():
        tensor.copy_(buffers[tensor_name]) if tensor_name in buffers else tensor.fill_(0.5)
    return source, target


def content_of(network, key, prefix):
    content = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    return content if key is None else {key: content, "epoch": 3, "description": "mine"}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "encoder.", "backbone.", "vit.", "swinViT.", "module.model.encoder."]
)
@pytest.mark.parametrize("name", MAKERS)
def test_any_prefix(networks, tmp_path, name, prefix):
    source, target = fresh(networks, name)
    content = content_of(source, None, prefix) | {"decoder.head.weight": torch.ones(2), "step": torch.tensor(3)}
    torch.save(content, tmp_path / "w.pt")
    report = load_encoder(target, tmp_path / "w.pt")
    encoder = find_encoder(source)
    assert sorted(report.loaded) == sorted(encoder.state_dict())
    assert report.new == report.resized == report.adapted == []
    assert len(report.loaded) + len(report.unused) == len(content)
    assert {"decoder.head.weight", "step"} <= set(report.unused)
    assert f"{len(report.loaded)} of {len(encoder.state_dict())} encoder tensors loaded" in str(report)
    assert_same_encoder(target, source, image(SIZES[name]))


@pytest.mark.parametrize("key", ["state_dict", "model", "network"])
@pytest.mark.parametrize("name", ["ViT", "UNETR", "SwinTransformer", "SwinUNETR"])
def test_nested(networks, tmp_path, name, key):
    source, target = fresh(networks, name)
    torch.save(content_of(source, key, "module.encoder."), tmp_path / "w.pt")
    assert sorted(load_encoder(target, tmp_path / "w.pt").loaded) == sorted(find_encoder(source).state_dict())
    assert_same_encoder(target, source, image(SIZES[name]))


@pytest.mark.parametrize(
    ("name", "part"), [("ViT", ""), ("SwinTransformer", ""), ("ViT", "blocks.0."), ("SwinTransformer", "layers2.0.")]
)
def test_compiled_as_a_whole_or_in_part(networks, tmp_path, name, part):
    source, target = fresh(networks, name)
    content = torch.compile(source).state_dict()
    if part:
        content = {key.replace(part, f"{part}_orig_mod."): value for key, value in source.state_dict().items()}
    assert any("_orig_mod." in key for key in content)
    torch.save(content, tmp_path / "w.pt")
    assert sorted(load_encoder(torch.compile(target), tmp_path / "w.pt").loaded) == sorted(source.state_dict())
    assert_same_encoder(target, source, image(SIZES[name]))


@pytest.mark.parametrize(
    ("source_name", "target_name"), [("SwinUNETR", "SwinTransformer"), ("SwinTransformer", "SwinUNETR")]
)
def test_from_one_network_to_another(networks, tmp_path, source_name, target_name):
    source, target = networks[source_name][0], fresh(networks, target_name)[1]
    torch.save(source.state_dict(), tmp_path / "w.pt")
    others = {n: t.clone() for n, t in target.state_dict().items() if not n.startswith("swinViT.")}
    report = load_encoder(target, tmp_path / "w.pt")
    assert len(report.loaded) == len(find_encoder(source).state_dict())
    assert_same_encoder(target, source, image((21, 12, 33)))
    if target_name == "SwinUNETR":
        assert all(torch.equal(target.state_dict()[n], t) for n, t in others.items())


# ------------------------------------------------------------------------------------------------------- our own files


def test_encoder_pt_of_a_swin(tmp_path):
    source = scatter(make_swin(2, (3, 4), patch_size=(2, 4), patch_norm=True, downsample="mergingv2"))
    save_encoder(tmp_path / "encoder.pt", source, (64, 32), PRESET)
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert set(content["state_dict"]) == set(source.state_dict())
    assert content["description"]["network"]["name"] == "SwinTransformer"
    built = build_encoder(tmp_path / "encoder.pt")
    assert type(built) is SwinTransformer
    assert_same_encoder(built, source, image((37, 22), 2))
    target = make_swin(2, (3, 4), patch_size=(2, 4), patch_norm=True, downsample="mergingv2")
    assert len(load_encoder(target, tmp_path / "encoder.pt").loaded) == len(source.state_dict())
    assert_same_encoder(target, source, image((37, 22), 2))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoint(tmp_path, wrapper):
    source = medmim.networks.MaskedAutoencoder(scatter(make_vit()), (12, 8, 20), "linear")
    optimizer = torch.optim.AdamW(source.parameters())
    source(image((12, 8, 20)), torch.arange(40).reshape(2, 20).fmod(2).bool().reshape(2, 2, 2, 5)).sum().backward()
    optimizer.step()
    state_dict = {wrapper + name: tensor for name, tensor in source.state_dict().items()}
    training = {"optimizer": optimizer.state_dict(), "epoch": 4, "iteration": 9, "made_with": {"loss_norm": "l2"}}
    torch.save({"network": state_dict} | training, tmp_path / "checkpoint.pt")

    vit = make_vit()
    report = load_encoder(vit, tmp_path / "checkpoint.pt")
    assert sorted(report.loaded) == sorted(vit.state_dict())
    assert sorted(report.unused) == sorted(name for name in state_dict if ".encoder." not in f".{name}")
    assert_same_encoder(vit, source, image((12, 8, 20)))

    network = medmim.networks.MaskedAutoencoder(make_vit(), (12, 8, 20), "linear")
    load_checkpoint(network, tmp_path / "checkpoint.pt", {"loss_norm": "l2"})
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())


def test_checkpoint_into_a_wrapped_network(tmp_path):
    source = scatter(make_vit())
    torch.save(source.state_dict(), tmp_path / "model.pt")
    network = make_vit()
    load_checkpoint(torch.compile(network), tmp_path / "model.pt")
    assert_same_encoder(network, source, image((12, 8, 20)))


# ---------------------------------------------------------------------------------------------- MONAI's published files


def published_ssl(network):
    """``model_swinvit.pt``: the Swin of a DDP-wrapped pre-training network of MONAI 0.8, with its heads."""
    state_dict = {}
    for name, tensor in network.swinViT.state_dict().items():
        state_dict["module." + name.replace("mlp.linear1", "mlp.fc1").replace("mlp.linear2", "mlp.fc2")] = tensor
    heads = {"norm.weight": 192, "norm.bias": 192, "rotation_head.weight": 4, "contrastive_head.bias": 512}
    heads |= {f"conv.{i}.weight": 3 for i in range(2)}
    state_dict |= {f"module.{name}": torch.ones(size) for name, size in heads.items()}
    return {"epoch": 100, "state_dict": state_dict, "optimizer": {"state": {}, "param_groups": []}}, list(heads)


def test_published_ssl_weights(networks, tmp_path):
    source, target = fresh(networks, "SwinUNETR")
    content, heads = published_ssl(source)
    assert "module.layers1.0.blocks.0.mlp.fc1.weight" in content["state_dict"]
    torch.save(content, tmp_path / "model_swinvit.pt")
    report = load_encoder(target, tmp_path / "model_swinvit.pt")
    assert sorted(report.loaded) == sorted(source.swinViT.state_dict())
    assert sorted(report.unused) == sorted(f"module.{name}" for name in heads)
    assert report.new == []

    oracle = make_swin_unetr().eval()
    oracle.load_from(torch.load(tmp_path / "model_swinvit.pt", weights_only=True))
    ours, monais = target.swinViT.state_dict(), oracle.swinViT.state_dict()
    assert ours.keys() == monais.keys()
    assert all(torch.equal(ours[name], monais[name]) for name in monais)
    assert_same_encoder(target, oracle, image((32, 64, 32)))
    assert_same_encoder(target, source, image((9, 22, 13)))


def test_published_ssl_weights_for_three_channels(networks, tmp_path):
    source = networks["SwinUNETR"][0]
    torch.save(published_ssl(source)[0], tmp_path / "w.pt")
    swin = make_swin(3)
    report = load_encoder(swin, tmp_path / "w.pt")
    assert report.adapted == [SWIN_STEM]
    assert_same_encoder_on(swin, image((9, 22, 13)).expand(-1, 3, -1, -1, -1), source, image((9, 22, 13)))


def test_published_full_network_weights(networks, tmp_path):
    """``ssl_pretrained_weights.pth``: an encoder with one level of names more, and a decoder."""
    source, target = fresh(networks, "SwinUNETR")
    state_dict = {
        "encoder.mask_token": torch.ones(1),
        "encoder.norm.weight": torch.ones(3),
        "out.conv.bias": torch.ones(2),
    }
    for name, tensor in source.swinViT.state_dict().items():
        stage, _, rest = name.partition(".0.")
        state_dict["encoder." + (f"{stage}.0.0.{rest}" if stage.startswith("layers") else name)] = tensor
    assert "encoder.layers1.0.0.blocks.0.mlp.linear1.weight" in state_dict
    torch.save({"model": state_dict, "epoch": 3}, tmp_path / "ssl_pretrained_weights.pth")
    report = load_encoder(target, tmp_path / "ssl_pretrained_weights.pth")
    assert sorted(report.loaded) == sorted(source.swinViT.state_dict())
    assert sorted(report.unused) == ["encoder.mask_token", "encoder.norm.weight", "out.conv.bias"]

    oracle = make_swin_unetr().eval()
    copy_model_state(oracle, state_dict, filter_func=filter_swinunetr)
    monais = oracle.swinViT.state_dict()
    assert all(torch.equal(target.swinViT.state_dict()[name], tensor) for name, tensor in monais.items())
    assert_same_encoder(target, source, image((9, 22, 13)))


# ------------------------------------------------------------------------------------------------- channels of a Swin


def assert_same_encoder_on(found, scan, expected, other_scan):
    for ours, theirs in zip(outputs(found, scan), outputs(expected, other_scan), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "wanted"), [(1, 4), (3, 1)])
@pytest.mark.parametrize("size", [(19, 13, 10), (37, 22)])
def test_stem_of_a_swin_is_adapted(tmp_path, channels, wanted, size):
    source, target = scatter(make_swin(channels, (3,) * len(size))), make_swin(wanted, (3,) * len(size))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    report = load_encoder(target, tmp_path / "w.pt")
    assert report.adapted == [SWIN_STEM]
    assert len(report.loaded) == len(source.state_dict()) - 1
    scan = image(size)
    repeated = [-1] * (scan.ndim - 2)
    assert_same_encoder_on(target, scan.expand(-1, wanted, *repeated), source, scan.expand(-1, channels, *repeated))


def test_stem_of_a_swin_may_stay(tmp_path):
    source, target = scatter(make_swin(2)), make_swin(4)
    own = target.patch_embed.proj.weight.detach().clone()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    report = load_encoder(target, tmp_path / "w.pt", allow_new="patch_embed.proj")
    assert report.new == [SWIN_STEM]
    assert torch.equal(target.patch_embed.proj.weight, own)
    assert torch.equal(target.patch_embed.proj.bias, source.patch_embed.proj.bias)


def test_swin_without_its_buffers(tmp_path):
    """The constructor computes them."""
    source, target = scatter(make_swin()), make_swin()
    learned = {name: tensor for name, tensor in source.state_dict().items() if "position_index" not in name}
    torch.save(learned, tmp_path / "w.pt")
    report = load_encoder(target, tmp_path / "w.pt")
    assert len(report.new) == 5
    assert sorted(report.loaded) == sorted(learned)
    assert_same_encoder(target, source, image((19, 13, 10)))


# -------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("name", ["ViT", "SwinTransformer"])
@pytest.mark.parametrize("file", ["encoder.safetensors", "encoder.pt"])
def test_safetensors(networks, tmp_path, name, file):
    source, target = fresh(networks, name)
    description = describe(source, SIZES[name], PRESET)
    save_safetensors(tmp_path / file, source.state_dict(), description)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    content = (tmp_path / file).read_bytes()
    save_safetensors(tmp_path / file, source.state_dict(), description)
    assert (tmp_path / file).read_bytes() == content
    assert read_checkpoint(tmp_path / file)[1] == json.loads(json.dumps(description))
    assert sorted(load_encoder(target, tmp_path / file).loaded) == sorted(source.state_dict())
    assert_same_encoder(target, source, image(SIZES[name]))
    assert_same_encoder(build_encoder(tmp_path / file), source, image(SIZES[name]))


def test_safetensors_written_by_others(networks, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = fresh(networks, "UNETR")
    state_dict = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    safetensors.save_file(state_dict, tmp_path / "w.safetensors", metadata={"description": "my best network"})
    report = load_encoder(target, tmp_path / "w.safetensors")
    assert sorted(report.loaded) == sorted(source.vit.state_dict())
    assert_same_encoder(target, source, image(SIZES["UNETR"]))


def test_whole_network_as_safetensors(tmp_path):
    network = medmim.networks.UNETR(1, 3, (16, 8, 24), 8, 4, 24, 32, 4, 2)
    save_safetensors(tmp_path / "model.safetensors", network.state_dict(), describe(network, (16, 8, 24), PRESET))
    built = build_encoder(tmp_path / "model.safetensors")
    assert type(built) is ViT
    assert_same_encoder(built, network, image((16, 8, 24)))


def test_safetensors_of_tensors_that_share_memory(tmp_path):
    table = torch.arange(6.0).reshape(2, 3)
    save_safetensors(tmp_path / "w.safetensors", {"a": table, "b": table.T, "c": table[1]})
    found, description = read_checkpoint(tmp_path / "w.safetensors")
    assert description is None
    assert torch.equal(found["a"], table)
    assert torch.equal(found["b"], table.T)
    assert torch.equal(found["c"], table[1])


def test_safetensors_not_installed(tmp_path, monkeypatch, record_property):
    save_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    needed = "needs the package safetensors: pip install safetensors"
    with pytest.raises(ValueError, match=f"^{tmp_path}/w.safetensors: reading it {needed}$") as error:
        read_checkpoint(tmp_path / "w.safetensors")
    record_property("error", str(error.value))
    with pytest.raises(ValueError, match=f"^{tmp_path}/v.safetensors: writing it {needed}$") as error:
        save_safetensors(tmp_path / "v.safetensors", {"a": torch.ones(2)})
    record_property("error", str(error.value))


def test_stem_that_is_no_convolution(tmp_path):
    """MONAI's ``perceptron`` embedding loads tensor by tensor; only a description cannot be made of it."""
    source, target = (ViT(1, (12, 8, 20), (6, 4, 4), 24, 32, 1, 2, proj_type="perceptron") for _ in range(2))
    torch.save(scatter(source).state_dict(), tmp_path / "w.pt")
    assert len(load_encoder(target, tmp_path / "w.pt").loaded) == len(source.state_dict())
    assert_same_encoder(target, source, image((12, 8, 20)))
    with pytest.raises(ValueError, match="must have proj_type 'conv'"):
        describe(source, (12, 8, 20), PRESET)
