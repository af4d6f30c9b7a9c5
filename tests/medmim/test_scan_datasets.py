"""Cached and reproducible datasets of scans."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    Invertd,
    MapTransform,
    Orientationd,
    RandFlipd,
    RandGaussianNoised,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
    Spacingd,
)

from medmim.datalists import Item
from medmim.datasets import get_preset
from medmim.scan_datasets import (
    DiskCacheDataset,
    SeededDataset,
    estimate_cache_bytes,
    make_dataset,
    resampled_size,
)
from medmim.transforms import LoadScand

CACHES = ["memory", "disk", "none"]
loaded: list[str] = []


class CountLoads(MapTransform):
    """Remembers the scans that pass."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        loaded.append(data["image"].meta["filename_or_obj"])
        return data


def transforms(window: float = 250.0, spacing: float = 8.0, random: bool = True) -> Compose:
    steps = [
        LoadScand("image"),
        CountLoads("image"),
        Orientationd("image", axcodes="RAS"),
        Spacingd("image", pixdim=(spacing,) * 3),
        CropForegroundd("image", source_key="image", select_fn=above, allow_smaller=True),
        ScaleIntensityRanged("image", -175.0, window, 0.0, 1.0, clip=True),
    ]
    drawn = [
        RandSpatialCropSamplesd("image", (16, 16, 16), num_samples=2, random_size=False),
        RandFlipd("image", 0.5, 0),
        RandGaussianNoised("image", prob=0.5),
    ]
    return Compose(steps + (drawn if random else []))


def above(image: torch.Tensor) -> torch.Tensor:
    return image > -175.0


@pytest.fixture(autouse=True)
def _no_loads_yet() -> None:
    loaded.clear()


@pytest.fixture
def items(phantom_dir: Path) -> list[Item]:
    return [{"image": str(path)} for path in sorted((phantom_dir / "imagesTr").iterdir())[:3]]


@pytest.fixture
def own_items(items: list[Item], tmp_path: Path) -> list[Item]:
    """Copies that a test may change."""
    (tmp_path / "scans").mkdir()
    return [{"image": str(shutil.copy(item["image"], tmp_path / "scans"))} for item in items]


def cached(items: list[Item], folder: Path, cache: str = "disk", **knobs: Any) -> SeededDataset:
    knobs = {"transform": transforms(), "seed": 5} | knobs
    return make_dataset(items, cache=cache, cache_dir=folder / "cache", **knobs)


def crops_of(dataset: SeededDataset, epoch: int) -> list[torch.Tensor]:
    dataset.set_epoch(epoch)
    return [crop["image"].as_tensor() for index in range(len(dataset)) for crop in dataset[index]]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# ------------------------------------------------------------------------------------------------ what a sample draws


def test_a_sample_does_not_depend_on_cache_workers_or_order(items: list[Item], tmp_path: Path) -> None:
    expected = {epoch: crops_of(cached(items, tmp_path, "none"), epoch) for epoch in (1, 2, 3)}
    for cache in CACHES:
        dataset = cached(items, tmp_path, cache)
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        for epoch in (3, 1):
            assert equal(crops_of(dataset, epoch), expected[epoch]), (cache, epoch)
        dataset.set_epoch(2)
        last = [crop["image"].as_tensor() for crop in dataset[2]]
        assert equal(last, expected[2][4:])
    assert not any(torch.equal(a, b) for a in expected[1] for b in expected[2] + expected[3])
    assert not any(torch.equal(a, b) for i, a in enumerate(expected[1]) for b in expected[1][:i])
    assert not equal(expected[1], crops_of(cached(items, tmp_path, "none", seed=6), 1))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_sees_the_epoch(items: list[Item], tmp_path: Path, cache: str, num_workers: int) -> None:
    dataset = cached(items, tmp_path, cache)
    loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, persistent_workers=num_workers > 0)
    try:
        for epoch in (1, 2, 3, 2):
            dataset.set_epoch(epoch)
            found = [crop for batch in loader for crop in batch["image"].as_tensor()]
            assert equal(found, crops_of(cached(items, tmp_path, "memory"), epoch)), epoch
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


def test_unknown_cache(items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--cache ram: expected memory or disk or none$"):
        cached(items, tmp_path, "ram")


# ------------------------------------------------------------------------------------------------- the cache on disk


def keys_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache").iterdir()}


def test_second_run_reads_the_cache(items: list[Item], tmp_path: Path) -> None:
    first = crops_of(cached(items, tmp_path), 1)
    assert loaded == [item["image"] for item in items]
    dataset = cached(items, tmp_path)
    assert equal(crops_of(dataset, 1), first)
    crops_of(dataset, 2)
    assert len(loaded) == len(items)
    assert len(keys_of(tmp_path)) == len(items)


KEYS_OF_A_BUNDLE = """\
import sys
from monai.bundle import ConfigParser
from medmim.scan_datasets import DiskCacheDataset
parser = ConfigParser(ConfigParser.load_config_file("bundles/mae_vit_pretraining/configs/train.yaml"))
parser.update({"dataset": "phantom"})
keys = [
    DiskCacheDataset([], parser.get_parsed_content(f"{part}::preprocessing"), sys.argv[1]).transform_hash
    for part in ("train", "validate")
]
print(*keys)
"""


def test_run_in_another_process_finds_the_same_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Keys must not depend on the seed of Python's hashes."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    exec(KEYS_OF_A_BUNDLE, {})
    here = capsys.readouterr().out.split()
    command = [sys.executable, "-c", KEYS_OF_A_BUNDLE, str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split()[-2:] == here
    assert here[0] != here[1]


@pytest.mark.parametrize("change", ["time", "size"])
def test_changed_file_is_prepared_again(own_items: list[Item], tmp_path: Path, change: str) -> None:
    before = crops_of(cached(own_items, tmp_path), 1)
    path = Path(own_items[1]["image"])
    stat = path.stat()
    if change == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    else:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.float32(20), image.affine), path)
        assert path.stat().st_size != stat.st_size
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = crops_of(cached(own_items, tmp_path), 1)
    assert loaded == [*(item["image"] for item in own_items), str(path)]
    assert len(keys_of(tmp_path)) == 4
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, *[change == "time"] * 2] + (
        [True] * 2
    )


@pytest.mark.parametrize("knobs", [{"window": 300.0}, {"spacing": 9.0}], ids=["window", "spacing"])
def test_changed_transform_is_prepared_again(items: list[Item], tmp_path: Path, knobs: dict) -> None:
    crops_of(cached(items, tmp_path), 1)
    other = crops_of(cached(items, tmp_path, transform=transforms(**knobs)), 1)
    assert len(loaded) == len(keys_of(tmp_path)) == 2 * len(items)
    assert equal(other, crops_of(cached(items, tmp_path, "none", transform=transforms(**knobs)), 1))


def test_changed_preset_and_region_are_prepared_again(coarse_preset: Path, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    def key(**knobs: Any) -> str:
        config = Path(__file__).resolve().parents[2] / "bundles" / "unetr_segmentation" / "configs" / "train.yaml"
        parser = ConfigParser(ConfigParser.load_config_file(str(config)))
        parser.update({"dataset": str(coarse_preset)} | knobs)
        transform = parser.get_parsed_content("train::preprocessing")
        return DiskCacheDataset([], transform, tmp_path).transform_hash

    other = tmp_path / "coarse.yaml"
    other.write_text(coarse_preset.read_text().replace("250.0", "251.0"))
    assert key() == key()
    assert len({key(), key(dataset=str(other)), key(dataset="phantom"), key(roi_size=[24, 24, 16])}) == 4
    assert key(crops_per_scan=7) == key()  # random transforms are not cached


def test_other_versions_are_prepared_again(items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crops_of(cached(items, tmp_path), 1)
    monkeypatch.setattr("medmim.scan_datasets.__version__", "99.0.0")
    crops_of(cached(items, tmp_path), 1)
    monkeypatch.setattr("medmim.scan_datasets.monai_version", "99.0.0")
    crops_of(cached(items, tmp_path), 1)
    assert len(keys_of(tmp_path)) == 3 * len(items)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "other content"])
def test_damaged_cache_file_is_made_again(
    items: list[Item], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = crops_of(cached(items, tmp_path), 1)
    path = sorted((tmp_path / "cache").iterdir())[0]
    content = path.read_bytes()
    if damage == "other content":
        torch.save({"image": slice(3)}, path)  # weights_only refuses it
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"no" * 99}[damage])
    with caplog.at_level(logging.WARNING, "medmim"):
        assert equal(crops_of(cached(items, tmp_path), 1), expected)
    assert len(loaded) == len(items) + 1
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{path}: not readable (")
    assert message.endswith("), made again")
    assert equal(crops_of(cached(items, tmp_path), 1), expected)
    assert len(loaded) == len(items) + 1
    assert path.stat().st_size == len(content)


def test_two_processes_share_a_cache(items: list[Item], tmp_path: Path) -> None:
    """Workers that prepare the same scan at once leave whole files only."""
    loader = DataLoader(cached(items[:1] * 6, tmp_path), batch_size=1, num_workers=2)
    first, *others = [batch["image"].as_tensor().shape for batch in loader]
    assert others == [first] * 5
    assert len(keys_of(tmp_path)) == 1
    assert not any(name.startswith(".") for name in keys_of(tmp_path))


@pytest.mark.parametrize("cache", CACHES)
def test_metadata_come_back(items: list[Item], tmp_path: Path, cache: str) -> None:
    steps = transforms(random=False)
    for _ in range(2):  # made, and read again
        dataset = cached(items, tmp_path, cache, transform=steps)
        image = dataset[0]["image"]
    fresh = cached(items, tmp_path, "none", transform=transforms(random=False))[0]["image"]
    assert isinstance(image, MetaTensor)
    assert torch.equal(image.as_tensor(), fresh.as_tensor())
    assert torch.equal(image.affine, fresh.affine)
    assert image.meta["filename_or_obj"] == items[0]["image"]
    names = [operation["class"] for operation in image.applied_operations]
    assert names == [operation["class"] for operation in fresh.applied_operations] != []
    inverted = Invertd("pred", steps, orig_keys="image", nearest_interp=False)({"image": image, "pred": image.clone()})
    scan = nib.load(items[0]["image"])
    assert inverted["pred"].shape[1:] == scan.shape
    np.testing.assert_allclose(inverted["pred"].affine, scan.affine, atol=1e-4)


# --------------------------------------------------------------------------------------------------- its size in memory


@pytest.mark.parametrize("keys", [("image",), ("image", "label")])
def test_estimate_of_the_cache(phantom_dir: Path, keys: tuple[str, ...]) -> None:
    preset = get_preset("phantom")
    items = [{key: str(phantom_dir / f"{key}s{'Tr'}" / f"phantom_00{i}.nii.gz") for key in keys} for i in range(6)]
    steps = Compose([LoadScand(list(keys)), Spacingd(list(keys), pixdim=preset.pixdim)])
    dataset = make_dataset(items, steps, "memory")
    truth = sum(dataset[i][key].numel() * 4 for i in range(6) for key in keys)
    assert estimate_cache_bytes(items, preset, (8, 8, 8)) == pytest.approx(truth, rel=0.1)
    assert estimate_cache_bytes(items, preset, (8, 8, 8), sample=2) == pytest.approx(truth, rel=0.1)


def test_estimate_counts_channels_and_the_region() -> None:
    assert estimate_cache_bytes([], get_preset("phantom"), (8, 8, 8)) == 0


def test_estimate_of_small_scans_is_that_of_the_region(phantom_dir: Path) -> None:
    items = [{"image": str(phantom_dir / "imagesTr" / "phantom_000.nii.gz")}] * 2
    assert estimate_cache_bytes(items, get_preset("phantom"), (200, 200, 100)) == 2 * 4 * 200 * 200 * 100


@pytest.mark.parametrize("size", [(16, 32, 8), [16, 32, 8]])
def test_estimate_of_scans_that_are_resized_as_a_whole(size: Sequence[int]) -> None:
    """Whatever the files hold, which need not be read."""
    items = [{"image": f"nowhere/{i}.nii.gz", "label": [1.0, 0.0]} for i in range(5)]
    preset = get_preset("phantom_ct")
    assert estimate_cache_bytes(items, preset, (64, 64, 64), size) == 5 * 4 * 16 * 32 * 8
    channels = dataclasses.replace(preset, channels=("CT", "PET", "MR"))
    assert estimate_cache_bytes(items, channels, (64, 64, 64), size) == 3 * 5 * 4 * 16 * 32 * 8
    assert estimate_cache_bytes([], preset, (64, 64, 64), size) == 0


def test_estimate_does_not_count_classes_as_a_channel(phantom_dir: Path) -> None:
    path = str(phantom_dir / "imagesTr" / "phantom_000.nii.gz")
    preset = get_preset("phantom")
    plain = estimate_cache_bytes([{"image": path}], preset, (8, 8, 8))
    assert estimate_cache_bytes([{"image": path, "label": [1.0]}], preset, (8, 8, 8)) == plain
    assert estimate_cache_bytes([{"image": path, "label": path}], preset, (8, 8, 8)) == 2 * plain


@pytest.mark.parametrize("shape", [(96, 76, 40), (31, 32, 33)])
def test_resampled_size_is_that_of_spacingd(make_scan: Callable, shape: tuple[int, ...]) -> None:
    preset = get_preset("phantom")
    spacing = (3.0, 2.5, 5.0)
    scan = make_scan(shape, spacing)
    result = Spacingd("image", pixdim=preset.pixdim)({"image": scan})["image"]
    expected = resampled_size(shape, spacing, preset)
    assert all(abs(a - b) <= 1 for a, b in zip(result.shape[1:], expected, strict=True))


@pytest.fixture
def make_scan() -> Callable[..., MetaTensor]:
    def make(shape: tuple[int, ...], spacing: tuple[float, ...]) -> MetaTensor:
        return MetaTensor(torch.rand(1, *shape), affine=torch.diag(torch.tensor([*spacing, 1.0])))

    return make
