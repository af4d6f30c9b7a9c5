"""The lines that the documentation shows do what it says."""

import re
from pathlib import Path

import torch
from monai.networks.nets import ViT

from medmim.datasets import get_preset
from medmim.weights import save_encoder

REPOSITORY = Path(__file__).resolve().parent.parent


def test_readme_puts_an_encoder_into_stock_monai(tmp_path, monkeypatch, capsys):
    readme = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"<!-- a test runs these lines -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 1
    vit = ViT(in_channels=1, img_size=(96, 96, 96), patch_size=16)
    save_encoder(tmp_path / "encoder.pt", vit, (96, 96, 96), get_preset("btcv"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks[0], names)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(names["network"].vit.state_dict()[name], tensor), name
    assert f"{len(vit.state_dict())} of {len(vit.state_dict())} encoder tensors loaded" in capsys.readouterr().out


def test_readme_names_every_bundle_and_command():
    readme = (REPOSITORY / "README.md").read_text()
    for bundle in (REPOSITORY / "bundles").iterdir():
        assert f"`{bundle.name}`" in readme
    for command in ("quickstart", "download", "benchmark"):
        assert command in readme
