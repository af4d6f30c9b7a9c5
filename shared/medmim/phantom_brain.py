"""A small synthetic set of head MR scans of four channels with a tumour, so that its bundle runs without a download."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from medmim.phantom_folders import write_decathlon

CHANNELS = ("FLAIR", "T1", "T1c", "T2")
LABELS = {"background": 0, "edema": 1, "non-enhancing tumour": 2, "enhancing tumour": 3}  # as MSD Task01 has them
SPACING = (2.5, 2.5, 2.5)  # mm
SIZE = (64, 64, 48)  # voxels: left-right, back-front, foot-head
CONTRAST = {  # intensities in FLAIR, T1, T1c, T2: what tells one tissue from another differs between the channels
    "white matter": (300, 600, 620, 300),
    "grey matter": (400, 450, 470, 430),
    "ventricle": (90, 180, 190, 900),
    "edema": (720, 420, 430, 720),
    "non-enhancing tumour": (560, 330, 340, 640),
    "enhancing tumour": (600, 400, 980, 600),
}


def phantom_brain_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One head without its skull: intensities (int16) ``(*SIZE, 4)`` and class map (uint8) ``SIZE``, axes RAS.

    Outside the brain all is 0. The tumour lies somewhere in the white matter: edema, in it a non-enhancing core, and
    around the core an enhancing rim, which each fourth case or so does not have. The same seed gives the same arrays.
    """
    rng = np.random.default_rng(seed)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SIZE, SPACING, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")  # mm
    wave = 0.06 * np.sin(x / 9 + rng.uniform(0, 6)) * np.cos(y / 8 + rng.uniform(0, 6)) * np.sin(z / 10)

    def inside(centre: tuple, radii: tuple) -> np.ndarray:
        """Distance-like field, below 1 inside a wobbly ellipsoid."""
        return sum(((a - c) / r) ** 2 for a, c, r in zip((x, y, z), centre, radii, strict=True)) + wave

    radii = np.array([62.0, 72.0, 52.0]) * rng.uniform(0.92, 1.06, 3)
    brain = inside((0, 0, 0), tuple(radii))
    depth = (1 - np.clip(brain, 0, 1)) * 30  # from the surface, roughly in mm
    tissue = np.where(depth < 7 + 3 * np.sin(x / 5) * np.sin(y / 6) * np.sin(z / 5), 1, 0)  # folds of grey matter
    names = ["white matter", "grey matter", "ventricle", "edema", "non-enhancing tumour", "enhancing tumour"]
    for side in (-1, 1):
        tissue[inside((side * 11, rng.uniform(-4, 4), 6), (7, 26, 11)) < 1] = 2

    size = rng.uniform(10, 17)  # mm, of the core with its rim
    direction = rng.normal(size=3)
    centre = tuple(0.5 * radii * direction / np.linalg.norm(direction))
    stretch = rng.uniform(0.8, 1.2, 3)
    around = inside(centre, tuple(size * stretch * rng.uniform(1.4, 1.9)))
    core = inside(centre, tuple(size * stretch))
    rim = (core > 0.35) & (rng.random() > 0.25)
    label = np.zeros(SIZE, np.uint8)
    label[around < 1] = LABELS["edema"]
    label[core < 1] = np.where(rim, LABELS["enhancing tumour"], LABELS["non-enhancing tumour"])[core < 1]
    label[brain >= 1] = 0
    tissue[label > 0] = 2 + label[label > 0]

    image = np.zeros((*SIZE, len(CHANNELS)))
    for channel in range(len(CHANNELS)):
        grey = np.array([CONTRAST[name][channel] * rng.uniform(0.93, 1.07) for name in names])[tissue]
        grey = gaussian_filter(grey, 0.5) * (1 + 0.1 * np.sin(x / 60 + rng.uniform(0, 6)))  # partial volume, coil
        grey += gaussian_filter(rng.normal(0, 60, SIZE), 0.6)
        image[..., channel] = np.clip(np.rint(grey * rng.uniform(0.7, 1.4)), 1, 4095)  # MR has no scale of its own
    image[brain >= 1] = 0
    return image.astype(np.int16), label


def write_phantom_brain(folder: str | Path, n_cases: int = 24, seed: int = 0) -> None:
    """Write phantom heads as NIfTI of four channels in Decathlon layout; cases that are already there are kept.

    Args:
        folder: gets ``imagesTr``, ``labelsTr`` and ``dataset.json``.
        n_cases: number of cases.
        seed: of the first case; the others follow.

    Raises:
        ValueError: when the folder holds anything else.
    """
    write_decathlon(
        folder,
        name="phantom_brain",
        description="Synthetic head MR of four channels with a tumour, made by medmim.phantom_brain",
        channels=CHANNELS,
        labels=LABELS,
        spacing=SPACING,
        cases={f"head_{seed + i:03d}": partial(phantom_brain_case, seed + i) for i in range(n_cases)},
    )
