"""What an exported bundle asks of the package it runs with; ``python -m tools export`` puts it into the configs.

A process holds one package of this name. Bundles of the same version share the one that was imported first; one of
another version ends with one line (``SystemExit``, which MONAI's config parser passes on).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple
from torch import nn

from medmim import networks
from medmim.version import __version__


def check_package(bundle: str, version: str) -> None:
    """End the process when the package that was imported is not of the version that a bundle brings.

    Args:
        bundle: name of the bundle, for the message.
        version: that it was exported with.
    """
    if __version__ == version:
        return
    raise SystemExit(
        f"error: {bundle} brings medmim {version} ({_find_package(version)}), but medmim {__version__} of "
        f"{Path(__file__).parent} was imported before it, and a process holds only one: use {bundle} in a process of "
        "its own, with its folder first on PYTHONPATH, or export both bundles with the same version"
    )


def own_class(version: str, name: str) -> type[nn.Module] | None:
    """A network's class in this package, if the package is of that version.

    Args:
        version: of the package that is wanted.
        name: of the class in ``medmim.networks``.
    """
    return getattr(networks, name) if __version__ == version else None


def check_network(config: str, arguments: Mapping[str, Sequence[Any]]) -> list[str]:
    """Find knobs that ask for another network than the one that a config was exported with.

    Args:
        config: name of the config file, for the message.
        arguments: name of each argument of the network, and then the value that the knobs give and the exported one.

    Returns:
        one line, or none, for :func:`medmim.commands.refuse`.
    """
    other = [
        f"{name} {asked} (exported: {exported})"
        for name, (asked, exported) in arguments.items()
        if not _is_same(asked, exported)
    ]
    if not other:
        return []
    return [
        f"{config} holds the network of models/model.pt as it is, but the knobs ask for {', '.join(other)}: "
        "leave them away, or take train.yaml, which builds any network"
    ]


def check_model(config: str, description: Mapping[str, Any], models_dir: str | Path) -> list[str]:
    """Find out whether ``model.json`` is of another model than the one that a config was exported with.

    Args:
        config: name of the config file, for the message.
        description: what the config holds: ``network`` and the fields of ``preset`` that matter.
        models_dir: folder of ``model.pt`` and ``model.json``.

    Returns:
        one line, or none, for :func:`medmim.commands.refuse`.
    """
    path = Path(models_dir) / "model.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs = _plain({"network": found["network"], **found["preset"]})
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the check of the run itself says so
    ours = _plain({"network": description["network"], **description["preset"]})
    other = [name for name, value in ours.items() if theirs.get(name) != value]
    if not other:
        return []
    return [
        f"{path} is of another model than {config} was exported with (other {', '.join(other)}): "
        "take inference.yaml, which reads model.json"
    ]


def _find_package(version: str) -> str:
    """Where the package of a version lies, as far as the search path tells."""
    for folder in sys.path:
        package = Path(folder) / "medmim"
        if (package / "version.py").is_file() and f'"{version}"' in (package / "version.py").read_text():
            return str(package)
    return "in its own folder"


def _is_same(first: Any, second: Any) -> bool:
    """Whether two arguments mean the same; one number may stand for that of each axis."""
    if isinstance(first, list | tuple) or isinstance(second, list | tuple):
        first, second = ensure_tuple(first), ensure_tuple(second)
        axes = max(len(first), len(second))
        first, second = (values * axes if len(values) == 1 else values for values in (first, second))
    return bool(first == second)


def _plain(value: Any) -> Any:
    """A value as it comes out of a JSON file that MONAI has read, whose parser writes # as ::."""
    return json.loads(json.dumps(value).replace("#", "::"))
