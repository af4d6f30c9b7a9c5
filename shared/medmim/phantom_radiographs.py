"""Synthetic chest radiographs, so that every bundle runs without any download. They teach nobody anatomy."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from medmim.phantom_folders import write_listed

FINDINGS = ("effusion", "nodule")
MARK = "synthetic, made by medmim"  # in the list's column source


def phantom_radiograph(seed: int, size: tuple[int, int] = (112, 96)) -> tuple[np.ndarray, dict[str, int]]:
    """One frontal radiograph and its findings.

    Args:
        seed: of body, noise and findings.
        size: rows and columns.

    Returns:
        uint8 ``(rows, columns)``; 1 or 0 for each of :data:`FINDINGS`.
    """
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
    x, y = x * rng.uniform(0.95, 1.15) + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.06, 0.06)
    found = {name: int(rng.random() < 0.4) for name in FINDINGS}
    grey = np.where((x / 0.95) ** 2 + (y / 1.4) ** 2 < 1, 0.55, 0.05)
    lungs = np.zeros(size, dtype=bool)
    for side in (-1, 1):
        lungs |= ((x - side * 0.43) / 0.33) ** 2 + ((y + 0.05) / 0.7) ** 2 < 1
    grey[lungs] = rng.uniform(0.16, 0.24)
    grey += 0.1 * lungs * (np.sin(14 * y + 3 * np.abs(x) + rng.uniform(0, 6)) > 0.5)  # ribs
    heart = ((x - 0.18) / rng.uniform(0.3, 0.42)) ** 2 + ((y - 0.35) / 0.38) ** 2 < 1
    grey[heart] = 0.7
    grey[np.abs(x) < 0.1] += 0.12  # spine
    if found["effusion"]:  # fluid at the bottom of a lung
        side, level = rng.choice([-1, 1]), rng.uniform(0.2, 0.4)
        grey[lungs & (np.sign(x) == side) & (y > level)] = 0.66
    if found["nodule"]:
        side = rng.choice([-1, 1])
        where = (side * rng.uniform(0.35, 0.55), rng.uniform(-0.45, 0.1))
        grey += 0.4 * (((x - where[0]) ** 2 + (y - where[1]) ** 2) < rng.uniform(0.09, 0.14) ** 2)
    texture = zoom(rng.normal(0, 1, (size[0] // 8, size[1] // 8)), 8, order=1)[: size[0], : size[1]]
    grey = gaussian_filter(grey, 0.8) + 0.02 * texture + rng.normal(0, 0.02, size)
    return np.clip(np.rint(255 * grey), 0, 255).astype(np.uint8), found


def write_phantom_radiographs(folder: str | Path, n_patients: int = 160, seed: int = 0) -> None:
    """Write radiographs as PNG, and ``labels.csv``; each third patient has two. Images that are there are kept.

    Args:
        folder: gets ``images`` and ``labels.csv``.
        n_patients: number of patients.
        seed: of the first image; the others follow.

    Raises:
        ValueError: when the folder holds anything else.
    """
    rows, files = [], {}
    for patient in range(n_patients):
        for visit in range(1 + (patient % 3 == 0)):
            name = f"images/patient{patient:04d}_{visit}.png"
            size = (112, 96) if patient % 2 else (96, 112)
            image, found = phantom_radiograph(seed + 10 * patient + visit, size)
            rows.append({"image": name, "patient": f"patient{patient:04d}", **found})
            files[name] = partial(Image.fromarray(image).save, format="PNG")
    write_listed(folder, rows, MARK, files)
