"""Resizing radiographs, and what a cache on disk and a bootstrap of rare classes must not mix up."""

import csv

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureTyped
from PIL import Image

from medmim.classes import Classification
from medmim.classification_figures import roc_figure
from medmim.classification_scores import ClassificationScores
from medmim.scan_datasets import make_dataset
from medmim.transforms import LoadRadiographd, ResizeRadiographd


def linear_weights(n: int, m: int) -> np.ndarray:
    """Weights ``(m, n)`` of a triangle as wide as the step, at least one pixel to each side."""
    scale = n / m
    width = max(scale, 1.0)
    weights = np.zeros((m, n))
    for i in range(m):
        centre = (i + 0.5) * scale
        for j in range(n):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / width)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("size", "to"), [((20, 30), (7, 11)), ((9, 5), (18, 15)), ((40, 8), (10, 16)), ((1, 3), (4, 4))]
)
def test_resized_against_weights(size, to):
    image = torch.rand(1, *size)
    found = ResizeRadiographd("image", to)({"image": MetaTensor(image, meta={"filename_or_obj": "a.png"})})["image"]
    expected = linear_weights(size[0], to[0]) @ image[0].numpy().astype(float) @ linear_weights(size[1], to[1]).T
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
    assert found.meta["filename_or_obj"] == "a.png"


@pytest.mark.parametrize(
    ("size", "to"), [((20, 30), (8, 12)), ((30, 20), (12, 8)), ((5, 5), (12, 12)), ((1, 300), (1, 12))]
)
def test_longer_side(size, to):
    image = {"image": MetaTensor(torch.rand(1, *size))}
    assert ResizeRadiographd("image", 12)(image)["image"].shape == (1, *to)


def test_labels_in_a_cache_on_disk_are_those_of_the_list(tmp_path):
    """The same image with another label or patient is another entry."""
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    transform = Compose([LoadRadiographd("image"), EnsureTyped("label", dtype=torch.float32, track_meta=False)])
    for label, patient in (([1.0, 0.0], "p"), ([0.0, 1.0], "p"), ([0.0, 1.0], "q"), ([1.0, 0.0, 0.0], "q")):
        item = {"image": str(tmp_path / "a.png"), "label": label, "patient": patient}
        for _ in range(2):  # made, and read
            found = make_dataset([item], transform, "disk", cache_dir=tmp_path / "cache")[0]
            assert found["label"].tolist() == label
            assert found["patient"] == patient


def test_interval_of_the_mean_with_rare_classes(tmp_path):
    """A draw that lacks a class counts with the others."""
    names = tuple("abcdefgh")
    scores = ClassificationScores(Classification("multilabel", names))
    random = np.random.default_rng(0)
    labels = np.zeros((60, 8), dtype=np.float32)
    labels[range(8), range(8)] = 1
    logits = torch.as_tensor(random.normal(size=(60, 8)) + 2 * labels)
    files = [str(i) for i in range(60)]
    scores.update((logits, torch.as_tensor(labels), files, files))
    table = scores.write_table(tmp_path / "scores.csv")
    assert table[-1]["auc_low"] < table[-1]["auc"] < table[-1]["auc_high"]
    assert table[-1]["auc_high"] - table[-1]["auc_low"] > 0.02


def test_class_that_no_draw_has_on_both_sides(tmp_path):
    scores = ClassificationScores(Classification("multilabel", ("a", "b")))
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    scores.update((torch.tensor([[1.0, 2.0], [0.0, 0.0]]), labels, ["x", "y"], ["same", "same"]))
    table = scores.table(3)
    assert table[0]["auc"] == 1.0
    scores.cases = {name: (*case[:2], name) for name, case in scores.cases.items()}
    scores._draws = lambda n, seed: np.array([[2, 0], [0, 2]])  # one patient alone
    table = scores.write_table(tmp_path / "scores.csv")
    assert table[0]["auc_low"] is None
    with (tmp_path / "scores.csv").open() as file:
        assert next(csv.DictReader(file))["auc_low"] == ""
    assert roc_figure(scores, table, "").legends[0].get_texts()[0].get_text() == "a: AUC 1.000 no interval"
