"""The whole way on phantom data: pre-train, fine-tune with and without the encoder, evaluate, predict."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from medmim.datasets import get_preset
from medmim.figures import curves_figure, save_figure, segmentation_figure
from medmim.metrics import case_mean
from tools.runner import read_rows, run_bundle


def quickstart(output_dir: str = "quickstart", seed: int = 0) -> None:
    """Pre-train a small MAE on phantom CT scans, fine-tune UNETR from it and from scratch, evaluate and predict.

    Every step is a bundle run, printed as you would type it. Takes some minutes on two CPU cores.

    Args:
        output_dir: where data, weights, scores and figures go.
        seed: of all random numbers.
    """
    started = time.monotonic()
    out = Path(output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    data, encoder = out / "data", out / "pretraining" / "models" / "encoder.pt"
    common = ["--dataset_dir", data, "--seed", seed]

    for checkpoint in out.glob("*/checkpoint*.pt"):  # of an earlier quickstart
        checkpoint.unlink()

    def run(step: str, bundle: str, configs: Sequence[str], folder: str, *options: object) -> None:
        where = ["--output_dir", out / folder, "--models_dir", out / folder / "models"]
        run_bundle(step, bundle, configs, [*common, *where, *options], out / folder / "log.txt")

    train, demo, evaluate = "configs/train.yaml", "configs/demo.yaml", "configs/evaluate.yaml"
    run("1/6 pre-train a masked autoencoder, without labels", "mae_vit_pretraining", [train, demo], "pretraining")
    for number, arm, options in (
        (2, "pretrained", ["--pretrained_encoder", encoder]),
        (3, "scratch", []),
    ):
        step = f"{number}/6 fine-tune UNETR with few labels, {arm}"
        run(step, "unetr_segmentation", [train, demo], arm, *options)
    for number, arm in ((4, "pretrained"), (5, "scratch")):
        run(f"{number}/6 evaluate, {arm}", "unetr_segmentation", [train, demo, evaluate], arm)

    # the new scan is one of the validation cases, so that its label can be drawn beside the prediction
    scores = {arm: read_rows(out / arm / "scores.csv") for arm in ("pretrained", "scratch")}
    case = Path(scores["pretrained"][0]["case"]).name
    scan = out / "new_scan" / case
    scan.parent.mkdir(exist_ok=True)
    shutil.copy(data / "imagesTr" / case, scan)
    for arm in ("pretrained", "scratch"):
        options = ["--dataset_dir", scan.parent, "--models_dir", out / arm / "models"]
        options += ["--output_dir", out / "predictions" / arm]
        run_bundle(
            f"6/6 predict a scan, {arm}",
            "unetr_segmentation",
            ["configs/inference.yaml"],
            options,
            out / arm / "log.txt",
        )
    _draw(out, case)
    _report(out, scores, time.monotonic() - started)


def _draw(out: Path, case: str) -> None:
    """Figures: reconstruction, segmentation over image, both learning curves."""
    previews = sorted((out / "pretraining" / "previews").glob("*.png"))
    shutil.copy(previews[-1], out / "reconstruction.png")

    preset = get_preset("phantom")
    image = nib.as_closest_canonical(nib.load(out / "data" / "imagesTr" / case))
    files = {"reference": out / "data" / "labelsTr" / case}
    for arm in ("pretrained", "scratch"):
        files[arm] = out / "predictions" / arm / case.replace(".nii.gz", "_seg.nii.gz")
    maps = {name: np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj) for name, path in files.items()}
    assert preset.window is not None
    scan = np.clip(image.get_fdata(), *preset.window)
    spacing = [float(mm) for mm in image.header.get_zooms()]
    save_figure(segmentation_figure(scan, maps, preset.labels, case, spacing), out / "segmentation.png")

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, column in (("training loss", "train_loss"), ("validation Dice", "mean_dice")):
        curves[title] = {
            arm: [
                (float(row["epoch"]), float(row[column])) for row in read_rows(out / arm / "scalars.csv") if row[column]
            ]
            for arm in ("pretrained", "scratch")
        }
    save_figure(curves_figure(curves), out / "curves.png")


def _report(out: Path, scores: dict[str, list[dict[str, str]]], seconds: float) -> None:
    here = os.path.relpath(out)
    print(f"\nDone in {seconds / 60:.1f} minutes. Validation cases, foreground classes:\n")
    print(f"  {'UNETR':12s} {'Dice':>6s} {'HD95 mm':>8s} {'surface Dice':>13s}")
    for arm, rows in scores.items():
        means = {
            name: case_mean([{"case": row["case"], name: float(row[name])} for row in rows], name)
            for name in ("dice", "hd95_mm", "surface_dice")
        }
        print(f"  {arm:12s} {means['dice']:6.3f} {means['hd95_mm']:8.1f} {means['surface_dice']:13.3f}")
    print(f"""
  {here}/reconstruction.png   what the pre-trained network makes of hidden patches
  {here}/segmentation.png     predictions over the scan
  {here}/curves.png           both learning curves
  {here}/pretraining/models/encoder.pt   the encoder, for your own networks: medmim.load_encoder(network, path)
  {here}/pretrained/models/model.pt      the segmentation network
  {here}/*/scores.csv         scores of each case and class

Phantoms are easy and few: see the README for what pre-training does on real scans.""")
