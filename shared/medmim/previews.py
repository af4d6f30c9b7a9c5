"""Pictures of validation cases, while a network trains: segmentations, and pairs of views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import Orientation
from torch import nn
from torch.nn.functional import normalize
from torch.utils.tensorboard import SummaryWriter

from medmim.datasets import Preset
from medmim.figures import figure_pixels, reconstruction_figure, save_figure, segmentation_figure
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


class ViewsPreview:
    """Draw the two views of the first two validation scans, with the cosines of their embeddings.

    Args:
        network: pretext network, called as ``network(view_1, view_2)``.
        dataset: its items hold the views ``image`` and ``image_2``, ``(C, *spatial)``; the first channel is shown.
        output_dir: folder for ``previews/epoch_NNNN.png`` and the TensorBoard events.
        interval: epochs between two previews; the last epoch is always drawn.
        device: of the network.
        spacing: mm of a voxel along each axis; those of a view are smaller, as it is an enlarged part.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: Any,
        output_dir: str,
        interval: int,
        device: str | torch.device,
        spacing: Sequence[float] | None = None,
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.device = device
        self.spacing = spacing or (1.0, 1.0, 1.0)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        figure = self.draw([self.dataset[index] for index in range(2)], f"epoch {epoch}")
        save_figure(figure, self.output_dir / "previews" / f"epoch_{epoch:04d}.png")
        with SummaryWriter(str(self.output_dir / "tensorboard")) as writer:
            writer.add_image("views", figure_pixels(figure), epoch, dataformats="HWC")

    def draw(self, items: Sequence[Mapping[str, Any]], title: str) -> Figure:
        """Figure of two items of the dataset."""
        views = [
            torch.stack([torch.as_tensor(item[key]).as_subclass(torch.Tensor) for item in items]).to(self.device)
            for key in ("image", "image_2")
        ]
        was_training = self.network.training
        self.network.eval()
        with torch.no_grad():
            (a1, a2), (b1, b2) = normalize(self.network(*views).float(), dim=-1)
        self.network.train(was_training)
        columns = {}
        for index, name in enumerate("ab"):
            std, mean = torch.std_mean(views[0][index, 0].float())  # of the first view, so that the second's differ
            for number, view in enumerate(views, start=1):
                columns[f"scan {name}, view {number}"] = ((view[index, 0].float() - mean) / std).cpu().numpy()
        cosines = (
            f"cosine of embeddings (not standardised): views of a {float(a1 @ a2):.2f}, of b {float(b1 @ b2):.2f}; "
            f"a and b {float(a1 @ b1):.2f}, {float(a2 @ b2):.2f}"
        )
        return reconstruction_figure(columns, f"{title}; {cosines}", self.spacing)
