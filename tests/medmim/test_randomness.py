"""Random numbers that depend on seed, epoch and rank alone."""

import random
from itertools import product
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pytest
import torch

from medmim.randomness import derive_seed, random_states, seed_epoch, set_random_states


def draw() -> tuple[float, float, float, float]:
    """One number of each generator; the last is normal, of which NumPy and Python keep a spare one."""
    return random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1)  # noqa: NPY002


def test_an_epoch_draws_the_same_whatever_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for seed, epoch, rank in product((0, 1), (1, 2), (0, 1)):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        draws = []
        for before in range(2):
            for _ in range(before):
                draw()
            seed_epoch(seed, epoch)
            draws.append(draw())
        assert draws[0] == draws[1]
        found[seed, epoch, rank] = draws[0]
    for numbers in zip(*found.values(), strict=True):
        assert len(set(numbers)) == len(found)


def test_seeds_differ_and_stay_as_they_are() -> None:
    seeds = {derive_seed(*numbers) for numbers in product(range(10), range(10), range(10))}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0, 1, 2) == int(np.random.SeedSequence([0, 1, 2]).generate_state(1)[0])


def test_states_are_restored_exactly_from_a_file(tmp_path: Path) -> None:
    seed_epoch(3, 4)
    np.random.normal()  # noqa: NPY002  (leaves a spare number behind, which belongs to the state)
    random.gauss(0, 1)
    torch.save(random_states(), tmp_path / "states.pt")
    expected = [(draw(), float(np.random.normal())) for _ in range(5)]  # noqa: NPY002
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [(draw(), float(np.random.normal())) for _ in range(5)] == expected  # noqa: NPY002


def test_states_of_more_devices_than_there_are() -> None:
    states = random_states() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    states["cuda"][: torch.cuda.device_count()] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_random_states(states)
