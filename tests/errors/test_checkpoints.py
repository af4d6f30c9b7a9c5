"""Encoders, models and checkpoints that do not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.common import CONVVIT_CT, MAE, MAE_CXR, MIM, UNETR, VIT_CXR, both, models_of, spoil


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"hidden_size": 96}, "--hidden_size 48"),
        ({"num_layers": 8}, "--num_layers 4"),
        ({"mlp_dim": 192}, "--mlp_dim 96"),
        ({"patch_size": 16, "roi_size": [16, 32, 16]}, "--patch_size 8"),
    ],
    ids=["hidden_size", "num_layers", "mlp_dim", "patch_size"],
)
def test_encoder_of_another_architecture(one_line: Callable, pretrained: Path, knobs: dict, told: str) -> None:
    path = pretrained / "models" / "encoder.pt"
    message = one_line(UNETR, pretrained_encoder=path, **knobs)
    assert message == f"--pretrained_encoder {path}: another architecture than this run's: give {told}"


def test_encoder_missing(one_line: Callable, tmp_path: Path) -> None:
    message = one_line(UNETR, pretrained_encoder=tmp_path / "encoder.pt")
    assert message.startswith(f"{tmp_path / 'encoder.pt'}: no such file")


def test_encoder_damaged(one_line: Callable, pretrained: Path, tmp_path: Path) -> None:
    path = shutil.copy(pretrained / "models" / "encoder.pt", tmp_path)
    spoil(Path(path), "truncated")
    message = one_line(UNETR, pretrained_encoder=path)
    assert message.startswith(f"{path}: not readable as a checkpoint of plain tensors (")
    assert message.endswith("): get it again")


def test_encoder_that_holds_no_vit(one_line: Callable, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(3, 4).state_dict(), path)
    message = one_line(UNETR, pretrained_encoder=path)
    assert message.startswith(f"{path}: 0 tensors are named …patch_embedding.position_embeddings")


def test_evaluation_with_other_knobs(one_line: Callable, finetuned: Path) -> None:
    models = finetuned / "models"
    message = one_line(UNETR, "train", "evaluate", models_dir=models, feature_size=8)
    assert message == f"{models / 'model.json'}: other knobs than it was trained with: give --feature_size 4"


def test_pretraining_evaluation_with_other_knobs(one_line: Callable, pretrained: Path) -> None:
    checkpoint = pretrained / "output" / "checkpoint.pt"
    message = one_line(MAE, "train", "evaluate", checkpoint=checkpoint, decoder_num_layers=2)
    assert message.startswith(f"{checkpoint}: ")
    assert "tensors do not fit a MaskedAutoencoder, first: " in message


@pytest.mark.parametrize(
    ("bundle", "config", "name"),
    [
        (UNETR, "evaluate", "models/model.json"),
        (MAE, "evaluate", "output/checkpoint.pt"),
        (MAE, "reconstruct", "output/checkpoint.pt"),
    ],
)
def test_no_training_before(one_line: Callable, tmp_path: Path, bundle: str, config: str, name: str) -> None:
    message = one_line(bundle, "train", config)
    assert message.startswith(f"{tmp_path / name}: no such file: train first")


@both
@pytest.mark.parametrize("name", ["model.json", "model.pt"])
def test_no_model_for_inference(
    one_line: Callable, tmp_path: Path, pretrained: Path, finetuned: Path, bundle: str, name: str
) -> None:
    models = shutil.copytree(models_of(bundle, pretrained, finetuned), tmp_path / "models")
    (models / name).unlink()
    assert one_line(bundle, "inference").startswith(f"{models / name}: no such file: train first")


@both
def test_dataset_for_inference_that_is_not_the_models(
    one_line: Callable, pretrained: Path, finetuned: Path, bundle: str
) -> None:
    models = models_of(bundle, pretrained, finetuned)
    message = one_line(bundle, "inference", dataset="hippocampus", models_dir=models)
    assert message == "--dataset hippocampus: the model was trained on coarse: leave --dataset away"


@both
def test_dataset_for_inference_that_is_the_models(
    run_bundle: Callable, coarse_preset: Path, pretrained: Path, finetuned: Path, tmp_path: Path, bundle: str
) -> None:
    models = models_of(bundle, pretrained, finetuned)
    run_bundle(bundle, "inference", folder=tmp_path, dataset=coarse_preset, models_dir=models)
    assert list((tmp_path / "output").rglob("*.nii.gz"))


def test_evaluation_with_other_knobs_than_training(one_line: Callable, pretrained: Path, finetuned: Path) -> None:
    checkpoint = pretrained / "output" / "checkpoint.pt"
    found = one_line(MAE, "train", "evaluate", checkpoint=checkpoint, num_heads=6)
    assert found == f"{checkpoint}: other knobs than it was trained with: give --num_heads 4"
    models = finetuned / "models"
    found = one_line(UNETR, "train", "evaluate", models_dir=models, num_heads=6)
    assert found == f"{models / 'model.json'}: other knobs than it was trained with: give --num_heads 4"


@pytest.mark.parametrize(
    ("bundle", "model", "found"),
    [
        (UNETR, "pretrained", "a FeatureExtractor, a model of pretraining, expected one of segmentation"),
        (MAE, "finetuned", "a UNETR, a model of segmentation, expected one of pretraining"),
        (MIM, "finetuned", "a UNETR, a model of segmentation, expected one of pretraining"),
        (CONVVIT_CT, "finetuned", "a UNETR, a model of segmentation, expected one of classification"),
        (CONVVIT_CT, "pretrained_cxr", "a FeatureExtractor, a model of pretraining, expected one of classification"),
        (VIT_CXR, "pretrained_cxr", "a FeatureExtractor, a model of pretraining, expected one of classification"),
        (MAE_CXR, "pretrained", "a model for images of 3 axes, expected one for radiographs, of 2"),
    ],
)
def test_model_of_another_kind_of_bundle_for_inference(
    one_line: Callable, request: pytest.FixtureRequest, tmp_path: Path, bundle: str, model: str, found: str
) -> None:
    models = request.getfixturevalue(model) / "models"
    assert one_line(bundle, "inference", models_dir=models).startswith(f"--models_dir {models}: {found}: give ")
    assert not (tmp_path / "output").exists()
