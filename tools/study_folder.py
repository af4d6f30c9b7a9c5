"""The folder of a study: what each cell left there, with which settings, and who works in it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmim.files import replace_file
from medmim.version import __version__
from tools.study_plan import BUNDLES, Cell, Knobs, Study, get_bundle

LOCK, STATE = "study.lock", "cell.json"


def read_state(out: Path, cell: Cell) -> dict[str, Any]:
    """What a cell's folder says of it; ``state`` is ``new``, ``started``, ``failed`` or ``finished``."""
    path = out / cell.name / STATE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"state": "new"}
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}): remove its folder to run the cell again") from error


def write_state(out: Path, cell: Cell, **content: Any) -> None:
    content = {"settings": cell.settings(), "medmim": __version__} | content
    text = json.dumps(content, indent=1, default=str)
    replace_file(out / cell.name / STATE, lambda path: path.write_text(text, encoding="utf-8"))


def changes(before: Knobs, now: Knobs) -> list[str]:
    """Settings in which two cells differ; a knob that the bundle did not have yet counts when it is set."""
    if before["bundle"] != now["bundle"]:
        return [f"bundle {now['bundle']} (was {before['bundle']})"]
    now = json.loads(json.dumps(now, default=str))
    old, new = before["knobs"], now["knobs"]
    defaults = json.loads(json.dumps(get_bundle(now["bundle"]).defaults, default=str))
    found = [
        f"{knob} {new.get(knob)} (was {old.get(knob)})"
        for knob in {**old, **new}
        if (old.get(knob) != new.get(knob) if knob in old else new[knob] != defaults.get(knob))
    ]
    if ("pretraining" in before) != ("pretraining" in now):
        return [*found, "with another start"]
    if "pretraining" in now:
        found += [f"pre-training: {text}" for text in changes(before["pretraining"], now["pretraining"])]
    return found


def prepare(study: Study, out: Path, rerun_changed: bool = False) -> list[str]:
    """Look for what an earlier run left with other settings, and move it away where that is allowed.

    An unfinished cell is moved in any case, a finished one with ``rerun_changed``.

    Returns:
        lines that say what was moved.

    Raises:
        ValueError: a line for each finished cell with other settings.
    """
    moves: list[tuple[Cell, str]] = []
    faults = []
    for cell in study.cells:
        state = read_state(out, cell)
        if state["state"] == "new":
            continue
        changed = changes(state["settings"], cell.settings())
        if not changed and state["state"] == "finished" and cell.kind == "pretraining":
            if not (out / cell.name / "models" / "encoder.pt").is_file():
                moves.append((cell, "its encoder.pt is gone"))
        elif changed and state["state"] == "finished" and not rerun_changed:
            faults.append(
                f"{out / cell.name}: was finished with other settings: {', '.join(changed)}: take another "
                "--output_dir, or --rerun_changed True to set such cells aside and run them again"
            )
        elif changed:
            moves.append((cell, ", ".join(changed)))
    if faults:
        raise ValueError("\n".join(faults))
    lines = []
    for cell, why in moves:
        target = next(t for n in range(1, 10**6) if not (t := out / "set_aside" / str(n) / cell.name).exists())
        target.parent.mkdir(parents=True, exist_ok=True)
        (out / cell.name).replace(target)
        lines.append(f"{cell.name}: other settings ({why}): set aside as {target.relative_to(out)}, runs again")
    return lines


def commands(study: Study, cell: Cell, out: Path) -> list[list[str]]:
    """The runner's arguments for a cell: training, and for a fine-tuning its evaluation."""
    knobs = cell.knobs | {"output_dir": out / cell.name, "models_dir": out / cell.name / "models"}
    if cell.needs is not None:
        knobs["pretrained_encoder"] = out / cell.needs.name / "models" / "encoder.pt"
    values = {name: "$None" if value is None else str(value) for name, value in knobs.items()}  # the runner drops None
    given = [text for name, value in values.items() for text in (f"--{name}", value)]
    found = [["--config_file", "configs/train.yaml", *given, "--resume", "true"]]
    if cell.kind == "finetuning" and study.evaluate:
        found.append(["--config_file", "['configs/train.yaml','configs/evaluate.yaml']", *given])
    return found


def command_text(cell: Cell, arguments: Sequence[str], threads: int) -> str:
    """A command as one would type it."""
    line = f"OMP_NUM_THREADS={threads} python -m monai.bundle run {shlex.join(arguments)}"
    return f"cd {shlex.quote(str(BUNDLES / cell.bundle))}\n{line}\n"


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keep a second study out of a folder, also while runs of a killed one still go on: they hold the lock too.

    Raises:
        ValueError: when another has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ValueError(
                f"{out}: another study works there ({file.read().strip()}), or runs that it left behind do: wait or "
                "end them, or take another --output_dir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield file.fileno()
