"""Statistics of a study against numbers worked out by hand, its tables and figures."""

import csv

import matplotlib.image
import pytest

from tools.study import study
from tools.study_results import (
    Curve,
    convergence,
    evaluation_results,
    interval,
    mean_and_sd,
    read_curve,
    training_results,
)

SLOW = Curve([10, 20, 30, 40], [5.0, 10.0, 15.0, 20.0], [0.5, 0.7, 0.8, 0.78])
FAST = Curve([10, 20, 30, 40], [6.0, 12.0, 18.0, 24.0], [0.76, 0.79, 0.79, 0.81])


def test_mean_deviation_and_interval():
    assert mean_and_sd([2.0, 4.0, 9.0]) == pytest.approx((5.0, 13**0.5))  # ((−3)² + (−1)² + 4²) / 2 = 13
    # t of two degrees of freedom at 97.5 %: 4.30265; half width 4.30265 · √13 / √3 = 8.9567
    assert interval([2.0, 4.0, 9.0]) == pytest.approx((5 - 8.9567, 5 + 8.9567), abs=1e-3)
    assert interval([1.0, 2.0]) == pytest.approx((1.5 - 12.7062 * 0.5, 1.5 + 12.7062 * 0.5), abs=1e-3)
    assert mean_and_sd([3.0]) == (3.0, None)
    assert interval([3.0]) is None


def test_convergence():
    # 95 % of 0.8 is 0.76
    assert convergence(FAST, SLOW, 0.95) == {"epochs": 10, "seconds": 6.0, "reference_epochs": 30, "speed_up": 3.0}
    assert convergence(FAST, SLOW, 1.0) == {"epochs": 40, "seconds": 24.0, "reference_epochs": 30, "speed_up": 0.75}
    never = convergence(SLOW, FAST, 1.0)
    assert never == {"epochs": None, "seconds": None, "reference_epochs": 40, "speed_up": None}


def write_scalars(folder, dice):
    lines = ["epoch,seconds,mean_dice"]
    lines += [f"{epoch},{epoch * 2.0},{'' if value is None else value}" for epoch, value in dice.items()]
    (folder / "scalars.csv").write_text("\n".join(lines) + "\n")


def test_results_of_a_training(tmp_path):
    write_scalars(tmp_path, {1: None, 5: 0.5, 9: 0.75, 10: 0.7})
    assert read_curve(tmp_path) == Curve([5, 9, 10], [10.0, 18.0, 20.0], [0.5, 0.75, 0.7])
    found = training_results(tmp_path, 10)
    assert (found["best_dice"], found["best_epoch"], found["last_dice"], found["train_seconds"]) == (0.75, 9, 0.7, 20.0)
    assert (found["still_improving"], found["late_gain"]) == (False, 0.0)
    write_scalars(tmp_path, {5: 0.5, 9: 0.75, 10: 1.0})
    found = training_results(tmp_path, 10)
    assert (found["still_improving"], found["late_gain"]) == (True, 0.25)
    write_scalars(tmp_path, {1: None, 2: "nan"})
    with pytest.raises(ValueError, match="no validation with a Dice"):
        training_results(tmp_path, 2)


def test_results_of_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="no scores"):
        evaluation_results(tmp_path)
    lines = ["case,class,dice,hd95_mm,surface_dice", "/a/one.nii.gz,front,0.8,2,1.0", "/a/one.nii.gz,back,0.4,4,0.0"]
    lines += ["/a/two.nii.gz,front,1.0,1,1.0", "/a/two.nii.gz,back,nan,nan,nan"]
    (tmp_path / "scores.csv").write_text("\n".join(lines) + "\n")
    found = evaluation_results(tmp_path)
    assert found["dice"] == pytest.approx(0.8)  # of 0.6 and, without the class that is nowhere, 1.0
    assert found["cases"]["one.nii.gz"] == pytest.approx({"dice": 0.6, "hd95_mm": 3.0, "surface_dice": 0.5})
    assert found["cases"]["two.nii.gz"]["dice"] == 1.0


@pytest.fixture
def report(study_file, phantom_dir, stand_in, tmp_path):
    """Runs a study with the stand-in; gives its report."""

    def make(**lines) -> str:
        learning = "{bundle: unetr_segmentation, epochs: 10, learning_rate: 0.1}"
        path = study_file(**{"finetuning": learning} | lines)
        study(str(path), str(phantom_dir), str(tmp_path / "out"), jobs=4)
        return (tmp_path / "out" / "report.md").read_text()

    return make


def dice(rate: float, epoch: int = 10) -> float:
    """What the stand-in gives."""
    return 1 - 0.5 / (1 + rate * epoch)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables(report, tmp_path):
    text = report(seeds="[0, 1, 2]", convergence="[1.0]")
    scratch = [dice(0.1 + 0.01 * seed) for seed in range(3)]
    mae = [dice(0.2 + 0.02 * seed) for seed in range(3)]
    differences = [b - a for a, b in zip(scratch, mae, strict=True)]
    mean, sd = mean_and_sd(mae)
    low, high = interval(differences)
    row = next(line for line in text.splitlines() if line.startswith("| mae | 4 |"))
    assert f"| {mean:.4f} ± {sd:.4f} |" in row
    gain = max(dice(0.2 + 0.02 * seed) - dice(0.2 + 0.02 * seed, 9) for seed in range(3))
    assert row.endswith(f"| 3 of 3, up to {gain:+.4f} |")
    assert f"{mean_and_sd(differences)[0]:+.4f} [{low:+.4f}, {high:+.4f}] (scratch)" in row
    assert "| 2.00 ± 0.00 |" in row  # HD95
    assert "| mae | 4 | 5 (5 s), 5 (5 s), 5 (5 s) | 10, 10, 10 | 2.00× |" in text  # twice the rate
    assert "All seeds of an arm start from one pre-training" in text
    assert "## Not finished" not in text

    rows = rows_of(tmp_path / "out" / "results.csv")
    assert len(rows) == 12
    last = rows[-1]
    assert (last["arm"], last["scans"], last["seed"]) == ("mae", "4", "2")
    assert float(last["difference"]) == pytest.approx(differences[2])
    assert last["compared_to"] == "finetuning/scratch/labels_4/seed_2"
    assert (last["epochs_to_1"], last["speed_up_to_1"], last["pretraining.epochs"]) == ("5", "2.0", "3")
    cases = rows_of(tmp_path / "out" / "cases.csv")
    assert len(cases) == 24
    assert {row["case"]: float(row["dice"]) for row in cases} == pytest.approx({"one.nii.gz": 0.85, "two.nii.gz": 0.65})


def test_what_is_never_reached_is_no_number(report):
    arms = "{scratch: {}, poor: {finetuning: {learning_rate: 0.01}}}"
    text = report(seeds="[0]", arms=arms, labels="[2]")
    assert "| poor | 2 | not in 10 | 8 | 0 of 1 got there | not in 10 | 10 | 0 of 1 got there |" in text
    assert "(one seed: no interval) (scratch)" in text
    assert "There is one seed only" in text
    assert "nan" not in text


def test_without_a_reference_there_is_no_comparison(report):
    text = report(arms="{mae: {pretraining: {}}}")
    assert "## Convergence" not in text
    assert "compared to none" in text


def test_without_evaluation(report, tmp_path):
    text = report(evaluate="false", seeds="[0]", labels="[2]")
    assert "| mae | 2 | 1 | " in text
    assert rows_of(tmp_path / "out" / "cases.csv") == []


@pytest.mark.parametrize(
    ("lines", "maps"),
    [
        ({}, []),
        ({"grid": "{pretraining: {mask_ratio: [0.3, 0.6, 0.9]}}", "seeds": "[0]"}, ["map_mae.png"]),
        (
            {"grid": "{common: {patch_size: [8, 16]}, pretraining: {mask_ratio: [0.3, 0.6]}}", "seeds": "[0]"},
            ["map_mae.png", "map_scratch.png"],
        ),
    ],
)
def test_figures(report, tmp_path, lines, maps):
    text = report(**lines)
    names = ["dice_epochs.png", "dice_labels.png", *maps]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    for name in names:
        assert f"![{name}]({name})" in text
        pixels = matplotlib.image.imread(tmp_path / "out" / name)
        assert min(pixels.shape[:2]) > 150
        assert pixels.std() > 0.05
