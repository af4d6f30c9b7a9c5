"""What the benchmarks measure with."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

N_WARM = 3  # steps of which the peak is taken


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(module: str, function: str, *arguments: Any) -> float:
    """GiB that three training steps take at most, in a process of their own.

    Call it before anything large is made: on Linux a child process's peak counts what its parent held at its start.

    Args:
        module, function: whose result is the step, a function without arguments.
        arguments: of that function, as JSON holds them.
    """
    call = json.dumps([module, function, *arguments])
    code = f"import json; from tools.measure import print_peak; print_peak(*json.loads({call!r}))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def print_peak(module: str, function: str, *arguments: Any) -> None:
    """What :func:`peak_memory` runs."""
    step: Callable[[], Any] = getattr(import_module(module), function)(*arguments)
    for _ in range(N_WARM):
        step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> str:
    """Name of the processor that the figures are for."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
