"""Checks of radiographs before a run: their preset, their list, each file."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from medmim.checks import check_encoder, is_number, is_whole
from medmim.classification import class_weights
from medmim.datalists import Datalist, Item
from medmim.datasets import Preset, get_radiograph_preset
from medmim.description import read_description
from medmim.folders import check_writable, writable_faults
from medmim.image_lists import find_images
from medmim.image_splits import kept_apart
from medmim.remembered_checks import check_each
from medmim.splits import load_split
from medmim.transforms.radiographs import load_radiograph
from medmim.weights import read_checkpoint

logger = logging.getLogger(__name__)

FEW = 20  # images for validation, below which the log says so


def check_radiograph_preset(dataset: Any, normalization: Any = None, labelled: bool = False) -> None:
    """Refuse a ``--dataset`` that is no preset of radiographs, or names no classes where they are needed.

    Raises:
        ValueError: naming the knob.
    """
    preset = get_radiograph_preset(dataset, normalization)
    if labelled and preset.classification is None:
        raise ValueError(
            f"--dataset {dataset}: the preset names no classes, so nothing can be classified: choose another, or give "
            "a .yaml file of your own with the field classification"
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
    """Check output folders and list of radiographs of a training run.

    Args:
        preset: of the data.
        dataset_dir, datalist, labelled, fold, folds, test_fold, label_fraction: see
            :func:`medmim.splits.load_split`.
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
        split = load_split(dataset_dir, preset, datalist, labelled, *args)
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


def check_radiograph_encoder(path: str | None, preset: Preset, **kwargs: Any) -> None:
    """:func:`medmim.checks.check_encoder`; says when pre-training may have seen the images that are kept apart here.

    The split depends on the classes, so another preset keeps other images apart.
    """
    check_encoder(path, preset, **kwargs)
    description = read_checkpoint(path)[1] if path else None
    if description is not None and description["preset"]["name"] != preset.name and idist.get_rank() == 0:
        logger.warning(
            f"--pretrained_encoder {path}: pre-trained with preset {description['preset']['name']}, which may split "
            f"the images otherwise: it may have seen those for validation and testing (without labels). Pre-train with "
            f"--dataset {preset.name} and the same --fold, --folds and --test_fold to keep them apart"
        )


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


def check_radiographs(items: Datalist | Sequence[Item], preset: Preset, remember: str | Path | None = None) -> None:
    """Read every radiograph once; all faulty ones are reported together.

    Args:
        items: radiographs, or a split of them.
        preset: of the data.
        remember: file in which the good ones are remembered.

    Raises:
        ScanError: one line for each faulty file.
    """
    if isinstance(items, Datalist):
        items = items.training + items.validation + items.test
    check_each(items, _check_radiograph, ("shape",), f"radiograph {list(preset.channels)}", remember)


def _check_radiograph(item: Item) -> dict[str, Any]:
    return {"shape": list(load_radiograph(item["image"]).shape[1:])}


def check_image_inference(
    models_dir: str, dataset_dir: str, output_dir: str, check_scans: Any = True, one_file_each: bool = False
) -> None:
    """Check model, output folder and images of a prediction run.

    Args:
        models_dir: folder with ``model.pt`` and ``model.json``.
        dataset_dir: folder with radiographs.
        output_dir: folder that must be writable; it is made.
        check_scans: whether to read each image.
        one_file_each: whether a file is written for each image, named like it but for the ending.

    Raises:
        ValueError: one line for each fault.
    """
    read_description(Path(models_dir) / "model.json")
    if Path(output_dir).resolve() == Path(dataset_dir).resolve():
        raise ValueError(f"--output_dir {output_dir}: the folder of the images: choose another for the results")
    check_writable(output_dir, results=True)
    items = find_images(dataset_dir)
    twice = [name for name, n in Counter(Path(item["image"]).with_suffix("") for item in items).items() if n > 1]
    if twice and one_file_each:
        raise ValueError(
            f"{twice[0]}: {len(twice)} names stand with several endings, whose results would be one: keep one"
        )
    logger.info(f"{len(items)} images from {dataset_dir}")
    if check_scans in (True, "true"):
        check_each(items, _check_radiograph, ("shape",), "radiograph")
