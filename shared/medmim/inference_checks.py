"""Checks before a prediction: model, folders and scans; :mod:`medmim.commands` holds their forms for a ``run``."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from medmim.datalists import find_items
from medmim.datasets import channel_file_faults
from medmim.description import read_description, read_preset, task_of
from medmim.folders import check_writable
from medmim.scan_checks import check_scans

logger = logging.getLogger(__name__)


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
        task: of the model, see :func:`check_task`.

    Raises:
        ValueError: one line for each fault.
    """
    check_task(models_dir, task)
    description = read_description(Path(models_dir) / "model.json")
    if Path(output_dir).resolve() == Path(dataset_dir).resolve():
        raise ValueError(f"--output_dir {output_dir}: the folder of the scans: choose another for the results")
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


def check_task(models_dir: str, task: str | None) -> None:
    """Refuse the model of another kind of bundle.

    Args:
        models_dir: folder with ``model.json``.
        task: ``pretraining``, ``segmentation`` or ``classification``; ``None`` allows any.

    Raises:
        ValueError: naming what was found and what is expected.
    """
    if task is None:
        return
    found = task_of(read_description(Path(models_dir) / "model.json")["network"]["name"])
    if task != found:
        raise ValueError(
            f"--models_dir {models_dir}: a model of {found}, expected one of {task}: give the folder of this bundle's "
            "training, or run the bundle that the model comes from"
        )


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
