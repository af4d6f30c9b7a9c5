"""The command line of ``python -m monai.bundle run``, which takes any name for a knob without a word."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate
from typing import Any

import ignite.distributed as idist
import monai.bundle
from fire.parser import DefaultParseValue
from monai.bundle import ComponentLocator, ConfigComponent, ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

RUNNER_OPTIONS = {name for name in inspect.signature(monai.bundle.run).parameters if name != "override"}


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Refuse a knob that no config file of the run knows; a misspelt one would do nothing.

    Args:
        argv: program and arguments; by default those of this process. Nothing is checked unless they are those of
            ``monai.bundle run``.

    Raises:
        ValueError: one line for each unknown knob, with the nearest known names.
    """
    argv = sys.argv if argv is None else argv
    if Path(argv[0]).parts[-2:] != ("bundle", "__main__.py") or list(argv[1:2]) != ["run"]:
        return
    given = _read_arguments(argv[2:])
    if "args_file" in given:
        given = ConfigParser.load_config_file(given["args_file"]) | given
    if not given.get("config_file"):
        return  # MONAI says so itself
    config = ConfigParser(ConfigParser.load_config_files(given["config_file"]))
    tracking: Any = given.get("tracking") or {}
    if not isinstance(tracking, dict):
        tracking = DEFAULT_EXP_MGMT_SETTINGS.get(tracking) or ConfigParser.load_config_files(tracking)
    known = RUNNER_OPTIONS | set(tracking.get("configs", {}))
    faults = [
        f"--{name} {value}: {why}: on the command line write '$None'"
        for name, value in given.items()
        for none, why in (("null", "read as a word"), (None, "left out by MONAI's runner"))
        if value == none and name not in RUNNER_OPTIONS and (none or config.get(name) is not None)
    ]
    for name, value in given.items():
        if name in known or _is_known(name, config):
            continue
        close = get_close_matches(name, [*config.get(), *known], n=2)
        hint = f" (did you mean {' or '.join('--' + other for other in close)}?)" if close else ""
        faults.append(f"--{name} {value}: no such knob{hint}: the knobs stand at the top of the config files")
    if faults:
        raise ValueError("\n".join(faults))


def check_processes() -> None:
    """Refuse several processes that do not know of each other; each would do the whole work, in the same folders.

    Raises:
        ValueError: naming the config that is missing.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and idist.get_world_size() == 1:
        raise ValueError(
            f"torchrun started {started} processes that do not know of each other: put configs/multi_gpu_train.yaml "
            "(for evaluate.yaml, configs/multi_gpu_evaluate.yaml) last in --config_file; other runs need no torchrun"
        )


def _read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Names and values as fire reads them."""
    given: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        flag = re.match(r"--?([a-zA-Z_][^=]*)(?:=(.*))?$", argument, re.DOTALL)
        if flag is None:
            continue
        name, value = flag.group(1).replace("-", "_"), flag.group(2)
        if value is None:
            value = arguments[position + 1] if position + 1 < len(arguments) else "True"
        given[name] = DefaultParseValue(value)
    return given


def _is_known(name: str, config: ConfigParser) -> bool:
    """Whether the config has the id, or the component that it adds an argument to takes such an argument."""
    parts = re.split("#|::", name)
    if parts[0] == "_meta_" or "::".join(parts) in config:
        return True
    parent = "::".join(parts[:-1])
    if len(parts) == 1 or parent not in config or not ConfigComponent.is_instantiable(config[parent]):
        return False
    target = locate(str(ConfigComponent(config[parent], locator=ComponentLocator()).resolve_module_name()))
    if not callable(target):
        return True  # the run says so
    parameters = inspect.signature(target).parameters
    return parts[-1] in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
