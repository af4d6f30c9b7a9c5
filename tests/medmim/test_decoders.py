"""Decoders, against loops over tokens."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from medmim.networks import sincos_position_embedding, token_ids
from medmim.networks.decoders import TokenwiseDecoder, TransformerDecoder, build_decoder

GRIDS = [(2, 3, 2), (1, 4, 2), (3, 4)]


def masked_case(grid: tuple, n_hidden: int, features: int, batch: int = 2):
    n_tokens = math.prod(grid)
    mask = torch.rand(batch, n_tokens).argsort(1).argsort(1) < n_hidden
    return torch.rand(batch, n_tokens - n_hidden, features), *token_ids(mask.reshape(batch, *grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("positions", ["sincos", "learnable"])
def test_transformer_equals_a_sequence_built_token_by_token(grid, positions):
    decoder = TransformerDecoder(
        6, 5, grid, hidden_size=12, num_layers=2, num_heads=2, mlp_dim=20, position_embedding=positions
    )
    latent, visible, hidden = masked_case(grid, 5, 6)
    found = decoder(latent, visible, hidden)
    for b in range(2):
        sequence = []
        for token in range(math.prod(grid)):
            where = visible[b].tolist()
            content = decoder.embed(latent[b, where.index(token)]) if token in where else decoder.mask_token[0, 0]
            sequence.append(content + decoder.position_embeddings[0, token])
        tokens = torch.stack(sequence).unsqueeze(0)
        for block in decoder.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(found[b], decoder.head(decoder.norm(tokens))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sigma", [1.0, 0.6])
@pytest.mark.parametrize("hidden_size", [None, 7])
def test_tokenwise_equals_loops_with_a_gaussian_of_the_distance(grid, sigma, hidden_size):
    features = 12
    decoder = TokenwiseDecoder(features, 5, grid, hidden_size, "sincos", sigma)
    latent, visible, hidden = masked_case(grid, 5, features)
    found = decoder(latent, visible, hidden)
    cells = list(product(*map(range, grid)))
    positions = sincos_position_embedding(grid, features)[0]
    for b in range(2):
        for token, cell in enumerate(cells):
            where = visible[b].tolist()
            if token in where:
                content = latent[b, where.index(token)]
            else:
                weights = [math.exp(-(math.dist(cell, cells[v]) ** 2) / (2 * sigma**2)) for v in where]
                mean = sum(w * latent[b, i] for i, w in enumerate(weights)) / sum(weights)
                content = mean + decoder.mask_token[0, 0]
            torch.testing.assert_close(found[b, token], decoder.head(content + positions[token]), rtol=1e-4, atol=1e-5)


def test_linear_decoder_has_one_layer_and_mlp_two():
    arguments = {"encoder_size": 12, "out_size": 5, "grid": (2, 2, 2), "num_layers": 3, "num_heads": 2}
    arguments |= {"hidden_size": 18, "position_embedding": "sincos"}
    linear, mlp, transformer = [build_decoder(kind, **arguments) for kind in ("linear", "mlp", "transformer")]
    assert [m.out_features for m in linear.modules() if isinstance(m, nn.Linear)] == [5]
    assert [m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)] == [18, 5]
    assert len(transformer.blocks) == 3
    assert transformer.position_embeddings.shape == (1, 8, 18)


@pytest.mark.parametrize("kind", ["transformer", "mlp", "linear"])
def test_sincos_positions_are_fixed_and_learnable_ones_learn(kind):
    for positions, learns in (("sincos", False), ("learnable", True)):
        decoder = build_decoder(kind, 12, 5, (2, 2), 12, 1, 2, positions)
        assert decoder.position_embeddings.requires_grad is learns
        assert "position_embeddings" in decoder.state_dict()


def test_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder must be transformer, mlp or linear, found 'conv'"):
        build_decoder("conv", 12, 5, (2, 2), 12, 1, 2, "sincos")


@pytest.mark.parametrize("kind", ["transformer", "mlp", "linear"])
def test_unknown_positions_are_refused(kind):
    with pytest.raises(ValueError, match="position_embedding must be learnable or sincos, found 'none'"):
        build_decoder(kind, 12, 5, (2, 2), 12, 1, 2, "none")
