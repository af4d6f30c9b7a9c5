"""Conventions that hold for every file."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".json", ".conf", ".cff", ""}
CONFIGS = sorted((ROOT / "bundles").glob("*/configs/*.yaml"))


def tracked_files() -> list[Path]:
    """Files that git knows, or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or git is missing")
    return [ROOT / name for name in names if (ROOT / name).is_file() and Path(name).suffix in TEXT]


def test_no_paths_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.$}])/(?:work|root|home|Users|mnt)/\w")
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_nothing_is_left_to_be_filled_in() -> None:
    mark = re.compile(r"@@|\bTODO\b|\bFIXME\b|\bXXX\b")
    files = [path for path in tracked_files() if path != Path(__file__).resolve()]
    assert [str(path.relative_to(ROOT)) for path in files if mark.search(path.read_text(encoding="utf-8"))] == []


def test_no_large_or_binary_files() -> None:
    for path in tracked_files():
        assert path.stat().st_size < 500_000, path
        assert b"\0" not in path.read_bytes(), path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_configs_do_not_import_the_package(path: Path) -> None:
    """An exported bundle brings its own copy, which MONAI finds only after the imports of a config."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\$\s*(?:import|from)\s+medmim", text)
    expressions = re.findall(r"\$.*", re.sub(r"#.*", "", text))
    assert not [expression for expression in expressions if "medmim." in expression]


@pytest.mark.parametrize("data", ["scans", "radiographs"])
def test_shared_knobs_are_explained_alike(data: str) -> None:
    """A knob that several bundles for one kind of data have under one name means the same in each."""
    explanations: dict[str, set[str]] = {}
    for path in (ROOT / "bundles").glob("*/configs/train.yaml"):
        if ("cxr" in path.parents[1].name) != (data == "radiographs"):
            continue
        for name, comment in re.findall(r"^(\w+): .*?  # (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            explanations.setdefault(name, set()).add(comment)
    own = {"crops_per_scan", "datalist", "dataset_dir", "learning_rate", "models_dir", "output_dir", "patch_size"}
    own |= {"compile", "roi_size", "test_fold"}  # in other words
    own |= {"decoder", "depths", "feature_size", "num_heads"}  # of another network
    assert {name: found for name, found in explanations.items() if len(found) > 1 and name not in own} == {}
