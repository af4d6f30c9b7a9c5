"""Another downstream bundle takes a folder of configs and no Python: CONTRIBUTING's example, as it stands there."""

import re
import shutil
import sys
import textwrap
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from medmim.datasets import Preset
from tests.common import BUNDLES, TINY, UNETR
from tools import configs

NAME = "mini_unetr_segmentation"
CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's bundle, beside a copy of the templates."""
    shutil.copytree(configs.TEMPLATES, tmp_path / "templates", ignore=shutil.ignore_patterns(NAME))
    own = tmp_path / "templates" / NAME
    shutil.copytree(configs.TEMPLATES / UNETR, own)
    example = re.search(r"^ +```\n( +{% extends.*?)\n +```$", CONTRIBUTING.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert example is not None
    (own / "train.yaml").write_text(textwrap.dedent(example.group(1)) + "\n", encoding="utf-8")
    folder = tmp_path / "bundles" / NAME
    (folder / "configs").mkdir(parents=True)
    monkeypatch.setattr(configs, "TEMPLATES", tmp_path / "templates")
    monkeypatch.setattr(configs, "BUNDLES", tmp_path / "bundles")
    for path, content in configs.rendered().items():
        path.write_text(content, encoding="utf-8")
    return folder


def test_it_trains_and_evaluates(bundle: Path, phantom_dir: Path, coarse_preset: Path, tmp_path: Path) -> None:
    written = {path.name for path in (bundle / "configs").iterdir()}
    assert written == {path.name for path in (BUNDLES / UNETR / "configs").glob("*.yaml")}
    knobs = TINY | {"dataset": str(coarse_preset), "dataset_dir": str(phantom_dir), "num_workers": 0, "epochs": 1}
    knobs |= {"output_dir": str(tmp_path / "output"), "models_dir": str(tmp_path / "models"), "overlap": 0.0}
    search_path = sys.path.copy()
    with chdir(bundle):
        for names in (["train"], ["train", "evaluate"]):
            files = [f"configs/{name}.yaml" for name in names]
            workflow = ConfigWorkflow(files, workflow_type="train", logging_file=False, **knobs)
            try:
                workflow.initialize()
                workflow.run()
                workflow.finalize()
            finally:
                sys.path[:] = search_path
                set_determinism(None)
    network = workflow.parser.get_parsed_content("network_def")
    assert (len(network.vit.blocks), len(network.vit.norm.weight)) == (4, 96)  # the example's knobs
    assert (tmp_path / "models" / "model.pt").is_file()
    assert (tmp_path / "output" / "scores.csv").stat().st_size > 0


def test_presets_of_the_example() -> None:
    example = re.search(r"^```yaml\n(.*?)^```$", CONTRIBUTING.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert example is not None
    presets = {name: Preset.from_dict(name, body) for name, body in yaml.safe_load(example.group(1)).items()}
    assert presets["kits23"].label_values == [0, 1, 2, 3]
    assert presets["emphysema"].classification is not None
