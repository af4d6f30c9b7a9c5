"""The benchmarks compare like with like, and run what the bundles run."""

import re

import pytest
import torch

from tools import benchmark_mae, benchmark_mim, benchmark_simmim
from tools.benchmark import benchmark
from tools.measure import print_peak


@pytest.fixture
def small_networks(monkeypatch):
    monkeypatch.setattr(benchmark_mae, "ENCODER", {"hidden_size": 48, "mlp_dim": 96, "num_layers": 2, "num_heads": 4})
    sizes = {"decoder_hidden_size": 24, "decoder_num_layers": 1, "decoder_num_heads": 4}
    monkeypatch.setattr(benchmark_mae, "DECODER", sizes)


@pytest.mark.parametrize("side", ["monai", "ours"])
@pytest.mark.parametrize("recipe", ["plain", "own"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_each_side_runs(small_networks, side, recipe, dtype):
    step = benchmark_mae.training_step(side, 0.75, 1, 32, dtype, recipe, "cpu")
    assert step() > 0


def test_both_sides_hide_as_many_tokens(small_networks, monkeypatch):
    seen = {}
    real = benchmark_mae.MaskedReconstructionLoss.forward

    for side in ("monai", "ours"):

        def record(self, prediction, image, mask, side=side):
            seen[side] = (tuple(prediction.shape), int(mask.sum()))
            return real(self, prediction, image, mask)

        monkeypatch.setattr(benchmark_mae.MaskedReconstructionLoss, "forward", record)
        benchmark_mae.training_step(side, 0.75, 2, 64, "float32", "plain", "cpu")()
    assert seen["monai"] == seen["ours"] == ((2, 64, 4096), 96)


def test_a_network_that_fails_under_autocast_is_found(small_networks):
    class Broken(torch.nn.Module):
        def forward(self, image):
            raise RuntimeError("index put needs equal dtypes")

    assert not benchmark_mae.runs_under_autocast(Broken(), torch.rand(1, 1, 8, 8, 8))
    assert benchmark_mae.runs_under_autocast(torch.nn.Conv3d(1, 1, 3), torch.rand(1, 1, 8, 8, 8))


@pytest.fixture
def small_mim(monkeypatch):
    monkeypatch.setattr(benchmark_mim, "DECODER", {"hidden_size": 24, "num_layers": 1, "num_heads": 4})
    monkeypatch.setattr(benchmark_mim, "build_encoder", lambda: benchmark_mim.ConvViT.tiny(fifth_stage=False))


def test_a_step_of_mim_is_that_of_the_published_levels(small_mim, monkeypatch):
    seen = []
    real = benchmark_mim.MaskInMask._loss_of

    def record(self, part):
        seen.append((part.number, tuple(part.image.shape), part.mask.float().mean().item()))
        return real(self, part)

    monkeypatch.setattr(benchmark_mim.MaskInMask, "_loss_of", record)
    seconds = benchmark_mim.training_step(1, 64, "float32", "cpu", False, 16)()
    assert [shape for _, shape, _ in seen] == [(n, 1, 32, 32, 32) for n in (1, 4, 16)]
    assert [share for *_, share in seen] == [0.5, pytest.approx(0.6, abs=0.1), 0.5]
    assert list(seconds) == list(benchmark_mim.PARTS)
    assert all(part > 0 for part in seconds.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report_of_mim(small_mim, monkeypatch, capsys, dtype):
    monkeypatch.setattr(benchmark_mim, "peak_memory", lambda *arguments: 1.25)
    benchmark("mim", size=64, repeats=1, mask_ratios=0.5, dtype=dtype, chunk_size=8)
    printed = capsys.readouterr().out
    assert re.search(r"one step [\d.]+ s .*peak 1\.25 GiB", printed)
    shares = [int(share) for share in re.findall(r"(\d+)%\n", printed.split("hidden")[0])]
    assert len(shares) == len(benchmark_mim.PARTS)
    assert 97 <= sum(shares) <= 103
    assert re.findall(r"^ +(\d+)% ", printed.split("alone")[1], re.MULTILINE) == ["0", "50"]


def test_peak_of_a_process(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_mae, "training_step", lambda *arguments: lambda: bytearray(1 << 27).find(b"x"))
    print_peak("tools.benchmark_mae", "training_step")
    assert float(capsys.readouterr().out) > 0.125


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretext": "moco"}, "error: pretext 'moco': expected mae, simmim or mim"),
        ({"pretext": "mim", "size": 96}, "error: --size 96: expected a multiple of 64"),
        ({"dtype": "float16"}, "error: --dtype float16: expected float32 or bfloat16"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        benchmark(**arguments)


@pytest.fixture
def small_swin(small_networks, monkeypatch):
    sizes = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": (3, 3, 3)}
    monkeypatch.setattr(benchmark_simmim, "SWIN", sizes)


@pytest.mark.parametrize("name", benchmark_simmim.NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_network_hides_as_many_voxels(small_swin, monkeypatch, name, dtype):
    seen = []
    real = benchmark_simmim.MaskedReconstructionLoss.forward

    def record(self, prediction, image, mask):
        seen.append((tuple(prediction.shape), int(mask.sum()), self.norm))
        return real(self, prediction, image, mask)

    monkeypatch.setattr(benchmark_simmim.MaskedReconstructionLoss, "forward", record)
    assert benchmark_simmim.training_step(name, 0.75, 2, 64, dtype, "cpu")() > 0
    assert seen == [((2, 64, 4096), 96, "l2" if name == "mae" else "l1")]


def test_a_benchmark_of_simmim_prints_a_line_for_each_network(small_swin, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_simmim, "peak_memory", lambda *arguments: 1.25)
    benchmark("simmim", mask_ratios=[0.5, 0.75], batch_size=1, size=32, repeats=1)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(?:MAE|SimMIM), .* (?:50|75)% .* s  \(.*\) +1\.25$", printed, re.MULTILINE)) == 6


def test_a_size_that_no_swin_takes_is_refused():
    with pytest.raises(SystemExit, match="--size 48: expected a multiple of 32"):
        benchmark("simmim", size=48)
