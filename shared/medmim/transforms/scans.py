"""Checks of a scan that was just loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform
from torch import Tensor

# a decoder of DICOM on GPUs, whose absence MONAI would tell at each scan that is loaded
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
LABEL_ROUNDING = 1e-3  # how far from a whole number a label may lie


class ScanError(ValueError):
    """A scan that cannot be used. The message is one line and names the file."""


def load_scan(path: str | Path | Sequence[str | Path]) -> Tensor:
    """Read a scan, channel first, with its affine; several files are the channels of one scan, on one grid.

    Raises:
        ScanError: naming the file, when it is missing, damaged, no image, or on another grid than the first.
    """
    if not isinstance(path, str | Path):
        return _join([load_scan(part) for part in path], path)
    try:
        return LoadImage(image_only=True, ensure_channel_first=True)(path)
    except Exception as error:  # readers raise anything from EOFError to zlib.error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__} {cause}".split())[:200]
        raise ScanError(f"{path}: not readable ({reason}): replace or remove the file") from error


def _join(parts: Sequence[Any], paths: Sequence[str | Path]) -> Tensor:
    """One scan of the channels of several files, with the metadata of the first."""
    first = parts[0]
    for part, path in zip(parts, paths, strict=True):
        if part.shape[0] != 1:
            raise ScanError(
                f"{path}: {part.shape[0]} channels, expected 1 in the file of one (channel_files): split the file, or "
                "choose a preset (--dataset) without channel_files"
            )
        check_image(part, str(path), 1)
    for part, path in zip(parts[1:], paths[1:], strict=True):
        if part.shape[1:] != first.shape[1:]:
            raise ScanError(
                f"{path}: {tuple(part.shape[1:])} voxels, but {paths[0]}, a channel of the same scan, has "
                f"{tuple(first.shape[1:])}: resample it to that grid"
            )
        distance, allowed = _farthest(part, first)
        if not distance <= allowed:
            raise ScanError(
                f"{path}: its voxels lie up to {distance:.3g} mm from those of {paths[0]}, a channel of the same scan "
                f"(other affine), expected {allowed:.3g} mm at most: resample it to that grid"
            )
    channels = torch.cat([part.as_tensor() for part in parts])
    return MetaTensor(channels, meta=first.meta, applied_operations=first.applied_operations)


def check_image(image: Tensor, name: str, n_channels: int, spatial_dims: int | None = None) -> None:
    """Refuse an image with a wrong number of axes or channels, NaN or infinite voxels, or a channel of one intensity.

    Args:
        image: ``(C, *spatial)``.
        name: file, for the message.
        n_channels: expected channels.
        spatial_dims: expected spatial axes; ``None`` allows any number.

    Raises:
        ScanError: naming the file and what was found.
    """
    if spatial_dims is not None and image.ndim - 1 != spatial_dims:
        raise ScanError(
            f"{name}: {image.ndim - 1} spatial axes {tuple(image.shape[1:])}, expected {spatial_dims} as in the "
            "preset's roi_size: convert or remove the file, or choose another preset (--dataset)"
        )
    if image.shape[0] != n_channels:
        raise ScanError(
            f"{name}: {image.shape[0]} channels, expected {n_channels}: choose a preset (--dataset) with as many "
            "channels, or convert the file"
        )
    finite = torch.isfinite(image)
    if not bool(finite.all()):
        raise ScanError(f"{name}: {int((~finite).sum())} voxels are NaN or infinite: repair or remove the file")
    flat = image.flatten(1)
    constant = [i for i, same in enumerate((flat.amin(1) == flat.amax(1)).tolist()) if same]
    if constant:
        what = "image" if n_channels == 1 else f"channel {constant[0]} (from 0)"
        value = float(flat[constant[0], 0])
        raise ScanError(f"{name}: constant {what}, each voxel is {value:g}: remove the file")


def check_label(label: Tensor, image: Tensor, name: str, values: Collection[int]) -> None:
    """Refuse a label map that lies on another grid than its image, or with values that the preset does not name.

    Args:
        label: ``(1, *spatial)``, class indices up to rounding (a header's slope stores 1 as 1.0000153).
        image: ``(C, *spatial)``.
        name: file of the label map, for the message.
        values: allowed class indices, background included.

    Raises:
        ScanError: naming the file and what was found.
    """
    if label.shape[1:] != image.shape[1:]:
        raise ScanError(
            f"{name}: label map of {tuple(label.shape[1:])} voxels for an image of {tuple(image.shape[1:])}: "
            "export the label map on the image's grid"
        )
    if label.shape[0] != 1:
        raise ScanError(f"{name}: label map of {label.shape[0]} channels, expected 1 with class indices: convert it")
    _check_same_grid(label, image, name)
    if not bool(torch.isfinite(label).all()):
        raise ScanError(f"{name}: the label map holds NaN or infinite values: repair or remove the file")
    found = torch.unique(label).tolist()
    unknown = [f"{v:g}" for v in found if abs(v - round(v)) >= LABEL_ROUNDING or round(v) not in values]
    if unknown:
        raise ScanError(
            f"{name}: label values {', '.join(unknown[:10])} are not in the preset ({sorted(values)}): "
            "correct the file, or name them in a preset of your own (--dataset my_preset.yaml)"
        )


def _check_same_grid(label: Tensor, image: Tensor, name: str) -> None:
    """Refuse a label map whose voxels lie elsewhere in space; what rounding of a header moves them by passes."""
    distance, allowed = _farthest(label, image)
    if not distance <= allowed:
        raise ScanError(
            f"{name}: the label map's voxels lie up to {distance:.3g} mm from the image's (other affine), expected "
            f"{allowed:.3g} mm at most: export the label map on the image's grid, orientation included"
        )


def _farthest(tensor: Tensor, image: Tensor) -> tuple[float, float]:
    """How far in mm any voxel lies from where the image has it, and how far it may: half of the shortest edge.

    0 and 0 when either has no affine.
    """
    affines = [getattr(one, "affine", None) for one in (tensor, image)]
    if affines[0] is None or affines[1] is None or affines[0].shape != affines[1].shape:
        return 0.0, 0.0
    of_tensor, of_image = (torch.as_tensor(affine, dtype=torch.float64) for affine in affines)
    n_axes = of_image.shape[0] - 1
    sizes = [*image.shape[1:], *[1] * n_axes][:n_axes]
    corners = torch.tensor([[*corner, 1] for corner in product(*[(0, n - 1) for n in sizes])], dtype=torch.float64)
    distance = float(((of_tensor - of_image) @ corners.T).norm(dim=0).max())  # linear: no voxel is moved further
    return distance, 0.5 * float(of_image[:-1, :-1].norm(dim=0).min())


class LoadScand(MapTransform):
    """Read scans as MONAI's ``LoadImaged`` does, channel first; an error names the file.

    Args:
        keys: paths of files; each is replaced by the image ``(C, *spatial)``.

    Raises:
        ScanError: see :func:`load_scan`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = load_scan(result[key])
        return result


class CheckScand(MapTransform):
    """Refuse a scan that would poison training. Stands right after loading, before anything changes the voxels.

    Label maps are rounded to whole numbers; see :func:`check_label`.

    Args:
        keys: the image, ``(C, *spatial)``.
        n_channels: expected channels.
        label_key: the label map, when there is one.
        label_values: allowed values of the label map, background included.

    Raises:
        ScanError: see :func:`check_image` and :func:`check_label`.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        n_channels: int,
        label_key: str | None = None,
        label_values: Collection[int] = (),
    ) -> None:
        super().__init__(keys)
        self.n_channels = n_channels
        self.label_key = label_key
        self.label_values = set(label_values)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            check_image(image, _file_of(image, str(key)), self.n_channels)
            if self.label_key is not None:
                label = result[self.label_key]
                check_label(label, image, _file_of(label, self.label_key), self.label_values)
                result[self.label_key] = label.round()
        return result


def _file_of(tensor: Tensor, default: str) -> str:
    return str(getattr(tensor, "meta", {}).get("filename_or_obj", default))
