"""Pictures of what a segmentation network makes of a validation case, while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import Orientation
from torch.utils.tensorboard import SummaryWriter

from medmim.datasets import Preset
from medmim.figures import figure_pixels, save_figure, segmentation_figure
from medmim.transforms.scans import load_scan


class SegmentationPreview:
    """Draw the first validation case: scan, reference and prediction, in three planes.

    Drawn at the first validation at or after each multiple of ``interval``, and at the last one. With several
    processes it is the first case of rank 0.

    Args:
        preset: knows the names of the classes, and the window in which the scan is shown.
        output_dir: folder for ``previews/epoch_NNNN.png`` and the TensorBoard events.
        interval: epochs between two previews.
        val_interval: epochs between two validations.
        epochs: of the whole training; the last one is always drawn.
    """

    def __init__(self, preset: Preset, output_dir: str, interval: int, val_interval: int, epochs: int) -> None:
        self.preset = preset
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.val_interval = val_interval
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator whose output holds class maps on the scan's own grid, ``pred`` and ``label``."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def is_due(self, epoch: int) -> bool:
        """Whether the validation after this epoch is drawn; the same when a training was resumed."""
        before = max(epoch - self.val_interval, 0)
        return epoch == self.epochs or epoch // self.interval > before // self.interval

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        if state.iteration != 1 or not self.is_due(state.epoch):
            return
        figure = draw_segmentation(state.output[0], self.preset, f"epoch {state.epoch}")
        save_figure(figure, self.output_dir / "previews" / f"epoch_{state.epoch:04d}.png")
        with SummaryWriter(str(self.output_dir / "tensorboard")) as writer:
            writer.add_image("segmentation", figure_pixels(figure), state.epoch, dataformats="HWC")


def draw_segmentation(case: Mapping[str, Any], preset: Preset, title: str) -> Figure:
    """Figure of one case, in RAS orientation on the grid of its file.

    Args:
        case: class maps ``pred`` and ``label``, ``(1, *spatial)``; the metadata of ``pred`` name the scan's file, of
            which the first channel is shown.
        preset: of the data.
        title: of the figure, before the name of the scan.
    """
    path = Path(str(case["pred"].meta["filename_or_obj"]))
    file: Any = load_scan(path)
    to_ras = Orientation(axcodes="RAS")
    scan: Any = to_ras(file[:1])
    image = scan[0].numpy()
    maps = {}
    for name, key in (("reference", "label"), ("prediction", "pred")):
        classes = torch.as_tensor(case[key]).as_subclass(torch.Tensor).cpu()
        oriented: Any = to_ras(MetaTensor(classes, affine=file.affine))
        maps[name] = oriented[0].numpy()
    if preset.window is not None:
        image = np.clip(image, *preset.window)
    return segmentation_figure(image, maps, preset.labels, f"{title}: {path.name}", scan.pixdim.tolist())
