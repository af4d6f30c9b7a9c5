"""Seconds and memory of the training steps, on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from tools.benchmark_mae import benchmark_mae
from tools.benchmark_mim import benchmark_mim
from tools.benchmark_simmim import benchmark_simmim


def benchmark(
    pretext: str = "mae",
    mask_ratios: Sequence[float] | float | None = None,
    batch_size: int | None = None,
    size: int | None = None,
    repeats: int | None = None,
    dtype: str = "float32",
    compile: bool = False,
    chunk_size: int = 4,
) -> None:
    """Time training steps; peak memory is that of a process that runs nothing else.

    mae: one step (mask, forward, loss, backward, optimiser) of ours beside MONAI's ``MaskedAutoEncoderViT``, in turns.
    Same encoder (ViT-B), decoder (384 × 8), image, mask ratio and loss. Once with the same plain AdamW on both sides,
    once with each side's own recipe (ours: fused AdamW). By default 50, 75 and 90 % hidden, two crops of 96³ voxels,
    ten steps.

    simmim: one step of ``SimMIM`` on ViT-B and on the Swin of Swin UNETR (feature size 48), beside that of our MAE. By
    default 75 % hidden, two crops of 96³ voxels, five steps.

    mim: one step of ``MaskInMask`` with ConvViT base, level by level, and its encoder alone at each mask ratio. By
    default one volume of 192³ voxels, five steps, and 25, 50, 75 and 90 % hidden.

    Args:
        pretext: mae, simmim or mim.
        mask_ratios: shares of hidden tokens.
        batch_size: images in a step.
        size: voxels along each axis of an image (mim: of what level 1 sees, a multiple of 64).
        repeats: timed steps, after some for warming up.
        dtype: float32, or bfloat16 (autocast; MONAI's network runs in float32 where it fails under autocast).
        compile: compile our network with ``torch.compile``.
        chunk_size: of mim, sub-volumes that pass the network at a time.
    """
    if pretext not in ("mae", "simmim", "mim"):
        raise SystemExit(f"error: pretext {pretext!r}: expected mae, simmim or mim")
    if dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"error: --dtype {dtype}: expected float32 or bfloat16")
    given = tuple(mask_ratios) if isinstance(mask_ratios, tuple | list) else (mask_ratios,) if mask_ratios else ()
    if pretext == "mae":
        benchmark_mae(given or (0.5, 0.75, 0.9), batch_size or 2, size or 96, repeats or 10, dtype, compile)
    elif pretext == "simmim":
        benchmark_simmim(given or (0.75,), batch_size or 2, size or 96, repeats or 5, dtype, compile)
    else:
        ratios = given or (0.25, 0.5, 0.75, 0.9)
        benchmark_mim(ratios, batch_size or 1, size or 192, repeats or 5, dtype, compile, chunk_size)
