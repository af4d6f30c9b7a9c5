"""A small synthetic CT data set, so that every bundle can be tried without a download."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from medmim.phantom_folders import write_decathlon

LABELS = {"background": 0, "liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4, "spine": 5}
SPACING = (3.0, 3.0, 5.0)  # mm, anisotropic as clinical CT
SIZE = (96, 76, 40)  # voxels: left-right, back-front, foot-head


def phantom_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One torso: intensities in HU (int16) and class map (uint8), ``SIZE`` voxels of ``SPACING`` mm, axes RAS.

    Organs vary in place, size and intensity; vessels, fat, lungs, ribs and a stomach without a label make the task
    less than trivial. The same seed gives the same arrays.
    """
    rng = np.random.RandomState(seed)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SIZE, SPACING, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")  # mm; x to the right, y to the front, z to the head
    scale = rng.uniform(0.9, 1.1, 3)
    x, y, z = x / scale[0], y / scale[1], z / scale[2]
    bend = rng.uniform(-12, 12) * np.sin(z / 90)
    x = x + bend

    def ellipsoid(centre: tuple, radii: tuple, jitter: float = 6.0, tilt: float = 0.0) -> np.ndarray:
        """Distance-like field, below 1 inside; wobbly, so that no organ is a perfect ellipsoid."""
        c = np.array(centre) + rng.uniform(-jitter, jitter, 3)
        r = np.array(radii) * rng.uniform(0.85, 1.15, 3)
        angle = tilt + rng.uniform(-0.2, 0.2)
        u = (x - c[0]) * np.cos(angle) + (z - c[2]) * np.sin(angle)
        w = -(x - c[0]) * np.sin(angle) + (z - c[2]) * np.cos(angle)
        wobble = 0.12 * np.sin(x / 17 + rng.uniform(0, 6)) * np.cos(y / 13 + rng.uniform(0, 6))
        return (u / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + (w / r[2]) ** 2 + wobble

    hu = np.full(SIZE, -1000.0)
    label = np.zeros(SIZE, np.uint8)
    body = (x / 132) ** 2 + (y / 98) ** 2
    hu[body < 1] = -105  # fat
    hu[body < 0.78] = 50  # muscle
    cavity = (x / 108) ** 2 + ((y - 8) / 74) ** 2 < 1
    hu[cavity] = -20
    ribs = (body > 0.62) & (body < 0.78) & (np.sin((z + 0.25 * np.abs(x)) / 7) > 0.65) & (z > -40)
    hu[ribs] = 350

    for side in (-1, 1):  # lungs, above the diaphragm
        lung = ellipsoid((side * 55, 5, 100), (46, 60, 62))
        hu[(lung < 1) & cavity] = -820
    hu[(ellipsoid((-40, 38, 10), (34, 24, 34)) < 1) & cavity] = rng.uniform(0, 60)  # stomach

    organs = [  # x to the right of the patient: the liver lies at positive x
        ("liver", (52, 12, 18), (58, 56, 44), (85, 125), -0.25),
        ("spleen", (-70, -16, 24), (30, 36, 42), (95, 135), 0.3),
        ("left kidney", (-50, -30, -46), (27, 26, 40), (130, 190), 0.15),
        ("right kidney", (50, -30, -54), (27, 26, 40), (130, 190), -0.15),
    ]
    for name, centre, radii, (low, high), tilt in organs:
        inside = (ellipsoid(centre, radii, tilt=tilt) < 1) & (body < 0.74)
        hu[inside] = rng.uniform(low, high)
        label[inside] = LABELS[name]
    vertebra = ((x / 21) ** 2 + ((y + 52) / 19) ** 2 < 1) | ((np.abs(x) < 5) & (np.abs(y + 78) < 13))
    disc = np.sin(z / 5.2 + rng.uniform(0, 6)) > 0.75
    hu[vertebra] = np.where(disc, 90, 320)[vertebra]
    label[vertebra] = LABELS["spine"]
    aorta = ((x + 8) / 10) ** 2 + ((y + 20) / 10) ** 2 < 1
    hu[aorta] = rng.uniform(140, 220)
    label[aorta] = 0

    hu = gaussian_filter(hu, [0.6, 0.6, 0.4])  # partial volume
    hu += gaussian_filter(rng.normal(0, 90, SIZE), 0.7)  # correlated noise
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), label


def write_phantom(folder: str | Path, n_cases: int = 24, seed: int = 0) -> None:
    """Write phantom cases as NIfTI in Decathlon layout; cases that are already there are kept.

    Args:
        folder: gets ``imagesTr``, ``labelsTr`` and ``dataset.json``.
        n_cases: number of cases.
        seed: of the first case; the others follow.

    Raises:
        ValueError: when the folder holds anything else.
    """
    write_decathlon(
        folder,
        name="phantom",
        description="Synthetic torso CT, made by medmim.phantom",
        channels=["CT"],
        labels=LABELS,
        spacing=SPACING,
        cases={f"phantom_{seed + i:03d}": partial(phantom_case, seed + i) for i in range(n_cases)},
    )
