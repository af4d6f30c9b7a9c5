"""What has to fit together in a study, found out at its start and not after hours of pre-training."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from medmim.checks import check_schedule, is_number, is_whole
from medmim.datasets import Preset, get_preset
from tools.study_plan import Arm, Knobs, Study, arm_grid, get_bundle, merge, points

PREPARATION = ("channels", "spacing", "window", "z_score")  # as medmim.checks.check_encoder compares
_read_preset = cache(get_preset)


def pair_faults(study: Study) -> list[str]:
    """An encoder must fit the network that is fine-tuned, and the scans of both be prepared alike."""
    faults = []
    for arm in [arm for arm in study.arms if arm.pretraining]:
        first, second = get_bundle(str(arm.pretraining)), get_bundle(arm.finetuning)
        strange = [knob for knob in second.encoder_knobs if not first.knows(knob)]
        if strange:
            faults.append(
                f"arms: {arm.name}: an encoder of {first.name} does not fit {second.name}, which needs its "
                f"{', '.join(strange)}"
            )
            continue
        for point, own in [(p, own) for p in points(arm_grid(arm, study.grid)) for _, own in study.labels]:
            before = first.defaults | merge(study, arm, "pretraining", point)
            after = second.defaults | merge(study, arm, "finetuning", point, own)
            faults += _encoder_faults(study, arm, before, after)
            if after.get("allow_other_preset") not in (True, "true"):
                faults += _preset_faults(study, arm, before, after)
    return faults


def _encoder_faults(study: Study, arm: Arm, before: Knobs, after: Knobs) -> list[str]:
    faults = []
    for knob in get_bundle(arm.finetuning).encoder_knobs:
        values = [_resolve(knobs[knob], knobs) for knobs in (before, after)]
        if values[0] != values[1] and not any(str(value).startswith("$") for value in values):
            faults.append(
                f"arms: {arm.name}: {knob}: {values[0]} in the pre-training, {values[1]} in the fine-tuning: "
                f"give it under {_place(study, knob)}"
            )
    return faults


def _preset_faults(study: Study, arm: Arm, before: Knobs, after: Knobs) -> list[str]:
    try:
        presets = [_preset(knobs) for knobs in (before, after)]
    except ValueError:
        return []  # said by cell_faults
    different = [name for name in PREPARATION if getattr(presets[0], name) != getattr(presets[1], name)]
    if not different:
        return []
    values = [", ".join(f"{name} {getattr(preset, name)}" for name in different) for preset in presets]
    return [
        f"arms: {arm.name}: scans of {presets[0].name} with {values[0]} in the pre-training, of {presets[1].name} with "
        f"{values[1]} in the fine-tuning: give dataset and spacing_factor under "
        f"{_place(study, 'dataset', 'spacing_factor')}, or allow_other_preset: true under finetuning"
    ]


def _place(study: Study, *knobs: str) -> str:
    """Where knobs belong in which pre-training and fine-tuning have to agree."""
    varied = any(knob in values for values in study.grid.values() for knob in knobs)
    return "grid: common" if varied else "common"


def cell_faults(study: Study) -> list[str]:
    """Epochs, warm-up and preset of each run, and the weights that it is given."""
    faults = []
    for cell in study.cells:
        knobs = get_bundle(cell.bundle).defaults | cell.knobs
        if not is_whole(cell.epochs) or cell.epochs < 1:
            faults.append(f"epochs: {cell.epochs!r} for {cell.bundle}: expected a whole number above 0")
        elif not str(knobs.get("warmup_epochs", "$")).startswith("$"):
            try:
                check_schedule(cell.epochs, knobs["warmup_epochs"])
            except ValueError as error:
                faults.append(f"arms: {cell.arm}: {cell.bundle}: {error}")
        try:
            _preset(knobs)
        except ValueError as error:
            faults += str(error).splitlines()
        weights = cell.knobs.get("pretrained_encoder")
        if weights is not None and not str(weights).startswith("$") and not Path(str(weights)).is_file():
            faults.append(f"arms: {cell.arm}: finetuning: pretrained_encoder: {weights}: no such file")
    return faults


def _preset(knobs: Knobs) -> Preset:
    """Of a run.

    Raises:
        ValueError: when there is none.
    """
    factor = knobs.get("spacing_factor", 1.0)
    return _read_preset(str(knobs["dataset"]), factor if is_number(factor) else str(factor))


def _resolve(value: Any, knobs: Knobs) -> Any:
    """``$@preset.patch_size`` as a value, other expressions as they are."""
    found = re.fullmatch(r"\$@preset\.(\w+)", str(value))
    if found is None:
        return value
    try:
        return getattr(_preset(knobs), found.group(1), value)
    except ValueError:
        return value  # said by cell_faults
