"""What stands in a bundle's ``run``: steps of a run whose faults end it with plain lines instead of a stack trace.

MONAI's config parser passes ``SystemExit`` on, and wraps any other exception. In Python code use the functions of the
other modules, which raise ``ValueError``.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from ignite.engine import Engine

from medmim import checks, optim, phantom, weights

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


def run_engine(engine: Engine) -> None:
    """Run a MONAI trainer or evaluator; a fault of ours inside (a bad scan, a non-finite loss) ends it plainly."""
    try:
        engine.run()
    except Exception as error:
        # a loader's worker sends its exception as text only
        chain = "".join(traceback.format_exception(error))
        fault = re.search(r"^(?:medmim\.[\w.]+): (.+)$", chain, re.MULTILINE)
        if fault is None:
            raise
        raise SystemExit(f"error: {fault.group(1)}") from error


check_data = ends_plainly(checks.check_data)
check_inference = ends_plainly(checks.check_inference)
check_same_dataset = ends_plainly(checks.check_same_dataset)
check_scans = ends_plainly(checks.check_scans)
check_sizes = ends_plainly(checks.check_sizes)
freeze_encoder = ends_plainly(optim.freeze_encoder)
load_checkpoint = ends_plainly(weights.load_checkpoint)
load_encoder = ends_plainly(weights.load_encoder)
write_phantom = ends_plainly(phantom.write_phantom)
