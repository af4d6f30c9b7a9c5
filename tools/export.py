"""A bundle as one zip that needs nothing but pip packages: configs, weights, documentation and the package itself."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from torch import Tensor

import medmim
from medmim.commands import ends_plainly
from medmim.description import build_network, describe, read_description, read_preset
from medmim.files import replace_file
from medmim.version import __version__
from medmim.weights import find_encoder, load_checkpoint, read_checkpoint
from tools.export_configs import (
    check_texts,
    inference_config,
    is_known,
    preset_file,
    shapes_only,
    stock_arguments,
    train_config,
    yaml_with_check,
)
from tools.export_metadata import license_text, make_metadata, name_licenses, read_pins

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = ROOT / "bundles"
PACKAGE = Path(medmim.__file__).resolve().parent
WEIGHTS_LICENSE = "Apache-2.0, within the terms of the data's licence"
NO_WEIGHTS = "No weights here yet: training (configs/train.yaml) writes model.pt and model.json.\n"
Files = dict[str, bytes]  # path inside the bundle, and content


@ends_plainly
def export(
    bundle: str,
    weights: str | None = None,
    output_dir: str = "dist",
    weights_license: str = WEIGHTS_LICENSE,
    safetensors: bool = False,
) -> None:
    """Write ``<name>_v<version>.zip`` and its ``.sha256``; the same files give the same bytes on each machine.

    Args:
        bundle: name of a folder in bundles/, or path of a bundle's folder.
        weights: a trained model.pt, with the model.json that training wrote beside it (and encoder.pt, if any).
        output_dir: where the two files go.
        weights_license: under which the weights are given away.
        safetensors: write the weights as .safetensors too; needs the package safetensors.
    """
    folder = find_bundle(str(bundle))
    if not isinstance(safetensors, bool):
        raise ValueError(f"--safetensors {safetensors}: a switch must be True or False, with a capital letter")
    if not isinstance(weights_license, str) or not weights_license.strip():
        raise ValueError(f"--weights_license {weights_license}: expected a text, such as CC-BY-NC-4.0")
    check_texts(weights_license, "--weights_license")
    train, inference = (
        ConfigParser.load_config_file(folder / "configs" / f"{name}.yaml") for name in ("train", "inference")
    )
    files = bundle_files(folder) | package_files()
    untrained = own_description(train)
    trained = None
    if weights is None:
        files["models/README.txt"] = NO_WEIGHTS.encode()
        licenses = name_licenses()
    else:
        trained, models = read_weights(Path(str(weights)), untrained["network"]["name"], safetensors)
        preset = read_preset(trained)
        licenses = name_licenses(weights_license, trained)
        files |= models
        if not is_known(preset):
            body = {key: value for key, value in preset.to_dict().items() if key != "name"}
            files[preset_file(preset)] = yaml.safe_dump(body, sort_keys=False).encode()
    pages = [page for page in (ROOT / "docs").iterdir() if page.suffix in (".md", ".png")]
    files |= {f"docs/{page.name}": page.read_bytes() for page in pages}
    files["docs/data_license.txt"] = license_text(licenses).encode()
    files["configs/metadata.json"] = _json(make_metadata(folder, trained, licenses))
    files["configs/train.json"] = _json(train_config(train, trained, folder.name))
    files["configs/inference.json"] = _json(inference_config(inference, trained or untrained, folder.name))

    path = Path(str(output_dir)) / f"{folder.name}_v{__version__}.zip"
    replace_file(path, lambda temporary: write_zip(temporary, folder.name, files))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    checksum = path.with_name(f"{path.name}.sha256")
    replace_file(checksum, lambda temporary: temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8"))
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB, {len(files)} files\n{checksum}\n")
    if trained is not None:
        print(_network_line(trained))
    print(license_text(licenses), end="")


def find_bundle(bundle: str) -> Path:
    """Folder of a bundle, by name or path.

    Raises:
        ValueError: when there is none; the nearest names are offered.
    """
    names = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/train.yaml"))
    folder = BUNDLES / bundle if bundle in names else Path(bundle).resolve()
    if not (folder / "configs" / "train.yaml").is_file():
        close = get_close_matches(bundle, names, n=2)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ValueError(f"{bundle}: no such bundle{hint}; there are {', '.join(names)}, or give a bundle's folder")
    missing = [
        name
        for name in ("LICENSE", "docs/README.md", "configs/inference.yaml", "configs/metadata.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(f"{folder}: {', '.join(missing)} missing, which every bundle has: add them")
    return folder


def own_description(train: dict[str, Any]) -> dict[str, Any]:
    """Description of the network and preset that a ``train.yaml`` comes to as it stands."""
    parser = ConfigParser(deepcopy(train))  # which it changes
    with shapes_only():
        network = parser.get_parsed_content("network_def")
    size, preset = parser.get_parsed_content("roi_size"), parser.get_parsed_content("preset")
    return json.loads(json.dumps(describe(network, size, preset)))


def read_weights(path: Path, wanted: str, safetensors: bool) -> tuple[dict[str, Any], Files]:
    """Description of trained weights, and the files that go into ``models/``.

    Args:
        path: ``model.pt``.
        wanted: name of the network that the bundle is for.
        safetensors: whether to write these too.

    Raises:
        ValueError: when a file is missing or damaged, or the weights do not fit their description or the bundle.
    """
    if path.is_dir():
        raise ValueError(f"--weights {path}: a folder: give the file model.pt in it")
    if not path.is_file():
        raise ValueError(f"--weights {path}: no such file: train first, or correct the path")
    described = path.with_name("model.json")
    if not described.is_file():
        raise ValueError(f"--weights {path}: has no model.json beside it: give a model.pt where training wrote it")
    description = read_description(described)
    check_texts(description, str(described))
    found = description["network"]["name"]
    if found != wanted:
        raise ValueError(
            f"--weights {path}: a {found}, but this bundle is for a {wanted}: give weights that it trained"
        )
    try:
        network = build_network(description)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{described}: describes no {found} ({error}): give the file that training wrote") from error
    load_checkpoint(network, path)
    state_dict = dict(network.state_dict())
    files = {"models/model.pt": _saved(state_dict), "models/model.json": _json(description)}
    if safetensors:
        files["models/model.safetensors"] = _safetensors(state_dict, description)
    beside = path.with_name("encoder.pt")
    if beside.is_file():
        encoder, of_encoder = read_checkpoint(beside)
        ours = dict(find_encoder(network).state_dict())
        same = encoder.keys() == ours.keys() and all(torch.equal(encoder[name], ours[name]) for name in ours)
        if of_encoder is None or not same:
            raise ValueError(f"{beside}: is not the encoder of {path.name}: remove it, or train again")
        check_texts(of_encoder, str(beside))
        files["models/encoder.pt"] = _saved({"state_dict": ours, "description": of_encoder})
        if safetensors:
            files["models/encoder.safetensors"] = _safetensors(ours, of_encoder)
    return description, files


def bundle_files(folder: Path) -> Files:
    """A bundle's own files: configs (with the check of the package), documentation, licence, and its requirements."""
    files = {"LICENSE": (folder / "LICENSE").read_bytes()}
    files["requirements.txt"] = "".join(f"{name}=={pin}\n" for name, pin in read_pins().items()).encode()
    for path in sorted((folder / "configs").iterdir()) + sorted((folder / "docs").iterdir()):
        name = f"{path.parent.name}/{path.name}"
        if path.suffix == ".yaml":
            try:
                files[name] = yaml_with_check(path.read_text(encoding="utf-8"), folder.name).encode()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        elif path.suffix in (".conf", ".md", ".png", ".txt"):
            files[name] = path.read_bytes()
    return files


def package_files() -> Files:
    """The package, as it stands at the bundle's root."""
    found = (path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml", ".typed"))
    return {f"medmim/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in found}


def write_zip(path: Path, name: str, files: Files) -> None:
    """Write files below the folder ``name``; nothing of this machine or moment goes in.

    Raises:
        ValueError: when a file would leave the folder.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # what deflating gives depends on zlib's version
        for inside in sorted(files):
            if inside.startswith("/") or ".." in PurePosixPath(inside).parts or "\\" in inside:
                raise ValueError(f"{inside}: would be extracted outside the bundle's folder: rename it")
            entry = zipfile.ZipInfo(f"{name}/{inside}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, so that the permissions count
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[inside])


def _network_line(description: dict[str, Any]) -> str:
    name = description["network"]["name"]
    if stock_arguments(description["network"]) is not None:
        return f"network: monai.networks.nets.{name}; monai.bundle.load needs nothing but MONAI\n"
    return f"network: medmim.networks.{name}; monai.bundle.load needs the bundle's folder on PYTHONPATH\n"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _saved(content: Any) -> bytes:
    """What torch.save writes; to a file, the file's name would be part of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _safetensors(state_dict: dict[str, Tensor], description: dict[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError("--safetensors: needs the package safetensors: pip install safetensors") from error
    # one key of metadata only: the order of several differs from run to run
    return save(state_dict, {"description": json.dumps(description)})
