"""Each fault a user can make, through the bundles' own runs: how it ends, and what is said.

The messages themselves are listed at the end of the test report.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ends(run_bundle: Callable, tmp_path: Path, record_property: Callable) -> Callable[..., list[str]]:
    """Runs a bundle that must end plainly; returns the faults, without ``error:``."""

    def run(bundle: str, *configs: str, **knobs: Any) -> list[str]:
        with pytest.raises(SystemExit) as ending:
            run_bundle(bundle, *(configs or ["train"]), **{"folder": tmp_path} | knobs)
        message = ending.value.code
        assert isinstance(message, str), "SystemExit with a text prints it and exits with status 1"
        record_property("error", message)
        lines = message.splitlines()
        assert lines[0].startswith("error: ")
        return [line.removeprefix("error: ") for line in lines]

    return run


@pytest.fixture
def one_line(ends: Callable[..., list[str]]) -> Callable[..., str]:
    def run(bundle: str, *configs: str, **knobs: Any) -> str:
        lines = ends(bundle, *configs, **knobs)
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def data(phantom_dir: Path, tmp_path: Path) -> Path:
    """A copy of the phantom data set, to be spoilt."""
    return shutil.copytree(phantom_dir, tmp_path / "data")
