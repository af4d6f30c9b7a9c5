"""Checks before a run, one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from medmim import checks, commands
from medmim.datasets import Preset, get_preset
from medmim.weights import save_encoder

SIZE = (16, 24, 8)


def faults_of(check: Callable, *args: Any, **knobs: Any) -> list[str]:
    try:
        check(*args, **knobs)
    except ValueError as error:
        return str(error).splitlines()
    return []


# ------------------------------------------------------------------------------------------------------------- knobs


@pytest.mark.parametrize("value", [True, False, "true", "false"])
def test_switches(value: Any) -> None:
    assert faults_of(checks.check_switches, resume=value) == []


def test_all_wrong_switches_are_named() -> None:
    found = faults_of(checks.check_switches, amp="True", compile=None, resume=True, check_scans="no", a=[True])
    wrong = ("amp True", "compile None", "check_scans no", "a [True]")
    assert found == [f"--{name}: expected true or false" for name in wrong]


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None, [1, 2, 3]])
def test_whole_numbers(value: Any) -> None:
    assert faults_of(checks.check_knobs, whole={"epochs": value}) == [
        f"--epochs {value}: expected a whole number of at least 1"
    ]
    assert faults_of(checks.check_knobs, whole={"epochs": 1, "fold": [0, 0]}) == []
    assert faults_of(checks.check_knobs, whole={"folds": [1, 2]}) == [
        "--folds 1: expected a whole number of at least 2"
    ]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, None])
def test_numbers(value: Any) -> None:
    assert faults_of(checks.check_knobs, numbers={"rate": [value, 0, 1]}) == [
        f"--rate {value}: expected a number from 0 to 1"
    ]
    assert faults_of(checks.check_knobs, numbers={"rate": [0, 0, 1], "other": [1, 0, 1]}) == []


def test_numbers_without_an_upper_end() -> None:
    assert faults_of(checks.check_knobs, numbers={"rate": [1e30, 0, float("inf")]}) == []
    assert faults_of(checks.check_knobs, numbers={"rate": [-1, 0, float("inf")]}) == [
        "--rate -1: expected a number of at least 0"
    ]


def test_all_knobs_are_reported_together() -> None:
    found = faults_of(
        checks.check_knobs,
        whole={"epochs": 0, "batch_size": 1.5},
        numbers={"overlap": [2, 0, 0.99]},
        one_of={"cache": ["ram", "memory", "disk"]},
        divisible={"hidden_size": [10, 4], "other": [12, 4], "wrong": ["a", 4], "nothing": [3, 0]}
        | {"roi_size": [[32, 40], 16], "crop_size": [[32, 48], 16], "words": [["a", 4], 4]},
    )
    assert found == [
        "--epochs 0: expected a whole number of at least 1",
        "--batch_size 1.5: expected a whole number of at least 1",
        "--overlap 2: expected a number from 0 to 0.99",
        "--cache ram: expected memory or disk",
        "--hidden_size 10: expected a multiple of 4",
        "--roi_size [32, 40]: expected multiples of 16",
    ]


@pytest.mark.parametrize(("epochs", "warmup", "good"), [(2, 1, True), (1, 0, True), (2, 2, False), (2, -1, False)])
def test_schedule(epochs: int, warmup: int, good: bool) -> None:
    assert (faults_of(checks.check_schedule, epochs, warmup) == []) is good


def test_schedule_leaves_wrong_epochs_to_the_other_check() -> None:
    assert faults_of(checks.check_schedule, "many", 1) == []
    assert len(faults_of(checks.check_schedule, 5, "few")) == 1


ODD = [None, "some", 0, -8, 8.0, True, [8], [8, 8, "8"], [8, 8, 8, 8], {}, (8, 0, 8)]


@pytest.mark.parametrize("value", ODD, ids=str)
def test_sizes_that_are_none(value: Any) -> None:
    good = {"roi_size": [16, 16, 16], "patch_size": 8, "mask_unit": 8, "mask_ratio": 0.5}
    assert faults_of(checks.check_sizes, **good) == []
    for name in ("roi_size", "patch_size", "mask_unit"):
        found = faults_of(checks.check_sizes, **good | {name: value})
        if name == "mask_unit" and value is None:
            assert found == []
        else:
            (line,) = found
            assert line.startswith(f"--{name} {value}: expected "), name


@pytest.mark.parametrize("value", ["some", 1, -0.5, [0.5], float("nan"), True], ids=str)
def test_mask_ratio_that_is_none(value: Any) -> None:
    found = faults_of(checks.check_sizes, [16, 16, 16], 8, mask_ratio=value)
    assert found == [f"--mask_ratio {value}: expected a number from 0 to below 1"]


def test_sizes_are_reported_together() -> None:
    found = faults_of(checks.check_sizes, "big", "small", mask_unit="none", mask_ratio=2)
    assert [line.split()[0] for line in found] == ["--roi_size", "--patch_size", "--mask_unit", "--mask_ratio"]


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "gpu", "cpu:x"])
def test_device_that_is_not_there(device: str, record_property: Callable) -> None:
    (found,) = faults_of(checks.check_device, device)
    record_property("error", found)
    assert found.startswith(f"--device {device}: not usable (")
    assert "): expected cpu" in found
    assert faults_of(checks.check_device, "cpu") == faults_of(checks.check_device, torch.device("cpu")) == []


# -------------------------------------------------------------------------------------------------------------- data


def test_data_and_folders_are_reported_together(tmp_path: Path, phantom_dir: Path) -> None:
    (tmp_path / "file").touch()
    folders = [tmp_path / "file" / "a", tmp_path / "good", tmp_path / "file" / "b"]
    found = faults_of(checks.check_data, get_preset("phantom"), str(tmp_path / "nowhere"), folders)
    assert [line.split(" is not")[0] for line in found] == [
        f"folder {folders[0]}",
        f"folder {folders[2]}",
        f"--dataset_dir {tmp_path / 'nowhere'}: no such folder",
    ]
    assert (tmp_path / "good").is_dir()
    assert list((tmp_path / "good").iterdir()) == []  # the first folder alone is marked as one of results
    assert faults_of(checks.check_data, get_preset("phantom"), str(phantom_dir), [tmp_path / "good"]) == []


@pytest.mark.parametrize("knobs", [{"fold": "a"}, {"folds": None}, {"fold": -1}, {"label_fraction": "b"}], ids=str)
def test_split_with_wrong_numbers_is_left_to_the_other_check(phantom_dir: Path, knobs: dict) -> None:
    assert faults_of(checks.check_data, get_preset("phantom"), str(phantom_dir), [], **knobs) == []


def test_each_process_needs_a_scan_for_validation(phantom_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    assert faults_of(checks.check_data, get_preset("phantom"), str(phantom_dir), []) == []
    monkeypatch.setattr(idist, "get_world_size", lambda: 3)
    (found,) = faults_of(checks.check_data, get_preset("phantom"), str(phantom_dir), [])
    assert found.startswith(f"--dataset_dir {phantom_dir}: 2 scans for validation by 3 processes: each needs one")


# ----------------------------------------------------------------------------------------------------------- encoders


@pytest.fixture
def encoder(tmp_path: Path, tiny_vit: Callable, preset: Preset) -> Path:
    save_encoder(tmp_path / "encoder.pt", tiny_vit(), SIZE, preset)
    return tmp_path / "encoder.pt"


def test_encoder_that_fits(encoder: Path, preset: Preset) -> None:
    knobs = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 8, "unheard_of": 3}
    assert faults_of(checks.check_encoder, str(encoder), preset, False, knobs) == []
    assert faults_of(checks.check_encoder, str(encoder), preset, False, knobs | {"patch_size": [8, 8, 8]}) == []
    assert faults_of(checks.check_encoder, None, preset) == faults_of(checks.check_encoder, "", preset) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"window": (0.0, 1.0)}, "window [-175.0, 250.0] (this run [0.0, 1.0])"),
        ({"spacing": (1.0, 1.0, 1.0)}, "spacing [4.0, 4.0, 4.0] (this run [1.0, 1.0, 1.0])"),
        ({"channels": ("T1", "T2")}, "channels ['CT'] (this run ['T1', 'T2'])"),
        ({"window": None, "z_score": "all"}, "window [-175.0, 250.0] (this run None), z_score None (this run all)"),
    ],
    ids=["window", "spacing", "channels", "z_score"],
)
def test_encoder_of_another_preset(
    encoder: Path, preset: Preset, record_property: Callable, change: dict, told: str
) -> None:
    other = replace(preset, name="mine", **change)
    (found,) = faults_of(checks.check_encoder, str(encoder), other)
    record_property("error", found)
    assert found == (
        f"--pretrained_encoder {encoder}: pre-trained with preset phantom: {told}: "
        f"prepare the scans alike (--dataset{', --spacing_factor' if 'spacing' in change else ''}), "
        "or give --allow_other_preset true"
    )
    for allowed in (True, "true"):
        assert faults_of(checks.check_encoder, str(encoder), other, allowed) == []
    assert len(faults_of(checks.check_encoder, str(encoder), other, "false")) == 1


def test_labels_and_region_may_differ(encoder: Path, preset: Preset) -> None:
    other = replace(preset, name="mine", labels={1: "liver"}, roi_size=(32, 32, 32), crop_foreground=False)
    assert faults_of(checks.check_encoder, str(encoder), other) == []


def test_encoder_of_other_knobs_and_preset(encoder: Path, preset: Preset) -> None:
    knobs = {"hidden_size": 48, "num_layers": 2, "patch_size": 16}
    first, second = faults_of(checks.check_encoder, encoder, replace(preset, window=(0.0, 1.0)), False, knobs)
    assert ": pre-trained with preset phantom: window " in first
    assert second == (
        f"--pretrained_encoder {encoder}: another architecture than this run's: give --hidden_size 24 --patch_size 8"
    )


def test_encoder_of_another_class(encoder: Path, preset: Preset) -> None:
    knobs = {"num_heads": [3, 6, 12, 24]}
    (found,) = faults_of(checks.check_encoder, encoder, preset, False, knobs, "SwinTransformer")
    assert found == (
        f"--pretrained_encoder {encoder}: holds a ViT, but this network's encoder is a SwinTransformer: "
        "give a file of a SwinTransformer"
    )
    assert faults_of(checks.check_encoder, encoder, preset, False, {}, "ViT") == []


def test_encoder_with_knobs_under_other_names(tmp_path: Path, preset: Preset) -> None:
    swin = SwinTransformer(1, 12, (2, 2, 2), (2, 2, 2), (1, 1, 1, 1), (1, 2, 3, 4))
    save_encoder(tmp_path / "swin.pt", swin, SIZE, preset)
    knobs = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4], "window_size": 2, "use_v2": True}
    (found,) = faults_of(checks.check_encoder, tmp_path / "swin.pt", preset, False, knobs)
    assert found == (
        f"--pretrained_encoder {tmp_path / 'swin.pt'}: another architecture than this run's: "
        'give --feature_size 12 --depths "[1, 1, 1, 1]" --use_v2 False'
    )


def test_foreign_checkpoint_is_left_to_the_loader(tmp_path: Path, preset: Preset, tiny_vit: Callable) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "foreign.pt")
    assert faults_of(checks.check_encoder, tmp_path / "foreign.pt", preset, False, {"hidden_size": 7}) == []


def test_encoder_of_scans_that_were_scaled_by_their_range(tmp_path: Path, preset: Preset, tiny_vit: Callable) -> None:
    """A description without the field says that they were not."""
    ranged = replace(preset, window=None, min_max=True)
    path = tmp_path / "encoder.pt"
    for theirs, ours, told in (
        (preset, ranged, "window [-175.0, 250.0] (this run None), min_max False (this run True)"),
        (ranged, preset, "window None (this run [-175.0, 250.0]), min_max True (this run False)"),
    ):
        save_encoder(path, tiny_vit(), SIZE, theirs)
        (found,) = faults_of(checks.check_encoder, path, ours)
        assert found.startswith(f"--pretrained_encoder {path}: pre-trained with preset phantom: {told}: prepare")
        assert faults_of(checks.check_encoder, path, theirs) == []
        assert faults_of(checks.check_encoder, path, ours, True) == []


def test_missing_encoder(tmp_path: Path, preset: Preset) -> None:
    (found,) = faults_of(checks.check_encoder, tmp_path / "no.pt", preset)
    assert found.startswith(f"{tmp_path / 'no.pt'}: no such file")


# ------------------------------------------------------------------------------------------------------- ending a run


def test_faults_of_all_checks_end_the_run_together() -> None:
    commands.refuse([[], None, []])
    with pytest.raises(SystemExit) as ending:
        commands.refuse([["--a 1: wrong"], None, ["--b 2: wrong", "--a 1: wrong"], ["--c 3: wrong"]])
    assert ending.value.code == "error: --a 1: wrong\nerror: --b 2: wrong\nerror: --c 3: wrong"


def test_faults_of_all_processes_are_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each process sees its own scans."""
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_gather", lambda own: [own, [["of both", "of the other"]]])
    monkeypatch.setattr(idist, "barrier", lambda: None)
    for rank, expected in ((0, "error: of both\nerror: of the other\n"), (1, "")):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        with pytest.raises(SystemExit) as ending:
            commands.refuse([["of both"]])
        assert ending.value.code == 1
        assert capsys.readouterr().err == expected


def test_check_becomes_a_list_of_lines() -> None:
    @commands.lists_faults
    def check(error: Exception | None) -> None:
        if error is not None:
            raise error

    assert check(None) == []
    assert check(ValueError("one\ntwo")) == ["one", "two"]
    assert check(FileNotFoundError(2, "No such file")) == ["[Errno 2] No such file"]
    with pytest.raises(KeyError):
        check(KeyError("a bug is not a fault of the user"))
