"""``python -m tools study``: pretext tasks, their knobs, numbers of labels and seeds, compared."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import torch

from medmim.commands import ends_plainly
from medmim.files import replace_file
from tools.study_file import read_study
from tools.study_folder import command_text, commands, locked, prepare, read_state
from tools.study_plan import Study
from tools.study_report import write_report
from tools.study_run import StudyRun, cores, share_machine, visible_gpus

SOURCE = "study.json"  # what the report needs of the command line


def study(
    file: str,
    dataset_dir: str | None = None,
    output_dir: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    report_only: bool = False,
    rerun_changed: bool = False,
) -> None:
    """Pre-train and fine-tune what a study file says, several runs at a time, and compare the results.

    What is finished is not run again, what was broken off goes on from its checkpoint. docs/studies.md explains the
    file and what is written.

    Args:
        file: the study, YAML; tools/studies has one.
        dataset_dir: folder of the scans, unless the file says it.
        output_dir: where everything goes, by default studies/<name of the file>.
        jobs: runs at a time; by default one for each GPU, or else for each processor core.
        threads: of each run; by default 1 when several run at a time on processors.
        dry_run: print the runs and stop.
        report_only: write tables and figures of what is there and stop.
        rerun_changed: set finished runs whose settings have changed aside, and run them again.
    """
    failed = _study(file, dataset_dir, output_dir, jobs, threads, dry_run, report_only, rerun_changed)
    if failed:
        raise SystemExit("\n".join(failed))


@ends_plainly
def _study(
    file: str,
    dataset_dir: str | None,
    output_dir: str | None,
    jobs: int | None,
    threads: int | None,
    dry_run: bool,
    report_only: bool,
    rerun_changed: bool,
) -> list[str]:
    """As :func:`study`; gives the lines about what failed."""
    out = Path("studies", Path(str(file)).stem).resolve() if output_dir is None else Path(str(output_dir)).resolve()
    if report_only and dataset_dir is None and (out / SOURCE).is_file():
        dataset_dir = json.loads((out / SOURCE).read_text(encoding="utf-8"))["dataset_dir"]
    try:
        plan = read_study(str(file), dataset_dir)
        gpus = visible_gpus()
        jobs, threads = share_machine(jobs, threads, gpus, cores())
    except ValueError as error:
        raise ValueError("\nerror: ".join(str(error).splitlines())) from error
    if dry_run:
        _print_plan(plan, out, jobs, threads)
        return []
    torch.set_num_threads(threads)
    if report_only:
        source = out / SOURCE
        if not source.is_file():
            raise ValueError(f"{out}: no study was run there: give its --output_dir")
        write_report(plan, out, json.loads(source.read_text(encoding="utf-8"))["command"])
        print(f"wrote {out / 'report.md'}")
        return []
    with locked(out) as lock:
        try:
            moved = prepare(plan, out, rerun_changed)
        except ValueError as error:
            raise ValueError("\nerror: ".join(str(error).splitlines())) from error
        command = f"python -m tools {shlex.join(sys.argv[1:])}"
        source_text = json.dumps({"command": command, "dataset_dir": dataset_dir}, indent=1)
        replace_file(out / SOURCE, lambda path: path.write_text(source_text, encoding="utf-8"))
        print("\n".join([*moved, *plan.notes, f"{_counts(plan)}, {jobs} at a time, in {out}"]), flush=True)
        run = StudyRun(plan, out, jobs, threads, gpus, lambda: write_report(plan, out, command))
        try:
            run.run(lock)
        except KeyboardInterrupt:
            raise SystemExit(f"stopped; {len(run.seconds)} cells are finished, the same command goes on") from None
        finally:
            write_report(plan, out, command)
    print(f"wrote {out / 'report.md'}")
    return [f"error: {name}: {text}" for name, text in run.failed.items()]


def _counts(plan: Study) -> str:
    pretrainings = len(plan.cells) - len(plan.finetunings)
    return f"{len(plan.cells)} cells: {pretrainings} pre-trainings, {len(plan.finetunings)} fine-tunings"


def _print_plan(plan: Study, out: Path, jobs: int, threads: int) -> None:
    for cell in plan.cells:
        after = f", after {cell.needs.name}" if cell.needs else ""
        print(f"# {cell.name} ({read_state(out, cell)['state']}{after})")
        print("\n".join(command_text(cell, arguments, threads) for arguments in commands(plan, cell, out)))
    print("\n".join([*plan.notes, f"{_counts(plan)}, {jobs} at a time, in {out}"]))
