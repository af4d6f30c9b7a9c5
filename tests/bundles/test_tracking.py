"""``--tracking mlflow`` of MONAI's runner, with a store on disk."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.common import MAE, TINY, TINY_OF, UNETR, rows

mlflow = pytest.importorskip("mlflow")


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "metric"), [(MAE, "val_loss"), (UNETR, "mean_dice")])
def test_losses_and_scores_reach_mlflow(
    command_line: Callable[..., subprocess.CompletedProcess],
    phantom_dir: Path,
    coarse_preset: Path,
    tmp_path: Path,
    bundle: str,
    metric: str,
) -> None:
    store = f"sqlite:///{tmp_path}/mlruns.db"
    knobs = TINY | TINY_OF[bundle] | {"dataset": coarse_preset, "dataset_dir": phantom_dir, "num_workers": 0}
    knobs |= {"output_dir": tmp_path / "output", "models_dir": tmp_path / "models", "tracking": "mlflow"}
    run = command_line(bundle, "train", **knobs, tracking_uri=store, experiment_name="ours", run_name="first")
    assert run.returncode == 0, run.stderr
    client = mlflow.MlflowClient(tracking_uri=store)
    (experiment,) = client.search_experiments(filter_string="name = 'ours'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_name.startswith("first")
    assert tracked.info.status == "FINISHED"
    scalars = rows(tmp_path / "output" / "scalars.csv")
    found = [point.value for point in client.get_metric_history(tracked.info.run_id, metric)]
    assert found == pytest.approx([float(row[metric]) for row in scalars])
    losses = [point.value for point in client.get_metric_history(tracked.info.run_id, "train_loss")]
    n_batches = int(scalars[0]["iteration"])
    means = [sum(losses[i : i + n_batches]) / n_batches for i in range(0, len(losses), n_batches)]
    assert means == pytest.approx([float(row["train_loss"]) for row in scalars], rel=1e-5)
    configs = list((tmp_path / "output").glob("config_*.json"))
    assert [path for path in configs if re.search(r'"max_epochs": "@epochs"', path.read_text())]
