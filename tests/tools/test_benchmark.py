"""The benchmark compares like with like."""

import pytest
import torch

from tools import benchmark


@pytest.fixture
def small_networks(monkeypatch):
    monkeypatch.setattr(benchmark, "ENCODER", {"hidden_size": 48, "mlp_dim": 96, "num_layers": 2, "num_heads": 4})
    sizes = {"decoder_hidden_size": 24, "decoder_num_layers": 1, "decoder_num_heads": 4}
    monkeypatch.setattr(benchmark, "DECODER", sizes)


@pytest.mark.parametrize("side", ["monai", "ours"])
@pytest.mark.parametrize("recipe", ["plain", "own"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_each_side_runs(small_networks, side, recipe, dtype):
    step = benchmark.training_step(side, 0.75, 1, 32, dtype, recipe, "cpu")
    assert step() > 0


def test_both_sides_hide_as_many_tokens(small_networks, monkeypatch):
    seen = {}
    real = benchmark.MaskedReconstructionLoss.forward

    for side in ("monai", "ours"):

        def record(self, prediction, image, mask, side=side):
            seen[side] = (tuple(prediction.shape), int(mask.sum()))
            return real(self, prediction, image, mask)

        monkeypatch.setattr(benchmark.MaskedReconstructionLoss, "forward", record)
        benchmark.training_step(side, 0.75, 2, 64, "float32", "plain", "cpu")()
    assert seen["monai"] == seen["ours"] == ((2, 64, 4096), 96)


def test_a_network_that_fails_under_autocast_is_found(small_networks):
    class Broken(torch.nn.Module):
        def forward(self, image):
            raise RuntimeError("index put needs equal dtypes")

    assert not benchmark.runs_under_autocast(Broken(), torch.rand(1, 1, 8, 8, 8))
    assert benchmark.runs_under_autocast(torch.nn.Conv3d(1, 1, 3), torch.rand(1, 1, 8, 8, 8))
