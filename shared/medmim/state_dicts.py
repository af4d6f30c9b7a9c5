"""Checkpoint files: read as plain tensors only, and loaded into exactly the network that they were saved from."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from medmim.datasets import Preset
from medmim.description import check_description, describe, is_description, read_description
from medmim.files import check_archive, replace_file

NESTED_KEYS = ("state_dict", "model", "network")
WRAPPERS = r"^(?:module\.|_orig_mod\.)+"  # what DistributedDataParallel and torch.compile put before each name
_ALLOWING = Lock()  # what torch.load may build is one set for the whole process
SAFETENSORS_NEEDED = "needs the package safetensors: pip install safetensors"


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """State dict of a checkpoint, and its description when it is one of ours.

    The state dict may be the file's content itself, or stand under ``state_dict``, ``model`` or ``network``. Files of
    PyTorch are read with ``weights_only=True``: code in a pickle is never run; an ``argparse.Namespace`` of plain
    values beside the state dict does no harm. Safetensors are told by their content, not by the file's name.

    Raises:
        ValueError: when the file is missing, damaged, holds code, no tensors are found, or another version of this
            package wrote it.
    """
    return _split(_read(path), path)


def save_safetensors(
    path: str | Path, state_dict: Mapping[str, Tensor], description: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict as safetensors; replaced in one step.

    Args:
        path: the file.
        state_dict: names and tensors; tensors that share memory are written each by itself.
        description: of the network, as ``medmim.description.describe`` makes it; stands in the file's metadata under
            ``description``, as JSON.

    Raises:
        ValueError: when the package safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError(f"{path}: writing it {SAFETENSORS_NEEDED}") from error
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state_dict.items()}
    # one key only: the order of several differs from run to run, and so would the file's checksum
    metadata = {"format": "pt"} if description is None else {"description": json.dumps(description)}
    content = save(tensors, metadata=metadata)
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def load_checkpoint(network: nn.Module, path: str | Path, made_with: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint into exactly the network that it was saved from, wrapped by DDP or not.

    Args:
        network: the network.
        path: ``checkpoint.pt`` or ``model.pt``.
        made_with: knobs that must be those of the training; compared with what ``checkpoint.pt`` says of it.

    Raises:
        ValueError: when a knob, a name or a shape differs.
    """
    content = _read(path)
    state_dict, _ = _split(content, path)
    if made_with is not None:
        _check_same(content.get("made_with", {}), made_with, path)
    load_strictly(network, state_dict, path)


def load_model(network: nn.Module, models_dir: str | Path, img_size: Sequence[int], preset: Preset) -> None:
    """Load ``model.pt`` into the network, after ``model.json`` was compared with network and preset.

    Args:
        network: UNETR or feature extractor of this package.
        models_dir: folder of the two files.
        img_size: voxels along each axis that the network was built for.
        preset: the data that it is to be used on.

    Raises:
        ValueError: when preset, a knob, a name or a shape differs.
    """
    path = Path(models_dir) / "model.json"
    theirs = read_description(path)
    ours = json.loads(json.dumps(describe(network, img_size, preset)))  # as read: no tuples, keys are text
    other = [name for name, value in ours["preset"].items() if theirs["preset"].get(name) != value]
    if other:
        named = {name: f"{name} {theirs['preset'].get(name)}, here {ours['preset'][name]}" for name in other}
        fields = named.get("name") or named.get("spacing") or ", ".join(other)
        raise ValueError(
            f"{path}: trained with preset {theirs['preset']['name']}, whose fields differ from this run's ({fields}): "
            "give the preset that it was trained with (--dataset, --spacing_factor)"
        )
    recorded, found = theirs["network"]["arguments"], ours["network"]["arguments"]
    recorded["roi_size"], found["roi_size"] = recorded.pop("img_size"), found.pop("img_size")
    _check_same(recorded, found, path)
    load_checkpoint(network, Path(models_dir) / "model.pt")


def load_strictly(network: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state dict into a network with the same names and shapes, but for those of DDP and torch.compile.

    Raises:
        ValueError: when a name or a shape differs; nothing is loaded then.
    """
    expected = {re.sub(WRAPPERS, "", name): (name, value) for name, value in network.state_dict().items()}
    found = {re.sub(WRAPPERS, "", name): value for name, value in state_dict.items()}
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, (_, value) in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if faults:
        raise ValueError(
            f"{path}: {count_faults(sorted(faults), f' a {type(network).__name__}')}: "
            "give the knobs that it was trained with"
        )
    network.load_state_dict({expected[name][0]: value for name, value in found.items()}, strict=True)


def count_faults(faults: Sequence[str], network: str = "") -> str:
    """How many tensors do not fit (``network``), and the first of them."""
    return f"{len(faults)} tensor{' does' if len(faults) == 1 else 's do'} not fit{network}, first: {faults[0]}"


def as_knob(name: str, value: Any) -> str:
    """A knob as one types it on the command line; equal sizes of all axes as one number."""
    if isinstance(value, list):
        value = value[0] if name.endswith("_size") and len(set(value)) == 1 else f'"{value}"'
    return f"--{name} {value}"


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str | Path) -> None:
    different = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if different:
        wanted = " ".join(as_knob(key, theirs[key]) for key in different)
        raise ValueError(f"{path}: other knobs than it was trained with: give {wanted}")


def _read(path: str | Path) -> Any:
    """Content of a file of PyTorch or safetensors; the latter as ``{"state_dict", "description"}``."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file: train first, or correct the path")
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:  # a header of that many bytes
            return _read_safetensors(path)
        if head[:2] == b"PK":  # a zip, which all but very old versions of PyTorch write
            check_archive(path)
        return _load_plainly(path)
    except ImportError as error:
        raise ValueError(f"{path}: reading it {SAFETENSORS_NEEDED}") from error
    except Exception as error:  # a damaged file makes torch raise anything, also IndexError or struct.error
        reason, advice = _diagnose(head, str(error))
        raise ValueError(f"{path}: not readable as a checkpoint of plain tensors ({reason}): {advice}") from error


def _load_plainly(path: Path) -> Any:
    """``torch.load`` without code, which takes a Namespace too: training scripts often save their options so."""
    with _ALLOWING:  # else one thread would take the permission back while another reads
        allowed = Namespace in torch.serialization.get_safe_globals()  # by the caller, and stays so
        with nullcontext() if allowed else torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        text = (file.metadata() or {}).get("description", "")
    try:
        return {"state_dict": state_dict, "description": json.loads(text)}
    except json.JSONDecodeError:
        return {"state_dict": state_dict}  # none, or somebody's free text


def _diagnose(head: bytes, error: str) -> tuple[str, str]:
    """What a file is that could not be read, and what to do."""
    if not head:
        return "an empty file", "get it again"
    if head.lstrip().startswith(b"<"):
        return "a web page, as a failed download leaves one", "get it again, from the address of the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS", "git lfs pull fetches the file"
    if "TorchScript" in error:
        return "a TorchScript archive", "save torch.jit.load(path).state_dict() and give that file"
    if named := re.search(r"GLOBAL (\S+)", error):
        return (
            f"it holds the Python object {named.group(1)}, and code is never run",
            "save its state dict alone and give that file",
        )
    if "Unsupported operand" in error:
        return "no file of PyTorch or safetensors", "get it again"
    reason = " ".join(error.split()).split(". ")[0][:150]
    return "truncated or damaged" + (f": {reason}" if reason else ""), "get it again"


def _split(content: Any, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    description = content.get("description") if isinstance(content, dict) else None
    if not is_description(description):
        description = None
    for key in NESTED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if isinstance(content, dict) and not content:
        raise ValueError(f"{path}: its state dict is empty: save it again, from network.state_dict()")
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path}: holds no state dict (looked at top level and under {', '.join(NESTED_KEYS)}): "
            "save network.state_dict()"
        )
    if description is not None:
        check_description(description, path)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} tensors are not finite, first: {bad[0]}: get other weights, or train again"
        )
    return tensors, description
