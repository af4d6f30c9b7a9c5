"""Lists of scans."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.common import UNETR, both


@both
def test_datalist_missing(one_line: Callable, tmp_path: Path, bundle: str) -> None:
    message = one_line(bundle, datalist=tmp_path / "list.csv")
    assert message == f"--datalist {tmp_path / 'list.csv'}: no such file"


@both
def test_listed_image_missing(one_line: Callable, data: Path, bundle: str) -> None:
    (data / "imagesTr" / "phantom_002.nii.gz").unlink()
    assert one_line(bundle, dataset_dir=data) == f"{data}/imagesTr/phantom_002.nii.gz: no such file"


@pytest.mark.parametrize("where", ["dataset.json", "imagesTr without list", "json entry", "csv"])
def test_image_without_its_label(one_line: Callable, data: Path, where: str) -> None:
    image = data / "imagesTr" / "phantom_002.nii.gz"
    label = data / "labelsTr" / "phantom_002.nii.gz"
    knobs = {"dataset_dir": data}
    if where == "json entry":
        content = json.loads((data / "dataset.json").read_text())
        del content["training"][2]["label"]
        (data / "dataset.json").write_text(json.dumps(content))
        expected = f"{data / 'dataset.json'}: entry 2 of 'training' has no 'label'"
    elif where == "csv":
        knobs["datalist"] = data / "list.csv"
        knobs["datalist"].write_text("image,label\nimagesTr/phantom_002.nii.gz,\n")
        expected = f"{data / 'list.csv'}: line 2 has no value in column 'label'"
    else:
        label.unlink()
        if where == "imagesTr without list":
            (data / "dataset.json").unlink()
        expected = f"{image}: its label {label} does not exist"
    assert one_line(UNETR, **knobs).startswith(expected)


@both
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"fold": 5}, "--fold 5 of --folds 5: fold must lie in 0 … folds - 1, and folds be 2 or more"),
        ({"fold": -1}, "--fold -1: expected a whole number of at least 0"),
        ({"folds": 1}, "--folds 1: expected a whole number of at least 2"),
    ],
    ids=["fold=5", "fold=-1", "folds=1"],
)
def test_fold_out_of_range(one_line: Callable, bundle: str, knobs: dict, message: str) -> None:
    assert one_line(bundle, **knobs) == message


@both
def test_too_few_scans(one_line: Callable, data: Path, bundle: str) -> None:
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(content | {"training": content["training"][:1]}))
    message = one_line(bundle, dataset_dir=data)
    assert "1 scans leave 0 for training and 1 for validation" in message
    assert "add scans or lower folds" in message
