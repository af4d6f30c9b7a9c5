"""Every fault of a study file is said in one line, all of them together."""

import pytest

from tools.study import study
from tools.study_file import read_study

SWIN = {"arms": "{swin: {pretraining: {bundle: simmim_swin_pretraining}}}"}
FAULTS = [
    ({"label": "[1]"}, "label: no such key (did you mean labels?)"),
    ({"arms": "{a: {pretrainin: {}}}"}, "arms: a: pretrainin: no such key (did you mean pretraining?)"),
    ({"arms": "[scratch]"}, "arms: ['scratch']: expected names of arms"),
    ({"arms": "{no: {}}"}, "arms: False: a name of letters, digits"),
    ({"arms": "{scratch: {}, scratch: {}}"}, "line 4: 'scratch' stands twice there"),
    ({"arms": "{scratch: 3}"}, "arms: scratch: 3: expected common, pretraining, finetuning, against, or {}"),
    ({"arms": "{a: {}, b: {against: c}}"}, "arms: b: against: c: no other arm of that name"),
    ({"arms": "{a: {}, b: {against: [a]}}"}, "arms: b: against: ['a']: no other arm of that name"),
    ({"arms": "{.: {}, ..: {}}"}, "arms: '..': a name of letters, digits, _ . + - that begins with neither . nor"),
    ({"pretraining": "{epochs: 3}"}, "arms: mae: pretraining: no bundle: give one there"),
    ({"pretraining": "{bundle: unetr_segmentation}"}, "bundle unetr_segmentation: not one of mae_vit_pretraining"),
    ({"finetuning": "{bundle: mae_vit_pretraining}"}, "bundle mae_vit_pretraining: not one of convvit_unetr"),
    ({"finetuning": "{bundle: unetr_segmentation, epoch: 3}"}, "finetuning: epoch: no knob of unetr_segmentation (did"),
    ({"common": "{hiden_size: 3}"}, "common: hiden_size: no knob of mae_vit_pretraining, unetr_segmentation (did you"),
    ({"common": "{seed: 3}"}, "common: seed: is set by the study itself (seeds)"),
    ({"common": "[a]"}, "common: ['a']: expected knobs and their values"),
    ({"arms": "{mae: {pretraining: {overlap: 0}}}"}, "arms: mae: pretraining: overlap: no knob of mae_vit_pretraining"),
    ({"arms": "{a: {pretraining: {}, finetuning: {pretrained_encoder: x.pt}}}"}, "that of its own pre-training"),
    ({"labels": "16"}, "labels: 16: expected a list"),
    ({"labels": "[5]"}, "labels: 5: there are 4 labelled scans for training"),
    ({"labels": "[0, 1.5]"}, "labels: 1.5: expected a whole number of scans, or a share above 0.0 up to 1.0"),
    ({"labels": "[2, 2]"}, "labels: [2, 2]: a number stands twice"),
    ({"labels": "[a]"}, "labels: 'a': expected a whole number of scans"),
    ({"labels": "[2, 0.5]"}, "finetuning/mae/labels_2/seed_0: stands for two cells"),
    ({"labels": "{2: {mask_ratio: 1}}"}, "labels: 2: mask_ratio: no knob of unetr_segmentation"),
    ({"seeds": "3"}, "seeds: 3: expected a list of whole numbers"),
    ({"seeds": "[1, 1]"}, "seeds: [1, 1]: a seed stands twice"),
    ({"pretraining_seed": "all"}, "pretraining_seed: 'all': expected a whole number, or 'each'"),
    ({"convergence": "[2]"}, "convergence: [2]: expected a list of numbers above 0 up to 1"),
    ({"convergence": "[true]"}, "convergence: [True]: expected a list of numbers above 0 up to 1"),
    ({"convergence": "[]"}, "convergence: []: expected a list of numbers above 0 up to 1"),
    ({"evaluate": "3"}, "evaluate: 3: expected true or false"),
    ({"grid": "{mask_ratio: [1]}"}, "grid: mask_ratio: no such key"),
    ({"grid": "{pretraining: {mask_ratio: 0.5}}"}, "grid: pretraining: mask_ratio: 0.5: expected a list of values"),
    ({"grid": "{pretraining: {mask_ratio: [1, 1]}}"}, "grid: pretraining: mask_ratio: [1, 1]: a value stands twice"),
    ({"grid": "{pretraining: {mask: [0.5]}}"}, "grid: pretraining: mask: no knob of mae_vit_pretraining"),
    ({"grid": "{common: {epochs: [1]}, pretraining: {epochs: [1]}}"}, "grid: epochs: stands in two sections"),
    (
        {"grid": "{pretraining: {mask_ratio: [0.5]}}", "arms": "{a: {pretraining: {mask_ratio: 0.3}}}"},
        "arms: a: pretraining: mask_ratio: the grid varies it: leave one away",
    ),
    (
        {"grid": "{pretraining: {patch_size: [8, 16]}}", "common": "{dataset: phantom}"},
        "arms: mae: patch_size: 16 in the pre-training, 8 in the fine-tuning: give it under grid: common",
    ),
    (
        {"pretraining": "{bundle: mae_vit_pretraining, hidden_size: 48}"},
        "arms: mae: hidden_size: 48 in the pre-training, 768 in the fine-tuning: give it under common",
    ),
    (
        {"pretraining": "{bundle: mim_convvit_pretraining}"},
        "an encoder of mim_convvit_pretraining does not fit unetr_segmentation, which needs its hidden_size",
    ),
    (
        SWIN
        | {"pretraining": "{feature_size: 48}", "finetuning": "{bundle: swin_unetr_segmentation, feature_size: 24}"},
        "arms: swin: feature_size: 48 in the pre-training, 24 in the fine-tuning: give it under common",
    ),
    (
        {"pretraining": "{bundle: mae_vit_pretraining, dataset: phantom, patch_size: 16}"},
        "arms: mae: scans of phantom with spacing (4.0, 4.0, 4.0) in the pre-training, of btcv with spacing "
        "(1.5, 1.5, 2.0) in the fine-tuning: give dataset and spacing_factor under common, or allow_other_preset: true",
    ),
    ({"grid": "{finetuning: {spacing_factor: [1, 2]}}"}, "give dataset and spacing_factor under grid: common, or"),
    ({"common": "{spacing_factor: 20}"}, "--spacing_factor 20: expected a number from 0.1 to 10"),
    ({"common": "{spacing_factor: [2]}"}, "--spacing_factor [2]: expected a number from 0.1 to 10"),
    (
        {"pretraining": "{bundle: mae_vit_pretraining, warmup_epochs: 3, epochs: 3}"},
        "arms: mae: mae_vit_pretraining: --epochs 3 with --warmup_epochs 3: the learning rate would not",
    ),
    ({"labels": "{2: {warmup_epochs: 10}}"}, "arms: scratch: unetr_segmentation: --epochs 10 with --warmup_epochs 10"),
    ({"common": "{pretrained_encoder: x.pt}"}, "common: pretrained_encoder: belongs under arms: <name>: finetuning"),
    ({"finetuning": "{pretrained_encoder: x.pt}"}, "finetuning: pretrained_encoder: belongs under arms: <name>: fin"),
    ({"labels": "{2: {pretrained_encoder: x.pt}}"}, "labels: 2: pretrained_encoder: belongs under arms: <name>: fin"),
    (
        {"grid": "{finetuning: {pretrained_encoder: [x.pt]}}"},
        "grid: finetuning: pretrained_encoder: belongs under arms",
    ),
    ({"arms": "{a: {common: {pretrained_encoder: x}}}"}, "arms: a: common: pretrained_encoder: belongs under arms"),
    (
        {"arms": "{a: {finetuning: {pretrained_encoder: x.pt}}}"},
        "small.yaml: arms: a: finetuning: pretrained_encoder: /",
    ),
    ({"common": "{dataset: hipocampus}"}, "hippocampus"),
    (
        {"common": "{epochs: many}", "finetuning": "{bundle: unetr_segmentation}"},
        "epochs: 'many' for unetr_segmentation",
    ),
]


@pytest.mark.parametrize(("lines", "message"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_fault_is_one_line(study_file, phantom_dir, lines, message, record_property):
    with pytest.raises(ValueError, match="small") as error:
        read_study(study_file(**lines), phantom_dir)
    record_property("error", str(error.value))
    assert message in str(error.value)
    assert all(line.startswith("small.yaml: ") or "small.yaml: line" in line for line in str(error.value).splitlines())


def test_all_faults_together(study_file, tmp_path):
    path = study_file(seeds="[x]", labels="[a]", convergence="fast")
    with pytest.raises(SystemExit) as error:
        study(str(path), output_dir=str(tmp_path / "out"))
    lines = str(error.value).splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("error: small.yaml: ") for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "while parsing"), ("- 1", "expected keys and values"), ("", "found NoneType")],
)
def test_what_is_no_study_file(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(path)


def test_a_key_that_stands_twice_is_named_at_its_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("arms:\n  a: {}\n  b: {}\n  a: {}\n")
    with pytest.raises(ValueError, match="line 4: 'a' stands twice"):
        read_study(path)


def test_missing_files(study_file, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        read_study(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="dataset_dir: missing: give --dataset_dir"):
        read_study(study_file())
    with pytest.raises(ValueError, match="no such folder"):
        read_study(study_file(), tmp_path / "nowhere")
