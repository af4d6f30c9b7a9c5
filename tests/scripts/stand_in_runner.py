"""Stands in for the bundle runner in tests of studies: writes a run's files, without a network.

The Dice of a validation is ``1 - 0.5 / (1 + rate * epoch)`` with ``rate`` from the knobs. Each start is noted in a
file beside the study.
"""

import csv
import os
import sys
import time
from pathlib import Path

arguments = sys.argv[1:]
knobs = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
out, models = Path(knobs["output_dir"]), Path(knobs["models_dir"])
evaluating = "evaluate.yaml" in knobs["config_file"]
with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
    place = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    log.write(f"{out}|{'evaluate' if evaluating else 'train'}|{place}|{os.environ['OMP_NUM_THREADS']}\n")

epochs, rate = int(knobs["epochs"]), float(knobs.get("learning_rate", 1)) + 0.01 * int(knobs["seed"])
if "pretrained_encoder" in knobs:
    assert Path(knobs["pretrained_encoder"]).is_file()
    rate *= 2
if float(knobs.get("mask_ratio", 0)) == 0.13:
    sys.exit("a first line\nerror: --mask_ratio 0.13: unlucky")
models.mkdir(parents=True, exist_ok=True)
if evaluating:
    with (out / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "class", "dice", "hd95_mm", "surface_dice"])
        writer.writeheader()
        for case, dice in (("/a/one.nii.gz", 0.8), ("/a/two.nii.gz", 0.6)):
            for number, name in enumerate(("front", "back")):
                row = {"case": case, "class": name, "dice": dice + 0.1 * number, "hd95_mm": 2, "surface_dice": 0.5}
                writer.writerow(row)
    sys.exit()

rows = []
done = out / "checkpoint.pt"
if done.is_file():
    assert knobs["resume"] == "true"
    rows = [
        {"epoch": n, "seconds": n, "mean_dice": 1 - 0.5 / (1 + rate * n)} for n in range(1, int(done.read_text()) + 1)
    ]
for epoch in range(len(rows) + 1, epochs + 1):
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", 0)))
    rows.append({"epoch": epoch, "seconds": epoch, "mean_dice": 1 - 0.5 / (1 + rate * epoch)})
    with (out / "scalars.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "seconds", "mean_dice"])
        writer.writeheader()
        writer.writerows(rows)
    done.write_text(str(epoch))
(models / "encoder.pt").touch()
