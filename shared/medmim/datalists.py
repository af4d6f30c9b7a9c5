"""Lists of scans: from a Decathlon ``dataset.json``, a folder of NIfTI files, or a CSV; and their splits."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medmim.channel_files import group_channels
from medmim.datasets import Preset
from medmim.folders import visible_files

logger = logging.getLogger(__name__)

SCAN_SUFFIXES = (".nii.gz", ".nii")
LABEL_FOLDERS = {"labelsTr", "labelsTs"}  # of a Decathlon folder
Item = dict[str, Any]


@dataclass(frozen=True)
class Datalist:
    """Scans for training and validation, each ``{"image": path}`` or ``{"image": path, "label": path}``; a list of
    paths holds a channel each.

    Radiographs have a list of numbers as label, perhaps a ``patient``, and perhaps images for testing.
    """

    training: list[Item]
    validation: list[Item]
    test: list[Item] = field(default_factory=list, repr=False)  # a training does not depend on it


def find_scans(folder: str | Path) -> list[Path]:
    """NIfTI files below a folder, sorted, without a Decathlon folder's label maps; see also
    :func:`medmim.folders.visible_files`.

    Raises:
        ValueError: when the folder is missing or holds none.
    """
    folder = Path(folder)
    found = [path for path in visible_files(folder) if path.name.endswith(SCAN_SUFFIXES)]
    scans = [path for path in found if not LABEL_FOLDERS & set(path.relative_to(folder).parts[:-1])]
    if len(scans) < len(found):
        logger.info(f"{folder}: {len(found) - len(scans)} label maps in {' or '.join(sorted(LABEL_FOLDERS))} left out")
    if not scans:
        advice = advice_to_unpack(folder)
        raise ValueError(f"--dataset_dir {folder}: no NIfTI file (.nii, .nii.gz) in it or below{advice}")
    return scans


def advice_to_unpack(folder: Path) -> str:
    """What to do with volumes of MedMNIST, where a folder holds them as they come; else nothing."""
    packed = sorted(folder.glob("*.npz"))
    return f", but {packed[0].name}: unpack it first: python -m medmim.medmnist {packed[0]} FOLDER" if packed else ""


def find_items(folder: str | Path, channel_files: Sequence[str] = (), label_file: str = "") -> list[Item]:
    """Every scan below a folder as ``{"image": path}``; see :func:`find_scans`.

    Args:
        folder: of the scans.
        channel_files: endings of names where each channel is a file of its own, which gives ``{"image": [path, ...]}``;
            see :func:`medmim.channel_files.group_channels`.
        label_file: ending of the names of their label maps, which may lie there too.

    Raises:
        ValueError: when there is none, or a case lacks a channel.
    """
    scans = find_scans(folder)
    if channel_files:
        return group_channels(scans, channel_files, Path(folder), known_labels=label_file)
    return [{"image": str(path)} for path in scans]


def load_datalist(
    dataset_dir: str | Path,
    datalist: str | Path | None = None,
    labelled: bool = True,
    fold: int = 0,
    folds: int = 5,
    label_fraction: float = 1.0,
    split_seed: int = 0,
    test_fold: int | None = None,
    preset: Preset | None = None,
) -> Datalist:
    """Scans of a data set, split into training and validation.

    The list comes from ``datalist`` if given, else from ``dataset_dir/dataset.json``, else from the folder itself:
    ``imagesTr`` with labels of the same names in ``labelsTr``, or any NIfTI file below when no labels are asked for.
    Where the preset says that each channel is a file of its own, the files below are grouped into cases, and labels
    found by their names (:func:`medmim.channel_files.group_channels`).
    A list that names its own ``validation`` scans, or a ``fold`` for each scan, is split as it says; any other is
    shuffled with ``split_seed`` and dealt into ``folds`` parts, of which part ``fold`` is for validation. Splits
    depend on the names of the files only.

    Args:
        dataset_dir: folder that paths are relative to.
        datalist: Decathlon ``.json``, or ``.csv`` with the columns ``image`` and, for labels, ``label``.
        labelled: whether each scan needs a label; without, labels are neither read nor looked for.
        fold: which part is for validation, counted from 0.
        folds: number of parts.
        label_fraction: share of the training scans to keep, rounded up; smaller shares are subsets of larger ones.
        split_seed: seed of the shuffle.
        test_fold: which part is left out for testing; ``None`` for none.
        preset: whose ``channel_files`` and ``label_file`` count when there is no list.

    Raises:
        ValueError: one line that names the file or knob.
    """
    if not 0 < label_fraction <= 1:
        raise ValueError(f"--label_fraction {label_fraction}: must lie in (0, 1]")
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(f"--fold {fold} of --folds {folds}: fold must lie in 0 … folds - 1, and folds be 2 or more")
    if test_fold is not None and not (0 <= test_fold < folds and test_fold != fold):
        raise ValueError(f"--test_fold {test_fold}: expected null, or a part in 0 … folds - 1 but {fold} (--fold)")
    root = Path(dataset_dir)
    if not root.is_dir():
        raise ValueError(f"--dataset_dir {root}: no such folder")
    items, validation = _read(root, Path(datalist) if datalist else None, labelled, preset)
    if not labelled:
        items = [{key: value for key, value in item.items() if key != "label"} for item in items]
        validation = [{key: value for key, value in item.items() if key != "label"} for item in validation]
    _check_files(items + validation, labelled)
    if not items:
        raise ValueError(f"--dataset_dir {root}: the list of training scans is empty")

    items.sort(key=lambda item: str(item["image"]))
    order = np.random.RandomState(split_seed).permutation(len(items))
    shuffled = [items[i] for i in order]
    if any("fold" in item for item in items) and not (validation and test_fold is None):
        part_of = [_fold_of(item) for item in shuffled]
    else:
        part_of = [i % folds for i in range(len(shuffled))]
    parts = list(zip(shuffled, part_of, strict=True))
    test = [item for item, part in parts if part == test_fold]
    drawn = {test_fold} if validation else {fold, test_fold}
    validation = validation or [item for item, part in parts if part == fold]
    shuffled = [item for item, part in parts if part not in drawn]
    if not shuffled or not validation:
        raise ValueError(
            f"--dataset_dir {root}: {len(items)} scans leave {len(shuffled)} for training and {len(validation)} for "
            f"validation with --fold {fold} of --folds {folds}: add scans or lower folds"
        )
    keep = int(np.ceil(label_fraction * len(shuffled) - 1e-9))
    validation, test = (sorted(items, key=lambda item: str(item["image"])) for items in (validation, test))
    return Datalist(training=shuffled[:keep], validation=validation, test=test)


def fingerprint(split: Datalist) -> str:
    """A short text that changes with the names of the files, their order, or the split."""
    return hashlib.sha256(repr(split).encode()).hexdigest()[:16]


def _fold_of(item: Item) -> int:
    try:
        return int(item["fold"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{item['image']}: its fold is {item.get('fold')!r}: number each scan, or none") from None


def _read(root: Path, datalist: Path | None, labelled: bool, preset: Preset | None) -> tuple[list[Item], list[Item]]:
    """Items for training (to be split) and for validation (when the list names them)."""
    if datalist is not None:
        if not datalist.is_file():
            raise ValueError(f"--datalist {datalist}: no such file")
        if datalist.suffix == ".csv":
            return _read_csv(datalist, root, labelled), []
        return _read_decathlon(datalist, root, labelled)
    if (root / "dataset.json").is_file():
        return _read_decathlon(root / "dataset.json", root, labelled)
    is_decathlon = (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir()
    if preset is not None and preset.channel_files:
        folder = root / "imagesTr" if is_decathlon else root
        ending = preset.label_file if labelled else None
        return group_channels(find_scans(folder), preset.channel_files, folder, ending, preset.label_file), []
    if is_decathlon:
        return _read_pairs(root), []
    if labelled:
        raise ValueError(
            f"--dataset_dir {root}: no dataset.json, and no imagesTr with labelsTr: labels cannot be found; "
            "give a --datalist .json or .csv"
        )
    return find_items(root), []


def _read_decathlon(path: Path, root: Path, labelled: bool) -> tuple[list[Item], list[Item]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        training = content["training"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a Decathlon list with the key 'training' ({error!r})") from error
    lists = []
    for key, entries in (("training", training), ("validation", content.get("validation") or [])):
        if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
            raise ValueError(f"{path}: '{key}' must be a list of {{'image': file, 'label': file}}")
        items = []
        for index, entry in enumerate(entries):
            entry = {"image": entry} if isinstance(entry, str) else dict(entry)
            if not entry.get("image") or (labelled and not entry.get("label")):
                missing = "label" if entry.get("image") else "image"
                raise ValueError(f"{path}: entry {index} of '{key}' has no '{missing}': {entry}")
            _check_entry(entry, f"{path}: entry {index} of '{key}'", labelled)
            items.append(_absolute(entry, root))
        lists.append(items)
    return lists[0], lists[1]


def _check_entry(entry: Item, place: str, labelled: bool) -> None:
    image, label = entry["image"], entry.get("label")
    parts = image if isinstance(image, list) else [image]
    if not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{place}: image is {image!r}, expected a file, or a list of files, one for each channel")
    if labelled and not isinstance(label, str):
        raise ValueError(f"{place}: label is {label!r}, expected a file")


def _read_csv(path: Path, root: Path, labelled: bool) -> list[Item]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as a CSV in UTF-8 ({error}): save it as UTF-8") from error
    for column in ["image", "label"] if labelled else ["image"]:
        for number, row in enumerate(rows, start=2):
            if not row.get(column):
                raise ValueError(f"{path}: line {number} has no value in column '{column}'")
    return [_absolute({key: row[key] for key in ("image", "label", "fold") if row.get(key)}, root) for row in rows]


def _read_pairs(root: Path) -> list[Item]:
    images = find_scans(root / "imagesTr")
    return [{"image": str(image), "label": str(root / "labelsTr" / image.name)} for image in images]


def _absolute(item: Item, root: Path) -> Item:
    """Paths of ``image`` and ``label`` made absolute; an image may be a list of files, one for each channel."""

    def resolve(value: str | Sequence[str]) -> str | list[str]:
        return str(root / value) if isinstance(value, str) else [str(root / part) for part in value]

    return {key: resolve(value) if key in ("image", "label") else value for key, value in item.items()}


def _check_files(items: list[Item], labelled: bool) -> None:
    missing = []
    times = Counter(item["image"] if isinstance(item["image"], str) else tuple(item["image"]) for item in items)
    twice = [name for name, count in times.items() if count > 1]
    if twice:
        name = twice[0] if isinstance(twice[0], str) else twice[0][0]
        raise ValueError(f"{name}: listed {times[twice[0]]} times, {len(twice)} scans in all: list each scan once")
    for item in items:
        images = [item["image"]] if isinstance(item["image"], str) else item["image"]
        missing += [f"{path}: no such file" for path in images if not Path(path).is_file()]
        if labelled and not Path(item["label"]).is_file():
            missing.append(f"{images[0]}: its label {item['label']} does not exist")
    if missing:
        more = f" (and {len(missing) - 5} more)" if len(missing) > 5 else ""
        raise ValueError("; ".join(missing[:5]) + more)
