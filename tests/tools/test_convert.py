"""``python -m tools convert mim``: a checkpoint of the public code becomes an encoder.pt."""

import argparse
import json
import os
import re
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from medmim import build_encoder
from medmim.mim_import import ENCODER_NAMES, POINTWISE, _published_name
from medmim.networks import ConvViT
from tools.convert import convert

GOLDEN = Path(os.environ.get("MEDMIM_TEST_DATA", "/nowhere")) / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="MEDMIM_TEST_DATA names no folder with golden/")


def published(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights by the formula of golden/README.md; positions are left out."""
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("pos_embed"):
            continue
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) == 1:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
        else:
            values = values / prod(shape[1:]) ** 0.5
        tensors[name] = values
    return tensors


@needs_golden
def test_converted_encoder_gives_the_published_latents(tmp_path, capsys):
    shapes = json.loads((GOLDEN / "mim_tiny_state_shapes.json").read_text())
    torch.save({"model": published(shapes), "epoch": 3}, tmp_path / "mim.pth")
    convert("mim", str(tmp_path / "mim.pth"), str(tmp_path / "encoder.pt"))
    assert "MiM tiny: 242 tensors loaded into ConvViT" in capsys.readouterr().out

    golden = np.load(GOLDEN / "mim_tiny_pretrain.npz")
    x = torch.rand((1, 1, 96, 96, 96), generator=torch.Generator().manual_seed(7))
    mask = torch.from_numpy(golden["mask"]).bool().reshape(1, 6, 6, 6)
    with torch.no_grad():
        latent = build_encoder(tmp_path / "encoder.pt").eval()(x, mask)[0]
    expected = torch.from_numpy(golden["latent"])[0][torch.from_numpy(golden["ids_keep"])[0].argsort()]
    assert torch.linalg.vector_norm(latent - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Writes ``mim.pth`` as the public code's ``save_model`` does, with all that stands beside the model."""
    monkeypatch.chdir(tmp_path)

    def write(change=lambda tensors: tensors, **args):
        encoder = ConvViT.tiny(fifth_stage=False)
        tensors = {_published_name(name, ENCODER_NAMES): value for name, value in encoder.state_dict().items()}
        for name, value in tensors.items():
            if re.search(POINTWISE, name) and name.startswith(("blocks1.", "blocks2.", "blocks3.")):
                tensors[name] = value[..., None, None, None]
        network = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.rand(1, 2)).sum().backward()
        optimizer.step()
        content = {
            "model": change(tensors),
            "optimizer": optimizer.state_dict(),
            "epoch": 7,
            "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "args": argparse.Namespace(**{"batch_size": 4, "data": ["a", None], "norm_pix_loss": True} | args),
        }
        torch.save(content, "mim.pth")
        return encoder

    return write


def test_all_that_the_public_code_saves(checkpoint, capsys):
    encoder = checkpoint()
    convert("mim", "mim.pth")
    assert "242 tensors loaded into ConvViT, 0 computed anew and equal (none), 0 unused" in capsys.readouterr().out
    found = build_encoder("encoder.pt").state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(found[name], value), name


def test_half_precision_is_told(checkpoint, capsys):
    checkpoint(lambda tensors: {name: value.half() for name, value in tensors.items()})
    convert("mim", "mim.pth")
    assert "the file holds float16, written as float32" in capsys.readouterr().out
    assert {value.dtype for value in build_encoder("encoder.pt").state_dict().values()} == {torch.float32}


class Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": Code()}, "it holds the Python object print, and code is never run"),
        ({"args": Path("a")}, "it holds the Python object pathlib"),
        (
            {"change": lambda tensors: tensors | {"blocks4.11.norm1.weight": torch.ones(96)}},
            "its encoder holds tensors that MiM tiny has no place for (1, first: blocks4.11.norm1.weight), exp",
        ),
        (
            {"change": lambda tensors: tensors | {"module.blocks4.0.attn.sr.weight": torch.ones(96)}},
            "first: blocks4.0.attn.sr.weight), expected the 242 of the published network alone: it is deeper",
        ),
        (
            {"change": lambda t: t | {"patch_embed1.proj.weight": t["patch_embed1.proj.weight"].repeat(1, 2, 1, 1, 1)}},
            "its encoder has 2 channels, but preset mim_ct has 1 (CT): give the preset of its scans (--dataset)",
        ),
    ],
    ids=["code", "path", "deeper", "multi-scale", "channels"],
)
def test_what_is_no_published_network_is_refused(checkpoint, options, message, record_property, capsys):
    args = {"holder": options["args"]} if "args" in options else {}
    checkpoint(options.get("change", lambda tensors: tensors), **args)
    with pytest.raises(SystemExit) as error:
        convert("mim", "mim.pth")
    record_property("error", str(error.value))
    assert str(error.value).startswith("error: mim.pth: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "this ran" not in capsys.readouterr().out
    assert not Path("encoder.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mae", "x.pth"), "no such source"),
        (("mim", "x.pth"), "no such file"),
        (("mim", "other.pth"), "not a checkpoint of the public MiM code"),
        (("mim", "other.pth", "there.pt"), "is there already"),
        (("mim", "other.pth", "new.pt", "nopreset"), "no such preset"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.ones(2)}}, "other.pth")
    Path("there.pt").touch()
    with pytest.raises(SystemExit, match=message) as error:
        convert(*arguments)
    record_property("error", str(error.value))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pth", "there.pt"]
