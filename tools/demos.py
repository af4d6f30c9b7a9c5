"""The demo of every bundle, one after the other, with a table of what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.runner import BUNDLES, read_rows, run_bundle

SCORES = ("mean_dice", "mean_auc")  # of validation, more is better; other bundles have a loss


def demos(output_dir: str = "demos", only: str | Sequence[str] = (), seed: int = 0) -> None:
    """Run ``train.yaml`` with ``demo.yaml`` of each bundle: phantom data, small networks, from scratch.

    Every run is printed as you would type it, and its log is kept. All bundles are run, also after one that failed.

    Args:
        output_dir: gets a new folder for each bundle; it must not hold an earlier demo of it.
        only: names of bundles, with commas between them; all by default.
        seed: of all random numbers.
    """
    out = Path(output_dir).resolve()
    known = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/demo.yaml"))
    chosen = known if not only else only.split(",") if isinstance(only, str) else list(only)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"error: --only {','.join(unknown)}: no such bundle, expected some of {', '.join(known)}")
    there = [str(out / name) for name in chosen if (out / name / "checkpoint.pt").exists()]
    if there:
        raise SystemExit(f"error: {there[0]}: holds an earlier demo: remove it, or take another --output_dir")
    table, failed = [], []
    for number, bundle in enumerate(chosen, start=1):
        folder = out / bundle
        options = ["--output_dir", folder, "--models_dir", folder / "models", "--seed", seed]
        try:
            configs = ["configs/train.yaml", "configs/demo.yaml"]
            seconds = run_bundle(f"{number}/{len(chosen)} {bundle}", bundle, configs, options, folder / "log.txt")
            table.append((bundle, f"{seconds:.0f}", result_of(read_rows(folder / "scalars.csv"))))
        except SystemExit as error:
            print(error, flush=True)
            failed.append(bundle)
            table.append((bundle, "", f"failed: {folder / 'log.txt'}"))
    print(f"\n{'bundle':34s} {'seconds':>8s}  result")
    for bundle, time, result in table:
        print(f"{bundle:34s} {time:>8s}  {result}")
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(chosen)} demos failed: {', '.join(failed)}")


def result_of(rows: Sequence[Mapping[str, str]]) -> str:
    """The best validation score of a training, or its first and last validation loss."""
    for name in SCORES:
        values = [float(row[name]) for row in rows if row.get(name)]
        if values:
            return f"best {name} {max(values):.3f} after {len(rows)} epochs"
    losses = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
    return f"val_loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(rows)} epochs"
