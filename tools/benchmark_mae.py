"""Training step of our MAE beside MONAI's ``MaskedAutoEncoderViT``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.nets import MaskedAutoEncoderViT, ViT
from torch import Tensor, nn
from tqdm import tqdm

from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskedAutoencoder
from medmim.transforms import RandPatchMaskd
from tools.measure import default_device, machine, peak_memory, synchronize

ENCODER: dict[str, Any] = {"hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12}  # ViT-B
DECODER: dict[str, Any] = {"decoder_hidden_size": 384, "decoder_num_layers": 8, "decoder_num_heads": 12}
PATCH = (16, 16, 16)
Step = Callable[[], float]


def benchmark_mae(ratios: Sequence[float], batch_size: int, size: int, repeats: int, dtype: str, compile: bool) -> None:
    """Print seconds and memory of both networks at each mask ratio; see :func:`tools.benchmark.benchmark`."""
    device = default_device()
    print(f"{machine(device)}, torch {torch.__version__}, {dtype}, batch {batch_size}, {size}³ voxels, patch 16\n")
    print("hidden  AdamW       MONAI         ours   ratio    MONAI GiB  ours GiB")
    # first of all, because on Linux the peak of a child process counts what its parent held when it was started
    peaks = {
        (side, ratio): peak_memory(
            "tools.benchmark_mae", "training_step", side, ratio, batch_size, size, dtype, "own", device, compile
        )
        for ratio in ratios
        for side in ("monai", "ours")
    }
    bar = tqdm(total=len(ratios) * 2 * (repeats + 3), disable=None, leave=False)
    for ratio in ratios:
        for recipe in ("plain", "own"):
            steps = {
                side: training_step(side, ratio, batch_size, size, dtype, recipe, device, compile)
                for side in ("monai", "ours")
            }
            seconds: dict[str, list[float]] = {"monai": [], "ours": []}
            for repeat in range(repeats + 3):
                for side, step in steps.items():
                    took = step()
                    if repeat >= 3:
                        seconds[side].append(took)
                bar.update()
            median = {side: statistics.median(values) for side, values in seconds.items()}
            bar.clear()
            print(
                f"{ratio:5.0%}   {recipe:6s} {median['monai']:9.4f} s {median['ours']:10.4f} s "
                f"{median['monai'] / median['ours']:6.2f}× {peaks['monai', ratio]:10.2f} {peaks['ours', ratio]:9.2f}",
                flush=True,
            )
    bar.close()


def training_step(
    side: str, ratio: float, batch_size: int, size: int, dtype: str, recipe: str, device: str, compile: bool = False
) -> Step:
    """A function that runs one training step and returns its seconds."""
    torch.manual_seed(0)
    image = torch.rand(batch_size, 1, size, size, size, device=device)
    loss_function = MaskedReconstructionLoss(PATCH)
    network: Any
    if side == "ours":
        vit = ViT(in_channels=1, img_size=size, patch_size=PATCH, **ENCODER)
        network = MaskedAutoencoder(vit, size, **DECODER).to(device)
        draw = RandPatchMaskd("image", PATCH, ratio)
    else:
        sizes: dict[str, Any] = {**ENCODER, **DECODER, "decoder_mlp_dim": 4 * DECODER["decoder_hidden_size"]}
        network = MaskedAutoEncoderViT(1, size, PATCH, masking_ratio=ratio, **sizes).to(device)
    network.train()
    fused = True if recipe == "own" and side == "ours" else None
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=fused)
    called = torch.compile(network) if compile and side == "ours" else network

    def forward() -> Tensor:
        if side == "ours":
            mask = torch.stack([draw({"image": x})["mask"] for x in image]).to(device)
            return loss_function(called(image, mask), image, mask)
        prediction, mask = called(image)
        return loss_function(prediction, image, mask.bool())

    autocast = dtype == "bfloat16" and (side == "ours" or runs_under_autocast(network, image))

    def step() -> float:
        synchronize(device)
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            loss = forward()
        loss.backward()
        optimizer.step()
        synchronize(device)
        return time.perf_counter() - started

    return step


def runs_under_autocast(network: nn.Module, image: Tensor) -> bool:
    """Whether a network can be called under bf16 autocast."""
    try:
        with torch.no_grad(), torch.autocast(image.device.type, dtype=torch.bfloat16):
            network(image)
    except RuntimeError:
        return False
    return True
