"""Random numbers that depend on (seed, epoch, rank or sample) alone, so that a resumed training draws the same ones."""

from __future__ import annotations

import random
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """A 32-bit seed from several numbers; neighbours give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed Python, NumPy and torch (CPU and CUDA) for one epoch of this process."""
    value = derive_seed(seed, epoch, idist.get_rank())
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  (MONAI and users' transforms draw from NumPy's global state)
    torch.manual_seed(value)


def random_states() -> dict[str, Any]:
    """States of the global generators, as values that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators into the states that :func:`random_states` gave; the CUDA ones on as many devices as there."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
