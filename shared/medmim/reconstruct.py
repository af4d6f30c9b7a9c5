"""Masked reconstruction of whole scans, window by window."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor, nn

from medmim.figures import reconstruction_figure, save_figure
from medmim.losses import MaskedReconstructionLoss
from medmim.networks import MaskedAutoencoder
from medmim.networks.patches import hidden_voxels
from medmim.transforms import RandPatchMaskd


class WindowReconstructor(nn.Module):
    """Hide patches of a window and reconstruct them; for use with ``SlidingWindowInferer``.

    Args:
        network: trained pretext network.
        loss: knows how a prediction becomes an image.
        mask_ratio, mask_unit: see :class:`medmim.transforms.RandPatchMaskd`.
        seed: of the masks.
    """

    def __init__(
        self,
        network: MaskedAutoencoder,
        loss: MaskedReconstructionLoss,
        mask_ratio: float,
        mask_unit: Sequence[int] | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.draw_mask = RandPatchMaskd("image", network.patch_size, mask_ratio, mask_unit)
        self.draw_mask.set_random_state(seed)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *img_size)`` to ``(B, 3C, *img_size)``.

        The parts are the image, the image with NaN at hidden voxels, and the image with hidden voxels reconstructed.
        """
        mask = torch.stack([self.draw_mask({"image": window})["mask"] for window in image]).to(image.device)
        hidden = hidden_voxels(mask, self.loss.patch_size)
        prediction = self.loss.to_image(self.network(image, mask), image)
        return torch.cat([image, image.masked_fill(hidden, float("nan")), torch.where(hidden, prediction, image)], 1)


class SplitReconstructiond(MapTransform):
    """Take the output of :class:`WindowReconstructor` apart, and draw it.

    Writes the keys ``masked`` (0 at hidden voxels) and ``reconstruction``, and a picture of the first channel,
    without what was padded around the scan.

    Args:
        keys: where the output stands.
        output_dir: folder of the pictures, ``<name of the scan>_reconstruction.png``.
        data_root_dir: folder of the scans; pictures stand in the same sub-folders.
        title: of the picture.
    """

    def __init__(
        self, keys: Hashable | Sequence[Hashable], output_dir: str, data_root_dir: str, title: str = ""
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.data_root_dir = Path(data_root_dir)
        self.title = title

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        output: MetaTensor = result[self.first_key(result)]
        image, masked, reconstruction = output.chunk(3)
        columns = {"original": image, "masked": masked, "reconstruction": reconstruction}
        spacing = output.pixdim.tolist()
        inside = without_padding(output)
        figure = reconstruction_figure(
            {name: volume[0].cpu().numpy()[inside] for name, volume in columns.items()}, self.title, spacing
        )
        path = Path(str(output.meta["filename_or_obj"]))
        folder = self.output_dir / os.path.relpath(path.parent, self.data_root_dir)
        name = path.name.removesuffix(".gz")
        name = name.removesuffix(Path(name).suffix)
        save_figure(figure, folder / f"{name}_reconstruction.png")
        result["masked"] = torch.nan_to_num(masked, nan=0.0)
        result["reconstruction"] = reconstruction
        return result


def without_padding(image: MetaTensor) -> tuple[slice, ...]:
    """Where along each axis an image ``(C, *spatial)`` is not padding of the last transforms that were applied."""
    start, stop = [0] * (image.ndim - 1), list(image.shape[1:])
    for operation in reversed(image.applied_operations):
        padded = operation.get("extra_info", {}).get("padded")
        if padded is None:  # what was done before is not in the way
            break
        for axis, (before, after) in enumerate(padded[1:]):
            start[axis] += int(before)
            stop[axis] -= int(after)
    return tuple(map(slice, start, stop))
