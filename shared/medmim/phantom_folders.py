"""Folders that synthetic data are written to. A folder's list is written first and each file at once, so that what a
break has left can be gone on with; files that are there are kept."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmim.files import replace_file

Write = Callable[[Path], Any]


def write_decathlon(
    folder: str | Path,
    name: str,
    description: str,
    channels: Sequence[str],
    labels: Mapping[str, int],
    spacing: Sequence[float],
    cases: Mapping[str, Callable[[], tuple[np.ndarray, np.ndarray]]],
) -> None:
    """Write cases in the layout of the Medical Segmentation Decathlon.

    Args:
        folder: gets ``imagesTr``, ``labelsTr`` and ``dataset.json``.
        name, description, channels, labels: as they stand in ``dataset.json``; the name tells later whose folder it is.
        spacing: mm along each axis, RAS.
        cases: by its name what makes a case, called where a file is missing: image, then label map.

    Raises:
        ValueError: when the folder holds anything else.
    """
    folder = Path(folder)
    listed = folder / "dataset.json"
    _refuse_others(folder, _name_in(listed) == name)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "description": description,
        "licence": "Apache-2.0",
        "modality": {str(number): channel for number, channel in enumerate(channels)},
        "labels": {str(value): label for label, value in labels.items()},
        "numTraining": len(cases),
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases],
    }
    replace_file(listed, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    for case, make in cases.items():
        files = [folder / sub / f"{case}.nii.gz" for sub in ("imagesTr", "labelsTr")]
        if not all(file.is_file() for file in files):
            for file, volume in zip(files, make(), strict=True):
                replace_file(file, nifti(volume, spacing))


def write_listed(folder: str | Path, rows: Sequence[Mapping[str, Any]], mark: str, files: Mapping[str, Write]) -> None:
    """Write images and ``labels.csv``.

    Args:
        folder: gets the files and the list.
        rows: of the list; a column ``source`` with the mark is added.
        mark: tells later whose folder it is.
        files: by its name below the folder what writes a file, called where it is missing.

    Raises:
        ValueError: when the folder holds anything else.
    """
    folder = Path(folder)
    listed = folder / "labels.csv"
    _refuse_others(folder, listed.is_file() and mark in listed.read_text(encoding="utf-8", errors="replace"))
    folder.mkdir(parents=True, exist_ok=True)
    marked = [{**row, "source": mark} for row in rows]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(marked[0]))
            writer.writeheader()
            writer.writerows(marked)

    replace_file(listed, write)
    for name, write_file in files.items():
        if not (folder / name).is_file():
            replace_file(folder / name, write_file)


def nifti(volume: np.ndarray, spacing: Sequence[float]) -> Write:
    """What writes a volume as ``.nii.gz``: three axes, RAS, of voxels of ``spacing`` mm around the origin."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-s * (n - 1) / 2 for n, s in zip(volume.shape, spacing, strict=False)]  # channels come last
    return lambda path: path.write_bytes(gzip.compress(nib.Nifti1Image(volume, affine).to_bytes(), mtime=0))


def _refuse_others(folder: Path, ours: bool) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ValueError(
            f"--dataset_dir {folder}: holds other data, phantom data are not written into it: for a small network on "
            "data of your own leave demo.yaml away and set its knobs"
        )


def _name_in(listed: Path) -> str | None:
    try:
        return str(json.loads(listed.read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
