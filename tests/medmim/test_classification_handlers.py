"""Figures of a classification, its files, and the handlers that write them."""

import csv
from pathlib import Path
from types import SimpleNamespace

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from medmim.classes import Classification
from medmim.classification_figures import confusion_figure, examples_figure, precision_recall_figure, roc_figure
from medmim.classification_handlers import ClassificationPreview, SaveClassificationScores, SavePredictions
from medmim.classification_scores import COLUMNS, ClassificationScores, area
from medmim.networks import ViTClassifier
from tests.common import rows as read_rows
from tests.common import tensorboard_names

NAN = float("nan")
CLASSIFICATIONS = {
    "multilabel": Classification("multilabel", ("effusion", "nodule")),
    "multiclass": Classification("multiclass", ("normal", "bacterial", "viral")),
    "binary": Classification("binary", ("normal", "pneumonia")),
}
tasks = pytest.mark.parametrize("task", CLASSIFICATIONS)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_examples(n):
    images = [np.full((4, 6), i) for i in range(n)]
    figure = examples_figure(images, [f"image {i}" for i in range(n)], "a title")
    assert [axis.get_title() for axis in figure.axes] == [f"image {i}" for i in range(n)]
    assert [int(axis.images[0].get_array()[0, 0]) for axis in figure.axes] == list(range(n))


def filled(task: str, n: int = 24) -> ClassificationScores:
    """Scores of some images; a multilabel task has a class without any."""
    random = np.random.default_rng(0)
    scores = ClassificationScores(CLASSIFICATIONS[task])
    k = len(CLASSIFICATIONS[task].outputs)
    labels = np.eye(k)[np.arange(n) % k] if task == "multiclass" else random.random((n, k)) < 0.5
    if task == "multilabel":
        labels[:, 1] = 0
    names = [f"{i:02d}.png" for i in range(n)]
    scores.update((torch.as_tensor(random.normal(size=(n, k))), torch.as_tensor(labels).float(), names, names))
    return scores


def draw_few(scores: ClassificationScores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand draws take seconds."""
    draw = scores._draws
    monkeypatch.setattr(scores, "_draws", lambda n, seed: draw(n // 200, seed))


@tasks
def test_figures_of_an_evaluation(task):
    scores = filled(task)
    table = scores.table(5)
    scored = [row for row in table[:-1] if "auc" in row]
    for make_figure, short, key in ((roc_figure, "AUC", "auc"), (precision_recall_figure, "AP", "average_precision")):
        figure = make_figure(scores, table, "24 images")
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts == [
            f"{row['class']}: {short} {row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]"
            for row in scored
        ]
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for artist in (figure.legends[0], figure.axes[0].yaxis.label, figure.axes[0].xaxis.label):  # nothing is cut off
            box = artist.get_window_extent(canvas.get_renderer())
            assert min(box.x0, box.y0) >= 0, artist
            assert box.x1 <= figure.bbox.x1, artist
            assert box.y1 <= figure.bbox.y1, artist
    x, y = roc_figure(scores, table, "").axes[0].lines[0].get_data()
    assert np.trapezoid(y, x) == pytest.approx(scored[0]["auc"])
    figure = confusion_figure(scores, "24 images")
    shown = [int(text.get_text().split("\n")[0]) for axis in figure.axes for text in axis.texts]
    assert shown == scores.confusion().flatten().tolist()
    assert figure.axes[0].get_xlabel() == "predicted"


@tasks
@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_writes_its_files_on_the_first_process(task, rank, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    scores = filled(task)
    draw_few(scores, monkeypatch)
    engine = Engine(lambda engine, batch: None)
    SaveClassificationScores(scores, str(tmp_path / "out"), "24 images").attach(engine)
    with caplog.at_level("INFO", "medmim"):
        engine.run([0])
    names = {"scores.csv", "predictions.csv", "roc.png", "precision_recall.png", "confusion.png"}
    assert {path.name for path in (tmp_path / "out").glob("*")} == (set() if rank else names)
    if not rank:
        for path in (tmp_path / "out").glob("*.png"):
            with Image.open(path) as picture:
                assert picture.format == "PNG"
        assert len(read_rows(tmp_path / "out" / "predictions.csv")) == 24
        assert ("nodule: 24 images, 0 with it: no AUC" in caplog.text) is (task == "multilabel")


@tasks
def test_preview_shows_labels_and_the_likeliest(task, tmp_path: Path):
    outputs = CLASSIFICATIONS[task].outputs
    preview = ClassificationPreview(
        CLASSIFICATIONS[task], output_dir=str(tmp_path), interval=2, val_interval=1, epochs=3
    )
    label = torch.zeros(10, len(outputs))
    label[0, 0] = 1
    logits = torch.zeros(10, len(outputs))
    logits[:, -1] = 1.0
    image = torch.rand(10, 1, 8, 12)
    engine = Engine(lambda engine, batch: {"pred": logits, "label": label, "image": image})
    preview.attach(engine)
    for epoch in (1, 2, 3) if task == "binary" else (3,):  # as MONAI's evaluators are run
        engine.state.max_epochs, engine.state.epoch, engine.state.iteration = epoch, epoch - 1, 0
        engine.run([0, 1], epoch_length=2)
    names = ["epoch_0002.png", "epoch_0003.png"] if task == "binary" else ["epoch_0003.png"]
    assert [path.name for path in sorted((tmp_path / "previews").iterdir())] == names
    assert tensorboard_names(tmp_path / "tensorboard", "images") == {"predictions"}
    figure = preview.draw(SimpleNamespace(output=engine.state.output, epoch=3))
    assert len(figure.axes) == 8
    truths = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert truths == [outputs[0], *["none"] * 7]
    p = {"multilabel": 0.73, "multiclass": 0.58, "binary": 0.73}[task]
    assert figure.axes[0].get_title().split("\n")[1].startswith(f"{outputs[-1]} {p:.2f}")
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), image[2, 0].numpy())


def test_preview_of_volumes_shows_the_middle_axial_slice(tmp_path: Path):
    """Front up, as axial slices are shown: the second axis runs to the front."""
    preview = ClassificationPreview(
        CLASSIFICATIONS["binary"], output_dir=str(tmp_path), interval=1, val_interval=1, epochs=1
    )
    image = torch.rand(2, 2, 6, 4, 8)
    output = {"pred": torch.tensor([[3.0], [-3.0]]), "label": torch.tensor([[1.0], [0.0]]), "image": image}
    figure = preview.draw(SimpleNamespace(output=output, epoch=1))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["pneumonia\npneumonia 0.95", "none\npneumonia 0.05"]
    for axis, volume in zip(figure.axes, image[:, 0].numpy(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), volume[:, :, 4].T[::-1])


LOGITS = {
    "multilabel": [[2.0, 0.1], [0.0, -2.0], [-1.0, 3.0]],
    "multiclass": [[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.1]],
    "binary": [[2.0], [0.0], [-1.0]],
}
PREDICTED = {  # with a threshold of 0.6 for each class
    "multilabel": ["effusion", "No Finding", "nodule"],
    "multiclass": ["bacterial", "normal", "viral"],
    "binary": ["pneumonia", "normal", "normal"],
}


@pytest.mark.parametrize(
    ("task", "overlay"),
    [("multilabel", "attention"), ("binary", "occlusion"), *[(task, None) for task in CLASSIFICATIONS]],
)
def test_predictions_of_new_images(task, overlay, tmp_path: Path):
    classification = CLASSIFICATIONS[task]
    outputs = classification.outputs
    description = {"preset": {"classification": classification.to_dict()}}
    description["thresholds"] = dict.fromkeys(outputs, 0.6)
    files = ["a.png", "below/a.png", "below/deep/c.dcm"]
    logits = torch.tensor(LOGITS[task])
    out = tmp_path / "out"
    network = ViTClassifier(1, len(outputs), (16, 24), 8, "mean", 24, 32, 2, 2)
    save = SavePredictions(description, str(tmp_path / "data"), str(out), network, overlay)
    batches = [(files[:2], logits[:2]), (files[2:], logits[2:])]

    def step(engine, batch):
        engine.state.device = "cpu"
        engine.state.batch = {"file": [str(tmp_path / "data" / name) for name in batch[0]]}
        return {"pred": batch[1], "image": torch.rand(len(batch[1]), 1, 16, 24)}

    engine = Engine(step)
    save.attach(engine)
    engine.run(batches)
    with (out / "probabilities.csv").open(newline="") as file:
        header, *written = csv.reader(file)
    assert header == ["image", *outputs, "predicted"]
    assert [row[0] for row in written] == files
    assert [row[-1] for row in written] == PREDICTED[task]
    expected = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
    np.testing.assert_allclose(np.array([row[1:-1] for row in written], float), expected.numpy(), atol=1e-6)
    pictures = {path.relative_to(out / "overlays").as_posix() for path in out.rglob("*.png")}
    assert pictures == (set() if overlay is None else {f"{name}.png" for name in files})


def test_several_findings_stand_side_by_side():
    preset = {"classification": CLASSIFICATIONS["multilabel"].to_dict() | {"nothing": "clear"}}
    save = SavePredictions({"preset": preset}, "data", "out")
    assert save.found(np.array([0.5, 0.9])) == ["effusion", "nodule"]  # 0.5 where no threshold is known
    assert save.found(np.array([0.1, 0.49])) == ["clear"]


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = np.array([[1, 0, NAN], [0, 1, 0], [1, 0, 0], [0, NAN, 0]])
    logits = np.array([[2.0, -1, 0], [0, 1, -2], [1, -1, 0], [-1, 0, 3]])
    names = ["b/2.png", "a/1.png", "c/3.png", "a/0.png"]
    classification = Classification("multilabel", ("effusion", "nodule", "hernia"))
    scores = ClassificationScores(classification)
    scores.update((torch.tensor(logits), torch.tensor(labels), names, ["x", "y", "x", "z"]))
    draw_few(scores, monkeypatch)
    written = scores.write_table(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["class"] for row in rows] == ["effusion", "nodule", "hernia", "mean of 2"]
    assert [row["images"] for row in rows] == ["4", "3", "3", "4"]
    assert float(rows[0]["auc"]) == written[0]["auc"] == 1.0
    assert rows[2]["auc"] == rows[2]["sensitivity"] == rows[2]["auc_low"] == ""
    assert "nan" not in (tmp_path / "scores.csv").read_text()
    scores.write_cases(tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        header, *cases = csv.reader(file)
    assert header == ["image", "patient", *classification.classes, "p(effusion)", "p(nodule)", "p(hernia)"]
    assert [row[:5] for row in cases] == [
        ["a/0.png", "z", "0", "", "0"],
        ["a/1.png", "y", "0", "1", "0"],
        ["b/2.png", "x", "1", "0", ""],
        ["c/3.png", "x", "1", "0", "0"],
    ]
    assert [float(value) for value in cases[2][5:]] == pytest.approx(
        [1 / (1 + np.exp(-z)) for z in logits[0]], abs=1e-6
    )


def test_on_an_engine_each_epoch_starts_anew():
    random = torch.Generator().manual_seed(0)
    batches = [{"file": [f"{b}{i}" for i in range(3)], "patient": ["p"] * 3} for b in "ab"]
    label = torch.tensor([[0.0], [1.0], [1.0]])
    engine = Engine(lambda engine, batch: {"pred": torch.randn(3, 1, generator=random), "label": label})
    scores = ClassificationScores(CLASSIFICATIONS["binary"])
    scores.attach(engine, "mean_auc")
    found = [engine.run(batches, max_epochs=1).metrics["mean_auc"] for _ in range(2)]
    assert len(scores.cases) == 6
    assert found[0] != found[1] == area(*scores.column(0))
    decollated = SimpleNamespace(output=[{"pred": torch.zeros(1, 1), "label": torch.ones(1, 1)}])
    decollated.batch = {"file": ["c"], "patient": ["q"]}
    scores.iteration_completed(SimpleNamespace(state=decollated))
    assert scores.cases["c"] == ([0.5], [1.0], "q")
