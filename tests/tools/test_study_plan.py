"""Which cells a study file makes."""

import math
from pathlib import Path

import pytest

from medmim.datalists import Datalist, load_datalist
from tools.study_file import read_study
from tools.study_folder import changes, commands
from tools.study_plan import share_of_scans

HIPPOCAMPUS = Path(__file__).resolve().parents[2] / "tools" / "studies" / "hippocampus.yaml"


def test_cells_of_arms_labels_and_seeds(study_file, phantom_dir):
    plan = read_study(study_file(), phantom_dir)
    assert [cell.name for cell in plan.cells] == [
        "pretraining/mae/seed_0",
        "finetuning/scratch/labels_2/seed_0",
        "finetuning/scratch/labels_2/seed_1",
        "finetuning/scratch/labels_4/seed_0",
        "finetuning/scratch/labels_4/seed_1",
        "finetuning/mae/labels_2/seed_0",
        "finetuning/mae/labels_2/seed_1",
        "finetuning/mae/labels_4/seed_0",
        "finetuning/mae/labels_4/seed_1",
    ]
    assert all(cell.needs is (plan.cells[0] if cell.arm == "mae" else None) for cell in plan.finetunings)
    for cell in plan.finetunings:
        kept = load_datalist(phantom_dir, label_fraction=cell.knobs["label_fraction"])
        assert len(kept.training) == cell.scans
    reference = plan.reference(plan.cells[-1])
    assert reference is not None
    assert reference.name == "finetuning/scratch/labels_4/seed_1"
    assert plan.reference(reference) is None


def test_a_pretraining_for_each_seed(study_file, phantom_dir):
    plan = read_study(study_file(pretraining_seed="each"), phantom_dir)
    names = [cell.name for cell in plan.cells if cell.kind == "pretraining"]
    assert names == ["pretraining/mae/seed_0", "pretraining/mae/seed_1"]
    assert all(cell.needs is None or cell.needs.seed == cell.seed for cell in plan.finetunings)


def test_shares_of_the_scans(study_file, phantom_dir):
    plan = read_study(study_file(labels="[0.3, 1.0, 1]"), phantom_dir)
    scratch = [(c.scans, c.knobs["label_fraction"]) for c in plan.finetunings if c.arm == "scratch" and c.seed == 0]
    assert scratch == [(2, 0.3), (4, 1.0), (1, 0.25)]


@pytest.mark.parametrize("n", [1, 3, 7, 160, 208])
def test_as_many_scans_as_the_data_list_keeps(n):
    for keep in range(1, n + 1):
        assert share_of_scans(keep / n, n) == keep


def test_a_grid_varies_what_each_bundle_has(study_file, phantom_dir):
    grid = "{common: {patch_size: [8, 16]}, pretraining: {mask_ratio: [0.5, 0.75]}, finetuning: {overlap: [0.0, 0.5]}}"
    plan = read_study(study_file(grid=grid, labels="[2]", seeds="[0]"), phantom_dir)
    pretrainings = [cell for cell in plan.cells if cell.kind == "pretraining"]
    assert len(pretrainings) == 4  # the overlap changes none of them
    by_arm = {arm: [cell for cell in plan.finetunings if cell.arm == arm] for arm in ("scratch", "mae")}
    assert len(by_arm["scratch"]) == 4  # patch size and overlap
    assert len(by_arm["mae"]) == 8
    for cell in by_arm["mae"]:
        assert cell.needs is not None
        assert cell.needs.knobs["mask_ratio"] == cell.point["mask_ratio"]
        assert cell.needs.knobs["patch_size"] == cell.knobs["patch_size"] == cell.point["patch_size"]
        assert "mask_ratio" not in cell.knobs
        assert "overlap" not in cell.needs.knobs
        reference = plan.reference(cell)
        assert reference is not None
        assert reference.point == {name: cell.point[name] for name in ("patch_size", "overlap")}


def test_arms_with_the_same_pretraining_share_it(study_file, phantom_dir):
    arms = "{scratch: {}, mae: {pretraining: {}}, frozen: {pretraining: {}, finetuning: {freeze_encoder: true}}}"
    plan = read_study(study_file(arms=arms), phantom_dir)
    assert sum(cell.kind == "pretraining" for cell in plan.cells) == 1
    assert {cell.needs.name for cell in plan.finetunings if cell.needs} == {"pretraining/mae/seed_0"}


def test_later_knobs_count(study_file, phantom_dir):
    labels = "{2: {epochs: 40}, 4: {}}"
    arms = "{scratch: {finetuning: {learning_rate: 0.5}}, other: {finetuning: {epochs: 7}}}"
    lines = {"arms": arms, "common": "{learning_rate: 0.1}", "labels": labels, "seeds": "[0]"}
    plan = read_study(study_file(**lines), phantom_dir)
    found = {(cell.arm, cell.scans): (cell.knobs["learning_rate"], cell.epochs) for cell in plan.finetunings}
    assert found == {
        ("scratch", 2): (0.5, 40),
        ("scratch", 4): (0.5, 10),
        ("other", 2): (0.1, 40),
        ("other", 4): (0.1, 7),
    }


def test_arms_are_compared_with_the_same_network(study_file, phantom_dir):
    arms = (
        "{scratch: {}, mae: {pretraining: {}}, slow: {finetuning: {learning_rate: 0.1}}, "
        "slow_mae: {pretraining: {}, finetuning: {learning_rate: 0.1}, against: slow}, "
        "convvit: {finetuning: {bundle: convvit_unetr_segmentation}}, "
        "mim: {pretraining: {bundle: mim_convvit_pretraining}, finetuning: {bundle: convvit_unetr_segmentation}}}"
    )
    plan = read_study(study_file(arms=arms, common="{dataset: btcv}"), phantom_dir)
    assert {arm.name: arm.against for arm in plan.arms} == {
        "scratch": None,
        "mae": "scratch",
        "slow": "scratch",
        "slow_mae": "slow",
        "convvit": None,
        "mim": "convvit",
    }


def test_without_an_arm_from_scratch_nothing_is_compared(study_file, phantom_dir):
    plan = read_study(study_file(arms="{mae: {pretraining: {}}}"), phantom_dir)
    assert plan.notes == ["mae: no arm from scratch with unetr_segmentation: compared to none"]
    assert plan.reference(plan.finetunings[0]) is None


def test_paths_in_the_file_are_relative_to_it(study_file, phantom_dir, coarse_preset):
    preset = study_file().with_name("mine.yaml")
    preset.write_text(coarse_preset.read_text())
    plan = read_study(study_file(common=f"{{dataset: mine.yaml, dataset_dir: {phantom_dir}}}"))
    assert plan.cells[0].knobs["dataset"] == str(preset)
    plan = read_study(study_file(grid="{common: {dataset: [mine.yaml, phantom]}}"), phantom_dir)
    found = {cell.knobs["dataset"] for cell in plan.cells if cell.arm == "scratch"}
    assert found == {str(preset), "phantom"}
    (preset.parent / "scans").symlink_to(phantom_dir)
    plan = read_study(study_file(grid="{common: {dataset_dir: [scans]}}"))
    assert {cell.knobs["dataset_dir"] for cell in plan.cells} == {str(preset.parent / "scans")}


def test_weights_of_an_arm(study_file, phantom_dir):
    weights = study_file().with_name("encoder.pt")
    weights.touch()
    arms = "{scratch: {finetuning: {pretrained_encoder: null}}, given: {finetuning: {pretrained_encoder: encoder.pt}}}"
    plan = read_study(study_file(arms=arms), phantom_dir)
    assert {arm.name: arm.against for arm in plan.arms} == {"scratch": None, "given": "scratch"}
    assert plan.cells[-1].knobs["pretrained_encoder"] == str(weights)


def test_a_pair_of_swin(study_file, phantom_dir):
    lines = {"pretraining": "{bundle: simmim_swin_pretraining}", "finetuning": "{bundle: swin_unetr_segmentation}"}
    plan = read_study(study_file(common="{feature_size: 24}", arms="{simmim: {pretraining: {}}}", **lines), phantom_dir)
    assert {cell.knobs["feature_size"] for cell in plan.cells} == {24}
    assert plan.finetunings[0].needs is plan.cells[0]


@pytest.mark.parametrize("where", ["common", "finetuning"])
def test_another_preset_may_be_allowed(study_file, phantom_dir, where):
    lines = {"pretraining": "{bundle: mae_vit_pretraining, epochs: 3, dataset: phantom, patch_size: 16}"}
    arms = f"{{mae: {{pretraining: {{}}, {where}: {{allow_other_preset: true}}}}}}"
    assert read_study(study_file(arms=arms, **lines), phantom_dir).cells


def test_merge_keys(study_file, phantom_dir):
    arms = (
        "{a: &a {pretraining: &p {epochs: 4, mask_ratio: 0.5}}, b: {<<: *a, against: a}, "
        "c: {pretraining: {<<: *p, epochs: 5}}}"
    )
    plan = read_study(study_file(arms=arms), phantom_dir)
    found = [(cell.arm, cell.epochs, cell.knobs["mask_ratio"]) for cell in plan.cells if cell.kind == "pretraining"]
    assert found == [("a", 4, 0.5), ("c", 5, 0.5)]
    assert plan.arm("b").against == "a"


def test_commands(study_file, phantom_dir, tmp_path):
    plan = read_study(study_file(common="{roi_size: [16, 24, 16], datalist: null}"), phantom_dir)
    train, evaluate = commands(plan, plan.finetunings[-1], tmp_path)
    text = " ".join(train)
    assert "--roi_size [16, 24, 16] " in text
    assert f"--pretrained_encoder {tmp_path}/pretraining/mae/seed_0/models/encoder.pt" in text
    assert "--datalist $None" in text  # the runner reads null as a word and leaves out None
    assert text.endswith("--resume true")
    assert evaluate[1] == "['configs/train.yaml','configs/evaluate.yaml']"
    plan.evaluate = False
    assert len(commands(plan, plan.finetunings[-1], tmp_path)) == 1


def test_changes_of_settings_reach_what_builds_on_them(study_file, phantom_dir):
    before = read_study(study_file(), phantom_dir).cells[-1].settings()
    assert changes(before, before) == []
    for line, told in (
        ({"pretraining": "{bundle: mae_vit_pretraining, epochs: 4}"}, ["pre-training: epochs 4 (was 3)"]),
        ({"pretraining": "{bundle: mae_vit_pretraining, epochs: 3, mask_ratio: 0.75}"}, []),  # the default
        ({"common": "{num_workers: 3, cache: disk}"}, []),  # changes no result
    ):
        after = read_study(study_file(**line), phantom_dir).cells[-1].settings()
        assert changes(before, after) == told


def test_the_study_of_the_repository(phantom_dir, monkeypatch):
    monkeypatch.setattr("tools.study_file.load_datalist", lambda **_: Datalist([{}] * 160, [{}] * 40))
    plan = read_study(HIPPOCAMPUS, phantom_dir)
    assert sum(cell.kind == "pretraining" for cell in plan.cells) == 3
    steps = {cell.epochs * math.ceil(cell.scans / cell.knobs["batch_size"]) for cell in plan.finetunings}
    assert len(steps) == 1  # as the file says
