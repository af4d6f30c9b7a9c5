"""Scores of a classification, against loops over pairs, thresholds and bins."""

from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.exceptions import NotComputableError

from medmim.classes import Classification
from medmim.classification_scores import (
    ClassificationScores,
    area,
    best_threshold,
    calibration_error,
    drawn_areas,
    precision_area,
)

NAN = float("nan")
MULTILABEL = Classification("multilabel", ("effusion", "nodule", "hernia"))
MULTICLASS = Classification("multiclass", ("normal", "bacterial", "viral"))
BINARY = Classification("binary", ("normal", "pneumonia"))


def naive_auc(labels, probabilities):
    """Share of pairs that stand in the right order; a tie is half right."""
    with_it = [p for y, p in zip(labels, probabilities, strict=True) if y == 1]
    without = [p for y, p in zip(labels, probabilities, strict=True) if y == 0]
    right = sum((p > q) + (p == q) / 2 for p in with_it for q in without)
    return right / (len(with_it) * len(without))


def naive_precision(labels, probabilities):
    """Precision at each threshold, weighed by how much of the recall it adds."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(probabilities), reverse=True):
        found = [y for y, p in zip(labels, probabilities, strict=True) if p >= threshold]
        recall = sum(found) / sum(labels)
        total += (recall - before) * sum(found) / len(found)
        before = recall
    return total


def naive_f1(labels, probabilities, threshold):
    found = [p >= threshold for p in probabilities]
    hits = sum(1 for y, f in zip(labels, found, strict=True) if y and f)
    return 2 * hits / (sum(found) + sum(labels))


def naive_ece(right, probabilities, bins=15):
    total = 0.0
    for i in range(bins):
        inside = [k for k, p in enumerate(probabilities) if i / bins < p <= (i + 1) / bins or (i == 0 and p == 0)]
        if inside:
            gap = sum(probabilities[k] for k in inside) / len(inside) - sum(right[k] for k in inside) / len(inside)
            total += abs(gap) * len(inside)
    return total / len(probabilities)


def case(seed, n=40, ties=True):
    random = np.random.default_rng(seed)
    labels = (random.random(n) < 0.3).astype(float)
    labels[:2] = (0, 1)
    probabilities = np.clip(random.random(n) * 0.7 + 0.2 * labels, 0, 1)
    return labels, probabilities.round(1) if ties else probabilities


def fill(scores, labels, logits, patients=None, names=None, batch_size=7):
    n = len(labels)
    names = names or [f"image_{i:03d}.png" for i in range(n)]
    patients = patients or [f"patient_{i}" for i in range(n)]
    labels, logits = torch.as_tensor(labels, dtype=torch.float32), torch.as_tensor(logits, dtype=torch.float32)
    for i in range(0, n, batch_size):
        part = slice(i, i + batch_size)
        scores.update((logits[part], labels[part], names[part], patients[part]))
    return scores


def random_scores(classification, n=30, seed=0, **options):
    """Scores of images whose logits tell a little of their labels."""
    random = np.random.default_rng(seed)
    k = len(classification.outputs)
    one = np.eye(k)[np.arange(n) % k] if classification.task == "multiclass" else random.random((n, k)) < 0.4
    logits = random.normal(size=(n, k)) + one
    return fill(ClassificationScores(classification), one.astype(float), logits, **options)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_areas_equal_loops(seed, ties):
    labels, probabilities = case(seed, ties=ties)
    assert area(labels, probabilities) == pytest.approx(naive_auc(labels, probabilities))
    assert precision_area(labels, probabilities) == pytest.approx(naive_precision(labels, probabilities))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [True, False])
def test_draws_are_repetitions(seed, ties):
    labels, probabilities = case(seed, ties=ties)
    draws = np.random.default_rng(seed).integers(0, 4, (5, len(labels)))
    draws[:, :2] = 1
    areas, precisions = drawn_areas(labels, probabilities, draws)
    for times, auc, precision in zip(draws, areas, precisions, strict=True):
        repeated = np.repeat(labels, times), np.repeat(probabilities, times)
        assert auc == pytest.approx(naive_auc(*repeated))
        assert precision == pytest.approx(naive_precision(*repeated))


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_side_alone_has_no_area(label):
    labels, probabilities = np.full(3, label), np.array([0.1, 0.5, 0.9])
    assert area(labels, probabilities) is None
    assert precision_area(labels, probabilities) is None
    assert best_threshold(labels, probabilities) == 0.5
    both = np.array([label, label, 1 - label])
    areas, precisions = drawn_areas(both, probabilities, np.array([[2, 1, 0], [1, 1, 1]]))  # the third is not drawn
    assert np.isnan(areas).tolist() == np.isnan(precisions).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_threshold_has_the_best_f1(seed, ties):
    labels, probabilities = case(seed, ties=ties)
    found = best_threshold(labels, probabilities)
    best = max(naive_f1(labels, probabilities, threshold) for threshold in [*probabilities, 0.5])
    assert naive_f1(labels, probabilities, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_equals_loops(seed):
    labels, probabilities = case(seed, ties=False)
    probabilities[:3] = (0.0, 1.0, 0.999)
    assert calibration_error(labels, probabilities) == pytest.approx(naive_ece(labels, probabilities), abs=1e-5)
    assert calibration_error(np.ones(4), np.ones(4)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.zeros(4), np.ones(4)) == pytest.approx(1)


@pytest.mark.parametrize("classification", [MULTILABEL, MULTICLASS, BINARY])
@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_value_is_the_mean_auc(classification, batch_size):
    scores = random_scores(classification, batch_size=batch_size)
    columns = range(len(classification.outputs))
    expected = [naive_auc(scores.labels[:, i], scores.probabilities[:, i]) for i in columns]
    assert scores.compute() == pytest.approx(sum(expected) / len(expected))
    rows = scores.table(5)
    assert [row["class"] for row in rows] == [*classification.outputs, f"mean of {len(expected)}"]
    assert [row["auc"] for row in rows] == pytest.approx([*expected, scores.compute()])
    precisions = [naive_precision(scores.labels[:, i], scores.probabilities[:, i]) for i in columns]
    assert [row["average_precision"] for row in rows] == pytest.approx([*precisions, np.mean(precisions)])
    if classification.task == "multiclass":
        assert scores.probabilities.sum(1) == pytest.approx(np.ones(30))


def test_rows_at_the_threshold_equal_counts():
    scores = random_scores(MULTILABEL)
    scores.given = {"effusion": 0.6, "nodule": 0.3}
    assert scores.thresholds() == {"effusion": 0.6, "nodule": 0.3, "hernia": 0.5}
    rows = scores.table(2)
    for i, row in enumerate(rows[:-1]):
        labels, found = scores.labels[:, i], scores.probabilities[:, i] >= row["threshold"]
        hits = [bool(f) == bool(y) for y, f in zip(labels, found, strict=True)]
        assert row["accuracy"] == pytest.approx(sum(hits) / 30)
        assert row["sensitivity"] == pytest.approx(
            sum(h for h, y in zip(hits, labels, strict=True) if y) / labels.sum()
        )
        assert row["specificity"] == pytest.approx(
            sum(h for h, y in zip(hits, labels, strict=True) if not y) / (30 - labels.sum())
        )
        assert row["f1"] == pytest.approx(naive_f1(labels, scores.probabilities[:, i], row["threshold"]))
        assert row["ece"] == pytest.approx(naive_ece(labels, scores.probabilities[:, i]), abs=1e-5)
        assert (row["images"], row["positives"]) == (30, labels.sum())
    for name in ("accuracy", "f1", "sensitivity", "specificity", "ece"):
        assert rows[-1][name] == pytest.approx(np.mean([row[name] for row in rows[:-1]]))


def test_last_row_of_a_multiclass_task_is_of_the_likeliest_class():
    scores = random_scores(MULTICLASS)
    row = scores.table(2)[-1]
    right = [int(p.argmax() == y.argmax()) for p, y in zip(scores.probabilities, scores.labels, strict=True)]
    assert row["accuracy"] == pytest.approx(sum(right) / 30)
    assert row["ece"] == pytest.approx(naive_ece(right, scores.probabilities.max(1)), abs=1e-5)


def test_absent_class_and_unknown_labels_are_left_out():
    """The third class never occurs; of the second some labels are unknown."""
    scores = random_scores(MULTILABEL)
    labels, logits = scores.labels.copy(), np.log(scores.probabilities / (1 - scores.probabilities))
    labels[:, 2] = 0
    labels[5:12, 1] = NAN
    scores = fill(ClassificationScores(MULTILABEL), labels, logits)
    keep = [*range(5), *range(12, 30)]
    expected = [naive_auc(labels[:, 0], scores.probabilities[:, 0])]
    expected.append(naive_auc(labels[keep, 1], scores.probabilities[keep, 1]))
    assert scores.compute() == pytest.approx(np.mean(expected))
    first, second, third, mean = scores.table(20)
    assert (first["images"], second["images"], third["images"], mean["images"]) == (30, 23, 30, 30)
    assert third["positives"] == 0
    assert not third.keys() & {"auc", "auc_low", "average_precision", "f1", "sensitivity"}
    assert third["threshold"] == 0.5
    assert mean["class"] == "mean of 2"
    assert mean["auc"] == pytest.approx(np.mean([first["auc"], second["auc"]]))
    numbers = [value for row in (first, second, third, mean) for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    assert scores.confusion()[1].sum() == 23
    assert scores.confusion()[2, 1].tolist() == [0, 0]


@pytest.mark.parametrize("value", [0.0, NAN])
def test_nothing_to_score(value, tmp_path: Path):
    scores = fill(ClassificationScores(MULTILABEL), np.full((4, 3), value), np.zeros((4, 3)))
    with pytest.raises(NotComputableError, match="no class has images with it and images without it"):
        scores.compute()
    rows = scores.write_table(tmp_path / "scores.csv")
    assert rows[-1] == {"class": "mean of 0", "images": 4}


@pytest.mark.parametrize("classification", [MULTILABEL, MULTICLASS, BINARY])
def test_confusion_equals_counts(classification):
    scores = random_scores(classification)
    thresholds = list(scores.thresholds().values())
    k = len(classification.outputs)
    expected = np.zeros((3, 3) if classification.task == "multiclass" else (k, 2, 2), int)
    for p, y in zip(scores.probabilities, scores.labels, strict=True):
        if classification.task == "multiclass":
            expected[y.argmax(), p.argmax()] += 1
        else:
            for i in range(k):
                expected[i, int(y[i]), int(p[i] >= thresholds[i])] += 1
    np.testing.assert_array_equal(scores.confusion(), expected[0] if classification.task == "binary" else expected)


def test_patients_are_drawn_together():
    """30 images of 10 patients; each draw holds as many patients as there are."""
    patients = [f"p{i % 10}" for i in range(30)]
    scores = random_scores(MULTILABEL, patients=patients)
    draws = scores._draws(50, 0)
    for draw in draws:
        assert draw.sum() == 30
        for i in range(30):
            assert draw[i] == draw[i % 10]
    assert any((draw == 0).any() for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 40


def test_intervals_are_those_of_images_drawn_by_hand():
    """An oracle that repeats the drawn images instead of weighing them."""
    scores = random_scores(MULTILABEL, patients=[f"p{i % 10}" for i in range(30)])
    rows = scores.table(20, seed=3)
    samples, accuracies = [], []
    for draw in scores._draws(20, 3):
        drawn = [i for i, times in enumerate(draw) for _ in range(times)]
        columns = [(scores.labels[drawn, k], scores.probabilities[drawn, k]) for k in range(3)]
        assert all(0 < y.sum() < len(y) for y, _ in columns)
        samples.append([naive_auc(*column) for column in columns])
        limits = [row["threshold"] for row in rows[:3]]
        accuracies.append(
            [np.mean([(q >= t) == y for y, q in zip(*c, strict=True)]) for c, t in zip(columns, limits, strict=True)]
        )
    samples, accuracies = np.array(samples), np.array(accuracies)
    for row, values in zip(rows, [*accuracies.T, accuracies.mean(1)], strict=True):
        found = [row["accuracy_low"], row["accuracy_high"]]
        assert found == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())
    for row, values in zip(rows, [*samples.T, samples.mean(1)], strict=True):
        assert [row["auc_low"], row["auc_high"]] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())


def test_interval_of_the_likeliest_class():
    scores = random_scores(MULTICLASS, patients=[f"p{i % 10}" for i in range(30)])
    row = scores.table(20, seed=3)[-1]
    right = [p.argmax() == y.argmax() for p, y in zip(scores.probabilities, scores.labels, strict=True)]
    drawn = [[right[i] for i, times in enumerate(draw) for _ in range(times)] for draw in scores._draws(20, 3)]
    expected = np.percentile([np.mean(each) for each in drawn], [2.5, 97.5]).tolist()
    assert [row["accuracy_low"], row["accuracy_high"]] == pytest.approx(expected)
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]


def test_bootstrap_is_deterministic_and_holds_the_value():
    tables = [random_scores(BINARY).table(40, seed) for seed in (0, 0, 1)]
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]
    for row in tables[0]:
        assert row["auc_low"] < row["auc"] < row["auc_high"]
        assert row["average_precision_low"] < row["average_precision"] < row["average_precision_high"]


def test_four_times_as_many_patients_halve_the_interval():
    widths = []
    for n in (150, 600):
        row = random_scores(BINARY, n).table(80)[0]
        widths.append(row["auc_high"] - row["auc_low"])
    assert 1.6 < widths[0] / widths[1] < 2.5


def share(rank, folder, whole):
    """What one of two processes does: an uneven share of the images, of which one went to both."""
    files = [whole.files[i] for i in (range(20) if rank == 0 else range(19, 30))]
    scores = ClassificationScores(MULTILABEL)
    scores.cases = {file: whole.cases[file] for file in files}
    value = scores.compute()
    torch.save((value, scores.table(4), scores.thresholds()), Path(folder) / f"{rank}.pt")


def test_two_processes_with_uneven_shares(tmp_path: Path):
    """Real ones, forked, which meet in a file."""
    whole = random_scores(MULTILABEL, patients=[f"p{i // 2}" for i in range(30)])
    options = {"nproc_per_node": 2, "init_method": f"file://{tmp_path}/meeting", "start_method": "fork"}
    idist.spawn("gloo", share, (str(tmp_path), whole), **options)
    for rank in (0, 1):
        value, table, thresholds = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert value == whole.compute()
        assert table == whole.table(4)
        assert thresholds == whole.thresholds()
