"""Tables of a study: ``results.csv``, ``cases.csv`` and ``report.md``, from what its cells left behind."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmim.files import replace_file
from tools.study_figures import draw_figures
from tools.study_folder import read_state
from tools.study_plan import Cell, Study
from tools.study_results import SCORES, Curve, convergence, interval, mean_and_sd, read_curve


@dataclass(frozen=True)
class Result:
    """A finished fine-tuning: its cell, numbers and curve, and the cell that it is compared to, if that is finished."""

    cell: Cell
    numbers: Mapping[str, Any]
    curve: Curve
    reference: Result | None

    @property
    def difference(self) -> float | None:
        """Best Dice above the reference's, with the same seed."""
        if self.reference is None:
            return None
        return self.numbers["best_dice"] - self.reference.numbers["best_dice"]


Group = tuple[Cell, list[Result]]  # the first cell of several that differ in the seed only


def write_report(study: Study, out: Path, command: str) -> None:
    """Write all tables and figures of what is finished up to now.

    Args:
        study: with its cells.
        out: its folder.
        command: that started it.
    """
    states = {cell.name: read_state(out, cell) for cell in study.cells}
    results = collect(study, out, states)
    groups = group(study, results)
    _write_csv(out / "results.csv", [_row(study, cell, states, results) for cell in study.finetunings])
    _write_csv(
        out / "cases.csv",
        [
            {**_place(result.cell), "case": case, **scores}
            for result in results.values()
            for case, scores in result.numbers.get("cases", {}).items()
        ],
    )
    figures = draw_figures(study, groups, out)
    text = report_text(study, states, groups, command, figures)
    replace_file(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


def collect(study: Study, out: Path, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """The finished fine-tunings by name."""
    found: dict[str, Result] = {}
    done = [cell for cell in study.finetunings if states[cell.name]["state"] == "finished"]
    bare = {cell.name: Result(cell, states[cell.name]["results"], read_curve(out / cell.name), None) for cell in done}
    for cell in done:
        reference = study.reference(cell)
        compared = bare.get(reference.name) if reference is not None else None
        found[cell.name] = Result(cell, bare[cell.name].numbers, bare[cell.name].curve, compared)
    return found


def group(study: Study, results: Mapping[str, Result]) -> list[Group]:
    """Cells that differ in the seed only, with what is finished of them; in the order of the plan."""
    found: dict[str, Group] = {}
    for cell in study.finetunings:
        _, own = found.setdefault(repr((cell.arm, cell.point, cell.scans)), (cell, []))
        if cell.name in results:
            own.append(results[cell.name])
    return list(found.values())


def report_text(
    study: Study,
    states: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Group],
    command: str,
    figures: Sequence[str],
) -> str:
    """``report.md``."""
    finished = sum(state["state"] == "finished" for state in states.values())
    machines = sorted(
        {f"{s['machine']}; {s['jobs']} cells at a time, {s['threads']} threads each" for s in states.values()
         if s["state"] == "finished"}
    )  # fmt: skip
    parts = [
        f"# Study {study.name}",
        f"{finished} of {len(states)} cells are finished ({time.strftime('%Y-%m-%d %H:%M')}). Made by:",
        f"```\n{command}\n```",
        "On: " + ("; ".join(machines) or "nothing was run yet") + ".",
        "## What was varied",
        "\n".join(_plan_lines(study)),
        "## Dice",
        "Mean foreground Dice of the validation scans, mean ± standard deviation over the seeds. *Best* is the best of "
        "all validations and *last* the last one; the best is chosen on these same scans, so it flatters, every arm "
        "alike. HD95 (mm) and surface Dice are those of the best weights, a mean over the classes of a scan, then over "
        "the scans. *Difference* is the mean of the differences of best Dice to the arm in brackets, each between two "
        "runs with the same seed, with its 95 % interval (Student's t). It speaks of other seeds on the same scans, "
        "not of other scans. *Still improving*: runs whose best validation lies in the last tenth of the epochs, and "
        "by how much it is above what was reached before; if that is much, the budget was short." + _seeds_line(study),
        _dice_table(groups),
    ]
    if any(group_.reference for _, own in groups for group_ in own):
        parts += [
            "## Convergence",
            "Epochs (in brackets seconds) until a share of the reference's best Dice was reached, with the same scans "
            "and seed, one value for each seed; validations are the resolution. *Speed-up*: the reference's epochs to "
            "get there over the arm's, mean over the seeds if all of them got there. Seconds are rough: cells ran "
            "beside each other.",
            _convergence_table(study, groups),
        ]
    missing = _missing(study, states)
    parts += ["## Not finished", "\n".join(missing)] if missing else []
    parts += ["## Figures", "\n\n".join(f"![{name}]({name})" for name in figures)] if figures else []
    parts += ["`results.csv` has a row for each fine-tuning with all its settings, `cases.csv` one for each scan."]
    return "\n\n".join(parts) + "\n"


def point_text(cell: Cell) -> str:
    """A cell's grid knobs in words."""
    return ", ".join(f"{knob} {value}" for knob, value in cell.point.items())


def _plan_lines(study: Study) -> list[str]:
    lines = []
    for arm in study.arms:
        own = {f"{section}: {knob}": value for section, ks in arm.knobs.items() for knob, value in ks.items()}
        knobs = f", with {', '.join(f'{knob} {value}' for knob, value in own.items())}" if own else ""
        start = arm.pretraining or ("from scratch" if arm.from_scratch else "weights that were given")
        lines.append(f"* arm **{arm.name}**: {start}, then {arm.finetuning}{knobs}")
    for section, knobs_ in study.grid.items():
        lines += [f"* {section}: {knob} {', '.join(map(str, values))}" for knob, values in knobs_.items()]
    lines.append(f"* labelled scans: {', '.join(str(n) for n in sorted({c.scans for c in study.finetunings}))}")
    lines.append(f"* seeds: {', '.join(map(str, study.seeds))}")
    if any(arm.pretraining for arm in study.arms):
        one = study.pretraining_seed
        each = "each seed has its own" if one is None else f"one for all seeds, with seed {one}"
        lines.append(f"* pre-training: {each}")
    for section, own in study.knobs.items():
        if own:
            lines.append(f"* {section}: " + ", ".join(f"{knob} {value}" for knob, value in own.items()))
    return lines + [f"* note: {note}" for note in study.notes]


def _seeds_line(study: Study) -> str:
    if len(study.seeds) == 1:
        return " There is one seed only, so neither deviations nor intervals are known."
    if study.pretraining_seed is not None and any(arm.pretraining for arm in study.arms):
        return " All seeds of an arm start from one pre-training, so how much that varies is not in the figures."
    return ""


def _dice_table(groups: Sequence[Group]) -> str:
    header = ["arm", "knobs", "labels", "seeds", "best Dice", "last Dice", "HD95 mm", "surface Dice", "difference"]
    header.append("still improving")
    rows = []
    for cell, own in groups:
        if not own:
            continue
        numbers = [_spread(own, name, digits) for name, digits in (
            ("best_dice", 4), ("last_dice", 4), ("hd95_mm", 2), ("surface_dice", 4)
        )]  # fmt: skip
        rows.append([cell.arm, point_text(cell), str(cell.scans), str(len(own)), *numbers, _difference(own)])
        late = [result.numbers["late_gain"] for result in own if result.numbers["still_improving"]]
        gains = [gain for gain in late if gain is not None]
        gain = f", up to {max(gains):+.4f}" if gains else ""
        rows[-1].append(f"{len(late)} of {len(own)}{gain}")
    return _table(header, rows) if rows else "No fine-tuning is finished."


def _difference(own: Sequence[Result]) -> str:
    pairs = [(result.difference, result.reference) for result in own if result.reference is not None]
    if not pairs or pairs[0][1] is None:
        return "–"
    values = [float(value) for value, _ in pairs if value is not None]
    found = interval(values)
    text = f"{mean_and_sd(values)[0]:+.4f}"
    text += f" [{found[0]:+.4f}, {found[1]:+.4f}]" if found else " (one seed: no interval)"
    some = f", {len(values)} of {len(own)} seeds" if len(values) < len(own) else ""
    return f"{text} ({pairs[0][1].cell.arm}{some})"


def _spread(own: Sequence[Result], name: str, digits: int) -> str:
    values = [result.numbers[name] for result in own if name in result.numbers]
    if not values:
        return "–"
    mean, sd = mean_and_sd(values)
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def _convergence_table(study: Study, groups: Sequence[Group]) -> str:
    header = ["arm", "knobs", "labels"]
    for share in study.convergence:
        header += [f"epochs to {share:.0%}", "reference", "speed-up"]
    rows = []
    for cell, own in groups:
        compared = [(result, result.reference) for result in own if result.reference is not None]
        if not compared:
            continue
        row = [cell.arm, point_text(cell), str(cell.scans)]
        for share in study.convergence:
            found = [convergence(result.curve, other.curve, share) for result, other in compared]
            reached = [
                f"{one['epochs']} ({one['seconds']:.0f} s)" if one["epochs"] else f"not in {cell.epochs}"
                for one in found
            ]
            ups = [one["speed_up"] for one in found if one["speed_up"] is not None]
            up = f"{mean_and_sd(ups)[0]:.2f}×" if len(ups) == len(found) else f"{len(ups)} of {len(found)} got there"
            row += [", ".join(reached), ", ".join(str(one["reference_epochs"]) for one in found), up]
        rows.append(row)
    return _table(header, rows)


def _missing(study: Study, states: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for cell in study.cells:
        state = states[cell.name]
        needs = states[cell.needs.name] if cell.needs is not None else {"state": "finished"}
        if state["state"] == "failed":
            lines.append(f"* {cell.name}: failed: {state['error']} (`{cell.name}/log.txt`)")
        elif state["state"] != "finished" and needs["state"] == "failed" and cell.needs is not None:
            lines.append(f"* {cell.name}: skipped: it needs {cell.needs.name}, which failed")
        elif state["state"] != "finished":
            lines.append(f"* {cell.name}: {'begun' if state['state'] == 'started' else 'not begun'}")
    return lines


def _place(cell: Cell) -> dict[str, Any]:
    return {"arm": cell.arm, "bundle": cell.bundle, **cell.point, "scans": cell.scans, "seed": cell.seed}


def _row(
    study: Study, cell: Cell, states: Mapping[str, Mapping[str, Any]], results: Mapping[str, Result]
) -> dict[str, Any]:
    """A row of ``results.csv``; what is not known is empty."""
    row = _place(cell) | {"state": states[cell.name]["state"]}
    names = ("best_dice", "best_epoch", "last_dice", "late_gain", "still_improving", "train_seconds", *SCORES)
    result = results.get(cell.name)
    row |= {name: result.numbers.get(name) if result else None for name in names}
    reference = study.reference(cell)
    row["compared_to"] = reference.name if reference is not None else None
    row["difference"] = result.difference if result else None
    for share in study.convergence:
        if result is not None and result.reference is not None:
            found = convergence(result.curve, result.reference.curve, share)
            row |= {f"{name}_to_{share:g}": value for name, value in found.items()}
    row["epochs_run"] = cell.epochs
    for kind, one in (("finetuning", cell), ("pretraining", cell.needs)):
        if one is not None:
            row |= {f"{kind}.bundle": one.bundle} | {f"{kind}.{knob}": value for knob, value in one.knobs.items()}
    return row


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows
            )

    replace_file(path, write)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, without the columns that are empty in each row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells[i] for i in kept)} |"  # noqa: E731
    return "\n".join([line(header), "|" + "---|" * len(kept), *map(line, rows)])
