"""Bundles and their templates are in step."""

from pathlib import Path

import pytest

from tools.configs import ROOT, rendered

CONFIGS = rendered()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_configs_are_what_their_templates_give(path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    where = f"tools/templates/{path.parents[1].name}/{path.name}"
    assert text == CONFIGS[path], f"{path.relative_to(ROOT)}: change {where} and run python -m tools configs"


def test_there_are_templates() -> None:
    assert len(CONFIGS) > 20
