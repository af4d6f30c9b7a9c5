"""The lines that docs/weights.md shows run as they stand, and do what it says."""

import re
from pathlib import Path

import pytest
import torch
from monai.networks.nets import SwinUNETR, ViT

from medmim.datasets import get_preset
from medmim.weights import find_encoder, save_encoder

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "weights.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- a test runs these lines -->\n```python\n(.*?)```", PAGE, re.DOTALL)
STEM = "patch_embedding.patch_embeddings.weight"
POSITIONS = "patch_embedding.position_embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page speaks of, and the state dicts that they were made of."""
    path = tmp_path_factory.mktemp("weights")
    vit = ViT(in_channels=1, img_size=(96, 96, 96), patch_size=16)
    save_encoder(path / "encoder.pt", vit, (96, 96, 96), get_preset("btcv"))
    swin = SwinUNETR(in_channels=1, out_channels=14, feature_size=48).swinViT.state_dict()
    published = {"module." + name.replace("linear", "fc"): tensor for name, tensor in swin.items()}
    torch.save({"state_dict": published | {"module.rotation_head.weight": torch.ones(4)}}, path / "model_swinvit.pt")
    return path, vit.state_dict(), swin


def test_every_python_block_is_run():
    assert len(BLOCKS) == PAGE.count("```python") == 6


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_lines_put_the_weights_into_the_network(block, folder, monkeypatch, capsys):
    path, vit, swin = folder
    monkeypatch.chdir(path)
    names: dict = {}
    exec(block, names)
    expected = swin if "SwinUNETR" in block else vit
    found = find_encoder(names["network"]).state_dict()
    assert found.keys() == expected.keys()
    other = {STEM, POSITIONS} if "UNETR" in block and expected is vit else set()
    assert {name for name in found if not torch.equal(found[name], expected[name])} == other
    if "load_encoder" in block:
        printed = capsys.readouterr().out
        assert f"{len(expected)} of {len(expected)} encoder tensors loaded" in printed
        assert (printed in PAGE) == bool(other), "the page shows the line of the one whose stem and positions change"
    if "tokens" in names:
        assert names["tokens"].shape == (1, 216, 768)
