"""Checks of radiographs before a run: their preset, and each file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmim.datalists import Datalist, Item
from medmim.datasets import Preset, get_radiograph_preset
from medmim.description import read_preset
from medmim.folders import check_writable
from medmim.image_checks import check_classes
from medmim.image_lists import find_images
from medmim.inference_checks import read_model
from medmim.remembered_checks import check_each
from medmim.transforms.radiographs import load_radiograph

logger = logging.getLogger(__name__)


def check_radiograph_preset(dataset: Any, normalization: Any = None, labelled: bool = False) -> None:
    """Refuse a ``--dataset`` that is no preset of radiographs, or names no classes where they are needed.

    Raises:
        ValueError: naming the knob.
    """
    preset = get_radiograph_preset(dataset, normalization)
    if labelled:
        check_classes(preset, dataset)


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
    models_dir: str,
    dataset_dir: str,
    output_dir: str,
    check_scans: Any = True,
    one_file_each: bool = False,
    task: str | None = None,
) -> None:
    """Check model, output folder and images of a prediction run.

    Args:
        models_dir: folder with ``model.pt`` and ``model.json``.
        dataset_dir: folder with radiographs.
        output_dir: folder that must be writable; it is made.
        check_scans: whether to read each image.
        one_file_each: whether a file is written for each image, named like it but for the ending.
        task: of the model, see :func:`medmim.inference_checks.read_model`.

    Raises:
        ValueError: one line for each fault.
    """
    axes = len(read_preset(read_model(models_dir, dataset_dir, output_dir, task)).roi_size)
    if axes != 2:
        raise ValueError(
            f"--models_dir {models_dir}: a model for images of {axes} axes, expected one for radiographs, of 2: give "
            "the folder of this bundle's training, or run the bundle that the model comes from"
        )
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
