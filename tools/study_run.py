"""Runs the cells of a study, several at a time, and goes on where an earlier run of it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from medmim.files import replace_file
from medmim.folders import CHECKPOINTS
from tools.measure import default_device, machine
from tools.study_folder import command_text, commands, read_state, write_state
from tools.study_plan import BUNDLES, Cell, Study
from tools.study_results import epochs_done, evaluation_results, training_results

RUNNER = [sys.executable, "-m", "monai.bundle", "run"]
PATIENCE = 10.0  # seconds that a process has to end before it is killed


def visible_gpus() -> list[str]:
    """Names of the GPUs as ``CUDA_VISIBLE_DEVICES`` takes them."""
    count = torch.cuda.device_count()
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (given or [str(index) for index in range(count)])[:count]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_machine(jobs: int | None, threads: int | None, gpus: Sequence[str], n_cores: int) -> tuple[int, int]:
    """Cells at a time and threads of each: a GPU each, or else a core each.

    Raises:
        ValueError: for anything but whole numbers above 0.
    """
    wrong = [
        f"--{name} {value}: expected a whole number above 0"
        for name, value in (("jobs", jobs), ("threads", threads))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    if gpus:
        jobs = jobs or len(gpus)
        return jobs, threads or max(1, n_cores // jobs)
    if jobs is None:
        return max(1, n_cores // (threads or 1)), threads or 1
    return jobs, threads or (1 if jobs > 1 else n_cores)


@dataclass
class Running:
    """A cell that is being run: its process, the place (GPU) that it holds, and the commands after this one."""

    cell: Cell
    place: int
    left: list[list[str]]
    seconds_before: float
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen | None = None
    log: IO[str] | None = None
    log_start: int = 0

    @property
    def seconds(self) -> float:
        """Of all its attempts."""
        return self.seconds_before + time.monotonic() - self.started


class StudyRun:
    """Runs the cells of a study that are not finished; those that others wait for first, then seed after seed.

    Args:
        study: whose cells.
        out: its folder.
        jobs: cells at a time.
        threads: of each.
        gpus: as ``CUDA_VISIBLE_DEVICES`` takes them; cell after cell gets the one with the fewest cells. Without any
            the variable is left as it is.
        after_each: called when cells have ended.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        jobs: int,
        threads: int,
        gpus: Sequence[str] = (),
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        self.study, self.out, self.jobs, self.threads, self.gpus = study, out, jobs, threads, list(gpus)
        self.after_each = after_each
        self.running: list[Running] = []
        self.seconds: dict[str, float] = {}  # of finished cells
        self.failed: dict[str, str] = {}
        self.machine = machine(default_device())
        self.stopping = False
        self.ended = False  # a cell did, since the report was written
        self.report_due = 0.0
        self.estimated = 0.0  # when the time left was last looked at

    def run(self, lock: int) -> None:
        """Run all cells.

        Args:
            lock: file descriptor that the runs inherit, see :func:`locked`.

        Raises:
            KeyboardInterrupt: at Ctrl-C, SIGTERM or SIGHUP, when all runs have been ended.
        """
        self.lock = lock
        waiting = []
        for cell in self.study.cells:
            state = read_state(self.out, cell)
            if state["state"] == "finished":
                self.seconds[cell.name] = state["seconds"]
            else:
                waiting.append(cell)
        waiting.sort(key=self._urgency)
        bar = tqdm(total=len(self.study.cells), initial=len(self.seconds), disable=None, unit="cell")
        with bar, self._signals():
            try:
                while (waiting or self.running) and not self.stopping:
                    self._start(waiting, bar)
                    self._report()  # after the start of others, so that no place is empty meanwhile
                    time.sleep(0.1)
                    self._look(bar)
            finally:
                self._stop()
        if self.stopping:
            raise KeyboardInterrupt

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Take signals down to be looked at between two steps, so that no run is lost sight of."""

        def note(number: int, frame: Any) -> None:
            self.stopping = True

        names = ("SIGINT", "SIGTERM", "SIGHUP")
        before = {number: signal.signal(number, note) for name in names if (number := getattr(signal, name, None))}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _urgency(self, cell: Cell) -> tuple:
        """What others wait for comes first, then seed after seed, so that a part of a study compares all arms; of one
        seed what takes long.
        """
        return cell.kind != "pretraining", cell.seed, -cell.epochs * max(1, cell.scans)

    def _start(self, waiting: list[Cell], bar: tqdm) -> None:
        for cell in list(waiting):
            needs = cell.needs
            if needs is not None and needs.name in self.failed:
                self.failed[cell.name] = f"skipped: it needs {needs.name}, which failed"
                waiting.remove(cell)
                bar.update()
            elif len(self.running) < self.jobs and (needs is None or needs.name in self.seconds):
                waiting.remove(cell)
                self._begin(cell)

    def _begin(self, cell: Cell) -> None:
        state = read_state(self.out, cell)
        folder = self.out / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        todo = commands(self.study, cell, self.out)
        text = "\n".join(command_text(cell, arguments, self.threads) for arguments in todo)
        replace_file(folder / "command.txt", lambda path: path.write_text(text, encoding="utf-8"))
        places = range(max(1, len(self.gpus)))
        held = [run.place for run in self.running]
        run = Running(cell, min(places, key=held.count), todo, state.get("seconds", 0.0))
        run.log = (folder / "log.txt").open("a", encoding="utf-8")
        write_state(self.out, cell, state="started", seconds=run.seconds_before)
        self.running.append(run)
        self._next(run)

    def _next(self, run: Running) -> None:
        """Start the next command of a cell."""
        assert run.log is not None
        run.log_start = run.log.tell()
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"}
        environment |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[run.place]
        run.process = subprocess.Popen(
            [*RUNNER, *run.left.pop(0)],
            cwd=BUNDLES / run.cell.bundle,
            stdin=subprocess.DEVNULL,
            stdout=run.log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[self.lock],
            start_new_session=True,  # Ctrl-C is for the study, which ends them
        )

    def _look(self, bar: tqdm) -> None:
        """See to the runs that have ended."""
        for run in list(self.running):
            assert run.process is not None
            code = run.process.poll()
            if code is None:
                continue
            if code == 0 and run.left:
                self._next(run)
                continue
            assert run.log is not None
            run.log.close()
            self.running.remove(run)
            self._end(run, code, bar)
        if not bar.disable and time.monotonic() - self.estimated > 5:
            self.estimated = time.monotonic()
            bar.set_postfix_str(self.time_left())

    def _report(self) -> None:
        """Bring the report up to date; it may take a tenth of the time, so that it does not hold quick cells up."""
        if self.ended and time.monotonic() > self.report_due:
            self.ended, started = False, time.monotonic()
            self.after_each()
            self.report_due = time.monotonic() + 10 * (time.monotonic() - started)

    def _end(self, run: Running, code: int, bar: tqdm) -> None:
        cell, folder, said = run.cell, self.out / run.cell.name, ""
        try:
            if code:
                raise ValueError(_last_error(folder / "log.txt", run.log_start) or f"ended with exit status {code}")
            results = {} if cell.kind == "pretraining" else training_results(folder, cell.epochs)
            if cell.kind == "finetuning" and self.study.evaluate:
                results |= evaluation_results(folder)
            if cell.kind == "pretraining" and not (folder / "models" / "encoder.pt").is_file():
                raise ValueError("left no encoder.pt")
        except ValueError as error:
            self.failed[cell.name] = f"{error}; log: {folder / 'log.txt'}"
            write_state(self.out, cell, state="failed", seconds=run.seconds, error=str(error))
            said = f"failed: {error}; log: {folder / 'log.txt'}"
        else:
            self.seconds[cell.name] = run.seconds
            write_state(
                self.out, cell, state="finished", seconds=run.seconds, results=results, machine=self.machine,
                jobs=self.jobs, threads=self.threads, finished=time.strftime("%Y-%m-%d %H:%M:%S"),
            )  # fmt: skip
            if cell.kind == "finetuning":  # model.pt is what is needed of it
                for name in CHECKPOINTS:
                    (folder / name).unlink(missing_ok=True)
            said = f"{run.seconds:.0f} s" + (f", Dice {results['best_dice']:.4f}" if results else "")
        bar.update()
        left = self.time_left()
        tqdm.write(
            f"[{len(self.seconds) + len(self.failed)}/{bar.total}] {cell.name}: {said}{f' ({left})' if left else ''}",
            file=sys.stdout,
        )
        sys.stdout.flush()
        self.ended = True

    def time_left(self) -> str:
        """An estimate from the mean time of finished cells of the same kind, and the epochs that run now."""
        means = {kind: self._mean_seconds(kind) for kind in {cell.kind for cell in self.study.cells}}
        total, at_least = 0.0, 0.0
        shares = {run.cell.name: self._share_done(run) for run in self.running}
        for cell in self.study.cells:
            if cell.name in self.seconds or cell.name in self.failed:
                continue
            mean = self._mean_seconds(cell.kind, cell) or means[cell.kind]
            if mean is None:
                return ""
            left = mean * (1 - shares.get(cell.name, 0.0))
            total, at_least = total + left, max(at_least, left)
        left = max(total / self.jobs, at_least)
        return f"about {left / 60:.0f} min left" if left >= 60 else f"about {left:.0f} s left"

    def _mean_seconds(self, kind: str, like: Cell | None = None) -> float | None:
        """Of finished cells of a kind, or of those with as many scans and epochs as another; else of running ones."""
        cells = [cell for cell in self.study.cells if cell.kind == kind]
        if like is not None:
            cells = [cell for cell in cells if (cell.scans, cell.epochs) == (like.scans, like.epochs)]
        found = [self.seconds[cell.name] for cell in cells if cell.name in self.seconds]
        if not found:
            runs = [(run, self._share_done(run)) for run in self.running if run.cell in cells]
            found = [run.seconds / share for run, share in runs if share > 0]
        return sum(found) / len(found) if found else None

    def _share_done(self, run: Running) -> float:
        done = epochs_done(self.out / run.cell.name)
        return min(0.99, done / run.cell.epochs) if run.cell.epochs else 0.0

    def _stop(self) -> None:
        """End the runs that are left; what they did up to their last checkpoint stays."""
        for run in self.running:
            _signal(run, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for run in self.running:
            with suppress(subprocess.TimeoutExpired):
                if run.process is not None:
                    run.process.wait(max(0.1, deadline - time.monotonic()))
            _signal(run, signal.SIGKILL)
            if run.process is not None:
                run.process.wait()
            if run.log is not None:
                run.log.close()
            write_state(self.out, run.cell, state="started", seconds=run.seconds)
        self.running = []


def _signal(run: Running, number: int) -> None:
    """To a run and its workers."""
    if run.process is not None:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, number)


def _last_error(log: Path, start: int) -> str:
    """The last line of an attempt's log that begins with ``error:``, or else its last line."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return errors[-1] if errors else (lines[-1] if lines else "")
