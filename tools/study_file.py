"""Reads a study file and says everything that is wrong in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from medmim.checks import is_number, is_whole
from medmim.datalists import load_datalist
from medmim.datasets import get_preset
from tools.study_checks import cell_faults, pair_faults
from tools.study_plan import (
    SET_BY_STUDY,
    Arm,
    Bundle,
    Knobs,
    Study,
    arm_grid,
    bundle_names,
    get_bundle,
    make_cells,
)

SECTIONS = ("common", "pretraining", "finetuning")
OTHERS = ("name", "arms", "grid", "labels", "seeds", "pretraining_seed", "convergence", "evaluate")
KEYS = (*SECTIONS, *OTHERS)
PATHS = ("dataset_dir", "datalist", "cache_dir", "pretrained_encoder")  # relative to the study file
SPLIT = ("dataset_dir", "datalist", "fold", "folds")  # what the number of training scans depends on


class _Loader(yaml.SafeLoader):
    """Refuses what YAML takes silently: a key that stands twice. What ``<<`` merges may be given anew."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.seen: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called before keys are constructed, for merged mappings again: afterwards merged keys stand among others."""
        if id(node) not in self.seen:
            self.seen.add(id(node))
            keys: list[Any] = []
            for key in [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]:
                name = self.construct_object(key, deep=True)
                if name in keys:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: '{name}' stands twice there: give each its own name")
                keys.append(name)
        super().flatten_mapping(node)


def read_study(path: str | Path, dataset_dir: str | Path | None = None) -> Study:
    """Read and check a study file, and make its cells.

    Args:
        path: of the file.
        dataset_dir: folder of the scans, before that of the file.

    Raises:
        ValueError: one line for each fault.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values ({', '.join(KEYS)}), found {type(content).__name__}")
    reader = _Reader(content, path.resolve().parent)
    study = reader.read(path.stem, None if dataset_dir is None else str(Path(dataset_dir).resolve()))
    if reader.faults:
        raise ValueError("\n".join(f"{path.name}: {fault}" for fault in dict.fromkeys(reader.faults)))
    return study


class _Reader:
    """Collects the faults of a file while it reads."""

    def __init__(self, content: Mapping[str, Any], folder: Path) -> None:
        self.content = content
        self.folder = folder
        self.faults: list[str] = []

    def read(self, name: str, dataset_dir: str | None) -> Study:
        self._check_names(self.content, KEYS, "")
        knobs = {section: self._knobs(self.content.get(section), section) for section in SECTIONS}
        if dataset_dir is not None:
            knobs["common"]["dataset_dir"] = dataset_dir
        study = Study(
            name=str(self.content.get("name", name)),
            arms=self._arms(knobs),
            knobs=knobs,
            grid=self._grid(),
            labels=self._labels(),
            seeds=self._seeds(),
            pretraining_seed=self._pretraining_seed(),
            convergence=self._convergence(),
            evaluate=self._switch("evaluate", True),
        )
        if study.arms and not self.faults:
            self._check_knobs(study)
        if study.arms and not self.faults:
            self.faults += pair_faults(study)
            self._compare(study)
            self._make_cells(study)
        return study

    # ---------------------------------------------------------------- the keys of the file, one by one

    def _knobs(self, given: Any, place: str) -> Knobs:
        if given is None:
            return {}
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
            self.faults.append(f"{place}: {given!r}: expected knobs and their values, as in {{epochs: 100}}")
            return {}
        for name in SET_BY_STUDY & set(given):
            hint = {"seed": "seeds", "label_fraction": "labels"}.get(name, "--output_dir")
            self.faults.append(f"{place}: {name}: is set by the study itself ({hint})")
        if "pretrained_encoder" in given and not re.fullmatch("arms: .*: finetuning", place):
            self.faults.append(f"{place}: pretrained_encoder: belongs under arms: <name>: finetuning, nowhere else")
        return {name: self._beside(name, value) for name, value in given.items()}

    def _beside(self, name: str, value: Any) -> Any:
        """A knob's value, or those of a list; paths are relative to the study file."""
        if isinstance(value, list):
            return [self._beside(name, one) for one in value]
        path = name in PATHS or (name == "dataset" and str(value).endswith((".yaml", ".yml")))
        return str(self.folder / value) if path and isinstance(value, str) and not value.startswith("$") else value

    def _arms(self, knobs: Mapping[str, Knobs]) -> list[Arm]:
        given = self.content.get("arms")
        default = {section: knobs[section].pop("bundle", None) for section in SECTIONS}
        if default["common"] is not None:
            self.faults.append("common: bundle: belongs under pretraining, finetuning or an arm")
        if not isinstance(given, dict) or not given:
            self.faults.append(f"arms: {given!r}: expected names of arms, as in {{scratch: {{}}, mae: {{...}}}}")
            return []
        arms = []
        for name, content in given.items():
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
                self.faults.append(
                    f"arms: {name!r}: a name of letters, digits, _ . + - that begins with "
                    "neither . nor + nor - (quote yes, no, on, off)"
                )
                continue
            content = {} if content is None else content
            if not isinstance(content, dict):
                self.faults.append(f"arms: {name}: {content!r}: expected {', '.join((*SECTIONS, 'against'))}, or {{}}")
                continue
            self._check_names(content, (*SECTIONS, "against"), f"arms: {name}: ")
            own = {section: self._knobs(content.get(section), f"arms: {name}: {section}") for section in SECTIONS}
            pretraining = None
            if "pretraining" in content:
                pretraining = own["pretraining"].pop("bundle", default["pretraining"])
                self._check_bundle(pretraining, "pretraining", name)
                if "pretrained_encoder" in own["finetuning"]:
                    self.faults.append(f"arms: {name}: pretrained_encoder: is that of its own pre-training")
            finetuning = own["finetuning"].pop("bundle", default["finetuning"])
            self._check_bundle(finetuning, "finetuning", name)
            against = content.get("against")
            if against is not None and (not isinstance(against, str) or against not in given or against == name):
                self.faults.append(
                    f"arms: {name}: against: {against}: no other arm of that name{_hint(against, given)}"
                )
            arms.append(Arm(name, pretraining, str(finetuning), own, against))
        return arms

    def _check_bundle(self, name: Any, section: str, arm: str) -> None:
        if name is None:
            self.faults.append(f"arms: {arm}: {section}: no bundle: give one there, or under {section} for all arms")
            return
        ending = "_pretraining" if section == "pretraining" else "_segmentation"
        known = [n for n in bundle_names() if n.endswith(ending) and "_cxr_" not in n]  # a study scores segmentations
        if name not in known:
            self.faults.append(f"arms: {arm}: {section}: bundle {name}: not one of {', '.join(known)}")
        elif section == "finetuning":
            bundle = get_bundle(name)
            if bundle.metric != "mean_dice" or not bundle.knows("label_fraction"):
                self.faults.append(f"arms: {arm}: bundle {name}: a study needs mean_dice and label_fraction of it")

    def _grid(self) -> dict[str, dict[str, list[Any]]]:
        given = self.content.get("grid") or {}
        if not isinstance(given, dict):
            self.faults.append(
                f"grid: {given!r}: expected sections, as in {{pretraining: {{mask_ratio: [0.5, 0.75]}}}}"
            )
            return {}
        self._check_names(given, SECTIONS, "grid: ")
        found: dict[str, dict[str, list[Any]]] = {section: {} for section in SECTIONS}
        for section in [section for section in SECTIONS if section in given]:
            for knob, values in self._knobs(given[section], f"grid: {section}").items():
                if not isinstance(values, list) or not values:
                    self.faults.append(f"grid: {section}: {knob}: {values!r}: expected a list of values")
                elif len({repr(value) for value in values}) < len(values):
                    self.faults.append(f"grid: {section}: {knob}: {values}: a value stands twice")
                elif any(knob in knobs for knobs in found.values()):
                    self.faults.append(f"grid: {knob}: stands in two sections: once is enough")
                else:
                    found[section][knob] = values
        return found

    def _labels(self) -> list[tuple[int | float, Knobs]]:
        given = self.content.get("labels")
        if isinstance(given, dict):
            found = [(key, self._knobs(value, f"labels: {key}")) for key, value in given.items()]
        else:
            found = [(key, {}) for key in given] if isinstance(given, list) else []
        if not found:
            self.faults.append(f"labels: {given!r}: expected a list, as in [16, 64] (scans) or [0.1, 1.0] (shares)")
        if len({repr(key) for key, _ in found}) < len(found):
            self.faults.append(f"labels: {given}: a number stands twice")
        for key, _ in found:
            whole = is_whole(key) and key > 0
            if not whole and not (isinstance(key, float) and 0 < key <= 1):
                self.faults.append(f"labels: {key!r}: expected a whole number of scans, or a share above 0.0 up to 1.0")
        return found

    def _seeds(self) -> list[int]:
        given = self.content.get("seeds", [0])
        if not isinstance(given, list) or not given or not all(_is_seed(seed) for seed in given):
            self.faults.append(f"seeds: {given!r}: expected a list of whole numbers, as in [0, 1, 2]")
            return []
        if len(set(given)) < len(given):
            self.faults.append(f"seeds: {given}: a seed stands twice")
        return given

    def _pretraining_seed(self) -> int | None:
        given = self.content.get("pretraining_seed", 0)
        if given == "each":
            return None
        if not _is_seed(given):
            self.faults.append(f"pretraining_seed: {given!r}: expected a whole number, or 'each' (one for each seed)")
            return None
        return int(given)

    def _convergence(self) -> list[float]:
        given = self.content.get("convergence", [0.95, 1.0])
        if not isinstance(given, list) or not given or not all(is_number(n) and 0 < n <= 1 for n in given):
            self.faults.append(f"convergence: {given!r}: expected a list of numbers above 0 up to 1, as in [0.95, 1.0]")
            return []
        return [float(share) for share in given]

    def _switch(self, name: str, default: bool) -> bool:
        given = self.content.get(name, default)
        if not isinstance(given, bool):
            self.faults.append(f"{name}: {given!r}: expected true or false")
        return bool(given)

    def _check_names(self, given: Mapping, known: Sequence[str], place: str) -> None:
        for name in given:
            if name not in known:
                self.faults.append(f"{place}{name}: no such key{_hint(name, known)}: known are {', '.join(known)}")

    # ---------------------------------------------------------------- what has to fit together

    def _check_knobs(self, study: Study) -> None:
        used: dict[str, list[Bundle]] = {
            "pretraining": [get_bundle(arm.pretraining) for arm in study.arms if arm.pretraining],
            "finetuning": [get_bundle(arm.finetuning) for arm in study.arms],
        }
        used = {kind: list(dict.fromkeys(bundles)) for kind, bundles in used.items()}
        used["common"] = [*used["pretraining"], *used["finetuning"]]
        for section in SECTIONS:
            places = {f"{section}: {knob}": knob for knob in study.knobs[section]}
            places |= {f"grid: {section}: {knob}": knob for knob in study.grid.get(section, {})}
            for place, knob in places.items():
                self._check_knob(place, knob, used[section], study.notes)
        for labels, knobs in study.labels:
            for knob in knobs:
                self._check_knob(f"labels: {labels}: {knob}", knob, used["finetuning"], [], True)
        for arm in study.arms:
            own = {"finetuning": [get_bundle(arm.finetuning)], "pretraining": []}
            own["pretraining"] = [get_bundle(arm.pretraining)] if arm.pretraining else []
            own["common"] = own["pretraining"] + own["finetuning"]
            varied = arm_grid(arm, study.grid)
            for section in SECTIONS:
                for knob in arm.knobs[section]:
                    self._check_knob(f"arms: {arm.name}: {section}: {knob}", knob, own[section], study.notes)
                    if any(knob in varied.get(other, {}) for other in {section, "common"}):
                        self.faults.append(f"arms: {arm.name}: {section}: {knob}: the grid varies it: leave one away")
            missing = [
                k for s in ("pretraining", "common") for k in study.grid.get(s, {}) if k not in varied.get(s, {})
            ]
            if missing and arm.pretraining:
                study.notes.append(f"{arm.name}: has no {', '.join(missing)}, so it is not varied there")

    def _check_knob(
        self, place: str, knob: str, bundles: Sequence[Bundle], notes: list[str], all_: bool = False
    ) -> None:
        if not bundles:
            notes.append(f"{place}: not used, as no arm has a pre-training")
            return
        without = [bundle.name for bundle in bundles if not bundle.knows(knob)]
        if len(without) == len(bundles) or (all_ and without):
            where = ", ".join(bundle.name for bundle in bundles)
            names = [name for bundle in bundles for name in bundle.names]
            self.faults.append(f"{place}: no knob of {where}{_hint(knob, names)}")
        elif without and not place.startswith("grid"):
            notes.append(f"{place}: not a knob of {', '.join(without)}, which runs without it")

    def _compare(self, study: Study) -> None:
        """Choose the arm that each is compared to: the first from scratch with the same fine-tuning bundle."""
        for number, arm in enumerate(study.arms):
            if arm.against is not None:
                continue
            scratch = [a for a in study.arms if a.from_scratch and a.finetuning == arm.finetuning]
            if not scratch:
                study.notes.append(f"{arm.name}: no arm from scratch with {arm.finetuning}: compared to none")
            elif scratch[0] is not arm:
                study.arms[number] = Arm(arm.name, arm.pretraining, arm.finetuning, arm.knobs, scratch[0].name)

    def _make_cells(self, study: Study) -> None:
        counts: dict[str, int | None] = {}

        def count(knobs: Knobs) -> int | None:
            split = {name: knobs[name] for name in SPLIT if name in knobs}
            if "dataset_dir" not in split:
                self.faults.append("dataset_dir: missing: give --dataset_dir, or dataset_dir under common")
                return None
            if repr(split) not in counts:
                try:
                    preset = get_preset(knobs["dataset"]) if "dataset" in knobs else None  # knows names of channels
                    counts[repr(split)] = len(load_datalist(**split, preset=preset).training)
                except (ValueError, OSError, TypeError) as error:
                    self.faults += str(error).splitlines()
                    counts[repr(split)] = None
            return counts[repr(split)]

        try:
            study.cells = make_cells(study, count)
        except ValueError as error:
            self.faults += str(error).splitlines()
        self.faults += cell_faults(study)


def _is_seed(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _hint(name: Any, known: Any) -> str:
    close = get_close_matches(str(name), [str(other) for other in known if other != name], n=2)
    return f" (did you mean {' or '.join(dict.fromkeys(close))}?)" if close else ""
