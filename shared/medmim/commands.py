"""What stands in a bundle's ``run``: steps of a run whose faults end it with plain lines instead of a stack trace.

MONAI's config parser passes ``SystemExit`` on, and wraps any other exception. In Python code use the functions of the
other modules, which raise ``ValueError``.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ignite.engine import Engine
from monai.data import CacheDataset

from medmim import checks, optim, phantom, weights

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def ends_plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Turn ``ValueError`` and ``OSError`` of a function into ``SystemExit`` with the message."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error

    return wrapper


@contextmanager
def plain_faults() -> Iterator[None]:
    """Turn a fault of ours deep inside MONAI (a bad scan, a non-finite loss) into ``SystemExit`` with its message."""
    try:
        yield
    except Exception as error:
        # a loader's worker sends its exception as text only
        chain = "".join(traceback.format_exception(error))
        fault = re.search(r"^(?:medmim\.[\w.]+): (.+)$", chain, re.MULTILINE)
        if fault is None:
            raise
        raise SystemExit(f"error: {fault.group(1)}") from error


def cache_scans(data: Sequence[Any], transform: Callable, cache_rate: float, num_workers: int) -> CacheDataset:
    """MONAI's ``CacheDataset``, which loads scans while it is made; a bad scan ends the run plainly."""
    with plain_faults():
        return CacheDataset(data, transform, cache_rate=cache_rate, num_workers=num_workers)


def run_engine(engine: Engine, results: str | None = None) -> None:
    """Run a MONAI trainer or evaluator; a fault of ours inside ends it plainly.

    Args:
        engine: trainer or evaluator.
        results: where its results are, for a last line in the log.
    """
    with plain_faults():
        engine.run()
    if results is not None:
        logger.info(f"done, results are in {results}")


check_data = ends_plainly(checks.check_data)
check_inference = ends_plainly(checks.check_inference)
check_knobs = ends_plainly(checks.check_knobs)
check_same_dataset = ends_plainly(checks.check_same_dataset)
check_schedule = ends_plainly(checks.check_schedule)
check_scans = ends_plainly(checks.check_scans)
check_switches = ends_plainly(checks.check_switches)
check_sizes = ends_plainly(checks.check_sizes)
freeze_encoder = ends_plainly(optim.freeze_encoder)
load_checkpoint = ends_plainly(weights.load_checkpoint)
load_model = ends_plainly(weights.load_model)
load_encoder = ends_plainly(weights.load_encoder)
write_phantom = ends_plainly(phantom.write_phantom)
