"""Segmentation bundles differ in their network only: each is complete in itself, so what they share stands in each."""

from typing import Any

import pytest
from monai.bundle import ConfigParser

from tests.common import BUNDLES, CONVVIT_UNETR, UNETR

FILES = ["evaluate.yaml", "inference.yaml", "multi_gpu_evaluate.yaml", "logging.conf"]
OWN = {  # of the network, and of its published training
    "network_def",
    "network",
    "num_heads",
    "warmup_epochs",
    "layer_decay",
    "weight_decay",
}
PARTS = {"run_with", "check"}  # compared entry by entry
OWN_CHECKS = {"switches", "knobs", "sizes", "encoder", "without_preset", "with_preset"}


@pytest.mark.parametrize("name", FILES)
def test_files_are_the_same(name: str) -> None:
    texts = [(BUNDLES / bundle / "configs" / name).read_text(encoding="utf-8") for bundle in (UNETR, CONVVIT_UNETR)]
    assert texts[0] == texts[1]


def test_training_differs_in_the_network_only() -> None:
    first, second = (
        ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "train.yaml") for bundle in (UNETR, CONVVIT_UNETR)
    )
    assert differences(first, second) - OWN == PARTS
    assert differences(first["run_with"], second["run_with"]) == set()
    assert differences(first["check"], second["check"]) - OWN_CHECKS == set()
    assert [name for name in first if name in second] == [name for name in second if name in first]


def differences(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    """Names that both have, with another content."""
    return {name for name in first.keys() & second.keys() if first[name] != second[name]}
