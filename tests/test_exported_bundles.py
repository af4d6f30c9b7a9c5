"""Exported bundles as a stranger meets them: a virtual environment without our package, from ``/``.

Slow. ``python -m pytest -m slow tests/test_exported_bundles.py -s`` prints every command with its output.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmim.version import __version__
from tests.common import (
    BRAIN,
    CLASSIFICATION,
    CONVVIT_CT,
    CONVVIT_UNETR,
    DEMO_KNOBS,
    MAE,
    MIM,
    RADIOGRAPHS,
    SIMMIM_SWIN,
    SWIN_UNETR,
    UNETR,
    WHOLE,
    rows,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ONNX = ("onnx==1.23.2", "onnxscript==0.7.2")  # what onnx_export needs beside torch
each = pytest.mark.parametrize("bundle", list(DEMO_KNOBS))


def options(**knobs: Any) -> list[str]:
    return [text for name, value in knobs.items() for text in (f"--{name}", str(value))]


def configs(folder: Path, *names: str) -> list[str]:
    return ["--config_file", str([str(folder / "configs" / name) for name in names]), "--bundle_root", str(folder)]


def call(command: Sequence[str], cwd: str | Path = "/", fails: bool = False, **environment: str) -> str:
    """Run a command, print it with its output, and return that; it must end well, or badly if ``fails``."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    base = {name: value for name, value in os.environ.items() if name not in hidden}
    base |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", **environment}
    print(f"\n{cwd} $ {' '.join([*(f'{name}={value}' for name, value in environment.items()), *command])}", flush=True)
    result = subprocess.run(command, cwd=cwd, env=base, capture_output=True, text=True, timeout=1800, check=False)
    output = result.stdout + result.stderr
    print(output[-3000:], flush=True)
    assert (result.returncode != 0) == fails, output[-6000:]
    return output


@pytest.fixture(scope="module")
def zips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported zip of a bundle with the weights of a short demo training; the same bytes from two processes."""
    files: dict[str, Path] = {}

    def make(bundle: str) -> Path:
        if bundle in files:
            return files[bundle]
        folder = tmp_path_factory.mktemp("trained") / bundle
        where = {"output_dir": folder / "output", "models_dir": folder / "models"}
        demo = str(["configs/train.yaml", "configs/demo.yaml"])
        run = [sys.executable, "-m", "monai.bundle", "run", "--config_file", demo]
        call([*run, *options(**where, **DEMO_KNOBS[bundle])], cwd=ROOT / "bundles" / bundle)
        weights = str(folder / "models" / "model.pt")
        found = []
        for seed in ("1", "2"):
            out = tmp_path_factory.mktemp("dist")
            command = [sys.executable, "-m", "tools", "export", bundle, "--weights", weights, "--output_dir", str(out)]
            call(command, cwd=ROOT, PYTHONHASHSEED=seed)
            found.append(out / f"{bundle}_v{__version__}.zip")
        assert found[0].read_bytes() == found[1].read_bytes()
        files[bundle] = found[0]
        return files[bundle]

    return make


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Interpreter of a fresh virtual environment with the pinned packages, and without ours."""
    folder = tmp_path_factory.mktemp("stranger")
    call([sys.executable, "-m", "venv", str(folder)])
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if "==" in line]
    schema = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if "jsonschema" in line]
    call([str(folder / "bin" / "pip"), "install", "--quiet", *pins, *schema, *ONNX])
    interpreter = str(folder / "bin" / "python")
    assert "No module named 'medmim'" in call([interpreter, "-c", "import medmim"], fails=True)
    return interpreter


@pytest.fixture
def unzipped(zips: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Unzips a bundle to a folder that the test may change: ``unzipped(bundle, "copy")``."""

    def unzip(bundle: str, where: str = "any where") -> Path:
        with zipfile.ZipFile(zips(bundle)) as archive:
            archive.extractall(tmp_path / where)
        return tmp_path / where / bundle

    return unzip


@each
def test_train_evaluate_infer(bundle: str, python: str, unzipped: Callable[..., Path], tmp_path: Path) -> None:
    mine, shipped = unzipped(bundle, "mine"), unzipped(bundle, "as shipped")
    run = [python, "-m", "monai.bundle", "run"]
    demo = ("train.yaml", "demo.yaml")
    output = call([*run, *configs(mine, *demo), *options(**DEMO_KNOBS[bundle], seed=1)])
    assert "epoch 2/2: train_loss" in output
    assert (mine / "models" / "model.pt").read_bytes() != (shipped / "models" / "model.pt").read_bytes()
    call([*run, *configs(mine, *demo, "evaluate.yaml"), *options(**DEMO_KNOBS[bundle])])

    data = mine / "output" / ("phantom_radiographs" if bundle in RADIOGRAPHS else "phantom")
    if bundle in (UNETR, BRAIN, CONVVIT_UNETR, SWIN_UNETR, *CLASSIFICATION):
        scores = "scores_validation/scores.csv" if bundle in CLASSIFICATION else "scores.csv"
        assert (mine / "output" / scores).stat().st_size > 0
        # train.json has the knobs of the weights as defaults
        call([*run, *configs(shipped, "train.json", "evaluate.yaml"), *options(dataset_dir=data, num_workers=0)])
        assert (shipped / "output" / scores).stat().st_size > 0
    images = data / ("images" if bundle in WHOLE else "imagesTr")
    for name in ("inference.json", "inference.yaml"):
        folder = tmp_path / name
        call([*run, *configs(shipped, name), *options(dataset_dir=images, output_dir=folder)])
        if bundle in CLASSIFICATION:
            assert len(rows(folder / "probabilities.csv")) == len(list(images.iterdir()))
            continue
        written = sorted(folder.glob("*.nii.gz"))
        assert len(written) == len(list(images.iterdir()))
        assert all(np.isfinite(np.asarray(nib.load(path).dataobj)).all() for path in written)


@each
def test_two_processes(bundle: str, python: str, unzipped: Callable[..., Path]) -> None:
    folder = unzipped(bundle)
    before = (folder / "models" / "model.pt").read_bytes()
    torchrun = [str(Path(python).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    files = configs(folder, "train.yaml", "demo.yaml", "multi_gpu_train.yaml")
    knobs = DEMO_KNOBS[bundle] | {"folds": 3 if bundle in WHOLE else 2}  # these keep a part for testing
    output = call([*torchrun, "-m", "monai.bundle", "run", *files, *options(**knobs)])
    assert output.count("epoch 2/2: train_loss") == 1
    assert (folder / "models" / "model.pt").read_bytes() != before


LOAD = """
import sys, torch
from monai.bundle import load
folder = sys.argv[1]
for bundle in sys.argv[2:]:
    for kind in ("train", "inference"):
        network = load(bundle, bundle_dir=folder, workflow_type=kind)
        weights = torch.load(f"{folder}/{bundle}/models/model.pt", weights_only=True)
        found = network.state_dict()
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
        print(f"{bundle}, {kind}: {type(network).__module__}.{type(network).__name__}, {len(weights)} tensors")
"""


@each
def test_download_and_load(bundle: str, python: str, zips: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    where = options(name=bundle, url=zips(bundle).as_uri(), bundle_dir=folder)
    call([python, "-m", "monai.bundle", "download", *where])
    assert (folder / bundle / "configs" / "train.json").is_file()
    load = [python, "-c", LOAD, str(folder), bundle]
    if bundle in (UNETR, SWIN_UNETR):  # MONAI's own class: nothing on the path
        assert "inference: monai.networks.nets." in call(load)
    else:
        assert "medmim" in call(load, fails=True)
        assert "inference: medmim.networks" in call(load, PYTHONPATH=str(folder / bundle))


def test_two_bundles_in_one_process(python: str, unzipped: Callable[..., Path]) -> None:
    first, second = unzipped(MAE), unzipped(UNETR)
    load = [python, "-c", LOAD, str(first.parent), MAE, UNETR]
    call(load, PYTHONPATH=os.pathsep.join([str(second), str(first)]))

    newer = "9.8.7"  # as a later package would export it
    for path in [*(first / "configs").glob("*.json"), *(first / "configs").glob("*.yaml"), first / "medmim/version.py"]:
        path.write_text(
            path.read_text().replace(f'"{__version__}"', f'"{newer}"').replace(f"'{__version__}'", f"'{newer}'")
        )
    output = call(load, fails=True, PYTHONPATH=os.pathsep.join([str(second), str(first)]))
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{MAE} brings medmim {newer} ({first / 'medmim'})" in line
    assert f"medmim {__version__} of {second / 'medmim'}" in line
    assert "Traceback" not in output
    call(load, PYTHONPATH=os.pathsep.join([str(first), str(second)]))  # the other's class is MONAI's: both load


@each
def test_bundle_commands(bundle: str, python: str, unzipped: Callable[..., Path], tmp_path: Path) -> None:
    """As the model zoo runs them, inside the bundle's folder."""
    folder = unzipped(bundle)
    command = [python, "-m", "monai.bundle"]
    meta = ["--meta_file", "configs/metadata.json"]
    for name in ("inference.json", "train.json"):
        output = call([*command, "verify_net_in_out", "network_def", *meta, "--config_file", f"configs/{name}"], folder)
        assert "data shape of network is verified with no error" in output
    network = ["network_def", "--ckpt_file", "models/model.pt", *meta, "--config_file", "configs/inference.json"]
    script = ["ckpt_export", *network, "--filepath", "models/model.ts"]
    if bundle in (MIM, CONVVIT_UNETR, SWIN_UNETR, SIMMIM_SWIN, CONVVIT_CT):
        size = json.loads(DEMO_KNOBS[bundle]["roi_size"])
        script += options(use_trace=True, input_shape=[1, 1, *size])
    call([*command, *script], folder)
    call([*command, "onnx_export", *network, "--filepath", "models/model.onnx"], folder)
    compare = """
import json, numpy, onnx, torch
from onnx.reference import ReferenceEvaluator
about = json.load(open("configs/metadata.json"))["network_data_format"]["inputs"]["image"]
image = torch.rand(1, about["num_channels"], *about["spatial_shape"])
script = torch.jit.load("models/model.ts")
from monai.bundle import load
network = load(".", bundle_dir=".", workflow_type="inference").eval()
with torch.no_grad():
    expected = network(image)
    torch.testing.assert_close(script(image), expected, rtol=1e-4, atol=1e-4)
onnx.checker.check_model("models/model.onnx")
graph = onnx.load("models/model.onnx").graph
found = ReferenceEvaluator("models/model.onnx").run(None, {graph.input[0].name: image.numpy()})[0]
numpy.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
print("outputs equal;", len(graph.node), "ONNX nodes")
"""
    assert "outputs equal" in call([python, "-c", compare], folder)
    data = os.environ.get("MEDMIM_TEST_DATA")
    if not data:
        pytest.skip("MEDMIM_TEST_DATA is not set: the schema of metadata.json lies there")
    schema = shutil.copy(Path(data) / "schema" / "meta_schema_20240725.json", tmp_path / "schema.json")
    output = call([*command, "verify_metadata", *meta, "--filepath", str(schema)], folder)
    assert "metadata is verified with no error" in output
    broken = json.loads((folder / "configs" / "metadata.json").read_text())
    broken.pop("task")
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    check = [*command, "verify_metadata", "--meta_file", str(tmp_path / "broken.json"), "--filepath", str(schema)]
    assert "Failed validating" in call(check, folder, fails=True)
