"""The folders of a run: where it may write, and how its results are told from scans."""

from __future__ import annotations

import tempfile
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
