"""The README's first command."""

import csv

import pytest

from tools.quickstart import quickstart


@pytest.mark.slow
def test_quickstart_leaves_what_it_promises(tmp_path, capsys):
    quickstart(str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert printed.count("python -m monai.bundle run") == 7
    for name in ("reconstruction.png", "segmentation.png", "curves.png", "pretraining/models/encoder.pt"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    for arm in ("pretrained", "scratch"):
        with (tmp_path / "out" / arm / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 5 * 5
        assert sum(float(row["dice"]) for row in rows) / len(rows) > 0.2


def test_a_failing_step_ends_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.runner.BUNDLES", tmp_path)
    (tmp_path / "mae_vit_pretraining").mkdir()
    with pytest.raises(SystemExit, match=r"1/6 pre-train.* failed with exit code 1; its log is .*log\.txt"):
        quickstart(str(tmp_path / "out"))
