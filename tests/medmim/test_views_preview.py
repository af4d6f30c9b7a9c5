"""Pictures of pairs of views."""

from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image

from medmim.networks import SimCLR
from medmim.previews import ViewsPreview
from tests.common import tensorboard_names

SIZE = (16, 24, 8)


@pytest.fixture
def preview(tiny_vit: Callable, tmp_path: Path) -> ViewsPreview:
    items = [{key: MetaTensor(torch.rand(1, *SIZE)) for key in ("image", "image_2")} for _ in range(3)]
    network = SimCLR(tiny_vit(), SIZE)
    return ViewsPreview(network=network, dataset=items, output_dir=str(tmp_path), interval=3, device="cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_drawn_at_intervals_and_at_the_end(
    preview: ViewsPreview, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    trainer = Engine(lambda engine, batch: None)
    preview.attach(trainer)
    preview.network.train()
    trainer.run([0], max_epochs=7)
    assert preview.network.training
    names = [path.name for path in sorted((tmp_path / "previews").glob("*"))]
    assert names == ([] if rank else ["epoch_0003.png", "epoch_0006.png", "epoch_0007.png"])
    assert tensorboard_names(tmp_path / "tensorboard", "images") == (set() if rank else {"views"})
    if not rank:
        with Image.open(tmp_path / "previews" / names[0]) as picture:
            assert picture.width > 900


def test_it_shows_the_views_and_their_cosines(preview: ViewsPreview) -> None:
    items = preview.dataset[:2]
    figure = preview.draw(items, "epoch 3")
    first = np.asarray(items[0]["image"][0])
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = np.rot90(first[SIZE[0] // 2])
    np.testing.assert_allclose(shown, (expected - first.mean()) / first.std(ddof=1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        views = [torch.stack([item[key].as_tensor() for item in items]) for key in ("image", "image_2")]
        a, b = preview.network.eval()(*views)
    cosine = torch.nn.functional.cosine_similarity
    found = [cosine(*a, dim=0), cosine(*b, dim=0), cosine(a[0], b[0], dim=0), cosine(a[1], b[1], dim=0)]
    numbers = [f"{float(value):.2f}" for value in found]
    title = f"views of a {numbers[0]}, of b {numbers[1]}; a and b {numbers[2]}, {numbers[3]}"
    assert figure.get_suptitle() == f"epoch 3; cosine of embeddings (not standardised): {title}"
