"""Unknown knobs on the command line of ``python -m monai.bundle run``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medmim.command_line import check_command_line
from tests.common import BUNDLES, MAE, UNETR

PROGRAM = "/somewhere/monai/bundle/__main__.py"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What is wrong with the arguments after ``run --config_file configs/train.yaml``."""

    def check(*arguments: str, config: str = "configs/train.yaml", bundle: str = UNETR) -> list[str]:
        monkeypatch.chdir(BUNDLES / bundle)
        given = ["--config_file", config] if config else []
        try:
            check_command_line([PROGRAM, "run", *given, *arguments])
        except ValueError as error:
            return str(error).splitlines()
        return []

    return check


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epohcs", "5"], "--epohcs 5: no such knob (did you mean --epochs"),
        (["--epohcs=5"], "--epohcs 5: no such knob (did you mean --epochs"),
        (["-epohcs", "5"], "--epohcs 5: no such knob (did you mean --epochs"),
        (["--learning-rte", "0.1"], "--learning_rte 0.1: no such knob (did you mean --learning_rate"),
        (["--resum"], "--resum True: no such knob (did you mean --resume"),
        (["--xyzzy", "5"], "--xyzzy 5: no such knob: the knobs stand at the top of the config files"),
        (["--trian#trainer#max_epochs", "5"], "--trian#trainer#max_epochs 5: no such knob"),
        (["--train::traner::max_epochs", "5"], "--train::traner::max_epochs 5: no such knob"),
        (["--roi_sise", "[8, 8, 8]"], "--roi_sise [8, 8, 8]: no such knob (did you mean --roi_size"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_unknown(faults: Callable, record_property: Callable, arguments: list[str], expected: str) -> None:
    (found,) = faults(*arguments)
    record_property("error", found)
    assert found.startswith(expected)
    assert found.endswith(": the knobs stand at the top of the config files")


def test_all_are_named(faults: Callable) -> None:
    found = faults("--epohcs", "5", "--fold", "-1", "--seeed=3")
    assert [line.split(":")[0] for line in found] == ["--epohcs 5", "--seeed 3"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--epochs", "5", "--roi_size", "[8, 8, 8]"],
        ["--epochs=5"],
        ["--learning-rate", "0.1"],
        ["--resume"],
        ["--fold", "-1"],
        ["--dataset", "a=b"],
        ["--dataset", "--"],
        ["--train#trainer#max_epochs", "5"],
        ["--train::trainer::max_epochs", "5"],
        ["--train::trainer::epoch_length", "5"],  # an argument that the config does not give
        ["--network_def#norm_name", "batch"],
        ["--_meta_#version", "1"],
        ["--run_id", "run", "--init_id", "initialize", "--final_id", "finalize"],
        ["--meta_file", "configs/metadata.json", "--logging_file", "configs/logging.conf"],
        ["--tracking", "mlflow"],
        ["--tracking", "mlflow", "--experiment_name", "mine", "--run_name", "first", "--tracking_uri", "there"],
    ],
    ids=" ".join,
)
def test_known(faults: Callable, arguments: list[str]) -> None:
    assert faults(*arguments) == []


def test_keys_of_tracking_need_tracking(faults: Callable) -> None:
    assert len(faults("--experiment_name", "mine")) == 1


def test_keys_of_a_tracking_file(faults: Callable, tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text(json.dumps({"handlers_id": {}, "configs": {"project": "a"}}))
    assert faults("--tracking", str(tmp_path / "tracking.json"), "--project", "b") == []
    assert len(faults("--tracking", str(tmp_path / "tracking.json"), "--projekt", "b")) == 1


def test_knobs_of_an_override_file(faults: Callable) -> None:
    files = "['configs/train.yaml','configs/demo.yaml']"
    assert faults("--phantom_cases", "5", config=files) == []
    assert len(faults("--phantom_cases", "5")) == 1
    assert faults("--phantom_cases", "5", config="configs/train.yaml,configs/demo.yaml") == []
    assert faults("--mask_ratio", "0.5", bundle=MAE) == []
    assert len(faults("--mask_ratio", "0.5")) == 1


def test_file_of_arguments(faults: Callable, tmp_path: Path) -> None:
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({"config_file": "configs/train.yaml", "epohcs": 5, "seed": 3}))
    (found,) = faults("--args_file", str(path), config="")
    assert found.startswith("--epohcs 5: no such knob (did you mean --epochs")
    path.write_text(json.dumps({"epochs": 5, "config_file": "configs/train.yaml"}))
    assert faults("--args_file", str(path), config="") == []
    assert len(faults("--args_file", str(path), "--seeed", "3", config="")) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["/usr/bin/pytest", "--epohcs", "5"],
        ["/somewhere/torch/distributed/run.py", "--nproc_per_node", "2"],
        [PROGRAM],
        [PROGRAM, "download", "--nmae", "x"],
        [PROGRAM, "run", "--epohcs", "5"],  # without a config file, MONAI says so
        ["-c"],
        [""],
    ],
    ids=" ".join,
)
def test_nothing_is_checked_for_another_program(argv: list[str]) -> None:
    check_command_line(argv)


def test_the_process_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLES / UNETR)
    monkeypatch.setattr("sys.argv", [PROGRAM, "run", "--config_file", "configs/train.yaml", "--epohcs", "5"])
    with pytest.raises(ValueError, match=r"^--epohcs 5: no such knob"):
        check_command_line()


def test_nothing_is_written_with_a_dollar(faults: Callable, record_property: Callable) -> None:
    """MONAI's runner drops a plain ``None``, so that the file's value would stay."""
    (found,) = faults("--label_fraction", "None")
    record_property("error", found)
    assert found == "--label_fraction None: left out by MONAI's runner: on the command line write '$None'"
    (found,) = faults("--pretrained_encoder", "null")
    assert found == "--pretrained_encoder null: read as a word: on the command line write '$None'"
    assert faults("--pretrained_encoder", "None") == []  # what the file says as well
    assert faults("--label_fraction", "$None") == []
