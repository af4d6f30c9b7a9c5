"""Presets: what a data set's scans are like, and how they are prepared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from monai.transforms import MapTransform, NormalizeIntensityd, ScaleIntensityd, ScaleIntensityRanged
from torch import Tensor

from medmim.classes import Classification


@dataclass(frozen=True)
class Preset:
    """How scans of one data set are prepared; the fields are explained in ``presets.yaml``."""

    name: str
    description: str
    modality: str
    channels: tuple[str, ...]
    channel_files: tuple[str, ...]
    label_file: str
    spacing: tuple[float, ...] | None
    window: tuple[float, float] | None
    z_score: str | None
    min_max: bool
    crop_foreground: bool
    roi_size: tuple[int, ...]
    patch_size: int
    augmentation: dict[str, float]
    crop_ratio: tuple[int, int]
    labels: dict[int, str]
    label_map: dict[int, int]
    regions: dict[str, list[int]]
    surface_tolerance: float
    classification: Classification | None
    license: str
    citation: str
    source: str

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> Preset:
        """Build and check a preset.

        Raises:
            ValueError: one line that lists every fault.
        """
        known = {f.name for f in fields(cls)} - {"name"}
        body: dict[str, Any] = _DEFAULTS | dict(values)
        faults = [f"unknown field {key!r}{_suggest(key, known)}" for key in body.keys() - known]
        faults += [f"field {key!r} is missing" for key in sorted(known - body.keys())]
        if not faults:
            faults = _faults(body)
        if faults:
            raise ValueError(f"preset {name}: {'; '.join(sorted(faults))}")
        for key in ("channels", "channel_files", "roi_size", "spacing", "window", "crop_ratio"):
            body[key] = None if body[key] is None else tuple(body[key])
        if body["classification"] is not None:
            body["classification"] = Classification.from_dict(body["classification"])
        body["labels"] = {int(value): label for value, label in body["labels"].items()}
        body["label_map"] = {int(value): meant for value, meant in body["label_map"].items()}
        # from the largest, so that the order in a file, which equality would not see, means nothing
        by_size = sorted(body["regions"].items(), key=lambda entry: -len(set(entry[1])))
        body["regions"] = {region: sorted(set(values)) for region, values in by_size}
        return cls(name=name, **body)

    @property
    def label_values(self) -> list[int]:
        """Values of the classes, background included."""
        return [0, *sorted(self.labels)]

    @property
    def file_values(self) -> list[int]:
        """Values that a label file may hold; ``label_map`` makes ``label_values`` of them."""
        return sorted({*self.label_values, *self.label_map})

    @property
    def n_classes(self) -> int:
        """Classes, background included: one more than the largest value."""
        return max(self.label_values) + 1

    @property
    def n_outputs(self) -> int:
        """Output channels of a segmentation network: one for each region, or for each class."""
        return len(self.regions) or self.n_classes

    @property
    def pixdim(self) -> tuple[float, ...]:
        """Target spacing for ``Spacingd``, where a negative number keeps the scan's own."""
        return self.spacing or (-1.0,) * len(self.roi_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a description file."""
        body = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        del body["classification"]
        if self.classification is not None:
            body["classification"] = self.classification.to_dict()
        return {key: value for key, value in body.items() if value or key not in _LEFT_OUT}


_DEFAULTS: dict[str, Any] = {
    "description": "",
    "modality": "",
    "channel_files": (),
    "label_file": "",
    "spacing": None,
    "window": None,
    "z_score": None,
    "min_max": False,
    "crop_foreground": False,
    "augmentation": {"flip": 0.0, "rotate": 0.1, "intensity": 0.1},
    "crop_ratio": (1, 1),
    "labels": {},
    "label_map": {},
    "regions": {},
    "surface_tolerance": 1.0,
    "classification": None,
    "license": "unknown",
    "citation": "",
    "source": "",
}

# of a description, where they say nothing: a preset without says the same as before there were such fields
_LEFT_OUT = ("channel_files", "label_file", "min_max", "regions")


def _faults(body: Mapping[str, Any]) -> list[str]:
    dims = len(body["roi_size"]) if isinstance(body["roi_size"], list | tuple) else 0
    faults = []
    if dims not in (2, 3) or any(not _is_whole(n) or n < 1 for n in body["roi_size"]):
        faults.append(f"roi_size must be 2 or 3 positive integers, found {body['roi_size']!r}")
    if body["spacing"] is not None and (not _are_numbers(body["spacing"], dims) or min(body["spacing"]) <= 0):
        faults.append(f"spacing must be {dims} positive numbers in mm or null, found {body['spacing']!r}")
    if not isinstance(body["min_max"], bool):
        faults.append(f"min_max must be true or false, found {body['min_max']!r}")
    elif [body["window"] is None, body["z_score"] is None, not body["min_max"]].count(False) != 1:
        faults.append("exactly one of window, z_score and min_max must be set")
    if body["window"] is not None and (not _are_numbers(body["window"], 2) or body["window"][0] >= body["window"][1]):
        faults.append(f"window must be [lower, upper], found {body['window']!r}")
    if body["z_score"] not in (None, "all", "nonzero"):
        faults.append(f"z_score must be all, nonzero or null, found {body['z_score']!r}")
    if not isinstance(body["crop_foreground"], bool):
        faults.append(f"crop_foreground must be true or false, found {body['crop_foreground']!r}")
    if not _is_whole(body["patch_size"]) or body["patch_size"] < 1:
        faults.append(f"patch_size must be a positive integer, found {body['patch_size']!r}")
    if not isinstance(body["augmentation"], Mapping) or set(body["augmentation"]) != {"flip", "rotate", "intensity"}:
        faults.append(f"augmentation must give flip, rotate and intensity, found {body['augmentation']!r}")
    elif any(not _is_number(p) or not 0 <= p <= 1 for p in body["augmentation"].values()):
        faults.append(f"augmentation must give probabilities in [0, 1], found {body['augmentation']!r}")
    ratio = body["crop_ratio"]
    if not _are_numbers(ratio, 2) or min(ratio) < 0 or max(ratio) == 0:
        faults.append(f"crop_ratio must be [foreground, background], not negative and not both 0, found {ratio!r}")
    if not _is_number(body["surface_tolerance"]) or body["surface_tolerance"] < 0:
        faults.append(f"surface_tolerance must be a number of mm, found {body['surface_tolerance']!r}")
    names, files = body["channels"], body["channel_files"]
    if not isinstance(names, list | tuple) or not names or any(not isinstance(name, str) for name in names):
        faults.append(f"channels must be a list of names, found {names!r}")
    else:
        faults += channel_file_faults(files, names)
    if not isinstance(body["label_file"], str):
        faults.append(f"label_file must be the ending of a name, such as _seg, found {body['label_file']!r}")
    elif body["label_file"] and isinstance(files, list | tuple) and body["label_file"] in files:
        faults.append(f"label_file {body['label_file']!r} is that of a channel (channel_files): give another")
    if body["classification"] is not None:
        for name, reason in (
            ("channel_files", "each scan is one file of all channels"),
            ("labels", "segmentation and classification take a preset each"),
        ):
            faults += [f"{name} cannot stand beside classification: {reason}"] if body[name] else []
        try:
            Classification.from_dict(body["classification"])
        except ValueError as error:
            faults.append(str(error))
    of_labels = _label_faults(body["labels"])
    if not of_labels:
        of_labels = _label_map_faults(body["label_map"], body["labels"])
        of_labels += _region_faults(body["regions"], set(map(int, body["labels"])))
    return faults + of_labels


def channel_file_faults(endings: Any, channels: Collection[str]) -> list[str]:
    """What is wrong with the endings of the channels' files; without any, a file holds all channels."""
    if not isinstance(endings, list | tuple) or any(not isinstance(ending, str) or not ending for ending in endings):
        return [f"channel_files must be a list of endings of names, such as [_t1, _t2], found {endings!r}"]
    if endings and len(endings) != len(channels):
        return [f"channel_files must give an ending for each of {len(channels)} channels, found {list(endings)}"]
    if any(ending.endswith((".nii", ".gz")) for ending in endings):
        return [f"channel_files must be endings without .nii.gz, such as _t1, found {list(endings)}"]
    if len(set(endings)) < len(endings):
        return [f"channel_files must differ, found {list(endings)}"]
    return []


def _label_faults(labels: Any) -> list[str]:
    if not isinstance(labels, Mapping) or any(not isinstance(name, str) for name in labels.values()):
        return [f"labels must map positive values to names, {{1: liver}}, found {labels!r}"]
    for value in labels:
        if not _is_positive_key(value) or int(value) > 255:
            return [f"labels must map positive values to names, value at most 255 (uint8), found value {value!r}"]
    return []


def _label_map_faults(label_map: Any, labels: Mapping[Any, str]) -> list[str]:
    meant = {0, *map(int, labels)}
    if not isinstance(label_map, Mapping) or not all(map(_is_positive_key, label_map)):
        return [
            f"label_map must map positive values of label files to values of labels, {{500: 3}}, found {label_map!r}"
        ]
    for value, other in label_map.items():
        if not _is_whole(other) or other not in meant:
            return [f"label_map must map to 0 or a value of labels, found {value!r}: {other!r}"]
    return []


def _region_faults(regions: Any, values: set[int]) -> list[str]:
    """Regions from which a label map can be made again: a chain in which each has one value more than the next."""
    if not isinstance(regions, Mapping) or any(
        not isinstance(name, str)
        or not name
        or not isinstance(inside, list | tuple)
        or not inside
        or not all(map(_is_whole, inside))
        for name, inside in regions.items()
    ):
        return [f"regions must map names to lists of values of labels, {{core: [2, 3]}}, found {regions!r}"]
    unknown = [f"{value} of {name}" for name, inside in regions.items() for value in inside if value not in values]
    if unknown:
        return [f"regions must hold values of labels ({sorted(values)}), found {', '.join(unknown)}"]
    chain = sorted(((set(inside), name) for name, inside in regions.items()), key=lambda entry: len(entry[0]))
    smaller: set[int] = set()
    for number, (inside, name) in enumerate(chain, start=1):
        if len(inside) != number or not smaller < inside:
            return [
                "regions must lie in each other, the smallest of one value and each larger one of one more, found "
                f"{name}: {sorted(inside)} {f'around {sorted(smaller)}' if smaller else 'as the smallest'}"
            ]
        smaller = inside
    if regions and smaller != values:
        return [f"regions must hold each value of labels, found none with {sorted(values - smaller)}"]
    return []


def _is_positive_key(value: Any) -> bool:
    whole = _is_whole(value) or (isinstance(value, str) and value.isdecimal())  # JSON has keys of text only
    return whole and int(value) >= 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == count and all(map(_is_number, values))


def _suggest(word: Any, known: Any) -> str:
    close = get_close_matches(str(word), list(known), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def preset_table() -> dict[str, Preset]:
    """Every preset of the package by name."""
    entries = yaml.safe_load(files("medmim").joinpath("presets.yaml").read_text(encoding="utf-8"))
    return {name: Preset.from_dict(name, body) for name, body in entries.items()}


def get_preset(name: str, spacing_factor: float = 1.0) -> Preset:
    """Preset by name, or from a YAML file of the user.

    Args:
        name: name of a preset of the package, or path of a ``.yaml`` file with the fields of one entry.
        spacing_factor: voxels this much larger than the preset's along each axis (image resolution; Chen et al.,
            WACV 2023, study it); all else stays, so a region of interest covers more of the body.

    Raises:
        ValueError: when it is unknown (nearest names offered), the file is missing or faulty, or the factor is no
            number from 0.1 to 10 or finds no spacing to multiply.
    """
    preset = _find_preset(name)
    if not _is_number(spacing_factor) or not 0.1 <= spacing_factor <= 10:
        raise ValueError(f"--spacing_factor {spacing_factor}: expected a number from 0.1 to 10")
    if spacing_factor == 1:
        return preset
    if preset.spacing is None:
        raise ValueError(
            f"--spacing_factor {spacing_factor}: preset {preset.name} keeps each scan's own spacing: leave the factor "
            "away, or give a preset with a spacing (--dataset)"
        )
    return replace(preset, spacing=tuple(spacing * spacing_factor for spacing in preset.spacing))


def get_radiograph_preset(name: str, normalization: str | None = None) -> Preset:
    """Preset of radiographs by name, or from a YAML file of the user.

    Args:
        name: see :func:`get_preset`.
        normalization: ``image`` standardises each image with its own mean and standard deviation, ``fixed`` takes
            grey values as a share of full scale; ``None`` leaves it to the preset.

    Raises:
        ValueError: when it is unknown or faulty, or not of images of two axes and one channel.
    """
    preset = _find_preset(name)
    if len(preset.roi_size) != 2 or len(preset.channels) != 1:
        raise ValueError(
            f"--dataset {name}: a preset of {len(preset.roi_size)} axes and {len(preset.channels)} channels, expected "
            "2 axes and 1 channel for radiographs: choose another"
        )
    if normalization not in (None, "image", "fixed"):
        raise ValueError(f"--normalization {normalization}: expected image or fixed")
    if normalization is None:
        return preset
    return (
        replace(preset, z_score="all", window=None, min_max=False)
        if normalization == "image"
        else replace(preset, z_score=None, window=(0.0, 1.0), min_max=False)
    )


def _find_preset(name: str) -> Preset:
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"--dataset {name}: no such file")
        try:
            body = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--dataset {name}: not readable as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(body, Mapping):
            raise ValueError(f"--dataset {name}: expected the fields of one preset, found {type(body).__name__}")
        return Preset.from_dict(path.stem, body)
    table = preset_table()
    if name not in table:
        raise ValueError(
            f"--dataset {name}: no such preset{_suggest(str(name), table)}; known are {', '.join(sorted(table))}, "
            "or give a .yaml file of your own"
        )
    return table[name]


def intensity_transform(preset: Preset, keys: str = "image") -> MapTransform:
    """MONAI transform that normalises intensities as the preset says: a window or the range to [0, 1], or z-score."""
    if preset.window is not None:
        lower, upper = preset.window
        return ScaleIntensityRanged(keys, a_min=lower, a_max=upper, b_min=0.0, b_max=1.0, clip=True)
    if preset.min_max:
        return ScaleIntensityd(keys, minv=0.0, maxv=1.0, channel_wise=True)
    return NormalizeIntensityd(keys, nonzero=preset.z_score == "nonzero", channel_wise=True)


def is_foreground(image: Tensor, preset: Preset) -> Tensor:
    """Voxels worth keeping when the border is cut away: above the lower end of the window or range, or not zero.

    Args:
        image: ``(C, *spatial)``, intensities of the file.
        preset: how its intensities are normalised.
    """
    if preset.min_max:
        return image > image.amin(dim=tuple(range(1, image.ndim)), keepdim=True)
    return image > preset.window[0] if preset.window is not None else image != 0
