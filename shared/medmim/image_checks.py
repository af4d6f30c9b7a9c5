"""Checks of images with classes before a run: their list, their split, the encoder and the weights to start from."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from medmim.checks import is_number, is_whole
from medmim.classification import class_weights
from medmim.datalists import Datalist, Item
from medmim.datasets import Preset, get_preset
from medmim.description import TASKS, read_description
from medmim.folders import writable_faults
from medmim.image_lists import load_image_list
from medmim.image_splits import kept_apart
from medmim.weights import read_checkpoint

logger = logging.getLogger(__name__)

FEW = 20  # images for validation, below which the log says so


def check_volume_preset(dataset: Any, spacing_factor: Any = 1.0) -> None:
    """Refuse a ``--dataset`` that is no preset of volumes with classes.

    Raises:
        ValueError: naming the knob.
    """
    preset = get_preset(dataset, spacing_factor)
    if len(preset.roi_size) != 3:
        raise ValueError(
            f"--dataset {dataset}: a preset of {len(preset.roi_size)} axes, expected 3 for volumes: choose another, or "
            "another bundle"
        )
    check_classes(preset, dataset)


def check_classes(preset: Preset, dataset: Any) -> None:
    """Refuse a preset that names no classes.

    Args:
        preset: of the data.
        dataset: how it was given.

    Raises:
        ValueError: naming it.
    """
    if preset.classification is None:
        raise ValueError(
            f"--dataset {dataset}: the preset names no classes, so nothing can be classified: choose another, or "
            "give a .yaml file of your own with the field classification"
        )


def check_image_data(
    preset: Preset,
    dataset_dir: str,
    output_dirs: Sequence[str],
    datalist: str | None = None,
    labelled: bool = True,
    fold: Any = 0,
    folds: Any = 5,
    test_fold: Any = None,
    label_fraction: Any = 1.0,
) -> None:
    """Check output folders and list of images of a training run.

    Args:
        preset: of the data.
        dataset_dir, datalist, labelled, fold, folds, test_fold, label_fraction: see
            :func:`medmim.image_lists.load_image_list`.
        output_dirs: folders that must be writable; they are made. The first is marked as one of results.

    Raises:
        ValueError: one line for each fault.
    """
    faults = writable_faults(output_dirs)
    good = is_whole(folds) and folds > 1 and is_number(label_fraction) and 0 < label_fraction <= 1
    if good and is_whole(fold) and not 0 <= fold < folds:
        faults.append(f"--fold {fold} of --folds {folds}: fold must lie in 0 … folds - 1")
    elif test_fold is not None and good and not (is_whole(test_fold) and 0 <= test_fold < folds):
        faults.append(f"--test_fold {test_fold} of --folds {folds}: expected null, or a number in 0 … folds - 1")
    elif good and is_whole(fold):  # check_knobs says so otherwise
        faults += _split_faults(preset, dataset_dir, datalist, labelled, fold, folds, test_fold, label_fraction)
    if faults:
        raise ValueError("\n".join(faults))


def _split_faults(preset: Preset, dataset_dir: str, datalist: str | None, labelled: bool, *args: Any) -> list[str]:
    try:
        split = load_image_list(dataset_dir, preset, datalist, labelled, *args)
    except (ValueError, TypeError) as error:
        return [str(error)]
    if idist.get_rank() == 0:
        logger.info(
            f"{preset.name}: {len(split.training)} images for training, {len(split.validation)} for validation, "
            f"{len(split.test)} for testing from {dataset_dir}"
        )
        if labelled:
            _tell_classes(split, preset)
    if len(split.validation) < idist.get_world_size():
        return [
            f"--dataset_dir {dataset_dir}: {len(split.validation)} images for validation by "
            f"{idist.get_world_size()} processes: each needs one: start fewer, or lower --folds"
        ]
    if labelled:
        return _label_faults(split, preset, dataset_dir)
    return []


def _label_faults(split: Datalist, preset: Preset, dataset_dir: str) -> list[str]:
    """Labels from which nothing could be learned, or on which nothing could be scored."""
    faults = []
    parts = [("training", split.training, "learned"), ("validation", split.validation, "scored")]
    for name, items, use in [*parts, ("test", split.test, "scored")]:
        if not items:
            continue
        columns = list(zip(*_labels(items), strict=True))
        if not any(0.0 in column and 1.0 in column for column in columns):
            classification: Any = preset.classification
            faults.append(
                f"--dataset_dir {dataset_dir}: none of {', '.join(classification.outputs)} has images with it and "
                f"images without it among the {len(items)} for {name}: nothing could be {use}: add images, or change "
                "--fold, --folds or --label_fraction"
            )
    return faults


def _labels(items: Sequence[Item]) -> list[list[float]]:
    return [item["label"] for item in items]


def _tell_classes(split: Datalist, preset: Preset) -> None:
    """Images of each class in each part, and the classes that a part lacks."""
    classification: Any = preset.classification
    for name, items in (("training", split.training), ("validation", split.validation), ("test", split.test)):
        if not items:
            continue
        columns = list(zip(*_labels(items), strict=True))
        counts = [sum(value == 1 for value in column) for column in columns]
        told = [f"{n} {label}" for label, n in zip(classification.outputs, counts, strict=True)]
        unknown = sum(math.isnan(value) for column in columns for value in column)
        logger.info(f"{name}: {', '.join(told)}" + (f"; {unknown} labels unknown" if unknown else ""))
        absent = [label for label, n in zip(classification.outputs, counts, strict=True) if n == 0]
        if name == "validation" and len(items) < FEW:
            logger.warning(
                f"validation: {len(items)} images are few to choose a model and thresholds on: a --datalist with a "
                "column split may name more"
            )
        if absent:
            logger.warning(f"{name}: no image has {' or '.join(absent)}: no score can be given, or nothing be learned")


def check_seen(path: str | None, split: Datalist, dataset_dir: str, preset: Preset) -> None:
    """Say when pre-training may have seen the images that are kept apart here: other classes make another split.

    Args:
        path: ``encoder.pt``, whose description tells its preset and what it has kept apart, or a ``model.pt`` with
            ``model.json`` beside it; nothing is said without.
        split: of this run.
        dataset_dir: folder that names are relative to.
        preset: of this run.
    """
    description = _describe_weights(Path(path)) if path else None
    if description is None or idist.get_rank() > 0:
        return
    trained_on, apart = description["preset"]["name"], description.get("kept_apart")
    if trained_on == preset.name and apart in (None, kept_apart(split, dataset_dir)):
        return
    how = "other images were kept apart" if trained_on == preset.name else "which may split the images otherwise"
    labels = "with" if TASKS.get(description["network"]["name"]) == "classification" else "without"
    logger.warning(
        f"--pretrained_encoder {path}: trained with preset {trained_on}, {how}: it may have seen those for "
        f"validation and testing ({labels} labels). Train it with --dataset {preset.name} "
        "and the same --datalist, --fold, --folds and --test_fold to keep them apart"
    )


def _describe_weights(path: Path) -> dict[str, Any] | None:
    """Description inside a file of weights or, of a ``model.pt``, that in ``model.json`` beside it."""
    description = read_checkpoint(path)[1]
    beside = path.with_name("model.json")
    if description is None and path.name == "model.pt" and beside.is_file():
        return read_description(beside)
    return description


def check_class_weights(split: Datalist, preset: Preset, how: Any) -> None:
    """Refuse weights that are none; see :func:`medmim.classification.class_weights`."""
    if preset.classification is not None:  # check_radiograph_preset says so otherwise
        class_weights(split.training, preset.classification, how)


def check_evaluated(
    split: Datalist, part: Any, dataset_dir: str, models_dir: str, allow_other_images: Any = False
) -> None:
    """Refuse to evaluate on images that are not there, or not those that training has kept apart.

    Args:
        split: of this run.
        part: ``validation`` or ``test``.
        dataset_dir: folder that names are relative to.
        models_dir: folder of ``model.json``, which knows what training has kept apart.
        allow_other_images: whether other images may be scored.

    Raises:
        ValueError: naming the knob.
    """
    if allow_other_images not in (True, False, "true", "false"):
        raise ValueError(f"--allow_other_images {allow_other_images}: expected true or false")
    if part not in ("validation", "test"):
        raise ValueError(f"--part {part}: expected validation or test")
    if part == "test" and len(split.test) < idist.get_world_size():
        raise ValueError(
            f"--part test: {len(split.test)} images for testing: give --test_fold as in training, or a --datalist that "
            "names test images in its column split"
        )
    path = Path(models_dir) / "model.json"
    kept = read_description(path).get("kept_apart", {}).get(part)
    ours = kept_apart(split, dataset_dir)[part]
    if kept not in (None, ours) and allow_other_images not in (True, "true"):
        raise ValueError(
            f"--part {part}: {len(getattr(split, part))} images, not those that training kept apart ({path}), so some "
            "may have been learned: give the --dataset_dir, --datalist, --fold, --folds and --test_fold of the "
            "training, or --allow_other_images true for images that it never saw"
        )
