"""``python -m tools convert mim``: a checkpoint of the public code becomes an encoder.pt."""

import json
import os
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from medmim import build_encoder
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
