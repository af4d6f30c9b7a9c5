"""MONAI's datasets as the bundles use them: cached in memory, on disk or not at all, and drawn reproducibly."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Sequence
from copy import deepcopy
from enum import Enum
from math import ceil, prod
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai import __version__ as monai_version
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset
from monai.transforms import Compose
from monai.utils import convert_to_tensor

from medmim.datalists import Item
from medmim.datasets import Preset
from medmim.files import save_tensors
from medmim.randomness import derive_seed
from medmim.transforms.radiographs import RADIOGRAPH_SUFFIXES, radiograph_size
from medmim.version import __version__

logger = logging.getLogger(__name__)

CACHES = ("memory", "disk", "none")
# MetaTensors carry arrays, which torch.load(weights_only=True) reads only when told so
NUMPY: Any = np
META_TYPES: list[Any] = [NUMPY._core.multiarray._reconstruct, np.ndarray, np.dtype]
META_TYPES += [value for value in vars(np.dtypes).values() if isinstance(value, type)]


class SeededDataset(torch.utils.data.Dataset):
    """A MONAI dataset whose random transforms depend on (seed, epoch, index) alone.

    Neither the number of workers, nor that of processes, nor what was drawn before matters, so a resumed training
    needs no loader state.

    Args:
        dataset: has a ``transform`` with MONAI's ``set_random_state``.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn next; before the loader is asked for its first batch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        transform: Any = self.dataset.transform
        transform.set_random_state(derive_seed(self.seed, int(self.epoch), index))
        return self.dataset[index]


class DiskCacheDataset(PersistentDataset):
    """MONAI's ``PersistentDataset`` with a key that covers paths, sizes and times of the files, the transforms before
    the first random one, and the versions of MONAI and this package; damaged files are made again.
    """

    def __init__(self, data: Sequence[Item], transform: Compose, cache_dir: str | Path) -> None:
        super().__init__(data, transform, cache_dir=cache_dir, hash_func=_item_key, hash_transform=_transforms_key)

    def _cachecheck(self, item_transformed: Item) -> Any:
        assert self.cache_dir is not None
        path = self.cache_dir / f"{self.hash_func(item_transformed).decode()}_{self.transform_hash}.pt"
        if path.is_file():
            try:
                with torch.serialization.safe_globals(META_TYPES):
                    return torch.load(path, weights_only=True)
            except Exception as error:  # torch raises anything over a damaged file
                logger.warning(f"{path}: not readable ({type(error).__name__}), made again")
        item = self._pre_transform(deepcopy(item_transformed))
        item = _without_enums(convert_to_tensor(item, convert_numeric=False, track_meta=True))
        save_tensors(path, item)
        return item


def _without_enums(value: Any) -> Any:
    """The same with the values of MONAI's enumerations, which are strings, in place of them: Python 3.11.2 pickles a
    member as a call of ``getattr``, which ``torch.load(weights_only=True)`` refuses.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, MetaTensor):
        value.meta = _without_enums(value.meta)
        value.applied_operations = _without_enums(value.applied_operations)
    if isinstance(value, dict):
        return {_without_enums(key): _without_enums(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_enums(inner) for inner in value)
    return value


def make_dataset(
    data: Sequence[Item],
    transform: Compose,
    cache: str = "memory",
    cache_rate: float = 1.0,
    cache_dir: str | Path = "cache",
    num_workers: int = 0,
    seed: int = 0,
) -> SeededDataset:
    """Dataset of scans, prepared up to the first random transform once or each time.

    Args:
        data: scans.
        transform: one flat Compose; what stands before the first random transform is cached.
        cache: ``memory`` (filled now), ``disk`` (filled in the first epoch, used again by later runs) or ``none``.
        cache_rate: share of the scans kept in memory.
        cache_dir: folder of the cache on disk.
        num_workers: threads that fill the memory.
        seed: of the random transforms.

    Raises:
        ValueError: when ``cache`` is unknown.
    """
    if cache == "memory":
        is_first = idist.get_rank() == 0
        cached = CacheDataset(data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=is_first)
        return SeededDataset(cached, seed)
    if cache == "disk":
        return SeededDataset(DiskCacheDataset(data, transform, cache_dir), seed)
    if cache == "none":
        return SeededDataset(Dataset(data, transform), seed)
    raise ValueError(f"--cache {cache}: expected {' or '.join(CACHES)}")


def estimate_cache_bytes(
    items: Sequence[Item],
    preset: Preset,
    roi_size: Sequence[int],
    load_size: int | Sequence[int] | None = None,
    sample: int = 100,
) -> int:
    """About how many bytes the prepared scans take in memory, from the headers of up to ``sample`` of them.

    Four bytes for a voxel, at the preset's spacing and at least ``roi_size`` large; the label map counts as one more
    channel. Cutting away the background makes it less. Radiographs have their own size, or ``load_size`` along the
    longer side. Volumes that are resized as a whole have ``load_size`` along their axes.
    """
    chosen = [items[round(i)] for i in np.linspace(0, len(items) - 1, min(sample, len(items)))] if items else []
    if isinstance(load_size, list | tuple):
        return 4 * prod(load_size) * len(preset.channels) * len(items)
    longer_side: Any = load_size
    sizes = []
    for item in chosen:
        name = item["image"] if isinstance(item["image"], str) else item["image"][0]
        if name.lower().endswith(RADIOGRAPH_SUFFIXES):
            size = radiograph_size(name)
            scale = 1 if longer_side is None else longer_side / max(size)
            sizes.append(round(4 * prod(size) * scale**2))
            continue
        header: Any = nib.load(name).header
        dims = len(preset.roi_size)
        shape = resampled_size(header.get_data_shape()[:dims], header.get_zooms()[:dims], preset)
        voxels = prod(max(n, roi) for n, roi in zip(shape, roi_size, strict=True))
        sizes.append(4 * voxels * (len(preset.channels) + isinstance(item.get("label"), str)))
    return round(sum(sizes) / len(sizes) * len(items)) if sizes else 0


def resampled_size(shape: Sequence[int], spacing: Sequence[float], preset: Preset) -> tuple[int, ...]:
    """About how many voxels a scan has at the preset's spacing (axes as in the file)."""
    target = preset.spacing or spacing
    return tuple(ceil(n * s / t) for n, s, t in zip(shape, spacing, target, strict=True))


def _item_key(item: Item) -> bytes:
    files = [path for key in sorted(item) for path in _paths(item[key])]
    states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    told = [(key, item[key]) for key in sorted(item) if not _paths(item[key])]  # labels that are no files
    return _digest(repr([*states, *told] if told else states).encode())


def _paths(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [path for path in values if isinstance(path, str) and os.path.exists(path)]


def _transforms_key(transforms: Any) -> bytes:
    return _digest(pickle.dumps(transforms) + f"{monai_version} {__version__}".encode())


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:24].encode()
