"""Radiographs: JPEG, PNG and DICOM files as one channel of grey values, whatever their bit depth."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import MapTransform
from PIL import Image, ImageChops, ImageOps
from torch import nn

from medmim.transforms.scans import ScanError

PICTURES = (".png", ".jpg", ".jpeg")
DICOM = (".dcm", ".dicom")
RADIOGRAPH_SUFFIXES = PICTURES + DICOM
GREY_DIFFERENCE = 8  # of 255, between the colours of a grey image after JPEG's rounding


def load_radiograph(path: str | Path) -> MetaTensor:
    """Read a radiograph; grey values are given as a share of what the file's bit depth can hold, bright is dense.

    Rows come first, as in any picture. A 16-bit file whose values use 12 bits is dark; a per-image normalisation
    mends that. Colour files are taken when their channels agree, transparency is left out. Of DICOM the modality
    and VOI transforms (window) are applied, and MONOCHROME1 is inverted.

    Returns:
        ``(1, rows, columns)``, float32 in [0, 1]; ``meta["filename_or_obj"]`` names the file.

    Raises:
        ScanError: one line that names the file, what was found, and what to do.
    """
    path = Path(path)
    try:
        grey = _read_dicom(path) if path.suffix.lower() in DICOM else _read_picture(path)
    except ScanError:
        raise
    except Exception as error:  # readers raise anything from SyntaxError to struct.error
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        advice = "replace or remove the file"
        if "missing dependencies" in reason:  # DICOM of a compression that pydicom alone cannot undo
            advice = "install pylibjpeg or gdcm, decompress the file, or remove it"
        raise ScanError(f"{path}: not readable ({reason}): {advice}") from error
    if grey.min() == grey.max():
        raise ScanError(f"{path}: constant image, each pixel is {float(grey.min()):g} of full scale: remove the file")
    image = MetaTensor(np.ascontiguousarray(grey[None], dtype=np.float32))
    image.meta |= {"filename_or_obj": str(path), "spatial_shape": np.array(grey.shape)}  # as MONAI's readers say it
    return image


def radiograph_size(path: str | Path) -> tuple[int, int]:
    """Rows and columns that the file's header tells; a picture to be turned (EXIF) has them the other way round."""
    if Path(path).suffix.lower() in DICOM:
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True)
        return int(header.Rows), int(header.Columns)
    with Image.open(path) as file:
        return file.height, file.width


def _read_picture(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        raise ScanError(f"{path}: empty file (0 bytes): replace or remove it")
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)  # upright, as every viewer shows it
        mode = picture.mode
        if mode != "P" and ";16" in str(getattr(file, "tile", "")) and not mode.startswith("I"):
            raise ScanError(f"{path}: 16-bit {mode}, of which 8 bits would be read: save it as grey 16-bit PNG")
        if mode in ("RGB", "RGBA", "P"):
            picture = _check_grey(picture.convert("RGB"), path, "palette with colours" if mode == "P" else "colours")
        elif mode in ("1", "LA", "La"):
            picture = picture.convert("L")
        pixels = np.asarray(picture)
    if picture.mode == "L":
        return pixels / np.float32(255)
    if not mode.startswith("I"):
        raise ScanError(f"{path}: pixels of kind {mode}, expected grey values: save it as grey 8- or 16-bit PNG")
    if pixels.min() < 0 or pixels.max() > 65535:  # 16 bits, which some versions of the library widen to 32
        raise ScanError(
            f"{path}: grey values from {pixels.min()} to {pixels.max()}, expected 0 to 65535: save it as 16-bit PNG"
        )
    return pixels / np.float32(65535)


def _check_grey(picture: Image.Image, path: Path, kind: str) -> Image.Image:
    """A picture of three channels as one, when they agree but for JPEG's rounding."""
    red, green, blue = picture.split()
    spread = max(int(np.asarray(ImageChops.difference(red, other)).max()) for other in (green, blue))
    if spread > GREY_DIFFERENCE:
        raise ScanError(
            f"{path}: {kind} (channels differ by up to {spread} of 255), expected a grey radiograph: save it as grey "
            "8- or 16-bit PNG, or remove it"
        )
    return picture.convert("L")


def _read_dicom(path: Path) -> np.ndarray:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    dataset = pydicom.dcmread(path)
    found = dataset.get("PhotometricInterpretation", "no pixels")
    if found not in ("MONOCHROME1", "MONOCHROME2") or int(dataset.get("NumberOfFrames") or 1) > 1:
        frames = int(dataset.get("NumberOfFrames") or 1)
        raise ScanError(
            f"{path}: DICOM with {found}, {frames} frames: expected one frame of MONOCHROME1 or MONOCHROME2: remove it"
        )
    grey = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset, index=0)
    low, high = _dicom_range(dataset)
    grey = np.clip((np.asarray(grey, dtype=np.float32) - low) / (high - low), 0, 1)
    return 1 - grey if found == "MONOCHROME1" else grey


def _dicom_range(dataset: Any) -> tuple[float, float]:
    """Darkest and brightest value that a DICOM image can show: a window maps to what the stored bits can hold."""
    for table in ("VOILUTSequence", "ModalityLUTSequence"):
        if table in dataset:
            return 0.0, 2.0 ** int(dataset[table][0].LUTDescriptor[2]) - 1
    bits, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0))
    stored = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    low, high = sorted(value * slope + intercept for value in stored)
    return low, high


class ResizeRadiographd(MapTransform):
    """Resize images bilinearly, smoothed where they shrink; MONAI's ``Resized`` does that much slower.

    Args:
        keys: images ``(C, rows, columns)``.
        spatial_size: rows and columns; or one number, to which the longer side is brought.
    """

    def __init__(self, keys: Hashable | Sequence[Hashable], spatial_size: Sequence[int] | float) -> None:
        super().__init__(keys)
        self.spatial_size = spatial_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image: MetaTensor = result[key]
            size = self.spatial_size
            if isinstance(size, int | float):
                rows, columns = image.shape[1:]
                scale = size / max(rows, columns)
                size = (max(round(rows * scale), 1), max(round(columns * scale), 1))
            resized = nn.functional.interpolate(
                image.as_tensor()[None], size=tuple(size), mode="bilinear", antialias=True, align_corners=False
            )
            result[key] = MetaTensor(resized[0], meta=image.meta)
        return result


class LoadRadiographd(MapTransform):
    """Read radiographs; see :func:`load_radiograph`.

    Args:
        keys: paths of files; each is replaced by the image ``(1, rows, columns)``.

    Raises:
        ScanError: see :func:`load_radiograph`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = load_radiograph(result[key])
        return result
