"""Files that are either old or new, never half written."""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class WriteError(OSError):
    """A file could not be written, for example because the disk is full; the one before it is still there."""


def replace_file(path: str | Path, write: Callable[[Path], Any], keep: str | Path | None = None) -> None:
    """Write a file under a temporary name beside its own, flush it to disk, and rename it.

    Args:
        path: the file.
        write: writes to the path that it is given.
        keep: where the file that is replaced goes; ``None`` does not keep it.

    Raises:
        WriteError: naming the file and the reason; the file before is untouched, nothing half written is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save may wrap the system's error into a RuntimeError
        if not isinstance(_root(error), OSError):
            raise
        before = "the one before is untouched" if path.exists() else "nothing is left of it"
        raise WriteError(
            f"{path}: cannot be written ({_reason(error)}); {before}: free space and start again"
        ) from error
    _flush_folder(path.parent)


def save_tensors(path: str | Path, content: Any, keep: str | Path | None = None) -> None:
    """``torch.save`` by way of :func:`replace_file`; equal content gives equal bytes."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch would write its name into the file
            torch.save(content, file)

    replace_file(path, write, keep)


def check_archive(path: Path) -> None:
    """Compare the check sums of a file that ``torch.save`` wrote, which ``torch.load`` does not look at.

    Raises:
        ValueError: when a part of it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"wrong check sum of {broken}")


def remove_leftovers(*paths: str | Path) -> None:
    """Remove what a process that was killed in :func:`replace_file` has left beside these files."""
    for path in map(Path, paths):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)


def _root(error: BaseException) -> BaseException:
    """The system's error behind one of torch, if there is any."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def _reason(error: BaseException) -> str:
    root = _root(error)
    return (isinstance(root, OSError) and root.strerror) or " ".join(str(root).split())[:150]


def _flush_folder(folder: Path) -> None:
    """Make a renaming last beyond a power failure, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
