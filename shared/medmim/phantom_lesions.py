"""Synthetic torso CT with and without a lesion, so that a classification of volumes can be tried without a download."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from medmim.phantom import LABELS, SIZE, SPACING, phantom_case
from medmim.phantom_folders import nifti, write_listed

CLASSES = ("normal", "cyst", "tumour")
MARK = "medmim.phantom_lesions"  # stands in the list, so that other data are not written over


def lesion_case(seed: int, kind: str) -> np.ndarray:
    """One torso of :func:`medmim.phantom.phantom_case` with a lesion in its liver: HU, int16, axes RAS.

    A cyst is filled with water, a tumour enhances at its rim; either is 15 to 22 mm in radius. The same seed gives the
    same array.

    Raises:
        ValueError: when the kind is unknown.
    """
    if kind not in CLASSES:
        raise ValueError(f"kind must be {' or '.join(CLASSES)}, found {kind!r}")
    image, label = phantom_case(seed)
    if kind == "normal":
        return image
    rng = np.random.RandomState(seed)
    inside = distance_transform_edt(label == LABELS["liver"], sampling=SPACING)
    places = np.argwhere(inside > 0.6 * inside.max())  # deep enough
    centre = places[rng.randint(len(places))]
    grid = np.indices(SIZE).reshape(3, -1).T
    distance = np.linalg.norm((grid - centre) * np.array(SPACING), axis=1).reshape(SIZE)  # mm
    radius = rng.uniform(15, 22)
    within = distance < radius
    noise = gaussian_filter(rng.normal(0, 90, SIZE), 0.7)
    hu = np.full(SIZE, rng.uniform(-5, 15) if kind == "cyst" else rng.uniform(40, 60))
    if kind == "tumour":
        hu[distance > 0.6 * radius] = rng.uniform(210, 260)
    return np.where(within, np.rint(hu + noise), image).astype(np.int16)


def write_phantom_lesions(folder: str | Path, n_patients: int = 60, seed: int = 0) -> None:
    """Write scans as NIfTI, and ``labels.csv``; each third patient has two scans. Files that are there are kept.

    Args:
        folder: gets ``images`` and ``labels.csv``.
        n_patients: number of patients; the classes go round.
        seed: of the first scan; the others follow.

    Raises:
        ValueError: when the folder holds anything else.
    """
    rows, files = [], {}
    for patient in range(n_patients):
        for visit in range(1 + (patient % 3 == 0)):
            name, kind = f"images/patient{patient:04d}_{visit}.nii.gz", CLASSES[(patient // 3 + patient) % len(CLASSES)]
            rows.append({"image": name, "label": kind, "patient": f"patient{patient:04d}"})
            files[name] = partial(_write_case, seed=seed + 10 * patient + visit, kind=kind)
    write_listed(folder, rows, MARK, files)


def _write_case(path: Path, seed: int, kind: str) -> None:
    nifti(lesion_case(seed, kind), SPACING)(path)
