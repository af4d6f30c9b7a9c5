"""What bundles share stands in one place: the templates of their YAML files; these files have none."""

import pytest
from monai.bundle import ConfigParser

from tests.common import (
    BRAIN,
    BUNDLES,
    CLASSIFICATION,
    CONVVIT_CT,
    CONVVIT_UNETR,
    MAE,
    MAE_CXR,
    MIM,
    SIMCLR,
    SIMMIM_SWIN,
    SIMMIM_VIT,
    SWIN_UNETR,
    UNETR,
    VIT_CXR,
)
from tools.configs import TEMPLATES

ALL = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/train.yaml"))
SEGMENTATION = [UNETR, CONVVIT_UNETR, SWIN_UNETR]


@pytest.mark.parametrize("name", ["LICENSE", "configs/logging.conf"])
def test_files_are_the_same(name: str) -> None:
    assert len({(BUNDLES / bundle / name).read_text(encoding="utf-8") for bundle in ALL}) == 1


@pytest.mark.parametrize("bundle", SEGMENTATION)
@pytest.mark.parametrize("name", ["evaluate.yaml", "inference.yaml", "multi_gpu_evaluate.yaml"])
def test_segmentation_bundles_differ_in_training_only(bundle: str, name: str) -> None:
    assert (TEMPLATES / bundle / name).read_text(encoding="utf-8") == f"{{% extends 'segmentation/{name}' %}}\n"


@pytest.mark.parametrize("bundle", CLASSIFICATION)
def test_classification_bundles_share_their_evaluation(bundle: str) -> None:
    for name in ("train.yaml", "evaluate.yaml", "inference.yaml"):
        text = (TEMPLATES / bundle / name).read_text(encoding="utf-8")
        assert text.startswith(f"{{% extends 'classification/{name}' %}}\n")
        assert "scores" not in text


@pytest.mark.parametrize("name", ["evaluate", "inference", "multi_gpu_evaluate", "multi_gpu_train"])
def test_brain_tumours_differ_in_the_name_of_the_data_only(name: str) -> None:
    brain, plain = ((BUNDLES / bundle / "configs" / f"{name}.yaml").read_text("utf-8") for bundle in (BRAIN, UNETR))
    assert brain == plain.replace("btcv", "msd_brain_tumour")


@pytest.mark.parametrize(
    ("pretraining", "segmentation"),
    [
        (MAE, UNETR),
        (MAE, BRAIN),
        (SIMMIM_VIT, UNETR),
        (SIMCLR, UNETR),
        (SIMMIM_SWIN, SWIN_UNETR),
        (MIM, CONVVIT_UNETR),
        (MAE_CXR, VIT_CXR),
        (MIM, CONVVIT_CT),
    ],
)
def test_encoders_of_the_demos_fit(pretraining: str, segmentation: str) -> None:
    first, second = (
        ConfigParser.load_config_files([BUNDLES / bundle / "configs" / f"{name}.yaml" for name in ("train", "demo")])
        for bundle in (pretraining, segmentation)
    )
    asked = [str(value) for value in second["check"]["encoder"]["knobs"].values()]
    knobs = [name for name in second if any(f"@{name}" in value for value in asked)]
    assert len(knobs) >= 3
    assert {name: first[name] for name in knobs} == {name: second[name] for name in knobs}
