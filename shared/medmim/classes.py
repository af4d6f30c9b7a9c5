"""What a classification is to tell apart: the field ``classification`` of a preset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

TASKS = ("multiclass", "binary", "multilabel")
COLUMNS = ("image_column", "label_column", "patient_column", "split_column", "nothing")
LISTS = ("datalist", "training_list", "test_list")


@dataclass(frozen=True)
class Classification:
    """Classes of a data set of images, and where its labels stand; the fields are explained in ``presets.yaml``."""

    task: str
    classes: tuple[str, ...]
    patterns: dict[str, str] = field(default_factory=dict)
    datalist: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    patient_column: str = "patient"
    split_column: str = "split"
    nothing: str = "No Finding"
    patient_pattern: str | None = None
    training_list: str | None = None
    test_list: str | None = None

    @property
    def outputs(self) -> list[str]:
        """Class of each output of the network: all of them, or the second of two."""
        return [self.classes[1]] if self.task == "binary" else list(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a description file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Classification:
        """Build and check.

        Raises:
            ValueError: listing every fault.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"classification must hold task and classes, or be null, found {values!r}")
        known = {f.name for f in fields(cls)}
        faults = [f"classification has an unknown field {key!r}" for key in values if key not in known]
        faults += [f"classification lacks the field {key!r}" for key in ("task", "classes") if key not in values]
        if not faults:
            faults = _faults(values)
        if faults:
            raise ValueError("; ".join(faults))
        return cls(**{**values, "classes": tuple(values["classes"])})


def _faults(values: Mapping[str, Any]) -> list[str]:
    task, classes, patterns = values["task"], values["classes"], values.get("patterns", {})
    faults = []
    if task not in TASKS:
        faults.append(f"task must be {' or '.join(TASKS)}, found {task!r}")
    named = isinstance(classes, list | tuple) and all(isinstance(name, str) and name for name in classes)
    if not named or len(set(classes)) < len(classes):
        return [*faults, f"classes must be a list of different names, found {classes!r}"]
    if len(classes) != 2 and task == "binary":
        faults.append(f"a binary task needs two classes, the negative one first, found {len(classes)}")
    if len(classes) < (1 if task == "multilabel" else 2):
        faults.append(f"a {task} task needs more classes, found {len(classes)}")
    for key in (key for key in COLUMNS if key in values):
        if not isinstance(values[key], str) or not values[key]:
            faults.append(f"{key} must be text, found {values[key]!r}")
    for key in (key for key in LISTS if key in values):
        name = values[key]
        if name is not None and (not isinstance(name, str) or not name or Path(name).is_absolute()):
            faults.append(f"{key} must name a file in the folder of the data, or be null, found {name!r}")
    if not isinstance(patterns, Mapping) or set(patterns) - set(classes):
        return [*faults, f"patterns must map classes to regular expressions, found {patterns!r}"]
    for text in [*patterns.values(), values.get("patient_pattern")]:
        try:
            groups = 0 if text is None else re.compile(text).groups
        except (re.error, TypeError):
            faults.append(f"expected a regular expression, found {text!r}")
        else:
            if text == values.get("patient_pattern") and text is not None and groups != 1:
                faults.append(f"patient_pattern needs one group (...) that holds the patient, found {text!r}")
    return faults
