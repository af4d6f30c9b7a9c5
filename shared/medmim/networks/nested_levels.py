"""Geometry of nested sub-volumes: what was hidden at one level is cut out and becomes the input of the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai.utils import ensure_tuple_rep

DEFAULT_LEVELS: tuple[dict[str, Any], ...] = (
    {"crop_size": 192, "img_size": 96, "mask_unit": 48, "mask_ratio": 0.5},
    {"img_size": 96, "mask_ratio": 0.6, "samples": 4},
    {"img_size": 96, "mask_ratio": 0.5, "samples": 4},
)
_FIELDS = ("crop_size", "img_size", "mask_unit", "mask_ratio", "samples")


@dataclass(frozen=True)
class Level:
    """One level; sizes along each axis.

    Attributes:
        crop_size: voxels of a sub-volume in the scan's own resolution.
        img_size: voxels that it is resized to, the network's input.
        patch_size: voxels of a token of that input.
        mask_unit: voxels of that input which are hidden as a whole. A unit is also a *region*: what the next level
            cuts out and what alignment pools over.
        mask_ratio: share of hidden units.
        samples: sub-volumes of this level from each sub-volume of the level above; 1 at the first level.
    """

    crop_size: tuple[int, ...]
    img_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    mask_unit: tuple[int, ...]
    mask_ratio: float
    samples: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return _divide(self.img_size, self.patch_size)

    @property
    def regions(self) -> tuple[int, ...]:
        """Regions along each axis."""
        return _divide(self.img_size, self.mask_unit)

    @property
    def region_tokens(self) -> tuple[int, ...]:
        """Tokens of a region along each axis."""
        return _divide(self.mask_unit, self.patch_size)


def nested_levels(
    levels: Sequence[Mapping[str, Any] | Level], patch_size: Sequence[int] | int, spatial_dims: int = 3
) -> tuple[Level, ...]:
    """Complete and check a list of levels, coarsest first.

    Args:
        levels: for each level a mapping of ``img_size``, ``mask_ratio`` and, optionally, ``mask_unit`` (default:
            one token), ``samples`` (default 1) and ``crop_size``. The first level needs a ``crop_size``; below it,
            the crop is a region of the level above, and a ``crop_size`` that is given must agree. A size is one
            number or one for each axis.
        patch_size: voxels of a token.
        spatial_dims: 2 or 3, for sizes that are one number.

    Returns:
        the levels.

    Raises:
        ValueError: when an entry is missing or unknown, or a size does not divide; the message names level and entry.

    Example::

        >>> [level.crop_size[0] for level in nested_levels(DEFAULT_LEVELS, 16)]
        [192, 96, 16]
    """
    if not levels:
        raise ValueError("levels is empty: give at least one")
    patch = ensure_tuple_rep(patch_size, spatial_dims)
    result: list[Level] = []
    for number, entries in enumerate(levels, 1):
        level = entries if isinstance(entries, Level) else _complete(entries, number, patch, result)
        _check(level, number, patch, result, has_children=number < len(levels))
        result.append(level)
    return tuple(result)


def _complete(entries: Mapping[str, Any], number: int, patch: tuple[int, ...], above: list[Level]) -> Level:
    unknown = [key for key in entries if key not in _FIELDS]
    missing = [key for key in ("img_size", "mask_ratio") if entries.get(key) is None]
    if not above and entries.get("crop_size") is None:
        missing.append("crop_size")
    if unknown or missing:
        what = f"unknown entry {unknown[0]!r}" if unknown else f"no {missing[0]}"
        raise ValueError(f"level {number} has {what}: the entries are {', '.join(_FIELDS)}")

    def size(key: str, default: Sequence[int]) -> tuple[int, ...]:
        value = default if entries.get(key) is None else entries[key]
        try:
            return ensure_tuple_rep(value, len(patch))
        except ValueError:
            raise ValueError(f"level {number}: {key} {value} must be one number or {len(patch)}") from None

    crop = _divide(above[-1].crop_size, above[-1].regions) if above else ()
    return Level(
        crop_size=size("crop_size", crop),
        img_size=size("img_size", ()),
        patch_size=patch,
        mask_unit=size("mask_unit", patch),
        mask_ratio=entries["mask_ratio"],
        samples=entries.get("samples", 1),
    )


def _check(level: Level, number: int, patch: tuple[int, ...], above: list[Level], has_children: bool) -> None:
    sizes = {"crop_size": level.crop_size, "img_size": level.img_size, "mask_unit": level.mask_unit}
    for name, size in sizes.items():
        if len(size) != len(patch) or any(not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"level {number}: {name} {size} must be {len(patch)} whole numbers above 0")
    if isinstance(level.mask_ratio, bool) or not isinstance(level.mask_ratio, int | float):
        raise ValueError(f"level {number}: mask_ratio {level.mask_ratio} must be a number from 0 to below 1")
    for name, whole, part_name, part in (
        ("mask_unit", level.mask_unit, "patch_size", patch),
        ("img_size", level.img_size, "mask_unit", level.mask_unit),
    ):
        if not _divides(whole, part):
            raise ValueError(
                f"level {number}: {name} {whole} is not divisible by {part_name} {part}: "
                f"change {name} or {part_name} so that each axis divides"
            )
    if not isinstance(level.samples, int) or level.samples < 1 or (not above and level.samples != 1):
        expected = "a whole number above 0" if above else "1 at the first level: draw more crops in the data"
        raise ValueError(f"level {number}: samples must be {expected}, found {level.samples}")
    if above:
        region = _divide(above[-1].crop_size, above[-1].regions)
        if level.crop_size != region:
            raise ValueError(
                f"level {number}: crop_size {level.crop_size} must be {region}, a region of level {number - 1}: "
                f"leave it out, or change mask_unit of level {number - 1}"
            )
    if has_children and not _divides(level.crop_size, level.regions):
        raise ValueError(
            f"level {number}: crop_size {level.crop_size} does not divide into {level.regions} regions "
            f"(img_size {level.img_size} / mask_unit {level.mask_unit}): change crop_size or mask_unit"
        )


def _divide(whole: Sequence[int], part: Sequence[int]) -> tuple[int, ...]:
    return tuple(w // p for w, p in zip(whole, part, strict=True))


def _divides(whole: Sequence[int], part: Sequence[int]) -> bool:
    return all(w % p == 0 for w, p in zip(whole, part, strict=True))
