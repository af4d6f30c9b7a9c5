"""Lists of radiographs, and of volumes with classes: from a folder or a CSV, with labels and patients; their splits."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from medmim.classes import Classification
from medmim.datalists import Datalist, Item, advice_to_unpack, find_scans
from medmim.datasets import Preset
from medmim.folders import visible_files
from medmim.image_splits import find_patients, in_proportion, split_images, tell_shared
from medmim.transforms.radiographs import RADIOGRAPH_SUFFIXES

logger = logging.getLogger(__name__)

SPLITS = {"train": "training", "val": "validation", "valid": "validation", "test": "test"}
SPLITS |= {name: name for name in ("training", "validation")}
SEPARATOR = "|"  # between the findings of an image


def find_radiographs(folder: str | Path) -> list[Path]:
    """JPEG, PNG and DICOM files below a folder, sorted; what is hidden and results of earlier runs are left out.

    Raises:
        ValueError: when the folder is missing or holds none.
    """
    found = [path for path in visible_files(folder) if path.suffix.lower() in RADIOGRAPH_SUFFIXES]
    if not found:
        raise ValueError(f"--dataset_dir {folder}: no radiograph ({', '.join(RADIOGRAPH_SUFFIXES)}) in it or below")
    return found


def find_images(folder: str | Path) -> list[Item]:
    """Every radiograph below a folder as ``{"image": path}``."""
    return [{"image": str(path)} for path in find_radiographs(folder)]


def _files(preset: Preset) -> Callable[[str | Path], list[Path]]:
    """What finds the images of a preset: radiographs, or volumes as NIfTI."""
    return find_radiographs if len(preset.roi_size) == 2 else find_scans


def load_image_list(
    dataset_dir: str | Path,
    preset: Preset,
    datalist: str | Path | None = None,
    labelled: bool = True,
    fold: int = 0,
    folds: int = 5,
    test_fold: int | None = None,
    label_fraction: float = 1.0,
    split_seed: int = 0,
) -> Datalist:
    """Images of a data set (radiographs, or volumes as NIfTI), split into training, validation and perhaps test.

    The list comes from ``datalist`` if given, else from the file that the preset names, else from the folder itself,
    where the class is that of a pattern of the preset or a folder's name, and folders ``train``, ``val`` and ``test``
    give the split. A list may give the split in a column, and a preset may name official lists. What is left to be
    split is dealt into ``folds`` parts by patient, so that each part has its share of each class; files that are
    copies of each other count as one patient. Splits depend on names, labels and contents of the files only.

    Args:
        dataset_dir: folder that paths are relative to.
        preset: its ``classification`` says how to read labels; without one, nothing is labelled.
        datalist: ``.csv``; names of images are relative to the folder, or unique below it.
        labelled: whether each image needs a label; ``{"label": [...]}`` has a number for each output of the network:
            1 or 0, or NaN where it is not known.
        fold: which part is for validation, counted from 0.
        folds: number of parts.
        test_fold: which part is kept for testing, where no list names test images; ``None`` for none.
        label_fraction: share of the training images to keep, rounded up, each class in proportion; smaller shares are
            subsets of larger ones.
        split_seed: seed of the shuffle.

    Raises:
        ValueError: one line that names the file or knob.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise ValueError(f"--dataset_dir {root}: no such folder")
    classification = preset.classification
    if labelled and classification is None:
        raise ValueError(f"--dataset {preset.name}: the preset has no classification: name its classes in one")
    path = _find_list(root, Path(datalist) if datalist else None, preset)
    items = _read_folder(root, preset, labelled) if path is None else _read_csv(path, root, preset, labelled)
    _mark_official(items, root, classification)
    _check_twice(items)
    find_patients(items, None if classification is None else classification.patient_pattern, root)
    unread = sum("label" not in item for item in items) if classification is not None else 0
    if unread and idist.get_rank() == 0:
        logger.info(f"{root}: no label can be read for {unread} of {len(items)} images, which are split last")
    if labelled:
        _check_labels(items, path or root)
    split = split_images(items, root, fold, folds, test_fold, split_seed)
    tell_shared(split)
    if labelled:
        split["training"] = in_proportion(split["training"])
        split["training"] = split["training"][: math.ceil(label_fraction * len(split["training"]) - 1e-9)]
    return Datalist(**{part: [_kept(item, labelled) for item in chosen] for part, chosen in split.items()})


def _kept(item: Item, labelled: bool) -> Item:
    """What a run needs of an item; an image of an unknown patient is one of its own."""
    named = {"label": item.get("label"), "patient": item.get("patient", item["image"])}
    return {"image": item["image"], **(named if labelled else {})}


def _find_list(root: Path, datalist: Path | None, preset: Preset) -> Path | None:
    classification = preset.classification
    if datalist is not None:
        if not datalist.is_file():
            raise ValueError(f"--datalist {datalist}: no such file")
        return datalist
    if classification is None or classification.datalist is None:
        column = "image" if classification is None else classification.image_column
        return root / "labels.csv" if _has_column(root / "labels.csv", column) else None
    found = sorted(root.glob(classification.datalist))
    if not found:
        advice = ": put the list there, or give another (--datalist)"
        if len(preset.roi_size) == 2:
            advice += ", or for images without one the preset cxr (--dataset)"
        raise ValueError(
            f"--dataset_dir {root}: no {classification.datalist} in it, which the preset names"
            f"{advice_to_unpack(root) or advice}"
        )
    return found[-1]


def _has_column(path: Path, column: str) -> bool:
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return column in next(csv.reader(file), [])


def _read_folder(root: Path, preset: Preset, labelled: bool) -> list[Item]:
    items = []
    for path in _files(preset)(root):
        below = path.relative_to(root)
        item: Item = {"image": str(path)}
        split = next((SPLITS[part.lower()] for part in below.parts[:-1] if part.lower() in SPLITS), None)
        if split:
            item["split"] = split
        item |= _label(labelled, preset.classification, partial(_label_of_path, below, root))
        items.append(item)
    return items


def _label(
    labelled: bool, classification: Classification | None, read: Callable[[Classification], list[float]]
) -> Item:
    """The label of an image. Where none is asked for, one that can be read still shapes the split: pre-training then
    leaves the same images out as fine-tuning does.
    """
    if classification is None:
        return {}
    try:
        return {"label": read(classification)}
    except ValueError:
        if labelled:
            raise
        return {}


def _label_of_path(below: Path, root: Path, classification: Classification) -> list[float]:
    text = below.as_posix()
    found = [name for name, pattern in classification.patterns.items() if re.search(pattern, text)]
    if not classification.patterns:
        found = [name for name in classification.classes if name.lower() in [part.lower() for part in below.parts[:-1]]]
    if len(found) != 1 and not (classification.task == "multilabel" and found):
        looked = list(classification.patterns.values()) or list(classification.classes)
        raise ValueError(
            f"{root / below}: its path tells {' and '.join(found) or 'no class'}, expected one of {', '.join(looked)}: "
            "move the file, or give the labels in a --datalist .csv"
        )
    return _as_vector(found, classification)


def _as_vector(names: Sequence[str], classification: Classification) -> list[float]:
    return [float(name in names) for name in classification.outputs]


def _read_csv(path: Path, root: Path, preset: Preset, labelled: bool) -> list[Item]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = {}
            for row in reader:
                rows[reader.line_num] = row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as a CSV in UTF-8 ({error}): save it as UTF-8") from error
    classification = preset.classification
    columns = classification or Classification("multilabel", ("any",))
    first = next(iter(rows.values()), {})
    if columns.image_column not in first:
        found = ", ".join(map(str, first)) or "no line"
        raise ValueError(f"{path}: found {found}, expected a column '{columns.image_column}' with names of images")
    names = {number: str(row[columns.image_column] or "") for number, row in rows.items()}
    where = _locate(names, root, path, _files(preset))
    items = []
    for (number, row), image in zip(rows.items(), where, strict=True):
        item: Item = {"image": image}
        split = str(row.get(columns.split_column) or "").strip().lower()
        if split and split not in SPLITS:
            raise ValueError(f"{path}: line {number}: split '{split}', expected one of {', '.join(SPLITS)}, or nothing")
        if split:
            item["split"] = SPLITS[split]
        if str(row.get(columns.patient_column) or "").strip():
            item["patient"] = str(row[columns.patient_column]).strip()
        item |= _label(labelled, classification, partial(_label_of_row, row, f"{path}: line {number}"))
        items.append(item)
    return items


def _locate(names: Mapping[int, str], root: Path, path: Path, find: Callable[[str | Path], list[Path]]) -> list[str]:
    """Files of a list, given by line: below the folder as given, or the one file with this name anywhere below it."""
    below: dict[str, list[Path]] | None = None
    where, missing = [], []
    for number, name in names.items():
        if not name.strip():
            raise ValueError(f"{path}: line {number} names no image")
        file = root / name.strip()
        if not file.is_file():
            if below is None:
                below = defaultdict(list)
                for found in find(root):
                    below[found.name].append(found)
            found_here = below.get(name.strip(), [])
            if len(found_here) != 1:
                missing.append(
                    f"{path}: line {number}: {name}: {'found several times' if found_here else 'no such file'}"
                )
                continue
            file = found_here[0]
        where.append(str(file))
    if missing:
        more = (
            f" ({len(missing)} such lines; --dataset_dir {root})" if len(missing) > 1 else f" in --dataset_dir {root}"
        )
        raise ValueError(missing[0] + more + ": correct the name (or path below the folder), or take the line out")
    return where


def _label_of_row(row: Mapping[str, Any], place: str, classification: Classification) -> list[float]:
    column, classes = classification.label_column, classification.classes
    if classification.task == "multilabel" and all(name in row for name in classes):
        return [_label_of_cell(row[name], place, name) for name in classes]
    if column not in row:
        raise ValueError(
            f"{place}: no column '{column}'"
            + (f", nor one for each of {', '.join(classes)}" if classification.task == "multilabel" else "")
            + f"; found {', '.join(map(str, row))}"
        )
    text = str(row[column] or "").strip()
    if classification.task != "multilabel":
        if not text:
            raise ValueError(f"{place}: column '{column}' is empty, expected one of {', '.join(classes)}")
        if text.isdecimal() and int(text) < len(classes) and not any(map(str.isdecimal, classes)):
            text = classes[int(text)]
        names = [text]
    else:
        names = [name.strip() for name in text.split(SEPARATOR) if name.strip()]
        names = [name for name in names if name != classification.nothing or name in classes]
        if not text:
            return [math.nan] * len(classes)
    unknown = [name for name in names if name not in classes]
    if unknown:
        known = ", ".join([*classes, *([classification.nothing] if classification.task == "multilabel" else [])])
        raise ValueError(
            f"{place}: label '{unknown[0]}' in column '{column}', expected {'some' if len(names) > 1 else 'one'} of "
            f"{known}: correct it, or name the class in a preset of your own (--dataset my_preset.yaml)"
        )
    return _as_vector(names, classification)


def _label_of_cell(value: Any, place: str, name: str) -> float:
    text = str(value if value is not None else "").strip()
    if text in ("", "-1", "-1.0"):  # not told, or uncertain
        return math.nan
    if text in ("0", "0.0", "1", "1.0"):
        return float(text)
    raise ValueError(f"{place}: '{text}' in column '{name}', expected 1, 0, or nothing (-1) where it is not known")


def _mark_official(items: list[Item], root: Path, classification: Classification | None) -> None:
    """Mark the test images that a list which came with the data set names."""
    if classification is None:
        return
    official: dict[str, str] = {}
    for part, name in (("training", classification.training_list), ("test", classification.test_list)):
        if name and (root / name).is_file():
            for line in _read_lines(root / name):
                if official.setdefault(Path(line).name, part) != part:
                    raise ValueError(f"{root / name}: {line} stands in the lists of training and of test: correct them")
    for item in items:
        if official.get(Path(item["image"]).name) == "test":
            item["split"] = "test"
    named = [name for name in (classification.training_list, classification.test_list) if name]
    missing = [name for name in named if not (root / name).is_file()]
    found = sum(item.get("split") == "test" for item in items)
    if missing and idist.get_rank() == 0:
        logger.warning(
            f"{root}: no {' and no '.join(missing)}, which the preset names: its split is not the official one"
        )
    elif classification.test_list and not found and idist.get_rank() == 0:
        logger.warning(f"{root / classification.test_list}: names none of the images: nothing is kept for testing")
    elif official:
        logger.info(f"{found} images kept for testing, as {root} lists them")


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not readable as UTF-8 ({error}): save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _check_twice(items: list[Item]) -> None:
    parts: dict[str, list[str]] = defaultdict(list)
    for item in items:
        parts[item["image"]].append(item.get("split", "no split"))
    twice = {name: found for name, found in parts.items() if len(found) > 1}
    if twice:
        name, found = next(iter(twice.items()))
        across = [name for name, found in twice.items() if len(set(found)) > 1]
        if across:
            name, found = across[0], parts[across[0]]
        raise ValueError(
            f"{name}: listed {len(found)} times, in {' and '.join(sorted(set(found)))} ({len(twice)} images in all): "
            "list each image once"
        )


def _check_labels(items: list[Item], source: Path) -> None:
    """Refuse a list that says nothing of an image: it could neither teach nor test."""
    silent = [item["image"] for item in items if all(map(math.isnan, item["label"]))]
    if silent:
        raise ValueError(
            f"{source}: no label is known for {silent[0]} ({len(silent)} images in all): fill in at least one of its "
            "labels, or take it out of the list"
        )
