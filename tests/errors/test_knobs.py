"""Knobs with values that cannot be."""

from collections.abc import Callable

import pytest

from tests.common import MAE, UNETR, both


@both
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"epochs": 2, "warmup_epochs": 2},
            "--epochs 2 with --warmup_epochs 2: the learning rate would not get beyond its warm-up: "
            "epochs must be larger, and warmup_epochs 0 or more",
        ),
        ({"learning_rate": -0.1}, "--learning_rate -0.1: expected a number of at least 0"),
    ],
    ids=["warm-up", "negative rate"],
)
def test_schedule_under_which_nothing_is_learned(one_line: Callable, bundle: str, knobs: dict, message: str) -> None:
    assert one_line(bundle, **knobs) == message


def test_layer_decay_out_of_range(one_line: Callable) -> None:
    assert one_line(UNETR, layer_decay=2) == "--layer_decay 2: expected a number from 1e-06 to 1"


def test_label_fraction_out_of_range(one_line: Callable) -> None:
    assert one_line(UNETR, label_fraction=10) == "--label_fraction 10: expected a number from 1e-06 to 1"


@both
def test_roi_not_divisible_by_the_patch(one_line: Callable, bundle: str) -> None:
    message = one_line(bundle, roi_size=[16, 20, 16])
    assert message.startswith("--roi_size [16, 20, 16] is not divisible by --patch_size 8: change one")


@both
def test_roi_with_too_few_axes(one_line: Callable, bundle: str) -> None:
    assert one_line(bundle, roi_size=[16, 16]).startswith("--roi_size [16, 16]: expected 3 numbers in voxels")


def test_patch_size_unetr_cannot_do(one_line: Callable) -> None:
    message = one_line(UNETR, patch_size=4)
    assert message == "--patch_size 4: this network needs one of 8, 16, 32, the same on each axis"


@pytest.mark.parametrize(
    ("mask_unit", "expected"),
    [
        ([12, 12, 12], "--roi_size [16, 24, 16] is not divisible by --mask_unit [12, 12, 12]"),
        ([4, 8, 8], "--mask_unit [4, 8, 8] is not a multiple of --patch_size 8"),
    ],
    ids=["roi_size", "patch_size"],
)
def test_mask_unit_that_does_not_fit(one_line: Callable, mask_unit: list[int], expected: str) -> None:
    assert one_line(MAE, mask_unit=mask_unit).startswith(expected)


@pytest.mark.parametrize(
    ("mask_ratio", "message"),
    [
        (0.99, "--mask_ratio 0.99 hides all 12 units: lower it, or take a smaller mask_unit"),
        (1.0, "--mask_ratio 1.0: expected a number from 0 to below 1"),
        (-0.1, "--mask_ratio -0.1: expected a number from 0 to below 1"),
        ("most", "--mask_ratio most: expected a number from 0 to below 1"),
    ],
)
def test_mask_ratio_that_hides_everything(one_line: Callable, mask_ratio: float, message: str) -> None:
    assert one_line(MAE, mask_ratio=mask_ratio) == message


@both
def test_switches_that_are_words(ends: Callable, bundle: str) -> None:
    switches = ["resume", "check_scans", "amp", "activation_checkpointing", "compile"]
    switches += ["normalize_target"] if bundle == MAE else ["freeze_encoder", "allow_other_preset"]
    found = ends(bundle, **dict.fromkeys(switches, "perhaps"))
    assert sorted(found) == sorted(f"--{name} perhaps: expected true or false" for name in switches)


@both
def test_every_knob_is_wrong(ends: Callable, bundle: str) -> None:
    """All are said together, each knob in one line."""
    whole = ["epochs", "batch_size", "crops_per_scan", "accumulation_steps", "val_interval", "checkpoint_interval"]
    whole += ["hidden_size", "mlp_dim", "num_layers", "num_heads", "folds", "fold", "preview_interval"]
    whole += {MAE: ["decoder_hidden_size"], UNETR: ["feature_size", "sw_batch_size"]}[bundle]
    numbers = ["learning_rate", "weight_decay", "cache_rate", "num_workers"]
    numbers += {MAE: ["mask_ratio", "flip_prob"], UNETR: ["overlap", "layer_decay", "label_fraction"]}[bundle]
    choices = ["amp_dtype", "cache"] + (["decoder", "loss_norm", "loss_region"] if bundle == MAE else [])
    sizes = ["roi_size", "patch_size"] + (["mask_unit"] if bundle == MAE else [])
    wrong = (
        dict.fromkeys(whole, 0.5)
        | dict.fromkeys([*numbers, *choices, *sizes], "some")
        | {"device": "cuda:99", "seed": -1}
    )
    wrong |= {"fold": -1, "dataset_dir": "/nowhere", "pretrained_encoder": None if bundle == MAE else "/no/encoder.pt"}
    found = ends(bundle, **{name: value for name, value in wrong.items() if value is not None})
    # a list of scans that cannot be split is not read
    expected = wrong.keys() - {"dataset_dir", "pretrained_encoder"}
    told = [line.split()[0].removeprefix("--") for line in found if line.startswith("--") and " with --" not in line]
    assert sorted(told) == sorted(expected)
    assert any(line.startswith("/no/encoder.pt: no such file") for line in found) is (bundle == UNETR)
    assert all(": " in line for line in found)


@both
def test_knobs_of_the_wrong_kind_are_reported_together(ends: Callable, bundle: str) -> None:
    found = ends(bundle, epochs=1.5, batch_size=0, num_heads=5, amp_dtype="float8", roi_size=[16, 24, 16])
    assert found == [
        "--epochs 1.5: expected a whole number of at least 1",
        "--batch_size 0: expected a whole number of at least 1",
        "--amp_dtype float8: expected auto or bfloat16 or float16",
        "--hidden_size 48: expected a multiple of 5",
    ]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"decoder": "cnn"}, "--decoder cnn: expected transformer or mlp or linear"),
        ({"loss_norm": "L1"}, "--loss_norm L1: expected l1 or l2"),
        ({"decoder_hidden_size": 20}, "--decoder_hidden_size 20: expected a multiple of 6"),
        ({"mask_ratio": 0.01}, "--mask_ratio 0.01 hides none of 12 units: there would be nothing to learn"),
    ],
    ids=["decoder", "loss_norm", "decoder_hidden_size", "mask_ratio"],
)
def test_knobs_of_pre_training(one_line: Callable, knobs: dict, message: str) -> None:
    assert one_line(MAE, **knobs) == message
