"""Training step of SimMIM on ViT and on Swin, beside that of MAE."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from tqdm import tqdm

from medmim.losses import MaskedReconstructionLoss
from medmim.networks import SimMIM
from medmim.transforms import RandPatchMaskd
from tools import benchmark_mae
from tools.benchmark_mae import PATCH, Step
from tools.measure import default_device, machine, peak_memory, synchronize

SWIN: dict[str, Any] = {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), "window_size": (7, 7, 7)}
NAMES = {
    "mae": "MAE, ViT-B, decoder 384 × 8, L2",
    "vit": "SimMIM, ViT-B, linear head, L1",
    "swin": "SimMIM, Swin 48, upsampling head, L1",
}


def benchmark_simmim(
    ratios: Sequence[float], batch_size: int, size: int, repeats: int, dtype: str, compile: bool
) -> None:
    """Print seconds and memory of each network at each mask ratio; see :func:`tools.benchmark.benchmark`."""
    if size % 32:
        raise SystemExit(f"error: --size {size}: expected a multiple of 32, which a Swin needs")
    device = default_device()
    print(f"{machine(device)}, torch {torch.__version__}, {dtype}, batch {batch_size}, {size}³ voxels, blocks of 16³\n")
    print(f"{'network':38s} hidden    seconds  (fastest, slowest)     GiB")
    bar = tqdm(total=len(NAMES) * len(ratios) * (repeats + 1), disable=None, leave=False)
    for ratio in ratios:
        options = (ratio, batch_size, size, dtype, device, compile)
        # first of all, because on Linux the peak of a child process counts what its parent held when it was started
        peaks = {name: peak_memory("tools.benchmark_simmim", "training_step", name, *options) for name in NAMES}
        steps = {name: training_step(name, *options) for name in NAMES}
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                took = step()
                if repeat:
                    seconds[name].append(took)
                bar.update()
        bar.clear()
        for name, values in seconds.items():
            print(
                f"{NAMES[name]:38s} {ratio:6.0%} {statistics.median(values):8.3f} s  ({min(values):.3f}, "
                f"{max(values):.3f})   {peaks[name]:7.2f}",
                flush=True,
            )
        del steps
    bar.close()


def training_step(
    name: str, ratio: float, batch_size: int, size: int, dtype: str, device: str, compile: bool = False
) -> Step:
    """A function that runs one training step (mask, forward, loss, backward, AdamW) and returns its seconds."""
    if name == "mae":
        return benchmark_mae.training_step("ours", ratio, batch_size, size, dtype, "own", device, compile)
    torch.manual_seed(0)
    image = torch.rand(batch_size, 1, size, size, size, device=device)
    encoder: Any
    if name == "vit":
        encoder = ViT(in_channels=1, img_size=size, patch_size=PATCH, **benchmark_mae.ENCODER)
    else:
        encoder = SwinTransformer(in_chans=1, patch_size=(2, 2, 2), **SWIN)
    head = "linear" if name == "vit" else "upsampling"
    network = SimMIM(encoder, size, PATCH, head).to(device).train()
    loss_function = MaskedReconstructionLoss(PATCH, "l1", normalize_target=False)
    draw = RandPatchMaskd("image", PATCH, ratio)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)
    if compile:
        network.compile()

    def step() -> float:
        synchronize(device)
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        mask = torch.stack([draw({"image": x})["mask"] for x in image]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_function(network(image, mask), image, mask)
        loss.backward()
        optimizer.step()
        synchronize(device)
        return time.perf_counter() - started

    return step
