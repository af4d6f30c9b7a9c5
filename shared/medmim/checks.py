"""Checks before a run: everything that can be known to fail is said before the first step.

The functions raise ``ValueError``; :mod:`medmim.commands` holds the forms that stand in a bundle's ``run``.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import ensure_tuple_rep
from tqdm import tqdm

from medmim.datalists import Datalist, Item, find_items, load_datalist
from medmim.datasets import Preset, get_preset
from medmim.description import read_description, read_preset
from medmim.files import replace_file
from medmim.networks.patches import grid_size
from medmim.transforms import ScanError, hidden_count
from medmim.transforms.scans import check_image, check_label, load_scan

logger = logging.getLogger(__name__)


def check_switches(**switches: Any) -> None:
    """Refuse a switch that is not a boolean; on the command line ``false`` arrives as a string, which counts as true.

    Raises:
        ValueError: naming every such knob.
    """
    wrong = [f"--{name} {value}" for name, value in switches.items() if not isinstance(value, bool)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: a switch must be True or False, with a capital letter")


def check_knobs(
    whole: Mapping[str, Any],
    one_of: Mapping[str, Sequence[Any]] | None = None,
    divisible: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Check plain values of knobs; all faults are reported together.

    Args:
        whole: name and value of knobs that must be whole numbers of at least 1.
        one_of: name, and then the value followed by the allowed ones.
        divisible: name, and then the value and a number that must divide it.

    Raises:
        ValueError: one line for each fault.
    """
    faults = [
        f"--{name} {value}: expected a whole number of at least 1"
        for name, value in whole.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    for name, (value, *allowed) in (one_of or {}).items():
        if value not in allowed:
            faults.append(f"--{name} {value}: expected {' or '.join(map(str, allowed))}")
    for name, (value, divisor) in (divisible or {}).items():
        if isinstance(value, int) and isinstance(divisor, int) and divisor > 0 and value % divisor:
            faults.append(f"--{name} {value}: expected a multiple of {divisor}")
    if faults:
        raise ValueError("\n".join(faults))


def check_schedule(epochs: int, warmup_epochs: int, learning_rate: float, layer_decay: float = 1.0) -> None:
    """Refuse a schedule under which nothing would be learned.

    Raises:
        ValueError: naming the knobs and the numbers.
    """
    if epochs < 1 or not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"--epochs {epochs} with --warmup_epochs {warmup_epochs}: the learning rate would not get beyond its "
            "warm-up: epochs must be larger, and warmup_epochs 0 or more"
        )
    if not learning_rate >= 0:
        raise ValueError(f"--learning_rate {learning_rate}: must not be negative")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"--layer_decay {layer_decay}: must lie in (0, 1]")


def check_data(
    dataset: str,
    dataset_dir: str,
    output_dirs: Sequence[str],
    datalist: str | None = None,
    labelled: bool = True,
    fold: int = 0,
    folds: int = 5,
    label_fraction: float = 1.0,
) -> None:
    """Check preset, output folders and list of scans of a training run.

    Args:
        dataset: see :func:`medmim.datasets.get_preset`.
        dataset_dir, datalist, labelled, fold, folds, label_fraction: see :func:`medmim.datalists.load_datalist`.
        output_dirs: folders that must be writable; they are made.

    Raises:
        ValueError: one line with the first fault.
    """
    preset = get_preset(dataset)
    if labelled and not preset.labels:
        raise ValueError(f"--dataset {dataset}: the preset names no labels, so it cannot be used for segmentation")
    for folder in output_dirs:
        check_writable(folder)
    split = load_datalist(dataset_dir, datalist, labelled, fold, folds, label_fraction)
    logger.info(
        f"{preset.name}: {len(split.training)} scans for training, {len(split.validation)} for validation "
        f"(fold {fold} of {folds}) from {dataset_dir}"
    )


def check_inference(models_dir: str, dataset_dir: str, output_dir: str, read_scans: bool = True) -> None:
    """Check model, output folder and scans of a prediction run.

    Args:
        models_dir: folder with ``model.pt`` and ``model.json``.
        dataset_dir: folder with NIfTI files.
        output_dir: folder that must be writable; it is made.
        read_scans: whether to read each scan.

    Raises:
        ValueError: one line for each fault.
    """
    description = read_description(Path(models_dir) / "model.json")
    check_writable(output_dir)
    items = find_items(dataset_dir)
    logger.info(f"{len(items)} scans from {dataset_dir}")
    if read_scans:
        check_scans(items, read_preset(description), roi_size=description["network"]["arguments"]["img_size"])


def check_same_dataset(dataset: Any, description: dict[str, Any]) -> None:
    """Refuse a ``--dataset`` that is not the one a model was trained on; a model knows its own preset.

    Args:
        dataset: name given on the command line; anything but a string passes.
        description: of the model.

    Raises:
        ValueError: naming both.
    """
    trained_on = description["preset"]["name"]
    if isinstance(dataset, str) and Path(dataset).stem != trained_on:
        raise ValueError(f"--dataset {dataset}: the model was trained on {trained_on}: leave --dataset away")


def check_writable(folder: str | Path) -> None:
    """Make a folder and write into it.

    Raises:
        ValueError: when that fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"folder {folder} is not writable ({reason}): choose another (--output_dir, --models_dir)"
        ) from error


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
        roi_size: voxels of the network's input, to count the scans that must be padded.

    Raises:
        ScanError: one line for each faulty scan.
        ValueError: when there are label maps for training, but none has any foreground.
    """
    training = items.training if isinstance(items, Datalist) else items
    if isinstance(items, Datalist):
        items = items.training + items.validation
    known = {} if remember is None else _read_remembered(Path(remember))
    rules = f"{list(preset.channels)} {preset.label_values} {preset.window} {len(preset.roi_size)}"
    faults, small, empty = [], [], []
    bar = tqdm(items, desc="checking scans", disable=None, leave=False)
    for item in bar:
        key = json.dumps([item["image"], item.get("label")])
        state = [rules, *_file_state(item)]
        if known.get(key, {}).get("state") != state:
            try:
                known[key] = {"state": state} | _check_scan(item, preset)
            except ScanError as error:
                faults.append(str(error))
                continue
        if known[key]["foreground"] is False:
            empty.append(item["label"])
        if roi_size is not None:
            size = _resampled_size(known[key]["shape"], known[key]["spacing"], preset)
            if any(n < roi for n, roi in zip(size, roi_size, strict=True)):
                small.append((item["image"], size))
    if remember is not None:
        replace_file(remember, lambda path: path.write_text(json.dumps(known)))
    if faults:
        summary = [f"{len(faults)} of {len(items)} scans cannot be used"] if len(faults) > 1 else []
        raise ScanError("\n".join([*faults, *summary]))
    labels = {item["label"] for item in training if "label" in item}
    if labels and labels <= set(empty):
        raise ValueError(
            f"{empty[0]}: no foreground, as in all {len(labels)} label maps for training: nothing could be learned: "
            "correct them, or choose others (--dataset_dir, --datalist)"
        )
    if empty:
        logger.warning(f"{len(empty)} of {len(items)} label maps have no foreground, for example {empty[0]}")
    if small and roi_size is not None:
        name, size = small[0]
        logger.warning(
            f"{len(small)} of {len(items)} scans are smaller than roi_size {tuple(roi_size)} and will be padded, "
            f"for example {name}: about {size} voxels"
        )


def check_sizes(
    roi_size: Sequence[int],
    patch_size: Sequence[int] | int,
    mask_unit: Sequence[int] | int | None = None,
    mask_ratio: float | None = None,
    allowed_patch_sizes: Sequence[int] | None = None,
    spatial_dims: int = 3,
) -> None:
    """Check that the region of interest divides into patches and mask units, and some would stay visible.

    Raises:
        ValueError: naming the knobs and the numbers.
    """
    if not isinstance(roi_size, list | tuple) or len(roi_size) != spatial_dims:
        raise ValueError(f'--roi_size {roi_size}: expected {spatial_dims} numbers in voxels, as in "[96, 96, 96]"')
    along_axes = set(ensure_tuple_rep(patch_size, spatial_dims))
    if allowed_patch_sizes is not None and (len(along_axes) > 1 or not along_axes <= set(allowed_patch_sizes)):
        allowed = ", ".join(map(str, allowed_patch_sizes))
        raise ValueError(f"--patch_size {patch_size}: this network needs one of {allowed}, the same on each axis")
    for knob, size in (("patch_size", patch_size), ("mask_unit", mask_unit)):
        if size is None:
            continue
        sizes = (size,) * len(roi_size) if isinstance(size, int) else tuple(size)
        try:
            grid_size(roi_size, sizes)
        except ValueError:
            raise ValueError(
                f"--roi_size {list(roi_size)} is not divisible by --{knob} {size}: change one so that each axis divides"
            ) from None
    patch = ensure_tuple_rep(patch_size, len(roi_size))
    unit = patch if mask_unit is None else ensure_tuple_rep(mask_unit, len(roi_size))
    if any(u % p for u, p in zip(unit, patch, strict=True)):
        raise ValueError(f"--mask_unit {mask_unit} is not a multiple of --patch_size {patch_size}")
    if allowed_patch_sizes is not None and max(grid_size(roi_size, patch)) < 2:
        raise ValueError(f"--roi_size {list(roi_size)} holds one patch of {patch_size} voxels only: enlarge it")
    n_units = prod(grid_size(roi_size, unit))
    if mask_ratio is not None and hidden_count(mask_ratio, n_units) == 0:
        raise ValueError(f"--mask_ratio {mask_ratio} hides none of {n_units} units: there would be nothing to learn")


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
        check_label(label, image, item["label"], preset.label_values)
        foreground = bool(label.round().any())
    pixdim = getattr(image, "pixdim", torch.ones(image.ndim - 1))
    return {"shape": list(image.shape[1:]), "spacing": [float(p) for p in pixdim], "foreground": foreground}


def _file_state(item: Item) -> list[int]:
    paths = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
    stats = [os.stat(path) for path in [*paths, *([item["label"]] if "label" in item else [])]]
    return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]


def _resampled_size(shape: Sequence[int], spacing: Sequence[float], preset: Preset) -> tuple[int, ...]:
    """About how many voxels a scan has at the preset's spacing (axes as in the file)."""
    target = preset.spacing or spacing
    return tuple(int(np.ceil(n * s / t)) for n, s, t in zip(shape, spacing, target, strict=True))
