"""Published checkpoints of other code as an ``encoder.pt`` of ours."""

from __future__ import annotations

from pathlib import Path

from medmim.commands import ends_plainly
from medmim.datasets import get_preset
from medmim.mim_import import IMG_SIZE, import_mim_encoder
from medmim.state_dicts import read_checkpoint
from medmim.weights import save_encoder


@ends_plainly
def convert(source: str, checkpoint: str, encoder: str = "encoder.pt", dataset: str = "mim_ct") -> None:
    """Turn a checkpoint of the public MiM code (tiny or base) into encoder.pt, tensor by tensor.

    Args:
        source: mim.
        checkpoint: file with {"model": state dict}, as the public pre-training code writes it.
        encoder: file to write; load it with --pretrained_encoder or medmim.load_encoder.
        dataset: preset that tells how the scans of that pre-training were prepared, or a .yaml file of your own.
    """
    if source != "mim":
        raise ValueError(f"{source}: no such source: expected mim, the public code of Mask in Mask")
    if Path(encoder).exists():
        raise ValueError(f"{encoder}: is there already: remove it, or give another name")
    preset = get_preset(dataset)
    state_dict, _ = read_checkpoint(checkpoint)
    try:
        network, report = import_mim_encoder(state_dict)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    if network.in_channels != len(preset.channels):
        raise ValueError(
            f"{checkpoint}: its encoder has {network.in_channels} channels, but preset {preset.name} has "
            f"{len(preset.channels)} ({', '.join(preset.channels)}): give the preset of its scans (--dataset)"
        )
    save_encoder(encoder, network, IMG_SIZE, preset)
    print(f"{checkpoint}: {report}\nwrote {encoder}")
