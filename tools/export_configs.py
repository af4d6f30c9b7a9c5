"""Configs of an exported bundle: the network written out, and checks of package, knobs and model put in.

The id ``package`` is put in, and stands first in each ``run``: is the imported package that of the bundle? See
:mod:`medmim.package`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite
from typing import Any

import monai.networks.nets
import torch
import yaml
from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigComponent
from torch import nn
from torch.overrides import TorchFunctionMode

from medmim import networks
from medmim.datasets import Preset, preset_table
from medmim.description import build_network, read_preset
from medmim.encoders import KINDS
from medmim.version import __version__

TEXTS = ("description", "license", "citation", "source")  # of a preset: nothing that a run needs
Config = dict[str, Any]
Description = dict[str, Any]

YAML_CHECK = """
# put in by export: this bundle brings its package, and runs with that version only
package:
  _target_: medmim.package.check_package
  bundle: {bundle}
  version: '{version}'
"""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks that are built here have names and shapes of tensors, and no content."""
    with torch.device("meta"), _RatesWithContent():
        yield


class _RatesWithContent(TorchFunctionMode):
    """MONAI's Swin reads its drop path rates off a tensor, so this one needs its content."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(kwargs or {}) | device)


def check_texts(value: Any, where: str) -> None:
    """Refuse texts that MONAI would run or resolve, instead of reading them, once they stand in a config.

    Raises:
        ValueError: naming the text.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_texts(key, where)
            check_texts(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            check_texts(item, where)
    elif isinstance(value, str) and re.search(r"^[$@%]|[@%](#|::)", value):
        raise ValueError(f"{where}: the text {value[:60]!r} would be run by MONAI's config parser: write it otherwise")


def yaml_with_check(text: str, bundle: str) -> str:
    """Text of a YAML config, comments and all, with the check of the package in its ``run``.

    Raises:
        ValueError: when ``run`` is no list with an item a line.
    """
    config = yaml.safe_load(text)
    text = re.sub(r"^run:\n", "run:\n- '@package'\n", text, flags=re.MULTILINE)
    if "run" in config and yaml.safe_load(text)["run"] != ["@package", *config["run"]]:
        raise ValueError("run must be a list, with each item on a line of its own")
    return text + YAML_CHECK.format(bundle=bundle, version=__version__) if "bundle_root" in config else text


def without_infinity(value: Any) -> Any:
    """A config for JSON, which has no infinite numbers: they become expressions."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinity(item) for item in value]
    return f"$float('{value}')" if isinstance(value, float) and not isfinite(value) else value


def network_config(network: Config) -> Config:
    """Component that builds a described network: a class of MONAI where one serves, else ours, arguments in full.

    Args:
        network: ``name`` and ``arguments``, as in a description.
    """
    name, arguments = network["name"], network["arguments"]
    if stock_arguments(network) is not None:
        return {"_target_": f"monai.networks.nets.{name}", **(stock_arguments(network) or {})}
    own = {"_target_": f"medmim.networks.{name}", "_requires_": "@package"}
    if name == "FeatureExtractor":
        kind = next(kind for kind in KINDS if kind.name == arguments.get("encoder", "ViT"))
        known = inspect.signature(kind.encoder_class).parameters  # a Swin has no img_size
        inside = {key: value for key, value in arguments.items() if key in known}
        encoder = {"_target_": f"{kind.encoder_class.__module__}.{kind.name}", **inside}
        return {**own, "encoder": encoder, "img_size": arguments["img_size"]}
    return {**own, **arguments}


def stock_arguments(network: Config) -> Config | None:
    """Arguments of MONAI's class of the same name, if it has the same tensors as ours; else None."""
    stock = getattr(monai.networks.nets, network["name"], None)
    if stock is None:
        return None
    known = inspect.signature(stock).parameters
    arguments = {key: value for key, value in network["arguments"].items() if key in known}
    with shapes_only():
        ours = build_network({"network": network})
        try:
            theirs = stock(**arguments)
        except (TypeError, ValueError):  # sizes that only ours takes
            return None
    return arguments if tensor_shapes(theirs) == tensor_shapes(ours) else None


def tensor_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of each tensor of a network."""
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def inference_config(config: Config, description: Description, bundle: str) -> Config:
    """``inference.json``: what ``model.json`` says is written into ``inference.yaml``.

    Raises:
        ValueError: when the config does not begin its run with a list of checks.
    """
    config = without_infinity(config)
    if "check" not in config or "faults" not in config["run"][0]:
        raise ValueError(f"inference.yaml of {bundle}: its run must begin with medmim.commands.refuse and its checks")
    arguments = description["network"]["arguments"]
    preset = read_preset(description).to_dict()
    config["description"] = {
        "network": description["network"],
        "preset": {key: value for key, value in preset.items() if key not in TEXTS},
    }
    if "thresholds" in description:  # of a classification
        config["description"]["thresholds"] = description["thresholds"]
    config["roi_size"] = arguments["img_size"]
    if "@description" in str(config.get("patch_size")) and "patch_size" in arguments:  # else the network's own
        config["patch_size"] = arguments["patch_size"]
    config["network_def"] = network_config(description["network"])
    config["package"] = _package_check(bundle)
    config["check"]["exported"] = {
        "_target_": "medmim.package.check_model",
        "config": "inference.json",
        "description": "@description",
        "models_dir": "@models_dir",
    }
    config["run"][0]["faults"].append("@check#exported")
    config["run"].insert(0, "@package")
    return config


def train_config(config: Config, description: Description | None, bundle: str) -> Config:
    """``train.json``: ``train.yaml``, and with a description of weights, knobs and network as these have them.

    Raises:
        ValueError: when the config has no list of checks, or does not come to the network of the description.
    """
    config = without_infinity(config)
    if "with_preset" not in config.get("check", {}):
        raise ValueError(f"train.yaml of {bundle}: check::with_preset is missing, the list of checks before a run")
    config["package"] = _package_check(bundle)
    config["run"].insert(0, "@package")
    if description is None:
        config["network_def"]["_requires_"] = "@package"
        return config
    network, preset = description["network"], read_preset(description)
    config |= _knobs(network["arguments"], config)
    config["dataset"] = preset.name if is_known(preset) else f"$@bundle_root + '/{preset_file(preset)}'"

    asked: dict[str, list[Any]] = {}
    parser = ConfigParser(deepcopy(config) | {"preset": preset})  # the parser changes what it is given
    with shapes_only():
        _write_out(config, "network_def", parser, asked)
        built = ConfigParser(deepcopy(config)).get_parsed_content("network_def")
        if tensor_shapes(built) != tensor_shapes(build_network(description)):
            raise ValueError(
                f"train.yaml of {bundle} does not come to the {network['name']} of model.json: export it with the "
                "files that it was trained with"
            )
    config["check"]["exported"] = {
        "_target_": "medmim.package.check_network",
        "config": "train.json",
        "arguments": asked,
    }
    config["check"]["with_preset"].append("@check#exported")
    stock = stock_arguments(network)
    if stock is None:
        config["network_def"]["_requires_"] = "@package"
    elif hasattr(networks, network["name"]):  # MONAI's class where the package is out of reach, as in monai.bundle.load
        config["imports"].append("$from importlib.util import find_spec")
        config["network_class"] = {
            "_target_": "medmim.package.own_class",
            "_disabled_": "$not find_spec('medmim')",
            "name": network["name"],
            "version": __version__,
        }
        target = f"$@network_class or 'monai.networks.nets.{network['name']}'"
        config["network_def"] = {"_target_": target, **stock}
    return config


def _knobs(arguments: Config, config: Config) -> Config:
    """Knobs of a config as a network's arguments have them; one number for equal sizes where the config has one."""
    names = {"img_size": "roi_size"}
    for kind in KINDS:
        names |= dict(kind.knobs)
    knobs = {names.get(key, key): value for key, value in arguments.items()}
    for key, value in knobs.items():
        if isinstance(config.get(key), int) and isinstance(value, list) and len(set(value)) == 1:
            knobs[key] = value[0]
    return {key: value for key, value in knobs.items() if key in config and not isinstance(config[key], dict)}


def _write_out(config: Config, id: str, parser: ConfigParser, asked: dict[str, list[Any]]) -> None:
    """Write the values of a component's arguments into it; what asked for each goes to ``asked``, with the value."""
    component = config[id]
    for key, value in component.items():
        if key in ConfigComponent.non_arg_keys:
            continue
        part = config.get(value[1:]) if isinstance(value, str) and value.startswith("@") else None
        if isinstance(part, dict) and "_target_" in part:  # a module, which others refer to as well
            _write_out(config, value[1:], parser, asked)
            continue
        component[key] = json.loads(json.dumps(parser.get_parsed_content(f"{id}::{key}")))
        if component[key] != value:
            asked[key] = [value, component[key]]


def _package_check(bundle: str) -> Config:
    return {"_target_": "medmim.package.check_package", "bundle": bundle, "version": __version__}


def is_known(preset: Preset) -> bool:
    """Whether a preset stands in the package's table, field by field."""
    return preset_table().get(preset.name) == preset


def preset_file(preset: Preset) -> str:
    """Where a preset of the user's own stands in the bundle.

    Raises:
        ValueError: when its name cannot be part of a file's name in each system.
    """
    if not re.fullmatch(r"\w[\w .-]*", preset.name):
        raise ValueError(f"preset {preset.name!r}: name its file with letters, digits, - and _ only, and train again")
    return f"presets/{preset.name}.yaml"
