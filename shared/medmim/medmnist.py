"""Volumes of MedMNIST (``.npz``) as NIfTI files and a list, which every bundle reads.

``python -m medmim.medmnist adrenalmnist3d_64.npz /data/adrenal``
"""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from tqdm import tqdm

from medmim.files import replace_file

PARTS = ("train", "val", "test")
LIST = "labels.csv"


def unpack(npz: str | Path, folder: str | Path) -> None:
    """Write each volume as NIfTI (voxels of 1 mm, as MedMNIST names none), and ``labels.csv`` with the official split.

    Files that are already there are written again; the list is written last, so a folder with one is whole.

    Args:
        npz: file of a 3D set of MedMNIST v2: arrays ``train_images`` ``(N, H, W, D)`` and ``train_labels`` ``(N, 1)``
            (number of the class, from 0), and the same for ``val`` and ``test``.
        folder: gets ``images`` and ``labels.csv``; it is made.

    Raises:
        ValueError: when the file is none, or the folder holds other data.
    """
    npz, folder = Path(npz), Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder, npz.stem):
        raise ValueError(f"{folder}: holds other data: give a folder that is empty or new")
    arrays = _read(npz)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for part in PARTS:
        volumes, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].ravel()
        for number, (volume, label) in enumerate(zip(tqdm(volumes, desc=part, disable=None), labels, strict=True)):
            name = f"images/{npz.stem}_{part}_{number:05d}.nii.gz"
            nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / name)
            rows.append([name, str(int(label)), part])

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["image", "label", "split"], *rows])

    replace_file(folder / LIST, write)
    print(f"{len(rows)} volumes of {'x'.join(map(str, arrays['train_images'].shape[1:]))} voxels in {folder}")


def _is_ours(folder: Path, stem: str) -> bool:
    """Whether nothing but what this file unpacks to is in the folder and in its list."""
    ours = re.compile(rf"images/{re.escape(stem)}_(?:{'|'.join(PARTS)})_\d+\.nii\.gz")
    others = {path.name for path in folder.iterdir()} - {"images", LIST}
    names = [f"images/{path.name}" for path in (folder / "images").glob("*")]
    if (folder / LIST).is_file():
        with (folder / LIST).open(newline="", encoding="utf-8", errors="replace") as file:
            names += [row[0] for row in list(csv.reader(file))[1:] if row]
    return not others and all(map(ours.fullmatch, names))


def _read(npz: Path) -> dict[str, np.ndarray]:
    wanted = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    try:
        with np.load(npz) as file:
            arrays = {name: file[name] for name in wanted}
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        advice = "check the path" if isinstance(error, FileNotFoundError) else "download it again"
        raise ValueError(
            f"{npz}: expected a .npz file of MedMNIST with {', '.join(wanted)} ({reason}): {advice}"
        ) from error
    for part in PARTS:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        volumes = images.ndim == 4 and images.shape[3] != 3 and images.dtype == np.uint8  # a photograph has 3 colours
        if not volumes or labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "ui":
            raise ValueError(
                f"{npz}: {part}_images of shape {images.shape} ({images.dtype}) with {part}_labels of shape "
                f"{labels.shape} ({labels.dtype}), expected volumes (N, H, W, D) of one channel (uint8) and the number "
                "of a class for each: give a 3D set of MedMNIST"
            )
        if not len(labels) or int(labels.min()) < 0:
            found = "no volumes" if not len(labels) else f"the class {int(labels.min())}"
            raise ValueError(f"{npz}: {part} has {found}, expected volumes with classes from 0: download it again")
    return arrays


def main(npz: str, folder: str) -> None:
    """Unpack volumes of MedMNIST (.npz) into a folder with NIfTI files and labels.csv."""
    try:
        unpack(str(npz), str(folder))  # fire makes a number of what looks like one
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    fire.Fire(main, name="python -m medmim.medmnist")
