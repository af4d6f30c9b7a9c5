"""The loss of a classification, its class weights, probabilities and batches, against loops."""

import math

import pytest
import torch
from monai.data import MetaTensor

from medmim.classes import Classification
from medmim.classification import LabelledBatch, class_weights, to_probabilities
from medmim.losses import ClassificationLoss

NAN = float("nan")
SOFT = [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6], [0.1, 0.2, 0.7]]
HARD = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
WEIGHTS = [None, (0.5, 2.0, 3.0)]


def naive_softmax(row):
    powers = [math.exp(z) for z in row]
    return [power / sum(powers) for power in powers]


def naive_multiclass(logits, targets, weights):
    """PyTorch's mean: over the weights of hard labels; soft ones are weighed and divided by the images."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        total -= sum(w * t * math.log(p) for w, t, p in zip(weights, target, naive_softmax(row), strict=True))
    return total / len(logits)


def naive_sigmoids(logits, targets, weights):
    losses = []
    for row, target in zip(logits, targets, strict=True):
        for z, t, w in zip(row, target, weights, strict=True):
            if not math.isnan(t):
                p = 1 / (1 + math.exp(-z))
                losses.append(-(w * t * math.log(p) + (1 - t) * math.log(1 - p)))
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("targets", [SOFT, HARD])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_loss_equals_loops(task, targets, weights):
    logits = torch.randn(4, 3) * 2
    naive = naive_multiclass if task == "multiclass" else naive_sigmoids
    found = ClassificationLoss(task, weights)(logits, torch.tensor(targets))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(naive(logits.tolist(), targets, weights or (1, 1, 1)), rel=1e-5)


@pytest.mark.parametrize("weight", [None, [3.0]])
def test_binary(weight):
    logits, targets = torch.randn(5, 1), [[0.0], [1.0], [NAN], [1.0], [0.3]]
    found = ClassificationLoss("binary", weight)(logits, torch.tensor(targets))
    assert float(found) == pytest.approx(naive_sigmoids(logits.tolist(), targets, weight or [1]), rel=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_unknown_labels_add_nothing(weights):
    logits = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN], [0.0, 1.0, NAN], [1.0, 0.0, 1.0]])
    loss = ClassificationLoss("multilabel", weights)
    value = loss(logits, targets)
    assert float(value) == pytest.approx(naive_sigmoids(logits.tolist(), targets.tolist(), weights or (1, 1, 1)))
    value.backward()
    assert torch.equal(logits.grad != 0, ~targets.isnan())
    assert bool(logits.grad.isfinite().all())
    changed = torch.where(targets.isnan(), logits + 50, logits)
    assert torch.equal(loss(changed, targets), value)


def test_batch_of_unknown_labels_costs_nothing():
    logits = torch.randn(2, 3, requires_grad=True)
    value = ClassificationLoss("multilabel")(logits, torch.full((2, 3), NAN))
    value.backward()
    assert float(value) == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_half_precision_is_computed_in_single(task):
    logits, loss = torch.randn(4, 3).bfloat16(), ClassificationLoss(task)
    found = loss(logits, torch.tensor(HARD))
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(logits.float(), torch.tensor(HARD)))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_large_logits_stay_finite(task):
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    value = ClassificationLoss(task)(logits, torch.tensor([[0.0, 1.0, 0.0]]))
    value.backward()
    assert math.isfinite(value)
    assert bool(logits.grad.isfinite().all())


def test_probabilities():
    logits = torch.randn(3, 4)
    expected = torch.tensor([naive_softmax(row) for row in logits.tolist()])
    torch.testing.assert_close(to_probabilities(logits, "multiclass"), expected)
    sigmoids = torch.tensor([[1 / (1 + math.exp(-z)) for z in row] for row in logits.tolist()])
    for task in ("multilabel", "binary"):
        torch.testing.assert_close(to_probabilities(logits, task), sigmoids)
    assert to_probabilities(logits.half(), "multiclass").dtype == torch.float32


def items(labels):
    return [{"image": f"{i}.png", "label": label} for i, label in enumerate(labels)]


def test_balanced_weights_of_a_multiclass_task():
    """Each class then weighs as much as the others: 8 images of 4 classes, 5, 2, 1 and none."""
    labels = [[1.0, 0, 0, 0]] * 5 + [[0, 1.0, 0, 0]] * 2 + [[0, 0, 1.0, 0]]
    found = class_weights(items(labels), Classification("multiclass", ("a", "b", "c", "d")), "balanced")
    assert found == pytest.approx([8 / (4 * 5), 8 / (4 * 2), 8 / 4, 1.0])


def test_balanced_weights_of_labels():
    """Images without, divided by images with; unknown ones count on neither side."""
    labels = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, NAN, NAN], [0.0, 0.0, 1.0], [NAN, 0.0, 1.0]]
    found = class_weights(items(labels), Classification("multilabel", ("rare", "never", "always")), "balanced")
    assert found == pytest.approx([3.0, 1.0, 1.0])
    binary = class_weights(items([[1.0], [1.0], [0.0]]), Classification("binary", ("no", "yes")), "balanced")
    assert binary == pytest.approx([0.5])


@pytest.mark.parametrize("how", [None, "null"])
def test_no_weights(how):
    assert class_weights([], Classification("multilabel", ("a", "b")), how) is None


def test_weights_of_ones_own():
    found = class_weights([], Classification("multilabel", ("a", "b")), [2, 0.5])
    assert found == [2.0, 0.5]
    assert all(isinstance(weight, float) for weight in found)
    assert class_weights([], Classification("binary", ("no", "yes")), (4,)) == [4.0]


@pytest.mark.parametrize("how", ["even", [1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [1.0, -2], [1.0, "2"], [True, 1.0], 3.0])
def test_faulty_weights_are_refused(how):
    with pytest.raises(
        ValueError, match=r"--class_weights .*: expected null, balanced, or 2 numbers above 0, for a, b"
    ):
        class_weights([], Classification("multilabel", ("a", "b")), how)


def batch(n=6):
    """Images whose first value is their number, so that a mixture can be told."""
    image = torch.zeros(n, 1, 4, 5) + torch.arange(n, dtype=torch.float32)[:, None, None, None]
    image[:, :, 0, 0] = torch.eye(n)[:, :1]
    return {"image": MetaTensor(image), "label": torch.eye(n)}


def test_without_mixup_nothing_changes():
    given = batch()
    image, label = LabelledBatch()(given, "cpu", True)
    assert type(image) is torch.Tensor
    assert torch.equal(image, given["image"].as_tensor())
    assert torch.equal(label, given["label"])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_images_and_labels_are_mixed_alike(alpha):
    """The labels, one for each image, tell the weights with which the images must have been mixed."""
    given = batch()
    image, label = LabelledBatch(alpha)(given, "cpu")
    assert type(image) is type(label) is torch.Tensor
    assert label.shape == (6, 6)
    torch.testing.assert_close(label.sum(1), torch.ones(6))
    assert bool(((label > 0).sum(1) <= 2).all())
    assert bool(((label > 0.01) & (label < 0.99)).any())
    source = given["image"].as_tensor()
    for mixed, weights in zip(image, label.tolist(), strict=True):
        torch.testing.assert_close(mixed, sum(w * original for w, original in zip(weights, source, strict=True)))
    assert torch.equal(given["label"], torch.eye(6))  # the batch itself stays


def test_unknown_stays_unknown_in_a_mixture():
    torch.manual_seed(2)
    given = batch()
    given["label"] = torch.cat((torch.eye(6), torch.tensor([[NAN], [0], [0], [0], [0], [0]])), 1)
    _, label = LabelledBatch(1.0)(given, "cpu")
    assert not bool(label[:, :6].isnan().any())
    assert torch.equal(label[:, 6].isnan(), label[:, 0] > 0)
    assert int(label[:, 6].isnan().sum()) == 2


def test_one_image_is_mixed_with_itself():
    image, label = LabelledBatch(1.0)({"image": torch.ones(1, 1, 4, 4), "label": torch.ones(1, 2)}, "cpu")
    torch.testing.assert_close(image, torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(label, torch.ones(1, 2))


def test_the_same_seed_mixes_alike():
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(torch.cat([LabelledBatch(0.4)(batch(), "cpu")[1] for _ in range(2)]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][:6], found[0][6:])  # anew for each batch
