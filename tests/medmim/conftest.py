"""Unit tests use networks so small that one thread is faster than several; and what several of their files share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path: Path) -> Callable[[dict[str, int]], Path]:
    """Makes small radiographs: ``images({"a": 5, "b": 5})`` in folders with the names of classes."""

    def make(counts: dict[str, int]) -> Path:
        for label, n in counts.items():
            (tmp_path / "data" / label).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng([ord(label), i]).integers(0, 256, (6, 5), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
        return tmp_path / "data"

    return make
