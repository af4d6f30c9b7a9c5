"""Batches of one pair of views are refused before a run."""

import ignite.distributed as idist
import pytest

from medmim.datalists import Datalist
from medmim.scan_checks import check_pairs


def split(training: int, validation: int = 2) -> Datalist:
    return Datalist([{"image": str(i)} for i in range(training)], [{"image": str(i)} for i in range(validation)])


@pytest.mark.parametrize(
    ("scans", "crops", "batch", "processes", "good"),
    [
        (8, 1, 1, 1, False),
        (8, 2, 1, 1, True),
        (8, 1, 1, 2, True),
        (8, 1, 4, 1, True),
        (9, 1, 4, 1, False),  # the last batch is one scan
        (9, 2, 4, 1, True),
        (9, 1, 4, 2, True),  # each process has five: the last batches are two pairs together
        (1, 1, 4, 1, False),
        (9, 1, None, 1, True),  # an evaluation
    ],
)
def test_training(
    monkeypatch: pytest.MonkeyPatch, scans: int, crops: int, batch: int | None, processes: int, good: bool
) -> None:
    monkeypatch.setattr(idist, "get_world_size", lambda: processes)
    if good:
        check_pairs(split(scans), crops, batch)
        return
    with pytest.raises(ValueError, match=f"^--batch_size {batch}: with {scans} scans for training") as error:
        check_pairs(split(scans), crops, batch)
    assert "\n" not in str(error.value)


def test_validation() -> None:
    with pytest.raises(ValueError, match=r"^1 scans for validation: one pair of views has no negatives"):
        check_pairs(split(8, 1), 4)
