"""Pictures and files of what a network of nested sub-volumes makes of a scan, level by level."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import SaveImage
from torch import Tensor

from medmim.engines import as_plain_tensor
from medmim.figures import NestedRow, nested_figure, save_figure
from medmim.mim_step import prepare_nested_batch
from medmim.networks.mask_in_mask import MaskInMask
from medmim.networks.nested_levels import Level
from medmim.networks.patches import hidden_voxels
from medmim.previews import PretextPreview

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LevelReconstruction:
    """One sub-volume of a level, and what the network makes of it.

    Attributes:
        level: its geometry.
        corner: voxels of the scan's crop before its first one, along each axis.
        volumes: ``original``, ``masked`` (NaN at hidden voxels) and ``reconstruction`` (visible voxels as they are),
            each ``(C, *img_size)``.
    """

    level: Level
    corner: tuple[int, ...]
    volumes: dict[str, Tensor]

    @property
    def scale(self) -> list[float]:
        """Voxels of the scan to one of these volumes, along each axis."""
        return [crop / size for crop, size in zip(self.level.crop_size, self.level.img_size, strict=True)]


def reconstruct_levels(network: MaskInMask, batch: Mapping[str, Tensor]) -> list[LevelReconstruction]:
    """Follow the first image of a batch down the levels, one sub-volume of each, inside the one before.

    Of the sub-volumes of a parent the one with the most contrast is taken.

    Args:
        network: trained; its mode is left as it is.
        batch: as the network takes it.

    Returns:
        one entry for each level, the coarsest first, on the CPU.
    """
    was_training = network.training
    network.eval()
    chosen, corner = 0, (0,) * len(network.patch_size)
    found = []
    with torch.no_grad():
        for number, level in enumerate(network.levels, 1):
            images, masks = network.level_images(batch, number)
            if number > 1:
                first = chosen * level.samples
                chosen = first + int(images[first : first + level.samples].flatten(1).std(dim=1).argmax())
                region = int(batch[f"region_{number}"].flatten()[chosen])
                index = np.unravel_index(region, network.levels[number - 2].regions)
                corner = tuple(c + int(i) * n for c, i, n in zip(corner, index, level.crop_size, strict=True))
            image, mask = images[chosen : chosen + 1], masks[chosen : chosen + 1]
            prediction = network.reconstruction_loss.to_image(network.predict(image, mask), image)
            hidden = hidden_voxels(mask.to(image.device), network.patch_size)
            volumes = {
                "original": image,
                "masked": image.masked_fill(hidden, float("nan")),
                "reconstruction": torch.where(hidden, prediction, image.float()),
            }
            volumes = {name: volume[0].float().cpu() for name, volume in volumes.items()}
            found.append(LevelReconstruction(level, corner, volumes))
    network.train(was_training)
    return found


def levels_figure(levels: Sequence[LevelReconstruction], title: str, spacing: Sequence[float]) -> Figure:
    """Figure with a row for each level (first channel); a frame shows what the next level looks into.

    Args:
        levels: from :func:`reconstruct_levels`.
        title: of the figure.
        spacing: mm of a voxel of the scan along each axis.
    """
    rows = []
    for number, (this, below) in enumerate(zip(levels, [*levels[1:], None], strict=True), 1):
        corner = None
        if below is not None:
            corner = [round((b - c) / s) for b, c, s in zip(below.corner, this.corner, this.scale, strict=True)]
        rows.append(
            NestedRow(
                label=f"level {number}: {' x '.join(map(str, this.level.crop_size))}",
                columns={name: volume[0].numpy() for name, volume in this.volumes.items()},
                spacing=[mm * s for mm, s in zip(spacing, this.scale, strict=True)],
                corner=corner,
                size=None if below is None else this.level.mask_unit,
            )
        )
    return nested_figure(rows, title)


def draw_item(
    network: MaskInMask, item: Mapping[str, Any], device: str | torch.device, title: str
) -> tuple[Figure, list[LevelReconstruction]]:
    """Figure of an item of a dataset that :class:`medmim.transforms.RandNestedMaskd` has masked, and what it shows."""
    single = {
        key: torch.as_tensor(as_plain_tensor(value)).unsqueeze(0)
        for key, value in item.items()
        if isinstance(value, Tensor)
    }
    levels = reconstruct_levels(network, prepare_nested_batch(single, device)[0])
    title = f"{title}; target: {network.reconstruction_loss.target_name}"
    return levels_figure(levels, title, item["image"].pixdim.tolist()), levels


class NestedPreview(PretextPreview):
    """Draw what the network makes of one fixed validation case at each level, in three planes.

    Args:
        network, dataset, output_dir, interval, device: see :class:`medmim.previews.PretextPreview`.
    """

    tag = "reconstruction"
    network: MaskInMask

    def draw_first(self, title: str) -> Figure:
        """Figure of the first item of the dataset."""
        item = self.dataset[0]
        return draw_item(self.network, item[0] if isinstance(item, list) else item, self.device, title)[0]


def write_reconstructions(
    network: MaskInMask,
    dataset: Any,
    scans: int,
    output_dir: str | Path,
    data_root_dir: str | Path,
    device: str | torch.device,
) -> None:
    """Write a picture of all levels, and masked and reconstructed volumes of each level as NIfTI.

    The volumes lie where they belong in the scan. Hidden voxels of the masked ones are 0.

    Args:
        network: trained.
        dataset: scans, cropped and masked.
        scans: how many of them, the first ones.
        output_dir: gets ``<scan>_reconstruction.png`` and ``<scan>_level_<n>_{masked,reconstruction}.nii.gz``, in the
            sub-folders of the scans.
        data_root_dir: folder of the scans.
        device: of the network.
    """
    count = min(scans, len(dataset))
    for i in range(count):
        item = dataset[i]
        image: MetaTensor = item["image"]
        path = Path(str(image.meta["filename_or_obj"]))
        figure, levels = draw_item(network, item, device, path.name)
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        folder = Path(output_dir) / os.path.relpath(path.parent, data_root_dir)
        save_figure(figure, folder / f"{name}_reconstruction.png")
        for number, level in enumerate(levels, 1):
            for what in ("masked", "reconstruction"):
                save = SaveImage(
                    output_dir=output_dir,
                    output_postfix=f"level_{number}_{what}",
                    data_root_dir=str(data_root_dir),
                    separate_folder=False,
                    resample=False,
                    print_log=False,
                )
                affine = _affine(image.affine, level)
                volume = torch.nan_to_num(level.volumes[what], nan=0.0)
                save(MetaTensor(volume, affine=affine, meta={**image.meta, "affine": affine}))
    logger.info(f"done, {count} scans are in {output_dir}")


def _affine(affine: Tensor, level: LevelReconstruction) -> Tensor:
    """Affine of a level's volumes from that of the scan's crop."""
    to_crop = torch.eye(len(affine), dtype=torch.float64)
    for axis, (corner, scale) in enumerate(zip(level.corner, level.scale, strict=True)):
        to_crop[axis, axis] = scale
        to_crop[axis, -1] = corner + (scale - 1) / 2  # the centre of the first voxel
    return affine.to(torch.float64) @ to_crop
