"""What a study consists of: cells, each one run of a bundle, and what they are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
NEUTRAL = {"cache", "cache_dir", "cache_rate", "check_scans", "checkpoint_interval", "num_workers", "preview_interval"}
SET_BY_STUDY = {"bundle_root", "imports", "label_fraction", "models_dir", "output_dir", "resume", "seed"}
Knobs = dict[str, Any]


class Bundle:
    """The knobs of a bundle, from its ``configs/train.yaml``.

    Args:
        name: of its folder.

    Raises:
        ValueError: when there is no such bundle.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path = BUNDLES / name / "configs" / "train.yaml"
        if not path.is_file():
            raise ValueError(f"bundle {name}: no such bundle")
        self.content: dict[str, Any] = ConfigParser.load_config_file(path)
        self.config = ConfigParser(self.content)

    def knows(self, knob: str) -> bool:
        """Whether it has the id; ``a::b`` looks inside."""
        return "::".join(re.split("#|::", knob)) in self.config

    @property
    def names(self) -> list[str]:
        """Ids that a knob can be mistaken for."""
        return [name for name in self.content if name not in SET_BY_STUDY]

    @property
    def defaults(self) -> Knobs:
        """Values of the ids that are no components, as they stand in the file."""
        no_knobs = {"imports", "initialize", "load", "run"}
        return {k: v for k, v in self.content.items() if not isinstance(v, dict) and k not in no_knobs}

    @property
    def encoder_knobs(self) -> list[str]:
        """Knobs in which a fine-tuning must agree with its pre-training."""
        knobs = self.content.get("check", {}).get("encoder", {}).get("knobs", {})  # by names of the constructor
        return [knob for value in knobs.values() for knob in re.findall(r"@(\w+)", str(value))]

    @property
    def metric(self) -> str:
        """Name of the validation's key metric, the column of ``scalars.csv``."""
        return next(iter(self.content.get("validate", {}).get("key_metric", {})), "")


@cache
def get_bundle(name: str) -> Bundle:
    """A bundle by its name, read once."""
    return Bundle(name)


def bundle_names() -> list[str]:
    """All bundles that are there."""
    return sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/train.yaml"))


@dataclass(frozen=True)
class Cell:
    """One pre-training, or one fine-tuning with its evaluation.

    Attributes:
        kind: ``pretraining`` or ``finetuning``.
        name: folder below the study's.
        bundle: that is run.
        arm: of the study; of several that share a pre-training, the first.
        point: the grid's knobs and their values here.
        knobs: what the command line gives, without folders.
        scans: labelled scans, 0 for a pre-training.
        needs: the pre-training that it starts from.
    """

    kind: str
    name: str
    bundle: str
    arm: str
    point: Knobs
    knobs: Knobs
    scans: int = 0
    needs: Cell | None = None

    @property
    def seed(self) -> int:
        """Of its random numbers."""
        return int(self.knobs["seed"])

    @property
    def epochs(self) -> int:
        """That it trains for."""
        return (get_bundle(self.bundle).defaults | self.knobs)["epochs"]

    def settings(self) -> Knobs:
        """All that decides over its results: knobs, the bundle's defaults for the rest, its pre-training's settings."""
        left_out = NEUTRAL | SET_BY_STUDY - {"seed", "label_fraction"}
        knobs = get_bundle(self.bundle).defaults | self.knobs
        found: Knobs = {"bundle": self.bundle, "knobs": {k: v for k, v in knobs.items() if k not in left_out}}
        return found | ({} if self.needs is None else {"pretraining": self.needs.settings()})


@dataclass(frozen=True)
class Arm:
    """A way to start a fine-tuning.

    Attributes:
        name: in tables.
        pretraining: name of the bundle, ``None`` for an arm without.
        finetuning: name of the bundle.
        knobs: its own, by section (``common``, ``pretraining``, ``finetuning``).
        against: arm that it is compared to, if any.
    """

    name: str
    pretraining: str | None
    finetuning: str
    knobs: Mapping[str, Knobs]
    against: str | None = None

    @property
    def from_scratch(self) -> bool:
        """Whether no weights are given to it."""
        return self.pretraining is None and self.knobs["finetuning"].get("pretrained_encoder") is None


@dataclass
class Study:
    """A study file that was checked.

    Attributes:
        name: of the study.
        arms: in the order of the file.
        knobs: of all arms, by section.
        grid: knobs that are varied, by section.
        labels: number of labelled scans as the file says it (whole number, or share as float) and knobs of the
            fine-tunings with so many.
        seeds: of the fine-tunings.
        pretraining_seed: of all pre-trainings; ``None`` gives each seed its own.
        convergence: shares of the reference's best Dice of which the time is taken.
        evaluate: whether each fine-tuning ends with an evaluation.
        notes: what a reader should know, a line each.
        cells: pre-trainings first.
    """

    name: str
    arms: list[Arm]
    knobs: Mapping[str, Knobs]
    grid: Mapping[str, Mapping[str, list[Any]]]
    labels: Sequence[tuple[int | float, Knobs]]
    seeds: Sequence[int]
    pretraining_seed: int | None
    convergence: Sequence[float]
    evaluate: bool
    notes: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def finetunings(self) -> list[Cell]:
        """The cells that give results."""
        return [cell for cell in self.cells if cell.kind == "finetuning"]

    def arm(self, name: str) -> Arm:
        """By its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def reference(self, cell: Cell) -> Cell | None:
        """The fine-tuning that another is compared to: same scans, seed and knobs of the grid that it has."""
        against = self.arm(cell.arm).against
        for other in self.finetunings:
            same = other.scans == cell.scans and other.seed == cell.seed
            if other.arm == against and same and other.point.items() <= cell.point.items():
                return other
        return None


def arm_grid(arm: Arm, grid: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
    """Those knobs of the grid that an arm's bundles have, by section."""
    pretraining = [arm.pretraining] if arm.pretraining else []
    bundles = {"pretraining": pretraining, "finetuning": [arm.finetuning], "common": [*pretraining, arm.finetuning]}
    return {
        section: {
            knob: values
            for knob, values in knobs.items()
            if any(get_bundle(name).knows(knob) for name in bundles[section])
        }
        for section, knobs in grid.items()
    }


def merge(study: Study, arm: Arm, kind: str, point: Knobs, own: Mapping[str, Any] | None = None) -> Knobs:
    """Knobs of a cell, later ones first: the grid's, ``own``, the arm's, those of all arms; a bundle gets those it has.

    Args:
        study, arm: whose knobs.
        kind: ``pretraining`` or ``finetuning``.
        point: values of the grid's knobs.
        own: more knobs of this cell.
    """
    bundle = get_bundle(arm.finetuning if kind == "finetuning" else str(arm.pretraining))
    found = {k: v for s in ("common", kind) for k, v in study.knobs[s].items() if bundle.knows(k)}
    found |= {k: v for k, v in arm.knobs["common"].items() if bundle.knows(k)}
    found |= {**arm.knobs[kind], **(own or {})}
    varied = {k for section in ("common", kind) for k in study.grid.get(section, {})}
    return found | {k: v for k, v in point.items() if k in varied and bundle.knows(k)}


def points(grid: Mapping[str, Mapping[str, list[Any]]]) -> Iterator[Knobs]:
    """Every combination of the grid's values."""
    axes = {knob: values for knobs in grid.values() for knob, values in knobs.items()}
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def folder_name(point: Knobs) -> str:
    """A grid point as the name of a folder; empty without a grid."""
    return "-".join(f"{_plain(knob)}_{_plain(value)}" for knob, value in point.items())


def make_cells(study: Study, count: Any) -> list[Cell]:
    """All cells of a study; arms with the same pre-training share it.

    Args:
        study: whose ``cells`` are still empty.
        count: gives the number of training scans for the knobs of a fine-tuning.

    Raises:
        ValueError: when a cell asks for more labelled scans than there are.
    """
    pretrainings: dict[str, Cell] = {}
    finetunings, faults = [], {}
    for arm in study.arms:
        grid = arm_grid(arm, study.grid)
        for point in points(grid):
            for (labels, own), seed in product(study.labels, study.seeds):
                knobs = merge(study, arm, "finetuning", point, own)
                total = count(knobs)
                if total is None:
                    continue
                scans = labels if isinstance(labels, int) else share_of_scans(labels, total)
                if scans > total:
                    faults[labels] = f"labels: {labels}: there are {total} labelled scans for training"
                    continue
                knobs |= {"seed": seed, "label_fraction": labels if isinstance(labels, float) else scans / total}
                needs = None
                if arm.pretraining:
                    needs = _pretraining(study, arm, point, grid, seed)
                    needs = pretrainings.setdefault(repr(needs.settings()), needs)
                parts = ["finetuning", arm.name, folder_name(point), f"labels_{scans}", f"seed_{seed}"]
                name = "/".join(part for part in parts if part)
                cell = Cell("finetuning", name, arm.finetuning, arm.name, point, knobs, scans, needs)
                finetunings.append(cell)
    if faults:
        raise ValueError("\n".join(faults.values()))
    cells = [*pretrainings.values(), *finetunings]
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            "\n".join(f"{name}: stands for two cells: labels or grid say the same twice" for name in twice)
        )
    return cells


def _pretraining(study: Study, arm: Arm, point: Knobs, grid: Mapping[str, Mapping[str, list]], seed: int) -> Cell:
    bundle = get_bundle(str(arm.pretraining))
    varied = {knob for section in ("common", "pretraining") for knob in grid.get(section, {}) if bundle.knows(knob)}
    own = {knob: value for knob, value in point.items() if knob in varied}
    number = seed if study.pretraining_seed is None else study.pretraining_seed
    knobs = merge(study, arm, "pretraining", own) | {"seed": number}
    parts = ["pretraining", arm.name, folder_name(own), f"seed_{number}"]
    return Cell("pretraining", "/".join(part for part in parts if part), bundle.name, arm.name, own, knobs)


def share_of_scans(fraction: float, total: int) -> int:
    """As :func:`medmim.datalists.load_datalist` counts."""
    return -int(-(fraction * total - 1e-9) // 1)


def _plain(value: Any) -> str:
    return re.sub(r"[^\w.+]+", "_", str(value)).strip("_")
