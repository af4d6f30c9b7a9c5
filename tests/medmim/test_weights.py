"""Weights that travel: nothing is lost on the way, nothing is skipped silently."""

from itertools import product

import monai.networks.nets
import pytest
import torch

from medmim.datasets import get_preset
from medmim.handlers import save_model
from medmim.networks import UNETR, FeatureExtractor, MaskedAutoencoder
from medmim.weights import (
    build_encoder,
    find_encoder,
    load_checkpoint,
    load_encoder,
    load_model,
    save_encoder,
)

POSITIONS = "patch_embedding.position_embeddings"
STEM = "patch_embedding.patch_embeddings.weight"
SIZE = (16, 24, 8)
SMALL = {"hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
N_TENSORS = 31  # of a ViT with 2 layers: 5, and 13 in each block


@pytest.fixture
def saved(tiny_vit, tmp_path, preset):
    """Writes the encoder.pt of a small ViT; returns the ViT and the path."""

    def make(channels=1, img_size=SIZE, patch_size=8, **arguments):
        vit = tiny_vit(channels, img_size, patch_size, **arguments).eval()
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_encoder(tmp_path / "encoder.pt", vit, img_size, preset)
        return vit, tmp_path / "encoder.pt"

    return make


def image(channels=1, img_size=SIZE):
    return torch.rand(2, channels, *img_size, generator=torch.Generator().manual_seed(1))


def features(vit, scan):
    return vit.eval()(scan)[0]


def naive_resize(positions: torch.Tensor, source: tuple, target: tuple) -> torch.Tensor:
    """Linear interpolation between the centres of cells, one cell of the new grid at a time, edges repeated."""
    table = positions.reshape(*source, -1)
    result = []
    for cell in product(*map(range, target)):
        corners = [()]
        weights = [1.0]
        for index, n_old, n_new in zip(cell, source, target, strict=True):
            place = min(max((index + 0.5) * n_old / n_new - 0.5, 0), n_old - 1)
            low = min(int(place), n_old - 1)
            high = min(low + 1, n_old - 1)
            share = place - low
            weights = [w * part for w in weights for part in (1 - share, share)]
            corners = [(*c, i) for c in corners for i in (low, high)]
        result.append(sum(w * table[c] for w, c in zip(weights, corners, strict=True)))
    return torch.stack(result).unsqueeze(0)


def test_file_holds_monais_names_and_a_plain_description(saved, preset):
    vit, path = saved(2)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"state_dict", "description"}
    assert set(content["state_dict"]) == set(vit.state_dict())
    assert content["description"]["preset"] == preset.to_dict()
    assert content["description"]["network"]["arguments"]["in_channels"] == 2
    stock = monai.networks.nets.ViT(2, SIZE, 8, 24, 32, 2, 2).eval()
    stock.load_state_dict(content["state_dict"], strict=True)
    torch.testing.assert_close(features(stock, image(2)), features(vit, image(2)))


@pytest.mark.parametrize(
    ("channels", "img_size", "patch_size", "options"),
    [(1, SIZE, 8, {}), (3, (8, 12), (4, 2), {"qkv_bias": True}), (2, (8, 8, 4), (4, 2, 4), {"num_layers": 3})],
)
def test_build_encoder(saved, channels, img_size, patch_size, options):
    vit, path = saved(channels, img_size, patch_size, **options)
    built = build_encoder(path)
    assert isinstance(built, monai.networks.nets.ViT)
    scan = image(channels, img_size)
    torch.testing.assert_close(features(built, scan), features(vit, scan), rtol=1e-5, atol=1e-5)


def test_build_encoder_needs_a_description(tiny_vit, tmp_path):
    torch.save(tiny_vit().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: carries no description: build the network yourself"):
        build_encoder(tmp_path / "w.pt")


@pytest.mark.parametrize("target", ["ViT", "FeatureExtractor", "MaskedAutoencoder", "UNETR", "MONAI UNETR"])
def test_load_encoder_into_each_network(saved, tiny_vit, target):
    layers, patch_size, img_size = (12, 16, (32, 16, 16)) if target == "MONAI UNETR" else (4, 8, SIZE)
    vit, path = saved(1, img_size, patch_size, num_layers=layers)
    fresh = tiny_vit(1, img_size, patch_size, num_layers=layers)
    network = {
        "ViT": lambda: fresh,
        "FeatureExtractor": lambda: FeatureExtractor(fresh, img_size),
        "MaskedAutoencoder": lambda: MaskedAutoencoder(fresh, img_size, "linear"),
        "UNETR": lambda: UNETR(1, 2, img_size, patch_size, 4, num_layers=layers, **SMALL),
        "MONAI UNETR": lambda: monai.networks.nets.UNETR(1, 2, img_size, 4, **SMALL),
    }[target]()
    elsewhere = {n: p.clone() for n, p in network.state_dict().items() if not n.startswith(("vit.", "encoder."))}
    report = load_encoder(network, path)
    assert sorted(report.loaded) == sorted(vit.state_dict())
    assert report.resized == report.adapted == report.new == report.unused == []
    scan = image(1, img_size)
    torch.testing.assert_close(features(find_encoder(network), scan), features(vit, scan), rtol=1e-5, atol=1e-5)
    if target != "ViT":
        assert all(torch.equal(network.state_dict()[name], value) for name, value in elsewhere.items())


def test_frozen_parameters_stay_frozen(saved, tiny_vit):
    _, path = saved()
    mae = MaskedAutoencoder(tiny_vit(), SIZE, "linear")
    load_encoder(mae, path)
    assert not mae.encoder.blocks[0].norm_cross_attn.weight.requires_grad
    assert mae.encoder.blocks[0].norm1.weight.requires_grad


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, 3, 1), (4, 3, 2)),
        ((4, 6, 4), (6, 4, 4)),  # as many tokens, another grid
        ((3, 2, 4), (2, 2, 2)),
        ((4, 6), (6, 4)),
        ((3, 3), (5, 2)),
    ],
)
@pytest.mark.parametrize("network_knows_its_size", [True, False])
def test_positions_are_interpolated_to_another_grid(saved, tiny_vit, source, target, network_knows_its_size):
    vit, path = saved(1, tuple(2 * n for n in source), 2)
    img_size = tuple(2 * n for n in target)
    fresh = tiny_vit(1, img_size, 2)
    if network_knows_its_size:
        report = load_encoder(FeatureExtractor(fresh, img_size), path)
    else:
        report = load_encoder(fresh, path, img_size=img_size)
    assert report.resized == [POSITIONS]
    assert len(report.loaded) == N_TENSORS - 1
    expected = naive_resize(vit.patch_embedding.position_embeddings.detach(), source, target)
    torch.testing.assert_close(fresh.patch_embedding.position_embeddings.detach(), expected, rtol=1e-5, atol=1e-6)


def test_positions_without_a_description_are_taken_for_a_cube(tiny_vit, tmp_path):
    vit = tiny_vit(1, (16, 16, 16), 8)
    torch.save(vit.state_dict(), tmp_path / "w.pt")
    fresh = tiny_vit(1, (24, 8, 16), 8)
    report = load_encoder(fresh, tmp_path / "w.pt", img_size=(24, 8, 16))
    assert report.resized == [POSITIONS]
    expected = naive_resize(vit.patch_embedding.position_embeddings.detach(), (2, 2, 2), (3, 1, 2))
    torch.testing.assert_close(fresh.patch_embedding.position_embeddings.detach(), expected, rtol=1e-5, atol=1e-6)


def test_positions_that_cannot_be_resized_are_refused(saved, tiny_vit, tmp_path):
    vit, path = saved()
    with pytest.raises(
        ValueError, match=r"positions of a grid \(2, 3, 1\) for a network with 12 tokens: give img_size"
    ):
        load_encoder(tiny_vit(1, (16, 24, 16)), path)
    with pytest.raises(
        ValueError, match=r"positions of a grid \(2, 3, 1\) for a network with 12 tokens: give img_size"
    ):
        load_encoder(tiny_vit(1, (16, 24, 16)), path, img_size=(16, 16, 16))
    torch.save(vit.state_dict(), tmp_path / "w.pt")  # 6 tokens are no cube
    with pytest.raises(ValueError, match="positions of a grid 6 for a network with 12"):
        load_encoder(tiny_vit(1, (16, 24, 16)), tmp_path / "w.pt", img_size=(16, 24, 16))


def test_one_channel_to_several_repeats_and_divides(saved, tiny_vit):
    vit, path = saved(1)
    network = tiny_vit(4)
    report = load_encoder(network, path)
    assert report.adapted == [STEM]
    assert len(report.loaded) == N_TENSORS - 1
    for channel in range(4):
        expected = vit.state_dict()[STEM][:, 0] / 4
        torch.testing.assert_close(network.state_dict()[STEM][:, channel], expected)
    scan = image(1)
    torch.testing.assert_close(features(network, scan.expand(-1, 4, -1, -1, -1)), features(vit, scan))


def test_several_channels_to_one_sums(saved, tiny_vit):
    vit, path = saved(3)
    network = tiny_vit(1)
    assert load_encoder(network, path).adapted == [STEM]
    scan = image(1)
    torch.testing.assert_close(features(network, scan), features(vit, scan.expand(-1, 3, -1, -1, -1)))


def test_between_two_and_four_channels_there_is_no_rule(saved, tiny_vit):
    vit, path = saved(2)
    with pytest.raises(ValueError, match=rf"{STEM} takes 2 channels, the network 4"):
        load_encoder(tiny_vit(4), path)
    network = tiny_vit(4)
    own = network.state_dict()[STEM].clone()
    report = load_encoder(network, path, allow_new=["patch_embedding.patch_embeddings"])
    assert report.new == [STEM]
    assert torch.equal(network.state_dict()[STEM], own)
    assert torch.equal(network.state_dict()["norm.weight"], vit.state_dict()["norm.weight"])


@pytest.mark.parametrize(
    ("knob", "value"),
    [("num_layers", 3), ("hidden_size", 48), ("mlp_dim", 64), ("patch_size", 4), ("num_heads", 4), ("qkv_bias", True)],
)
def test_another_architecture_is_refused_and_the_knob_named(saved, tiny_vit, knob, value):
    _, path = saved(**{knob: value})
    network = tiny_vit()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"another architecture .* The file was made with --{knob} {value}$") as error:
        load_encoder(network, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_fewer_layers_are_refused_too(saved, tiny_vit):
    _, path = saved()
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp.* is missing\. The file was made with --num_layers 2$"):
        load_encoder(tiny_vit(num_layers=3), path)


def test_two_dimensions_into_three_are_refused(saved, tiny_vit):
    _, path = saved(1, (16, 24))
    with pytest.raises(ValueError, match="another architecture"):
        load_encoder(tiny_vit(), path)


def test_missing_tensors_are_refused_unless_named(tiny_vit, tmp_path):
    source = tiny_vit().state_dict()
    del source["norm.weight"], source["norm.bias"], source["blocks.1.mlp.linear1.bias"]
    torch.save(source, tmp_path / "w.pt")
    network = tiny_vit()
    with pytest.raises(ValueError, match=r"3 tensors do not fit, first: blocks\.1\.mlp\.linear1\.bias is missing\.$"):
        load_encoder(network, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1 tensor does not fit, first: blocks\.1\.mlp\.linear1\.bias is missing"):
        load_encoder(network, tmp_path / "w.pt", allow_new=["norm."])
    own = network.norm.weight.detach().fill_(3.0).clone()
    report = load_encoder(network, tmp_path / "w.pt", allow_new=["norm.", "blocks.1.mlp.linear1.bias"])
    assert sorted(report.new) == ["blocks.1.mlp.linear1.bias", "norm.bias", "norm.weight"]
    assert len(report.loaded) == N_TENSORS - 3
    assert torch.equal(network.norm.weight, own)


def test_damaged_file_of_ours_names_no_knob(saved, tiny_vit):
    _, path = saved()
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["norm.bias"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"first: norm\.bias is missing\.$"):
        load_encoder(tiny_vit(), path)


def test_a_raising_load_changes_nothing(saved, tiny_vit):
    _, path = saved(num_layers=3)
    for network in (tiny_vit(), tiny_vit(2, (16, 24, 16), 8)):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(ValueError, match="blocks"):
            load_encoder(network, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_failed_resizing_changes_nothing(saved, tiny_vit):
    _, path = saved()
    network = tiny_vit(2, (16, 24, 16))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="give img_size"):
        load_encoder(network, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_files_of_other_monai_versions(tiny_vit, tmp_path):
    """norm_cross_attn is missing in older ones, cross_attn was there in some; nothing uses either."""
    vit = tiny_vit()
    source = {name: tensor for name, tensor in vit.state_dict().items() if "norm_cross_attn" not in name}
    source["blocks.0.cross_attn.to_q.weight"] = torch.ones(2)
    torch.save(source, tmp_path / "w.pt")
    report = load_encoder(tiny_vit(), tmp_path / "w.pt")
    assert len(report.new) == 4
    assert report.unused == ["blocks.0.cross_attn.to_q.weight"]


def test_report_is_printed_and_counts(saved, tiny_vit, capsys):
    _, path = saved()
    content = torch.load(path, weights_only=True)
    content["state_dict"] |= {f"extra.{i}": torch.ones(1) for i in range(5)}
    del content["state_dict"]["norm.bias"]
    torch.save(content, path)
    network = FeatureExtractor(tiny_vit(2, (16, 24, 16)), (16, 24, 16))
    report = load_encoder(network, path, allow_new=["norm."])
    text = (
        f"{path}: 30 of 31 encoder tensors loaded, 1 resized ({POSITIONS}), 1 adapted ({STEM}), 1 new (norm.bias), "
        "5 unused (extra.0, extra.1, extra.2 and 2 more)"
    )
    assert str(report) == text
    assert capsys.readouterr().out.strip() == text


def test_network_without_or_with_two_vits_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="Linear holds 0 ViT encoders, 0 SwinTransformer encoders, 0 Con"):
        find_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ModuleList holds 2 ViT encoders, 0 SwinTransformer encoders, 0 Con"):
        find_encoder(torch.nn.ModuleList([tiny_vit(), tiny_vit()]))


def test_saving_takes_a_network_on_any_device_and_keeps_no_graph(saved):
    _, path = saved()
    content = torch.load(path, weights_only=True)
    assert all(not tensor.requires_grad for tensor in content["state_dict"].values())
    assert all(tensor.device.type == "cpu" for tensor in content["state_dict"].values())


def test_load_checkpoint_is_strict(tiny_vit, tmp_path):
    path = tmp_path / "model.pt"
    source = FeatureExtractor(tiny_vit(), SIZE)
    torch.save(source.state_dict(), path)
    network = FeatureExtractor(tiny_vit(), SIZE)
    load_checkpoint(network, path)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), source.parameters(), strict=True))
    with pytest.raises(
        ValueError,
        match=r"1 tensor does not fit a FeatureExtractor, first: .* is \(1, 6, 24\), expected",
    ):
        load_checkpoint(FeatureExtractor(tiny_vit(1, (16, 24, 16)), (16, 24, 16)), path)
    with pytest.raises(
        ValueError, match=r"13 tensors do not fit a FeatureExtractor, first: encoder\.blocks\.2\..* is missing: give"
    ):
        load_checkpoint(FeatureExtractor(tiny_vit(num_layers=3), SIZE), path)
    with pytest.raises(
        ValueError, match=r"13 tensors do not fit a FeatureExtractor, first: encoder\.blocks\.1\..* is unknown"
    ):
        load_checkpoint(FeatureExtractor(tiny_vit(num_layers=1), SIZE), path)


def test_one_name_as_a_string_does_not_allow_everything(saved, tiny_vit):
    _, path = saved()
    deeper = tiny_vit(1, num_layers=4)
    with pytest.raises(ValueError, match="is missing"):
        load_encoder(deeper, path, allow_new="patch_embedding.patch_embeddings")
    with pytest.raises(ValueError, match="an empty beginning would allow every tensor"):
        load_encoder(deeper, path, allow_new=[""])


def test_a_model_is_loaded_with_its_own_knobs_only(tmp_path):
    sizes = {"in_channels": 1, "out_channels": 3, "img_size": (16, 24, 16), "patch_size": 8, "feature_size": 4}
    sizes |= {"hidden_size": 48, "mlp_dim": 96, "num_layers": 4}
    preset = get_preset("hippocampus")
    network = UNETR(**sizes, num_heads=4)
    save_model(tmp_path, network, (16, 24, 16), preset)
    fresh = UNETR(**sizes, num_heads=4)
    load_model(fresh, tmp_path, (16, 24, 16), preset)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match=r"model.json: other knobs than it was trained with: give --num_heads 4$"):
        load_model(UNETR(**sizes, num_heads=6), tmp_path, (16, 24, 16), preset)
    with pytest.raises(ValueError, match="trained with preset hippocampus, whose fields differ"):
        load_model(fresh, tmp_path, (16, 24, 16), get_preset("btcv"))


def test_a_checkpoint_is_loaded_with_its_own_knobs_only(tmp_path, tiny_vit):
    vit = tiny_vit()
    torch.save(
        {"network": vit.state_dict(), "made_with": {"loss_norm": "l1", "roi_size": [16, 24, 8]}}, tmp_path / "c.pt"
    )
    load_checkpoint(tiny_vit(), tmp_path / "c.pt", {"loss_norm": "l1", "roi_size": [16, 24, 8]})
    with pytest.raises(ValueError, match=r'give --loss_norm l1 --roi_size "\[16, 24, 8\]"'):
        load_checkpoint(tiny_vit(), tmp_path / "c.pt", {"loss_norm": "l2", "roi_size": [16, 24, 16]})
