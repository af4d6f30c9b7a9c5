"""Pictures of validation cases, while a network trains: segmentations, reconstructions, pairs of views."""

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
from medmim.losses import MaskedReconstructionLoss
from medmim.networks.patches import hidden_voxels
from medmim.transforms.scans import load_scan


class ValidationPreview:
    """Draw the first batch of a validation.

    Drawn at the first validation at or after each multiple of ``interval``, and at the last one. A subclass gives the
    figure, and ``tag``, its name in TensorBoard.

    Args:
        output_dir: folder for ``previews/epoch_NNNN.png`` and the TensorBoard events.
        interval: epochs between two previews.
        val_interval: epochs between two validations.
        epochs: of the whole training; the last one is always drawn.
    """

    tag = ""

    def __init__(self, output_dir: str, interval: int, val_interval: int, epochs: int) -> None:
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.val_interval = val_interval
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def is_due(self, epoch: int) -> bool:
        """Whether the validation after this epoch is drawn; the same when a training was resumed."""
        before = max(epoch - self.val_interval, 0)
        return epoch == self.epochs or epoch // self.interval > before // self.interval

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        if state.iteration == 1 and self.is_due(state.epoch):
            save_preview(self.draw(state), self.output_dir, state.epoch, self.tag)

    def draw(self, state: Any) -> Figure:
        """Figure of the evaluator's first batch."""
        raise NotImplementedError


class SegmentationPreview(ValidationPreview):
    """Draw the first validation case: scan, reference and prediction, in three planes.

    With several processes it is the first case of rank 0. The evaluator's output holds class maps on the scan's own
    grid, ``pred`` and ``label``.

    Args:
        preset: knows the names of the classes, and the window in which the scan is shown.
        output_dir, interval, val_interval, epochs: see :class:`ValidationPreview`.
    """

    tag = "segmentation"

    def __init__(self, preset: Preset, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.preset = preset

    def draw(self, state: Any) -> Figure:
        """Figure of the first case."""
        return draw_segmentation(state.output[0], self.preset, f"epoch {state.epoch}")


def save_preview(figure: Figure, output_dir: Path, epoch: int, tag: str) -> None:
    """Write ``previews/epoch_NNNN.png``, and the same for TensorBoard."""
    save_figure(figure, output_dir / "previews" / f"epoch_{epoch:04d}.png")
    with SummaryWriter(str(output_dir / "tensorboard")) as writer:
        writer.add_image(tag, figure_pixels(figure), epoch, dataformats="HWC")


class PretextPreview:
    """Draw what a pretext network makes of validation cases, every ``interval`` epochs and at the end.

    A subclass gives the figure, and ``tag``, its name in TensorBoard.

    Args:
        network: pretext network.
        dataset: whose first items are drawn.
        output_dir: folder for ``previews/epoch_NNNN.png`` and the TensorBoard events.
        interval: epochs between two previews; the last epoch is always drawn.
        device: of the network.
    """

    tag = ""

    def __init__(
        self, network: nn.Module, dataset: Any, output_dir: str, interval: int, device: str | torch.device
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.device = device

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.interval == 0 or epoch == engine.state.max_epochs:
            save_preview(self.draw_first(f"epoch {epoch}"), self.output_dir, epoch, self.tag)

    def draw_first(self, title: str) -> Figure:
        """Figure of the first items of the dataset."""
        raise NotImplementedError


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


class ReconstructionPreview(PretextPreview):
    """Draw what the network makes of one fixed validation case: original, masked, reconstruction.

    The network is called as ``network(image, mask)``.

    Args:
        loss: knows the target, and so how a prediction becomes an image.
        network, dataset, output_dir, interval, device: see :class:`PretextPreview`.
    """

    tag = "reconstruction"

    def __init__(self, loss: MaskedReconstructionLoss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss

    def draw_first(self, title: str) -> Figure:
        """Figure of the first item."""
        item = self.dataset[0]
        return self.draw(item[0] if isinstance(item, list) else item, title)

    def draw(self, item: Mapping[str, Any], title: str) -> Any:
        """Figure of an item of the dataset."""
        image = torch.as_tensor(item["image"]).as_subclass(torch.Tensor).unsqueeze(0).to(self.device)
        mask = item["mask"].unsqueeze(0).to(self.device)
        return draw_reconstruction(self.network, self.loss, image, mask, title, item["image"].pixdim.tolist())


def draw_reconstruction(
    network: nn.Module,
    loss: MaskedReconstructionLoss,
    image: torch.Tensor,
    mask: torch.Tensor,
    title: str,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Any:
    """Figure of one image ``(1, C, *spatial)`` (first channel), masked and reconstructed; ``spacing`` in mm."""
    was_training = network.training
    network.eval()
    with torch.no_grad():
        prediction = loss.to_image(network(image, mask), image)
    network.train(was_training)
    hidden = hidden_voxels(mask, loss.patch_size)
    masked = image.masked_fill(hidden, float("nan"))
    reconstruction = torch.where(hidden, prediction, image)  # visible patches as they are
    columns = {"original": image, "masked": masked, "reconstruction": reconstruction}
    return reconstruction_figure(
        {name: volume[0, 0].float().cpu().numpy() for name, volume in columns.items()},
        f"{title}; target: {loss.target_name}",
        spacing,
    )


class ViewsPreview(PretextPreview):
    """Draw the two views of the first two validation scans, with the cosines of their embeddings.

    The network is called as ``network(view_1, view_2)``; items of the dataset hold the views ``image`` and
    ``image_2``, ``(C, *spatial)``, of which the first channel is shown.

    Args:
        spacing: mm of a voxel along each axis; those of a view are smaller, as it is an enlarged part.
        network, dataset, output_dir, interval, device: see :class:`PretextPreview`.
    """

    tag = "views"

    def __init__(self, spacing: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spacing = spacing or (1.0, 1.0, 1.0)

    def draw_first(self, title: str) -> Figure:
        """Figure of two items."""
        return self.draw([self.dataset[index] for index in range(2)], title)

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
