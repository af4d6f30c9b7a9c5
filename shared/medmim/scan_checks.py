"""Reading every scan once before a run: all that are faulty are named together."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from tqdm import tqdm

from medmim.datalists import Datalist, Item
from medmim.datasets import Preset
from medmim.files import replace_file
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
        items = items.training + items.validation
    known = {} if remember is None else _read_remembered(Path(remember))
    # each process reads its share
    found = _find_out(items[idist.get_rank() :: idist.get_world_size()], preset, known)
    if idist.get_world_size() > 1:
        shares: Any = idist.all_gather(found)
        found = {key: entry for share in shares for key, entry in share.items()}
    faults, small, empty = [], [], []
    for item in items:
        entry = found[_name(item)]
        if isinstance(entry, str):
            faults.append(entry)
            continue
        if entry["foreground"] is False:
            empty.append(item["label"])
        if roi_size is not None:
            size = resampled_size(entry["shape"], entry["spacing"], preset)
            if any(n < roi for n, roi in zip(size, roi_size, strict=True)):
                small.append((item["image"], size))
    if remember is not None and idist.get_rank() == 0:
        good = {key: entry for key, entry in found.items() if not isinstance(entry, str)}
        replace_file(remember, lambda path: path.write_text(json.dumps(known | good)))
    if faults:
        summary = [f"{len(faults)} of {len(items)} scans cannot be used"] if len(faults) > 1 else []
        raise ScanError("\n".join([*faults, *summary]))
    labels = {item["label"] for item in training if "label" in item}
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


def _find_out(items: Sequence[Item], preset: Preset, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What each scan is like, or the line that says why it cannot be used; only new and changed files are read."""
    values = f"{preset.file_values} {preset.label_map}"
    rules = f"{list(preset.channels)} {values} {preset.window} {len(preset.roi_size)}"
    found: dict[str, Any] = {}
    for item in tqdm(items, desc="checking scans", disable=None, leave=False):
        key = _name(item)
        try:
            state = [rules, *_file_state(item)]
            if known.get(key, {}).get("state") == state:
                found[key] = known[key]
            else:
                found[key] = {"state": state} | _check_scan(item, preset)
        except (ScanError, OSError) as error:
            found[key] = str(error)
    return found


def _name(item: Item) -> str:
    return json.dumps([item["image"], item.get("label")])


def _read_remembered(path: Path) -> dict[str, dict[str, Any]]:
    """Scans that an earlier run found good; none when the file is missing or damaged: they are read again."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    whole = {"state", "shape", "spacing", "foreground"}
    entries = known.items() if isinstance(known, dict) else ()
    return {key: entry for key, entry in entries if isinstance(entry, dict) and entry.keys() == whole}


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
    if "label" in item:
        label = load_scan(item["label"])
        check_label(label, image, item["label"], preset.file_values)
        found = [int(value) for value in torch.unique(label.round())]
        foreground = any(preset.label_map.get(value, value) for value in found)
    pixdim = getattr(image, "pixdim", torch.ones(image.ndim - 1))
    return {"shape": list(image.shape[1:]), "spacing": [float(p) for p in pixdim], "foreground": foreground}


def _file_state(item: Item) -> list[int]:
    paths = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
    stats = [os.stat(path) for path in [*paths, *([item["label"]] if "label" in item else [])]]
    return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]


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
