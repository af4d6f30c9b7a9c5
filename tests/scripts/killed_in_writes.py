"""Trainings through MONAI's runner that are killed (SIGKILL) exactly inside a write; for test_kills.

``killed_in_writes.py JSON`` with a list of ``{"run": arguments of the runner, "kills": [[function, call], ...]}`` forks
one process for each kill, which kills itself at that call of ``os.fsync`` or ``os.replace``, or after half of the bytes
of ``torch.save``. A last process is left alone. Prints how each of them ended.
"""

import io
import json
import os
import runpy
import signal
import sys
from typing import Any

import monai.bundle  # noqa: F401  (once for all processes)
import torch


def kill_at(function: str, call: int) -> None:
    """Replace a function: its n-th call is the last thing that happens."""
    module: Any = torch if function == "save" else os
    real, count = getattr(module, function), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count < call:
            return real(*args, **kwargs)
        if function == "save":
            buffer = io.BytesIO()
            real(args[0], buffer)
            args[1].write(buffer.getvalue()[: buffer.tell() // 2])
            args[1].flush()
        print(f"{function} number {call}:", *(arg for arg in args if isinstance(arg, os.PathLike)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, function, counted)


def start(arguments: list[str], kill: list[Any] | None) -> int:
    """Exit status of a process that runs the bundle."""
    process = os.fork()
    if process == 0:
        if kill is not None:
            kill_at(*kill)
        sys.argv = ["monai.bundle", "run", *arguments]
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for plan in json.loads(sys.argv[1]):
        for kill in [*plan["kills"], None]:
            sys.stdout.flush()
            print("ended with", start(plan["run"], kill), kill, flush=True)
