"""One way from a folder and a preset to scans for training, validation and testing."""

from __future__ import annotations

from pathlib import Path

from medmim.datalists import Datalist, load_datalist
from medmim.datasets import Preset
from medmim.image_lists import load_image_list


def load_split(
    dataset_dir: str | Path,
    preset: Preset,
    datalist: str | Path | None = None,
    labelled: bool = True,
    fold: int = 0,
    folds: int = 5,
    test_fold: int | None = None,
    label_fraction: float = 1.0,
) -> Datalist:
    """Scans of a data set, split as its task needs it.

    A preset with classes has a list of images, split by patient:
    :func:`medmim.image_lists.load_image_list`; any other a Decathlon list: :func:`medmim.datalists.load_datalist`.
    Pre-training and fine-tuning with the same preset and knobs keep the same scans apart.

    Raises:
        ValueError: one line that names the file or knob.
    """
    if preset.classification is not None:
        return load_image_list(dataset_dir, preset, datalist, labelled, fold, folds, test_fold, label_fraction)
    return load_datalist(
        dataset_dir, datalist, labelled, fold, folds, label_fraction, test_fold=test_fold, preset=preset
    )
