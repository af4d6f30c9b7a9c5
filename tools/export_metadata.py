"""``metadata.json`` and the licences of an exported bundle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medmim.datasets import preset_table
from medmim.description import build_network, name_data, read_preset
from medmim.version import __version__
from tools.export_configs import shapes_only

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
CODE_LICENSE = "Apache-2.0"
NO_WEIGHTS = "none, this bundle holds no weights"


def read_pins() -> dict[str, str]:
    """Packages and exact versions of ``requirements.txt``, the one place where they stand."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines if "==" in line)


def make_metadata(folder: Path, description: dict[str, Any] | None, licenses: dict[str, Any]) -> dict[str, Any]:
    """``metadata.json``: the bundle's own, with versions, licences and, for weights, what the description says.

    Raises:
        ValueError: when its changelog does not tell of this version.
    """
    path = folder / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    if __version__ not in metadata["changelog"]:
        raise ValueError(f"{path}: its changelog does not tell of version {__version__}: add a line")
    pins = read_pins()
    metadata |= {"version": __version__, "monai_version": pins.pop("monai"), "pytorch_version": pins.pop("torch")}
    metadata |= {"numpy_version": pins.pop("numpy"), "required_packages_version": pins, "license": licenses}
    if description is None:
        return metadata
    preset, arguments = read_preset(description), description["network"]["arguments"]
    size = list(arguments["img_size"])
    metadata["data_source"] = f"{preset.name}: {preset.description or 'described by its user'}; {preset.source}"
    image, pred = (metadata["network_data_format"][key] for key in ("inputs", "outputs"))
    image["image"] |= {
        "modality": preset.modality or "not named",
        "num_channels": len(preset.channels),
        "spatial_shape": size,
        "value_range": [0, 1] if preset.window is not None else [],
        "channel_def": {str(number): name for number, name in enumerate(preset.channels)},
    }
    if pred["pred"]["format"] == "segmentation":
        names = dict(enumerate(preset.regions)) if preset.regions else {0: "background"} | preset.labels
        classes = {str(value): names.get(value, "unused") for value in range(arguments["out_channels"])}
        pred["pred"] |= {"num_channels": len(classes), "spatial_shape": size, "channel_def": classes}
    elif preset.classification is not None and pred["pred"]["format"] == "logits":
        outputs = {str(number): name for number, name in enumerate(preset.classification.outputs)}
        pred["pred"] |= {"num_channels": len(outputs), "channel_def": outputs}
    else:
        with shapes_only():
            extractor: Any = build_network(description)
        pred["pred"] |= {"num_channels": extractor.feature_size, "spatial_shape": list(extractor.grid)}
    return metadata


def name_licenses(weights: str = NO_WEIGHTS, description: dict[str, Any] | None = None) -> dict[str, Any]:
    """Licences of code, weights, and all data that described weights have seen; without, of all that presets are for.

    Data without a licence that weights have seen are named in a warning.
    """
    seen = [asdict(preset) for preset in preset_table().values()]
    if description is not None:
        seen = name_data(description, "")
    nameless = [about["name"] for about in seen if not about["license"] or about["license"] == "unknown"]
    if nameless and description is not None:
        print(f"warning: {', '.join(nameless)}: no licence in the preset: name it before you give the weights away")
    data = {about["name"]: {key: about[key] for key in ("license", "citation", "source")} for about in seen}
    return {"code": CODE_LICENSE, "weights": weights, "data": data}


def license_text(licenses: dict[str, Any]) -> str:
    """What :func:`name_licenses` found in words, for ``docs/data_license.txt``."""
    trained = licenses["weights"] != NO_WEIGHTS
    lines = [
        "Licences",
        "--------",
        f"Code: {licenses['code']} (the file LICENSE)",
        f"Weights: {licenses['weights']}",
        "Data that the weights were trained on:" if trained else "Data that the presets are for:",
    ]
    for name, about in licenses["data"].items():
        lines.append(f"  {name}: {about['license']}")
        lines += [f"    {about[key]}" for key in ("citation", "source") if about[key]]
    return "\n".join(lines) + "\n"
