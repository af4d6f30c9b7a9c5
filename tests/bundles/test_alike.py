"""What bundles share stands in one place: the templates of their YAML files; these files have none."""

import pytest

from tests.common import BUNDLES, CONVVIT_UNETR, SWIN_UNETR, UNETR
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
