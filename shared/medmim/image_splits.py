"""Splits of images: patients and copies of a file stay together, and each part has its share of each class."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np

from medmim.datalists import Datalist, Item

logger = logging.getLogger(__name__)

SAME = 65536  # bytes of files of equal size that are compared first to find copies


def find_patients(items: list[Item], pattern: str | None, root: Path) -> None:
    """A patient for each item, as far as a column, the name or the path below ``root`` tells; and for copies of a file
    the same ``copies``.
    """
    for item in items:
        path = Path(item["image"])
        if pattern and "patient" not in item:
            found = [re.search(pattern, text) for text in (path.name, Path(os.path.relpath(path, root)).as_posix())]
            named = [match.group(1) for match in found if match and match.group(1)]
            item |= {"patient": named[0]} if named else {}
    by_size: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_size[Path(item["image"]).stat().st_size].append(item)
    by_start: dict[tuple[int, bytes], list[Item]] = defaultdict(list)
    by_content: dict[tuple[int, bytes], list[Item]] = defaultdict(list)
    for size, alike in by_size.items():
        for item in alike if len(alike) > 1 else ():
            with open(item["image"], "rb") as file:
                by_start[size, hashlib.sha256(file.read(SAME)).digest()].append(item)
    for (size, _), alike in by_start.items():
        for item in alike if len(alike) > 1 else ():  # headers and black borders may be equal in different images
            by_content[size, hashlib.sha256(Path(item["image"]).read_bytes()).digest()].append(item)
    for copies in by_content.values():
        if len(copies) > 1:
            for item in copies:
                item["copies"] = copies[0]["image"]


def _groups(items: Sequence[Item]) -> list[list[Item]]:
    """Items that must stay together: of one patient, or copies of one file."""
    leader = list(range(len(items)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, item in enumerate(items):
        for key in ("patient", "copies"):
            if key in item:
                j = first.setdefault((key, item[key]), i)
                leader[find(i)] = find(j)
    groups: dict[int, list[Item]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[find(i)].append(item)
    return list(groups.values())


def _class_of(group: Sequence[Item], counts: Mapping[int, int]) -> int:
    """The rarest class of any item of a group; -1 when it has none."""
    found = {number for item in group for number, value in enumerate(item.get("label", ())) if value == 1}
    return min(found, key=lambda number: (counts[number], number), default=-1)


def split_images(
    items: list[Item], root: Path, fold: int, folds: int, test_fold: int | None, split_seed: int
) -> dict[str, list[Item]]:
    """Parts ``training``, ``validation`` and ``test``.

    What an item says under ``split`` holds, for other items of its patient too that say nothing (of two parts the one
    that is further from training). What then is left is dealt out; where nothing is left, the items for training are.

    Raises:
        ValueError: when parts would be empty, or two knobs contradict each other or the list.
    """
    items = sorted(items, key=lambda item: str(item["image"]))
    split: dict[str, list[Item]] = {"training": [], "validation": [], "test": []}
    open_items: list[Item] = []  # of which nothing is said, nor of another image of the patient
    for group in _groups(items):
        said = {item["split"] for item in group if "split" in item}
        strictest = next((part for part in ("test", "validation", "training") if part in said), None)
        for item in group:
            part = item.get("split", strictest)
            (open_items if part is None else split[part]).append(item)
    for knob, number in (("fold", fold), ("test_fold", test_fold)):
        if number is not None and not 0 <= number < folds:
            raise ValueError(f"--{knob} {number} of --folds {folds}: {knob} must lie in 0 … folds - 1")
    if test_fold is not None and split["test"]:
        raise ValueError(f"--test_fold {test_fold}: {root} names {len(split['test'])} test images: leave it away")
    if test_fold is not None and test_fold == fold and not split["validation"]:
        raise ValueError(f"--test_fold {test_fold}: the same part as --fold, which is for validation: take another")
    drawn = {} if split["validation"] else {fold: "validation"}
    drawn |= {} if test_fold is None else {test_fold: "test"}
    if drawn:
        if not open_items:  # a list that names training images only
            open_items, split["training"] = split["training"], []
        dealt = _deal(sorted(open_items, key=lambda item: str(item["image"])), folds, split_seed)
        for number, part_items in enumerate(dealt):
            split[drawn.get(number, "training")] += part_items
    else:
        split["training"] += open_items
    if not drawn and not split["training"]:
        raise ValueError(f"{root}: the list names no image for training, {len(split['validation'])} for validation")
    if not split["training"] or not split["validation"]:
        raise ValueError(
            f"--dataset_dir {root}: {len(items)} images leave {len(split['training'])} for training and "
            f"{len(split['validation'])} for validation with --fold {fold} of --folds {folds}"
            + ("" if test_fold is None else f" and {len(split['test'])} for testing with --test_fold {test_fold}")
            + f": add images or patients, or {'raise' if len(drawn) == folds else 'lower'} folds"
        )
    if test_fold is not None and not split["test"]:
        raise ValueError(
            f"--test_fold {test_fold}: {len(items)} images leave none for testing with --folds {folds}: add images or "
            "patients, or lower folds"
        )
    for chosen in split.values():
        chosen.sort(key=lambda item: str(item["image"]))
    order = np.random.RandomState(split_seed).permutation(len(split["training"]))
    split["training"] = [split["training"][i] for i in order]
    return split


def _deal(items: list[Item], folds: int, split_seed: int) -> list[list[Item]]:
    """Parts of about equal size; the groups of each class go round."""
    counts = class_counts(items)
    by_class: dict[int, list[list[Item]]] = defaultdict(list)
    for group in _groups(items):
        by_class[_class_of(group, counts)].append(group)
    random = np.random.RandomState(split_seed)
    parts: list[list[Item]] = [[] for _ in range(folds)]
    place = 0
    for _, groups in sorted(by_class.items(), key=lambda entry: (entry[0] < 0, entry[0])):  # the unlabelled last
        for i in random.permutation(len(groups)):
            parts[place % folds] += groups[i]
            place += 1
    return parts


def kept_apart(split: Datalist, dataset_dir: str | Path) -> dict[str, str]:
    """A short text for the validation and the test images, which changes with their names below the folder."""

    def name(item: Item) -> str | list[str]:
        image = item["image"]
        if isinstance(image, str):
            return os.path.relpath(image, dataset_dir)
        return [os.path.relpath(path, dataset_dir) for path in image]  # a file for each channel

    return {
        part: hashlib.sha256(repr(sorted(map(name, items), key=str)).encode()).hexdigest()[:16]
        for part, items in (("validation", split.validation), ("test", split.test))
    }


def class_counts(items: Sequence[Item]) -> Counter[int]:
    """Images of each class, by the number of the network's output."""
    return Counter(number for item in items for number, value in enumerate(item.get("label", ())) if value == 1)


def in_proportion(items: list[Item]) -> list[Item]:
    """Another order, in which each beginning holds the classes in proportion."""
    counts = class_counts(items)
    members: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        members[_class_of([item], counts)].append(item)
    placed = [
        ((position + 0.5) / len(group), number, item)
        for number, group in members.items()
        for position, item in enumerate(group)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def tell_shared(split: Mapping[str, list[Item]]) -> None:
    """Tell patients and copies that stand in two parts of a split that the list itself gives."""
    for key, what in (("patient", "patients"), ("copies", "files and their copies")):
        parts: dict[str, set[str]] = defaultdict(set)
        for name, items in split.items():
            for item in items:
                if key in item:
                    parts[item[key]].add(name)
        shared = [value for value, names in parts.items() if len(names) > 1]
        if shared and idist.get_rank() == 0:
            logger.warning(
                f"{len(shared)} {what} stand in two parts of the split, for example {shared[0]} in "
                f"{' and '.join(sorted(parts[shared[0]]))}: scores will flatter"
            )
