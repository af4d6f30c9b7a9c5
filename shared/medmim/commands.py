"""What stands in a bundle's ``run``: steps of a run whose faults end it with plain lines instead of a stack trace.

MONAI's config parser passes ``SystemExit`` on, and wraps any other exception. In Python code use the functions of the
other modules, which raise ``ValueError``.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from torch import nn

from medmim import (
    checks,
    command_line,
    folders,
    image_checks,
    inference_checks,
    mim_checks,
    mim_reconstruct,
    networks,
    optim,
    phantom,
    phantom_brain,
    phantom_lesions,
    phantom_radiographs,
    radiograph_checks,
    scan_checks,
    scan_datasets,
    swin_checks,
    weights,
)
from medmim.datalists import Datalist
from medmim.datasets import Preset
from medmim.engines import autocast_dtype

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


def lists_faults(check: Callable[P, None]) -> Callable[P, list[str]]:
    """Turn ``ValueError`` and ``OSError`` of a check into a list of their lines, for :func:`refuse`."""

    @wraps(check)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> list[str]:
        try:
            check(*args, **kwargs)
        except (ValueError, OSError) as error:
            return str(error).splitlines()
        return []

    return wrapper


def refuse(faults: Sequence[Sequence[str] | None]) -> None:
    """End the run when any check found a fault, with all of them; on several processes each fault is said once.

    Args:
        faults: one list for each check; ``None`` for one that was not made.
    """
    lines = [line for fault in faults for line in fault or ()]
    if idist.get_world_size() > 1:
        gathered: Any = idist.all_gather([lines])
        lines = [line for rank in gathered for line in rank[0]]
    message = "\n".join(f"error: {line}" for line in dict.fromkeys(lines))
    if not message:
        return
    if idist.get_world_size() > 1:
        if idist.get_rank() == 0:
            print(message, file=sys.stderr, flush=True)
        idist.barrier()  # torchrun ends all processes with the first that ends
        raise SystemExit(1)
    raise SystemExit(message)


@contextmanager
def plain_faults() -> Iterator[None]:
    """Turn a fault of ours deep inside MONAI (a bad scan, a non-finite loss) into ``SystemExit`` with its message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"error: out of GPU memory ({' '.join(str(error).split())[:120]}): lower --batch_size, --crops_per_scan or "
            "--sw_batch_size, or give --activation_checkpointing true"
        ) from error
    except Exception as error:
        # a loader's worker sends its exception as text only
        chain = "".join(traceback.format_exception(error))
        fault = re.search(r"^(medmim\.[\w.]+): (.+)$", chain, re.MULTILINE)
        if fault is None:
            raise
        if fault.group(1) == "medmim.resume.CheckpointError":
            refuse([[fault.group(2)]])  # every process has met it
        raise SystemExit(f"error: {fault.group(2)}") from error


def make_dataset(*args: Any, **kwargs: Any) -> scan_datasets.SeededDataset:
    """:func:`medmim.scan_datasets.make_dataset`, which loads scans when it fills the memory; a bad one ends the run."""
    with plain_faults():
        return scan_datasets.make_dataset(*args, **kwargs)


def run_engine(engine: Engine, results: str | None = None) -> None:
    """Run a MONAI trainer or evaluator; a fault of ours inside ends it plainly.

    Args:
        engine: trainer or evaluator.
        results: where its results are, for a last line in the log.
    """
    with plain_faults():
        engine.run()
    if results is not None and idist.get_rank() == 0:
        logger.info(f"done, results are in {results}")


@ends_plainly
def start_processes(device: torch.device, timeout: Any) -> None:
    """Let the processes that torchrun started find each other; NCCL on GPUs, gloo on CPUs. Only rank 0 logs.

    Args:
        device: of this process.
        timeout: minutes that a process waits for the others.

    Raises:
        SystemExit: when torchrun did not start this process, or there are fewer GPUs than processes.
    """
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise ValueError("multi_gpu configs: start them with torchrun --nproc_per_node N -m monai.bundle run ...")
    if not isinstance(timeout, int | float) or timeout <= 0:
        raise ValueError(f"--timeout {timeout}: expected minutes, a number above 0")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"process {os.environ['LOCAL_RANK']} of this machine has no GPU: it has {torch.cuda.device_count()}: "
            "start at most so many (--nproc_per_node)"
        )
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout))
    # Python lets go of the group last, and without its lock: DistributedDataParallel would hold the lock while it waits
    # for the end of gloo's threads, which may wait for the lock (pytorch/pytorch#56297)
    atexit.register([torch.distributed.group.WORLD].clear)
    if idist.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def end_processes() -> None:
    """Part from the other processes, as the last thing in a run that went well."""
    torch.distributed.barrier()  # meanwhile gloo's threads forget their tensors, for which they need Python's lock
    torch.distributed.destroy_process_group()


def write_phantom(folder: str, n_cases: int) -> None:
    """:func:`medmim.phantom.write_phantom`, by one process for all."""
    if idist.get_rank() == 0:
        ends_plainly(phantom.write_phantom)(folder, n_cases)
    if idist.get_world_size() > 1:
        idist.barrier()


def write_phantom_brain(folder: str, n_cases: int) -> None:
    """:func:`medmim.phantom_brain.write_phantom_brain`, by one process for all."""
    if idist.get_rank() == 0:
        ends_plainly(phantom_brain.write_phantom_brain)(folder, n_cases)
    if idist.get_world_size() > 1:
        idist.barrier()


def write_phantom_radiographs(folder: str, n_patients: int) -> None:
    """:func:`medmim.phantom_radiographs.write_phantom_radiographs`, by one process for all."""
    if idist.get_rank() == 0:
        ends_plainly(phantom_radiographs.write_phantom_radiographs)(folder, n_patients)
    if idist.get_world_size() > 1:
        idist.barrier()


def write_phantom_lesions(folder: str, n_patients: int) -> None:
    """:func:`medmim.phantom_lesions.write_phantom_lesions`, by one process for all."""
    if idist.get_rank() == 0:
        ends_plainly(phantom_lesions.write_phantom_lesions)(folder, n_patients)
    if idist.get_world_size() > 1:
        idist.barrier()


def write_nested_reconstructions(*args: Any, **kwargs: Any) -> None:
    """:func:`medmim.mim_reconstruct.write_reconstructions`; a bad scan ends the run."""
    with plain_faults():
        mim_reconstruct.write_reconstructions(*args, **kwargs)


def compile_network(network: nn.Module) -> None:
    """``torch.compile`` a network in place; names in its state dict stay as they are."""
    network.compile()


def report_run(
    network: nn.Module,
    device: str | torch.device,
    amp: bool,
    amp_dtype: str,
    batch_size: int,
    crops_per_scan: int,
    accumulation_steps: int,
    learning_rate: float,
    split: Datalist,
    preset: Preset,
    roi_size: Sequence[int],
    cache: str,
    cache_rate: float,
    load_size: int | Sequence[int] | None = None,
) -> None:
    """Say in the log what a training is about to use, before it fills the memory."""
    if idist.get_rank() > 0:
        return
    total, learning = (sum(p.numel() for p in network.parameters() if p.requires_grad or every) for every in (1, 0))
    dtype = str(autocast_dtype(amp_dtype, device) if amp else torch.float32).removeprefix("torch.")
    processes = idist.get_world_size()
    logger.info(
        f"{type(network).__name__} with {total / 1e6:.1f} M parameters ({learning / 1e6:.1f} M learn) on {device} in "
        f"{dtype}; a step sees {batch_size} scans x {crops_per_scan} crops x {processes} processes x "
        f"{accumulation_steps} batches = {batch_size * crops_per_scan * processes * accumulation_steps} crops at "
        f"learning rate {learning_rate:g} (as given, not scaled)"
    )
    size = scan_datasets.estimate_cache_bytes([*split.training, *split.validation], preset, roi_size, load_size)
    if cache == "memory":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        logger.info(f"cache: about {_gib(size * cache_rate * here)} of memory{_of_this_machine()}, filled now")
    elif cache == "disk":
        logger.info(f"cache: about {_gib(size)} on disk, filled as scans are first read")
    else:
        logger.info("cache: none, every scan is prepared each time that it is read")


def _of_this_machine() -> str:
    if not hasattr(os, "sysconf"):  # Windows
        return ""
    return f" of {_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2g} GiB"


check_class_weights = lists_faults(image_checks.check_class_weights)
check_command_line = lists_faults(command_line.check_command_line)
check_convvit = lists_faults(mim_checks.check_convvit)
check_data = lists_faults(checks.check_data)
check_device = lists_faults(checks.check_device)
check_encoder = lists_faults(checks.check_encoder)
check_inference = lists_faults(inference_checks.check_inference)
check_evaluated = lists_faults(image_checks.check_evaluated)
check_image_data = lists_faults(image_checks.check_image_data)
check_image_inference = lists_faults(radiograph_checks.check_image_inference)
check_knobs = lists_faults(checks.check_knobs)
check_levels = lists_faults(mim_checks.check_levels)
check_pairs = lists_faults(scan_checks.check_pairs)
check_paths = lists_faults(folders.check_paths)
check_preset = lists_faults(checks.check_preset)
check_processes = lists_faults(command_line.check_processes)
check_radiograph_preset = lists_faults(radiograph_checks.check_radiograph_preset)
check_radiographs = lists_faults(radiograph_checks.check_radiographs)
check_resume = lists_faults(folders.check_resume)
check_same_dataset = ends_plainly(inference_checks.check_same_dataset)
check_schedule = lists_faults(checks.check_schedule)
check_scans = lists_faults(scan_checks.check_scans)
check_seen = lists_faults(image_checks.check_seen)
check_sizes = lists_faults(checks.check_sizes)
check_upsampling = lists_faults(checks.check_upsampling)
check_swin = lists_faults(swin_checks.check_swin)
check_swin_roi = lists_faults(swin_checks.check_swin_roi)
check_switches = lists_faults(checks.check_switches)
check_volume_preset = lists_faults(image_checks.check_volume_preset)
checkpoint_activations = ends_plainly(networks.checkpoint_activations)
freeze_encoder = ends_plainly(optim.freeze_encoder)
load_checkpoint = ends_plainly(weights.load_checkpoint)
load_encoder = ends_plainly(weights.load_encoder)
load_model = ends_plainly(weights.load_model)
