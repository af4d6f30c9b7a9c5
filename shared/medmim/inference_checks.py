"""Checks before a prediction: model, folders and scans; :mod:`medmim.commands` holds their forms for a ``run``."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from medmim.datalists import find_items
from medmim.datasets import channel_file_faults
from medmim.description import TASKS, read_description, read_preset
from medmim.folders import check_writable
from medmim.scan_checks import check_scans

logger = logging.getLogger(__name__)


def read_model(models_dir: str, dataset_dir: str, output_dir: str, task: str | None = None) -> dict[str, Any]:
    """Description of the model of a prediction run, whose results must not go where the images are.

    Args:
        models_dir: folder with ``model.json``.
        dataset_dir: folder of the images.
        output_dir: of the results.
        task: that the model must have been trained for, ``pretraining``, ``segmentation`` or ``classification``;
            ``None`` allows any.

    Raises:
        ValueError: naming the knob, what was found and what is expected.
    """
    description = read_description(Path(models_dir) / "model.json")
    name = description["network"]["name"]
    if task not in (None, TASKS.get(name)):
        raise ValueError(
            f"--models_dir {models_dir}: a {name}, a model of {TASKS.get(name, 'an unknown task')}, expected one of "
            f"{task}: give the folder of this bundle's training, or run the bundle that the model comes from"
        )
    if Path(output_dir).resolve() == Path(dataset_dir).resolve():
        raise ValueError(f"--output_dir {output_dir}: the folder of the data: choose another for the results")
    return description


def check_inference(
    models_dir: str,
    dataset_dir: str,
    output_dir: str,
    read_scans: bool = True,
    channel_files: Any = None,
    resized: bool = False,
    task: str | None = None,
) -> None:
    """Check model, output folder and scans of a prediction run.

    Args:
        models_dir: folder with ``model.pt`` and ``model.json``.
        dataset_dir: folder with NIfTI files.
        output_dir: folder that must be writable; it is made.
        read_scans: whether to read each scan.
        channel_files: endings of the names of each channel's files, where they are files of their own; ``None`` takes
            those of the model's preset.
        resized: whether scans are resized as a whole, so that none is padded.
        task: of the model, see :func:`read_model`.

    Raises:
        ValueError: one line for each fault.
    """
    description = read_model(models_dir, dataset_dir, output_dir, task)
    preset = read_preset(description)
    channel_files = preset.channel_files if channel_files is None else channel_files
    faults = channel_file_faults(channel_files, preset.channels)
    if faults:
        raise ValueError(f"--channel_files {channel_files}: {faults[0]}")
    check_writable(output_dir, results=True)
    items = find_items(dataset_dir, channel_files, preset.label_file)
    files = [item["image"] if isinstance(item["image"], str) else item["image"][0] for item in items]
    twice = [name for name, count in Counter(map(_stem, files)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}.nii and {twice[0]}.nii.gz would write the same result: keep one of them")
    logger.info(f"{len(items)} scans from {dataset_dir}")
    if read_scans:
        check_scans(items, preset, roi_size=None if resized else description["network"]["arguments"]["img_size"])


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


def _stem(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".nii")
