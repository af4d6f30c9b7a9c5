"""Starting a bundle as a user would."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"


def run_bundle(step: str, bundle: str, configs: Sequence[str], options: Sequence[object], log: Path) -> float:
    """Run a bundle in a process of its own; its log goes to a file, its progress bars to the terminal.

    Args:
        step: what is done, for the output.
        bundle: its name.
        configs: paths of configs below the bundle's folder, in their order.
        options: further arguments of the runner.
        log: file that the output is added to.

    Returns:
        seconds that it took.

    Raises:
        SystemExit: when it fails, naming step and log.
    """
    config_file = configs[0] if len(configs) == 1 else str(list(configs)).replace(" ", "")
    arguments = ["-m", "monai.bundle", "run", "--config_file", config_file, *map(str, options)]
    print(f"\n{step}\n  cd {os.path.relpath(BUNDLES / bundle)}\n  python {shlex.join(arguments)}", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore"} | ({} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"})
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        result = subprocess.run(
            [sys.executable, *arguments], cwd=BUNDLES / bundle, stdout=file, env={**os.environ, **quiet}, check=False
        )
    seconds = time.monotonic() - started
    if result.returncode:
        raise SystemExit(f"error: {step} failed with exit code {result.returncode}; its log is {log}")
    print(f"  done in {seconds:.0f} s, log: {os.path.relpath(log)}", flush=True)
    return seconds


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by their columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
