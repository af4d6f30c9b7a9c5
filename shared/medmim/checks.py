"""Checks before a run: everything that can be known to fail is said before the first step.

The functions raise ``ValueError``; :mod:`medmim.commands` holds the forms that stand in a bundle's ``run``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.utils import ensure_tuple_rep

from medmim.datasets import Preset, get_preset
from medmim.encoders import KINDS
from medmim.folders import writable_faults
from medmim.networks.patches import grid_size
from medmim.splits import load_split
from medmim.state_dicts import as_knob
from medmim.transforms import hidden_count
from medmim.weights import read_checkpoint

logger = logging.getLogger(__name__)

PREPARED = ("channels", "spacing", "window", "z_score", "min_max")  # fields that say how scans are prepared
SWITCH = (True, False, "true", "false")


def check_switches(**switches: Any) -> None:
    """Refuse a switch that is neither on nor off; on the command line ``true`` arrives as a string.

    Raises:
        ValueError: naming every such knob.
    """
    wrong = [f"--{name} {value}: expected true or false" for name, value in switches.items() if value not in SWITCH]
    if wrong:
        raise ValueError("\n".join(wrong))


def check_knobs(
    whole: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Sequence[Any]] | None = None,
    one_of: Mapping[str, Sequence[Any]] | None = None,
    divisible: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Check plain values of knobs; all faults are reported together.

    Args:
        whole: name and value of knobs that must be whole numbers of at least 1; or name, value and lowest number.
        numbers: name, and then the value, the lowest and the highest allowed number; with a fourth entry ``None``,
            the value may be ``None``.
        one_of: name, and then the value followed by the allowed ones.
        divisible: name, and then the value, or a list of values, and numbers that must divide each of them.

    Raises:
        ValueError: one line for each fault.
    """
    faults = []
    for name, entry in (whole or {}).items():
        value, lowest = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (entry, 1)
        if not is_whole(value) or value < lowest:
            faults.append(f"--{name} {value}: expected a whole number of at least {lowest}")
    for name, (value, lowest, highest, *optional) in (numbers or {}).items():
        if value is None and optional:
            continue
        if not is_number(value) or not lowest <= value <= highest:
            bounds = f"from {lowest} to {highest}" if highest < math.inf else f"of at least {lowest}"
            faults.append(f"--{name} {value}: expected a number {bounds}")
    for name, (value, *allowed) in (one_of or {}).items():
        if value not in allowed:
            faults.append(f"--{name} {value}: expected {' or '.join(map(str, allowed))}")
    for name, (value, *divisors) in (divisible or {}).items():
        values = value if isinstance(value, list | tuple) else [value]
        for divisor in divisors:
            if all(map(is_whole, [*values, divisor])) and divisor > 0 and any(number % divisor for number in values):
                expected = f"multiples of {divisor}" if values is value else f"a multiple of {divisor}"
                faults.append(f"--{name} {value}: expected {expected}")
    if faults:
        raise ValueError("\n".join(faults))


def check_upsampling(patch_size: Any) -> None:
    """Refuse a patch that an upsampling head does not reach: it doubles the grid until it is that of the voxels.

    Raises:
        ValueError: naming the knob; sizes that are none are left to :func:`check_sizes`.
    """
    sizes = set(patch_size) if isinstance(patch_size, list | tuple) else {patch_size}
    if all(map(is_whole, sizes)) and (len(sizes) > 1 or any(size < 1 or size & (size - 1) for size in sizes)):
        raise ValueError(
            f"--patch_size {patch_size}: with --decoder upsampling expected a power of two, the same along each axis"
        )


def check_schedule(epochs: Any, warmup_epochs: Any) -> None:
    """Refuse a schedule under which nothing would be learned.

    Raises:
        ValueError: naming the knobs and the numbers.
    """
    if not is_number(warmup_epochs) or (is_whole(epochs) and not 0 <= warmup_epochs < epochs):
        raise ValueError(
            f"--epochs {epochs} with --warmup_epochs {warmup_epochs}: the learning rate would not get beyond its "
            "warm-up: epochs must be larger, and warmup_epochs 0 or more"
        )


def check_device(device: Any) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: naming it.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        reason = " ".join(str(error).split()).split(". ")[0][:100]
        raise ValueError(
            f"--device {device}: not usable ({reason}): expected {' or '.join(['cpu', *there])}"
        ) from error


def check_preset(dataset: Any, spacing_factor: Any = 1.0, segmentation: bool = False) -> None:
    """Refuse a ``--dataset`` that is no preset, or a factor it cannot take; see :func:`medmim.datasets.get_preset`.

    For a segmentation it needs labels too.
    """
    preset = get_preset(dataset, spacing_factor)
    if segmentation:
        check_labels(preset)


def check_data(
    preset: Preset,
    dataset_dir: str,
    output_dirs: Sequence[str],
    datalist: str | None = None,
    labelled: bool = True,
    fold: int = 0,
    folds: int = 5,
    label_fraction: float = 1.0,
    test_fold: Any = None,
) -> None:
    """Check output folders and list of scans of a training run.

    Args:
        preset: of the data.
        dataset_dir, datalist, labelled, fold, folds, label_fraction, test_fold: see
            :func:`medmim.splits.load_split`.
        output_dirs: folders that must be writable; they are made. The first is marked as one of results.

    Raises:
        ValueError: one line for each fault.
    """
    faults = writable_faults(output_dirs)
    if test_fold is not None and not is_whole(test_fold):
        faults.append(f"--test_fold {test_fold}: expected null, or a whole number")
        test_fold = None
    numbers_are_good = is_whole(fold) and fold >= 0 and is_whole(folds) and folds > 1
    if numbers_are_good and is_number(label_fraction) and 0 < label_fraction <= 1:  # check_knobs says so otherwise
        faults += _split_faults(preset, dataset_dir, datalist, labelled, fold, folds, test_fold, label_fraction)
    if faults:
        raise ValueError("\n".join(faults))


def _split_faults(preset: Preset, dataset_dir: str, *args: Any) -> list[str]:
    """What is wrong with a list of scans, and how it is split."""
    try:
        split = load_split(dataset_dir, preset, *args)
    except (ValueError, TypeError) as error:
        return [str(error)]
    *_, fold, folds, _, _ = args
    logger.info(
        f"{preset.name}: {len(split.training)} scans for training, {len(split.validation)} for validation "
        f"(fold {fold} of {folds}) from {dataset_dir}"
    )
    if len(split.validation) < idist.get_world_size():
        return [
            f"--dataset_dir {dataset_dir}: {len(split.validation)} scans for validation by "
            f"{idist.get_world_size()} processes: each needs one: start fewer, or lower --folds"
        ]
    return []


def check_labels(preset: Preset) -> None:
    """Refuse a preset without labels for a segmentation.

    Raises:
        ValueError: naming it.
    """
    if not preset.labels:
        raise ValueError(f"--dataset {preset.name}: the preset names no labels, so it cannot be used for segmentation")


def check_encoder(
    path: str | None,
    preset: Preset,
    allow_other_preset: Any = False,
    knobs: Mapping[str, Any] | None = None,
    encoder_class: str | None = None,
) -> None:
    """Compare an ``encoder.pt`` with the run that is to start from it: the data it has seen, and its architecture.

    Args:
        path: the file; nothing is compared when it carries no description, and nothing is done without a path.
        preset: of this run.
        allow_other_preset: whether channels, spacing and intensities may be others than in pre-training.
        knobs: of the network of this run, under the names of the encoder's constructor arguments.
        encoder_class: name of the class that the network of this run takes; ``None`` leaves it to the loader.

    Raises:
        ValueError: one line for each fault.
    """
    if not path:
        return
    if not isinstance(path, str | Path):
        raise ValueError(f"--pretrained_encoder {path}: expected the path of a file")
    description = read_checkpoint(path)[1]
    if description is None:
        return
    faults = []
    theirs, ours = ({"min_max": False} | fields for fields in (description["preset"], preset.to_dict()))
    if allow_other_preset not in (True, "true"):
        different = [name for name in PREPARED if theirs.get(name) != ours.get(name)]
        if different:
            found = ", ".join(f"{name} {theirs.get(name)} (this run {ours.get(name)})" for name in different)
            how = "--dataset, --spacing_factor" if "spacing" in different else "--dataset"
            faults.append(
                f"--pretrained_encoder {path}: pre-trained with preset {theirs['name']}: {found}: prepare the scans "
                f"alike ({how}), or give --allow_other_preset true"
            )
    made_with, found_class = description["network"]["arguments"], description["network"]["name"]
    kinds = {kind.name: kind for kind in KINDS}
    if encoder_class is not None and found_class in kinds and found_class != encoder_class:
        faults.append(
            f"--pretrained_encoder {path}: holds a {found_class}, but this network's encoder is a {encoder_class}: "
            f"give a file of a {encoder_class}"
        )
        raise ValueError("\n".join(faults))  # to compare their arguments would say nothing
    renamed = dict(kinds[found_class].knobs) if found_class in kinds else {}
    wrong = [
        name for name, value in (knobs or {}).items() if name in made_with and _sizes(made_with[name]) != _sizes(value)
    ]
    if wrong:
        give = " ".join(as_knob(renamed.get(name, name), made_with[name]) for name in wrong)
        faults.append(f"--pretrained_encoder {path}: another architecture than this run's: give {give}")
    if faults:
        raise ValueError("\n".join(faults))


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
    faults = []
    if not isinstance(roi_size, list | tuple) or not are_sizes(roi_size, spatial_dims):
        faults.append(f'--roi_size {roi_size}: expected {spatial_dims} numbers in voxels, as in "[96, 96, 96]"')
    for knob, size in (("patch_size", patch_size), ("mask_unit", mask_unit)):
        if not (are_sizes(size, spatial_dims) or (knob == "mask_unit" and size is None)):
            faults.append(f"--{knob} {size}: expected a whole number of voxels, or {spatial_dims} for the axes")
    if mask_ratio is not None and not (is_number(mask_ratio) and 0 <= mask_ratio < 1):
        faults.append(f"--mask_ratio {mask_ratio}: expected a number from 0 to below 1")
    if faults:
        raise ValueError("\n".join(faults))
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
    try:
        count = None if mask_ratio is None else hidden_count(mask_ratio, n_units)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if count == 0:
        raise ValueError(f"--mask_ratio {mask_ratio} hides none of {n_units} units: there would be nothing to learn")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, and no switch."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def are_sizes(value: Any, axes: int) -> bool:
    """Whether a value is one whole number above 0 for all axes, or one for each."""
    values = value if isinstance(value, list | tuple) else (value,) * axes
    return len(values) == axes and all(is_whole(size) and size > 0 for size in values)


def _sizes(value: Any) -> Any:
    """One number for all axes when they are equal."""
    return value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value
