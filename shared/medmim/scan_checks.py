"""Reading every scan once before a run: all that are faulty are named together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch

from medmim.datalists import Datalist, Item
from medmim.datasets import Preset
from medmim.remembered_checks import check_each, has_label_map
from medmim.scan_datasets import resampled_size
from medmim.transforms import ScanError
from medmim.transforms.scans import check_image, check_label, load_scan

logger = logging.getLogger(__name__)


def check_scans(
    items: Sequence[Item] | Datalist,
    preset: Preset,
    remember: str | Path | None = None,
    roi_size: Sequence[int] | None = None,
) -> None:
    """Read every scan and its label once; all faulty scans are reported together.

    Args:
        items: scans, or a split of them.
        preset: what they must be like.
        remember: file in which the scans found good are remembered (path, size and time of each), so that the next
            run need not read them again.
        roi_size: voxels of a crop, to count the scans that must be padded.

    Raises:
        ScanError: one line for each faulty scan.
        ValueError: when there are label maps for training, but none has any foreground.
    """
    training = items.training if isinstance(items, Datalist) else items
    if isinstance(items, Datalist):
        items = items.training + items.validation + items.test
    values = f"{preset.file_values} {preset.label_map}"
    rules = f"{list(preset.channels)} {values} {preset.window} {len(preset.roi_size)}"
    found = check_each(
        items, lambda item: _check_scan(item, preset), ("shape", "spacing", "foreground"), rules, remember
    )
    small, empty = [], []
    for item, entry in zip(items, found, strict=True):
        if entry["foreground"] is False:
            empty.append(item["label"])
        if roi_size is not None:
            size = resampled_size(entry["shape"], entry["spacing"], preset)
            if any(n < roi for n, roi in zip(size, roi_size, strict=True)):
                small.append((item["image"], size))
    labels = {item["label"] for item in training if has_label_map(item)}
    if labels and labels <= set(empty):
        raise ValueError(
            f"{empty[0]}: no foreground, as in all {len(labels)} label maps for training: nothing could be learned: "
            "correct them, or choose others (--dataset_dir, --datalist)"
        )
    if empty and idist.get_rank() == 0:
        logger.warning(f"{len(empty)} of {len(items)} label maps have no foreground, for example {empty[0]}")
    if small and roi_size is not None and idist.get_rank() == 0:
        name, size = small[0]
        logger.warning(
            f"{len(small)} of {len(items)} scans are smaller than a crop of {tuple(roi_size)} voxels and will be "
            f"padded, for example {name}: about {size} voxels"
        )


def _check_scan(item: Item, preset: Preset) -> dict[str, Any]:
    """Check one scan.

    Returns:
        ``shape`` in voxels and ``spacing`` in mm, in the file's axes; ``foreground``, whether the label map has any,
        ``None`` without a label map.

    Raises:
        ScanError: naming the file and what was found.
    """
    name = item["image"] if isinstance(item["image"], str) else item["image"][0]
    image = load_scan(item["image"])
    check_image(image, name, len(preset.channels), len(preset.roi_size))
    lowest, highest = float(image.min()), float(image.max())
    if preset.window is not None and (highest <= preset.window[0] or lowest >= preset.window[1]):
        raise ScanError(
            f"{name}: constant image after the preset's window {list(preset.window)}, voxels lie in [{lowest:g}, "
            f"{highest:g}]: remove the file, or choose a preset with another window (--dataset)"
        )
    foreground = None
    if has_label_map(item):
        label = load_scan(item["label"])
        check_label(label, image, item["label"], preset.file_values)
        found = [int(value) for value in torch.unique(label.round())]
        foreground = any(preset.label_map.get(value, value) for value in found)
    pixdim = getattr(image, "pixdim", torch.ones(image.ndim - 1))
    return {"shape": list(image.shape[1:]), "spacing": [float(p) for p in pixdim], "foreground": foreground}


def check_pairs(split: Datalist, crops_per_scan: int, batch_size: int | None = None) -> None:
    """Check that each batch of a contrastive task holds two pairs of views or more, so that there are negatives.

    Args:
        split: scans of the run.
        crops_per_scan: pairs from a scan in training; in validation there is one.
        batch_size: scans in a batch of a process; without one, only the validation is checked.

    Raises:
        ValueError: naming the knobs and the numbers.
    """
    faults = []
    if batch_size is not None:
        processes = idist.get_world_size()
        share = math.ceil(len(split.training) / processes)  # the sampler fills up with scans of the beginning
        last = share % batch_size or batch_size
        if last * crops_per_scan * processes < 2:
            faults.append(
                f"--batch_size {batch_size}: with {share} scans for training and --crops_per_scan {crops_per_scan} a "
                "batch would be one pair of views, which has no negatives: change batch_size, or raise crops_per_scan"
            )
    if len(split.validation) < 2:
        faults.append(
            f"{len(split.validation)} scans for validation: one pair of views has no negatives, two are needed: lower "
            "--folds, or name more in --datalist"
        )
    if faults:
        raise ValueError("\n".join(faults))
