"""Training step of our MiM at full size, level by level, and its encoder at each mask ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from medmim.losses import MaskedReconstructionLoss
from medmim.mim_step import prepare_nested_batch
from medmim.networks import ConvViT, MaskInMask
from medmim.networks.decoders import TransformerDecoder
from medmim.transforms import RandNestedMaskd, RandPatchMaskd
from tools.measure import default_device, machine, peak_memory, synchronize

PATCH = (16, 16, 16)
DECODER: dict[str, Any] = {"hidden_size": 576, "num_layers": 8, "num_heads": 16}
PARTS = ("masks", "level 1", "level 2", "level 3", "AdamW")
Step = Callable[[], dict[str, float]]


def benchmark_mim(
    mask_ratios: Sequence[float], batch_size: int, size: int, repeats: int, dtype: str, compile: bool, chunk_size: int
) -> None:
    """Print what a step takes and the encoder's part at each mask ratio; see :func:`tools.benchmark.benchmark`."""
    if size % 64:
        raise SystemExit(f"error: --size {size}: expected a multiple of 64: octants of half the size hold whole tokens")
    device = default_device()
    options = (batch_size, size, dtype, device, compile, chunk_size)
    peak = peak_memory("tools.benchmark_mim", "training_step", *options)
    print(f"{machine(device)}, torch {torch.__version__}, {dtype}, batch {batch_size}, {size}³ voxels, 1 + 4 + 16")
    print(f"sub-volumes of {size // 2}³, ConvViT base, decoder 576 × 8, {chunk_size} sub-volumes at a time\n")
    step = training_step(*options)
    step()
    runs = [step() for _ in tqdm(range(repeats), disable=None, leave=False)]
    totals = [sum(run.values()) for run in runs]
    print(f"one step {statistics.median(totals):.2f} s ({min(totals):.2f} to {max(totals):.2f}), peak {peak:.2f} GiB")
    for part in PARTS:
        seconds = statistics.median(run[part] for run in runs)
        print(f"  {part:8s} {seconds:7.2f} s {seconds / statistics.median(totals):5.0%}")
    print("\nhidden  encoder alone, forward and backward of one sub-volume")
    for ratio in (0.0, *mask_ratios):
        print(f"{ratio:6.0%}  {encoder_seconds(ratio, size // 2, dtype, device, repeats):7.3f} s", flush=True)


def build_encoder() -> ConvViT:
    """The encoder, base."""
    return ConvViT.base(fifth_stage=False)


def training_step(batch_size: int, size: int, dtype: str, device: str, compile: bool, chunk_size: int) -> Step:
    """A function that runs one training step of the base network and returns the seconds of each of its parts."""
    torch.manual_seed(0)
    half = size // 2
    levels = [
        {"crop_size": size, "img_size": half, "mask_unit": half // 2, "mask_ratio": 0.5},
        {"img_size": half, "mask_ratio": 0.6, "samples": 4},
        {"img_size": half, "mask_ratio": 0.5, "samples": 4},
    ]
    encoder = build_encoder()
    decoder = TransformerDecoder(encoder.token_embedding.out_features, 16**3, (half // 16,) * 3, **DECODER)
    loss = MaskedReconstructionLoss(PATCH)
    network = MaskInMask(encoder, decoder, levels, loss, chunk_size=chunk_size).to(device).train()
    if compile:
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    draw = RandNestedMaskd("image", levels)
    draw.set_random_state(0)
    images = torch.rand(batch_size, 1, size, size, size)

    def step() -> dict[str, float]:
        seconds = dict.fromkeys(PARTS, 0.0)
        synchronize(device)
        started = time.perf_counter()

        def stop(part: str) -> None:
            nonlocal started
            synchronize(device)
            now = time.perf_counter()
            seconds[part] += now - started
            started = now

        items = [draw({"image": image}) for image in images]
        collated = {str(key): torch.stack([item[key] for item in items]) for key in items[0]}
        batch = prepare_nested_batch(collated, device)[0]
        stop("masks")
        shares = network.shares(batch)
        for _ in range(network.n_shares(batch_size)):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                share, terms = next(shares)
            share.backward()
            stop(f"level {max(int(name[-1]) for name in terms)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stop("AdamW")
        return seconds

    return step


def encoder_seconds(mask_ratio: float, size: int, dtype: str, device: str, repeats: int) -> float:
    """Median seconds of forward and backward of ConvViT base on one image ``size``³."""
    torch.manual_seed(0)
    encoder = build_encoder().to(device).train()
    image = torch.rand(1, 1, size, size, size, device=device)
    grid = (size // 16,) * 3
    if mask_ratio:
        mask = torch.stack([RandPatchMaskd("image", PATCH, mask_ratio)({"image": x.cpu()})["mask"] for x in image])
    else:
        mask = torch.zeros(1, *grid, dtype=torch.bool)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            latent = encoder(image, mask)
        latent.float().square().mean().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
