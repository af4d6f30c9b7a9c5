"""The folders of a run: where it may write, and how its results are told from scans."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")
RESULTS = ".medmim_results"  # an empty file in a folder of results: none of its files is a scan to work on


def check_paths(**paths: Any) -> None:
    """Refuse what is no path; on the command line ``5`` arrives as a number.

    Raises:
        ValueError: one line for each.
    """
    wrong = [
        f"--{name} {value}: expected a path" + (f": write ./{value}" if isinstance(value, int) else "")
        for name, value in paths.items()
        if not isinstance(value, str) or not value.strip()
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def check_writable(folder: str | Path, results: bool = False) -> None:
    """Make a folder and write into it.

    Args:
        folder: the folder.
        results: whether to mark it as one of results.

    Raises:
        ValueError: when that fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if results:
            (Path(folder) / RESULTS).touch()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"folder {folder} is not writable ({reason}): choose another (--output_dir, --models_dir)"
        ) from error


def writable_faults(folders: Sequence[str]) -> list[str]:
    """What :func:`check_writable` says of each of a run's folders; the first is marked as one of results."""
    faults = []
    for number, folder in enumerate(folders):
        try:
            check_writable(folder, results=number == 0)
        except ValueError as error:
            faults.append(str(error))
    return faults


def visible_files(folder: str | Path) -> list[Path]:
    """What lies below a folder of data, sorted, without what is hidden and what an earlier run has written.

    Hidden is what has a dot before its name, or before that of a folder on the way, such as macOS's ``._`` companions.

    Raises:
        ValueError: when the folder is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--dataset_dir {folder}: no such folder")
    files = sorted(folder.rglob("*"))
    results = {path.parent for path in files if path.name == RESULTS} - {folder}
    return [
        path
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (results and results & set(path.parents))
    ]


def check_resume(output_dir: str | Path, resume: Any) -> None:
    """Refuse to begin anew over the checkpoint of another training.

    Raises:
        ValueError: naming it.
    """
    there = [path for name in CHECKPOINTS if (path := Path(output_dir) / name).is_file()]
    if there and resume not in (True, "true"):
        raise ValueError(
            f"{there[0]}: the checkpoint of an earlier training: go on from it with --resume true; to begin anew, "
            "remove it or take another --output_dir (and --models_dir)"
        )
