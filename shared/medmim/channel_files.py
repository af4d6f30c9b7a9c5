"""Cases whose channels are files of their own, such as the four of BraTS, found by the endings of their names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.data.folder_layout import default_name_formatter

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii")
LABELS_BESIDE = {"images": "labels", "imagesTr": "labelsTr"}
LISTED = 5  # faults that a message names


def group_channels(
    paths: Sequence[Path],
    endings: Sequence[str],
    folder: Path,
    label_ending: str | None = None,
    known_labels: str = "",
) -> list[dict[str, Any]]:
    """Cases of files that share a folder and the part of their names before the ending.

    Args:
        paths: files; those that are of no case are left out, and told.
        endings: of each channel's name before the suffix, in the order of the channels: ``["_t1", "_t2"]``. Of several
            that fit a name the longest counts.
        folder: of the data, for messages.
        label_ending: of the label map's name. It lies in the same folder, or, of images in ``images`` or ``imagesTr``,
            in ``labels`` or ``labelsTr`` beside it. ``None`` looks for none.
        known_labels: ending of label maps that are not looked for, so that they are no unknown files.

    Returns:
        ``{"image": [path, ...]}``, one path for each channel, with ``label`` when it was asked for; sorted.

    Raises:
        ValueError: one line that names the cases without, or with more than one, file for a channel or label.
    """
    cases: dict[Path, dict[str, list[Path]]] = {}
    for path in paths:
        fitting = [ending for ending in endings if _stem(path).endswith(ending) and _stem(path) != ending]
        if fitting:
            ending = max(fitting, key=len)
            case = path.with_name(_stem(path).removesuffix(ending))
            cases.setdefault(case, {}).setdefault(ending, []).append(path)
    if not cases:
        raise ValueError(
            f"--dataset_dir {folder}: no NIfTI file whose name is that of a case and then {' or '.join(endings)} in it "
            "or below: give the endings of yours (channel_files of the preset; in inference --channel_files, '[]' "
            "where a file holds all channels)"
        )
    _tell_others(paths, cases, folder, known_labels if label_ending is None else label_ending)
    items: list[dict[str, Any]] = []
    faults: list[str] = []
    for case, found in sorted(cases.items()):
        item: dict[str, Any] = {"image": [_one(found.get(ending, []), case, ending, faults) for ending in endings]}
        if label_ending is not None:
            item["label"] = _one(_labels_of(case, label_ending), case, label_ending, faults, "label map ")
        items.append(item)
    if faults:
        more = f" (and {len(faults) - LISTED} more)" if len(faults) > LISTED else ""
        wanted = [*endings, *([] if label_ending is None else [label_ending])]
        raise ValueError(
            f"{'; '.join(faults[:LISTED])}{more}; names are expected to end in {', '.join(map(repr, wanted))} "
            "(channel_files and label_file of the preset, in inference --channel_files): give the endings of yours if "
            "they are others"
        )
    return items


def _tell_others(
    paths: Sequence[Path], cases: Mapping[Path, Mapping[str, Sequence[Path]]], folder: Path, label_ending: str
) -> None:
    """Tell files that are neither a channel nor a label map of a case."""
    used = {path for found in cases.values() for files in found.values() for path in files}
    used |= {path for case in cases for path in _labels_of(case, label_ending)}
    others = [path for path in paths if path not in used]
    if others and idist.get_rank() == 0:
        logger.warning(
            f"{folder}: {len(others)} NIfTI files belong to no case and are left out, for example {others[0]}"
        )


def _one(files: Sequence[Path], case: Path, ending: str, faults: list[str], what: str = "") -> str:
    """The file of a case; a fault where there is none, or more than one."""
    if not files:
        faults.append(f"{case}: no {what}{case.name}{ending}.nii.gz: add it, or move the case's files away")
    elif len(files) > 1:
        faults.append(f"{case}: {' and '.join(map(str, files))} are one {what or 'channel '}twice: keep one of them")
    return str(files[0]) if len(files) == 1 else ""


def _labels_of(case: Path, ending: str) -> list[Path]:
    """Label maps of a case that are there."""
    folders = [case.parent]
    parts = case.parent.parts
    inner = max((number for number, part in enumerate(parts) if part in LABELS_BESIDE), default=None)
    if inner is not None:
        folders.append(Path(*parts[:inner], LABELS_BESIDE[parts[inner]], *parts[inner + 1 :]))
    named = [folder / f"{case.name}{ending}{suffix}" for folder in folders for suffix in SUFFIXES]
    return [path for path in named if path.is_file()]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


class CaseName:
    """Name the results of a case after the case and not after its first channel, for MONAI's ``SaveImage``.

    Args:
        endings: of the channels' files; without, and for a file with none of them, the name is the file's.
    """

    def __init__(self, endings: Sequence[str] = ()) -> None:
        self.endings = endings

    def __call__(self, metadata: Mapping[str, Any], saver: Callable) -> dict[str, Any]:
        """Keyword arguments of ``FolderLayout.filename``."""
        name = default_name_formatter(dict(metadata), saver)  # type: ignore[arg-type]
        path = Path(name["subject"])
        fitting = [ending for ending in self.endings if _stem(path).endswith(ending) and _stem(path) != ending]
        if fitting:
            stem = _stem(path).removesuffix(max(fitting, key=len))
            name["subject"] = str(path.with_name(stem + path.name.removeprefix(_stem(path))))
        return name
