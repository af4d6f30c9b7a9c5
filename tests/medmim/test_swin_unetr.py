"""MONAI's SwinUNETR as this package trains it: weights, description, learning rates, memory, region of interest."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformer

from medmim import load_encoder
from medmim.datasets import get_preset
from medmim.description import build_network, describe_network
from medmim.networks import checkpoint_activations
from medmim.optim import parameter_groups
from medmim.swin_checks import check_swin_roi
from medmim.weights import save_encoder

DEPTHS = (1, 2, 1, 1)
SIZES: dict[str, Any] = {"depths": DEPTHS, "num_heads": (1, 2, 3, 4), "window_size": 3}
versions = pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])


def make(in_channels: int = 1, **arguments: Any) -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(in_channels, 3, feature_size=12, **SIZES | arguments)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------ weights


@versions
def test_an_encoder_loads_into_the_stock_network(use_v2: bool, image: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = SwinTransformer(1, 12, (3, 3, 3), (2, 2, 2), DEPTHS, (1, 2, 3, 4), use_v2=use_v2)
    save_encoder(tmp_path / "encoder.pt", encoder, (64, 64, 64), get_preset("phantom"))
    network = make(use_v2=use_v2)
    report = load_encoder(network, tmp_path / "encoder.pt")
    assert len(report.loaded) == len(encoder.state_dict())
    assert report.new == report.unused == report.adapted == []
    with torch.no_grad():
        for found, expected in zip(network.swinViT(image), encoder(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_v2": True, "window_size": (2, 3, 4)}, {"qkv_bias": False, "normalize": False, "mlp_ratio": 2.0}],
    ids=["default", "v2", "other"],
)
def test_built_from_its_description_it_is_the_same(arguments: dict[str, Any], image: torch.Tensor) -> None:
    network = make(**arguments).eval()
    description = json.loads(json.dumps({"network": describe_network(network, (64, 32, 32))}))
    assert description["network"]["name"] == "SwinUNETR"
    own = {"in_channels": 1, "out_channels": 3, "feature_size": 12, "img_size": [64, 32, 32], "patch_size": 2}
    assert description["network"]["arguments"].items() >= own.items()
    built = build_network(description).eval()
    built.load_state_dict(network.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(built(image), network(image))


# ----------------------------------------------------------------------------------------------------------- training


@versions
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_each_parameter_gets_a_gradient(use_v2: bool, checkpointed: bool, image: torch.Tensor) -> None:
    network = make(use_v2=use_v2)
    names = list(network.state_dict())
    if checkpointed:
        checkpoint_activations(network)
    network(image).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert list(network.state_dict()) == names


def test_checkpointed_activations_change_nothing(image: torch.Tensor) -> None:
    """Neither with drop path, whose draw must be repeated."""
    plain = make(dropout_path_rate=0.5)
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    kept: list[list[torch.Size]] = []
    for network in (plain, saving):
        torch.manual_seed(5)
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept[-1].append(x.shape), x)[1], lambda x: x):
            loss = network(image).square().mean()
        loss.backward()
    assert len(kept[1]) < 0.8 * len(kept[0])
    for (name, first), second in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad, msg=name)


def test_mixed_precision(image: torch.Tensor) -> None:
    network = make()
    expected = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(image)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@versions
def test_learning_rates_of_the_layers(use_v2: bool) -> None:
    network = make(use_v2=use_v2)
    rates = {id(p): g["lr"] for g in parameter_groups(network, 1.0, 0.05, 0.5) for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in parameter_groups(network, 1.0, 0.05, 0.5) for p in g["params"]}
    firsts = [1, 2, 4, 5]  # layer of the first block of each stage; the embedding is 0
    for name, parameter in network.named_parameters():
        inside = re.match(r"swinViT\.layers(\d)(c?)\.0\.(?:blocks\.(\d+)|downsample)?", name)
        if name.startswith("swinViT.patch_embed."):
            layer = 0
        elif inside and inside[2]:  # the convolution before a stage
            layer = firsts[int(inside[1]) - 1]
        elif inside and inside[3]:
            layer = firsts[int(inside[1]) - 1] + int(inside[3])
        elif inside:
            layer = firsts[int(inside[1]) - 1] + DEPTHS[int(inside[1]) - 1] - 1
        else:
            layer = 6
        assert rates[id(parameter)] == pytest.approx(0.5 ** (6 - layer)), name
        plain = parameter.ndim == 1 or name.endswith("relative_position_bias_table")
        assert decays[id(parameter)] == (0.0 if plain else 0.05), name


@pytest.mark.slow
def test_compiled_it_computes_the_same(image: torch.Tensor) -> None:
    """What is traced; to generate code for so many sizes of maps takes minutes."""
    network = make().eval()
    names = list(network.state_dict())
    with torch.no_grad():
        expected = network(image)
        network.compile(backend="aot_eager")
        torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-4)
    assert list(network.state_dict()) == names


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("size", [[64, 32, 32], [96, 96, 96], [32, 32, 160]])
def test_sizes_that_fit(size: list[int]) -> None:
    check_swin_roi(size)
    assert make()(torch.rand(1, 1, *size)).isfinite().all()


@pytest.mark.parametrize(
    ("size", "better"),
    [
        ([32, 48, 32], [32, 64, 32]),
        ([32, 32, 32], [64, 32, 32]),
        ([96, 96, 1], [96, 96, 32]),
        ([8, 8, 8], [64, 32, 32]),
    ],
)
def test_sizes_that_do_not_fit(size: list[int], better: list[int]) -> None:
    with pytest.raises(ValueError, match=r"--roi_size .* more than 32 along one axis") as caught:
        check_swin_roi(size)
    assert str(caught.value).endswith(f'give --roi_size "{better}"')
    check_swin_roi(better)
    with pytest.raises(ValueError, match=r"divisible|more than 1 spatial element"):
        make()(torch.rand(1, 1, *size))


@pytest.mark.parametrize("size", [32, "96", [32, "a", 32], [0, 32, 32]])
def test_what_is_no_size_is_left_to_the_other_check(size: Any) -> None:
    check_swin_roi(size)
