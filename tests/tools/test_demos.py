"""``python -m tools demos``: a table of all demos, also when one fails."""

from pathlib import Path

import pytest

from tools.demos import demos, result_of


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that would have been started; that of a swin fails."""
    started: list[str] = []

    def run(step: str, bundle: str, configs: list, options: list, log: Path) -> float:
        started.append(bundle)
        assert configs == ["configs/train.yaml", "configs/demo.yaml"]
        if "swin" in bundle:
            raise SystemExit(f"error: {step} failed with exit code 1; its log is {log}")
        log.parent.mkdir(parents=True)
        column = "val_loss" if "pretraining" in bundle else "mean_dice"
        (log.parent / "scalars.csv").write_text(f"epoch,{column}\n1,0.5\n2,\n3,0.25\n")
        return 12.3

    monkeypatch.setattr("tools.demos.run_bundle", run)
    return started


def test_every_bundle_is_run(runs, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"2 of .* demos failed: simmim_swin_pretraining, swin_unetr_segmentation"):
        demos(str(tmp_path))
    bundles = sorted(path.name for path in (Path(__file__).parents[2] / "bundles").iterdir())
    assert runs == bundles
    table = capsys.readouterr().out.split("result\n")[1].splitlines()
    assert [line.split()[0] for line in table] == bundles
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in table}
    assert lines["mae_vit_pretraining"] == "12 val_loss 0.500 to 0.250 in 3 epochs"
    assert lines["unetr_segmentation"] == "12 best mean_dice 0.500 after 3 epochs"
    assert lines["swin_unetr_segmentation"] == f"failed: {tmp_path / 'swin_unetr_segmentation' / 'log.txt'}"


def test_some_bundles(runs, tmp_path):
    demos(str(tmp_path), only="unetr_segmentation,mae_vit_pretraining")
    assert runs == ["unetr_segmentation", "mae_vit_pretraining"]


def test_unknown_bundle_and_earlier_demo_are_refused(runs, tmp_path):
    with pytest.raises(SystemExit, match="--only unet: no such bundle, expected some of convvit_ct_classification, "):
        demos(str(tmp_path), only="unet")
    (tmp_path / "unetr_segmentation").mkdir()
    (tmp_path / "unetr_segmentation" / "checkpoint.pt").touch()
    with pytest.raises(SystemExit, match="unetr_segmentation: holds an earlier demo: remove it"):
        demos(str(tmp_path))
    assert runs == []


def test_a_score_comes_before_a_loss():
    rows = [{"val_loss": "0.4", "mean_auc": ""}, {"val_loss": "0.3", "mean_auc": "0.8"}]
    assert result_of(rows) == "best mean_auc 0.800 after 2 epochs"
