"""Import of checkpoints of the public MiM code, and the numbers that this code gave under formula weights."""

import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from medmim.mim_import import import_mim_decoder, import_mim_encoder, mim_size
from medmim.networks import ConvViT, patchify, sincos_position_embedding

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> Path:
    data = os.environ.get("MEDMIM_TEST_DATA")
    if data is None:
        pytest.skip("MEDMIM_TEST_DATA is not set: the golden numbers lie there")
    return Path(data) / "golden"


def formula(name: str, shape: list[int]) -> torch.Tensor:
    """Weights of the golden numbers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        return 1 + 0.1 * weight if name.endswith("weight") else 0.1 * weight
    return weight / math.sqrt(math.prod(shape[1:]))


def checkpoint(golden: Path, size: str, fill=formula) -> dict[str, torch.Tensor]:
    shapes = json.loads((golden / f"mim_{size}_state_shapes.json").read_text())
    state_dict = {name: fill(name, shape) for name, shape in shapes.items()}
    for name in ("pos_embed", "decoder_pos_embed"):
        state_dict[name] = sincos_position_embedding((6, 6, 6), shapes[name][-1])
    return state_dict


@pytest.fixture(scope="module")
def tiny(golden):
    return checkpoint(golden, "tiny")


@pytest.fixture(scope="module")
def image():
    return torch.rand((1, 1, 96, 96, 96), generator=torch.Generator().manual_seed(7))


def error(found, expected) -> float:
    expected = torch.from_numpy(np.asarray(expected)).float()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def test_pre_training_gives_the_published_numbers(golden, tiny, image):
    published = np.load(golden / "mim_tiny_pretrain.npz")
    visible, mask = torch.from_numpy(published["ids_keep"]), torch.from_numpy(published["mask"]).bool()
    encoder, _ = import_mim_encoder(tiny)
    decoder, _ = import_mim_decoder(tiny)
    with torch.no_grad():
        latent = encoder.encode(image, visible)
        features = decoder.features(latent, visible, mask.nonzero()[:, 1].unsqueeze(0))
        prediction = decoder.head(features)
        by_mask = encoder(image, mask.view(1, 6, 6, 6))
    target = patchify(image, (16, 16, 16))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = (prediction - target).square().mean(-1)[mask].mean()
    errors = {
        "latent": error(latent, published["latent"]),
        "decoder_feature": error(features[..., :32], published["decoder_feature"]),
        "pred": error(prediction[..., ::64], published["pred"]),
        "loss": error(loss, published["loss"]),
        "pos_embed": error(tiny["pos_embed"][0, ::7, ::5], published["pos_embed"]),
        "decoder_pos_embed": error(decoder.position_embeddings[0, ::7, ::5], published["decoder_pos_embed"]),
    }
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) < TOLERANCE
    torch.testing.assert_close(by_mask, latent[:, visible[0].argsort()])


def test_dense_use_gives_the_published_maps(golden, tiny, image):
    published = np.load(golden / "mim_tiny_dense.npz")
    encoder = ConvViT.tiny(fusion=False, layer_scale=1.0, relative_position_bias=True, img_size=96).eval()
    weights = import_mim_encoder(tiny)[0].state_dict()
    missing = encoder.load_state_dict({n: w for n, w in weights.items() if n in encoder.state_dict()}, strict=False)
    assert all(re.search(r"^fifth_stage|scale\d|position_bias", name) for name in missing.missing_keys)
    with torch.no_grad():
        maps = encoder(image)
    errors = {}
    for i, step in enumerate((8, 4, 2, 1)):
        errors[f"map{i}"] = error(maps[i][..., ::step, ::step, ::step], published[f"map{i}"])
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) < TOLERANCE


def test_report_names_what_was_loaded_and_what_was_not(golden, tiny):
    _, of_encoder = import_mim_encoder(tiny)
    _, of_decoder = import_mim_decoder(tiny)
    shared = set(json.loads((golden / "mim_tiny_finetune_keys.json").read_text())["shared"])
    fusion = {f"stage{i}_output_decode.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
    loaded = set(of_encoder.loaded) | set(of_encoder.computed)
    assert loaded == shared | fusion | {"norm.weight", "norm.bias"}
    assert of_encoder.computed == ["pos_embed"]
    assert loaded | set(of_encoder.unused) == set(tiny)
    decoder = set(of_decoder.loaded) | set(of_decoder.computed)
    assert decoder == {name for name in tiny if name.startswith("decoder_")} | {"mask_token"}
    assert all(name.startswith("aggregate_") for name in set(tiny) - loaded - decoder)
    assert str(of_encoder) == (
        "MiM tiny: 242 tensors loaded into ConvViT, 1 computed anew and equal (pos_embed), 120 unused "
        "(mask_token, decoder_pos_embed, decoder_embed.weight and 117 more)"
    )


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_size_is_recognised(golden, size):
    state_dict = checkpoint(golden, size, fill=lambda _, shape: torch.empty(shape, device="meta"))
    assert mim_size(state_dict) == size


def test_base_is_loaded_tensor_by_tensor(golden):
    state_dict = checkpoint(golden, "base", fill=lambda name, shape: torch.full(shape, zlib.crc32(name.encode()) / 2e9))
    for part, (network, report) in {
        "encoder": import_mim_encoder({f"module.{name}": value for name, value in state_dict.items()}),
        "decoder": import_mim_decoder(state_dict),
    }.items():
        weights = network.state_dict()
        assert report.size == "base"
        assert sorted(report.loaded.values()) == sorted(n for n in weights if "cross" not in n and "posit" not in n)
        for published, ours in report.loaded.items():
            assert torch.equal(weights[ours].flatten(), state_dict[published].flatten()), part


def test_without_positions_and_alignment(tiny):
    names = ("pos_embed", "decoder_pos_embed")
    bare = {n: v for n, v in tiny.items() if n not in names and not n.startswith("aggregate")}
    assert import_mim_encoder(bare)[1].computed == []
    assert "0 computed anew and equal (none)" in str(import_mim_decoder(bare)[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "blocks4.3.attn.qkv.weight",
            lambda v: v[:-1],
            r"1 tensor does not fit ConvViT of size tiny, first: blocks4.3.attn.qkv.weight is \(287, 96\), "
            r"expected \(288, 96\)",
        ),
        (
            "blocks1.0.conv1.weight",
            lambda v: v.expand(-1, -1, 3, 3, 3),
            r"blocks1.0.conv1.weight is \(12, 12, 3, 3, 3\), expected \(12, 12\)",
        ),
        ("norm.bias", None, "1 tensor does not fit ConvViT of size tiny, first: norm.bias is missing"),
        ("pos_embed", lambda v: v + 0.1, r"pos_embed of shape \(1, 216, 96\) is not the fixed sine-cosine table"),
        ("pos_embed", lambda v: v[:, :-1], r"pos_embed of shape \(1, 215, 96\) is not the fixed sine-cosine table"),
        ("patch_embed4.proj.weight", lambda v: v[:90], r"features \(12, 24, 48, 90\), known are \(12, 24, 48, 96\)"),
        (
            "patch_embed4.proj.weight",
            lambda v: v.sum(),
            r"features \(12, 24, 48, 0\), known are .*: give a pre-training",
        ),
        ("patch_embed2.proj.weight", None, "not a checkpoint of the public MiM code: it lacks patch_embed1"),
        (
            "patch_embed1.proj.weight",
            lambda v: v[:, 0, 0, 0, 0],
            r"first: patch_embed1.proj.weight is \(12,\), expected \(12, 1, 2, 2, 2\): give a pre-training checkpoint",
        ),
        ("blocks4.3.mlp.fc1.bias", lambda v: v.to(torch.int8), "blocks4.3.mlp.fc1.bias is int8, expected floating poi"),
        ("norm.weight", lambda v: v.to(torch.complex64), "first: norm.weight is complex64, expected floating point"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(tiny, name, change, message):
    broken = dict(tiny)
    value = broken.pop(name)
    if change is not None:
        broken[name] = change(value)
    with pytest.raises(ValueError, match=message) as caught:
        import_mim_encoder(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("encoder", [f"blocks4.11.{name}" for name in ("norm1.weight", "attn.qkv.weight", "mlp.fc2.bias")]),
        ("encoder", ["blocks1.0.attn.sr.weight", "blocks1.0.attn.sr.bias"]),
        ("encoder", ["blocks3.2.conv1.weight"]),
        ("encoder", ["patch_embed6.proj.weight"]),
        ("encoder", ["stage4_output_decode.weight"]),
        ("encoder", ["norm.running_mean"]),
        ("encoder", ["pos_embed2"]),
        ("decoder", ["decoder_blocks.0.attn.sr.weight"]),
    ],
)
def test_tensors_of_another_network_are_refused(tiny, what, names):
    import_part = {"encoder": import_mim_encoder, "decoder": import_mim_decoder}[what]
    count = len(import_part(tiny)[1].loaded)
    with pytest.raises(ValueError, match=what) as caught:
        import_part(tiny | {f"module.{name}": torch.ones(96) for name in names})
    assert str(caught.value) == (
        f"its {what} holds tensors that MiM tiny has no place for ({len(names)}, first: {names[0]}), expected the "
        f"{count} of the published network alone: it is deeper or has other parts (--sr_ratio 2 of the public code); "
        "give a pre-training checkpoint of the public code, made with the published sizes"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_is_taken_over_and_told(tiny, dtype):
    """Also that of the positions, which are compared with a table of full precision."""
    encoder, report = import_mim_encoder({name: value.to(dtype) for name, value in tiny.items()})
    assert report.computed == ["pos_embed"]
    assert str(report).endswith(f"; the file holds {str(dtype).removeprefix('torch.')}, written as float32")
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    assert torch.equal(encoder.norm.weight, tiny["norm.weight"].to(dtype).float())


def test_precision_of_what_is_not_taken_over_is_not_told(tiny):
    name = "decoder_norm.weight"
    assert import_mim_encoder(tiny | {name: tiny[name].half()})[1].precision == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder_pred.weight", "the checkpoint holds no decoder"),
        ("mask_token", "1 tensor does not fit TransformerDecoder of size tiny, first: mask_token is missing"),
        ("decoder_blocks.7.norm1.weight", "first: decoder_blocks.7.norm1.weight is missing"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(tiny, name, message):
    with pytest.raises(ValueError, match=message):
        import_mim_decoder({n: v for n, v in tiny.items() if n != name})


def test_a_foreign_file_is_refused():
    with pytest.raises(ValueError, match="its first tensor is none"):
        mim_size({})
    with pytest.raises(ValueError, match=r"its first tensor is fc\.weight"):
        import_mim_encoder({"fc.weight": torch.zeros(2, 2)})
