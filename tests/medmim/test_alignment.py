"""Alignment losses: against loops, where they start, how low they get, what they depend on."""

from math import exp, log

import pytest
import torch
from torch import nn

from medmim.losses import ContrastiveAlignment, PredictiveAlignment

KINDS = [
    lambda: ContrastiveAlignment(12, 0.3),
    lambda: PredictiveAlignment(12),
    lambda: PredictiveAlignment(12, center_keys=False),
]


def batch(m=5, p=2, r=8, f=12):
    return torch.randn(m, f), torch.randn(p, r, f), torch.randint(p, (m,)), torch.randint(r, (m,))


def project(layers, x):
    """Two linear layers with a GELU between, written out."""
    hidden = x @ layers[0].weight.T + layers[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ layers[2].weight.T + layers[2].bias


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_contrastive_loss_against_loops():
    loss = ContrastiveAlignment(12, temperature=0.3)
    children, parents, parent_ids, regions = batch()
    with torch.no_grad():
        found = loss(children, parents, parent_ids, regions)
        for i, child in enumerate(children):
            query = project(loss.query, child)
            scores = [exp(cosine(query, project(loss.key, key)) / 0.3) for key in parents[parent_ids[i]]]
            assert float(found[i]) == pytest.approx(-log(scores[regions[i]] / sum(scores)), abs=1e-5)


@pytest.mark.parametrize("center_keys", [True, False])
def test_predictive_loss_against_loops(center_keys):
    loss = PredictiveAlignment(12, center_keys)
    children, parents, parent_ids, regions = batch()
    with torch.no_grad():
        found = loss(children, parents, parent_ids, regions)
        for i, child in enumerate(children):
            keys = [project(loss.key, feature) for feature in parents[parent_ids[i]]]
            key = keys[regions[i]] - (sum(keys) / 8 if center_keys else 0)
            assert float(found[i]) == pytest.approx(2 - 2 * cosine(project(loss.query, child), key), abs=1e-5)


@pytest.mark.parametrize("make", KINDS)
def test_gradient_reaches_the_child_and_stops_at_the_parents(make):
    loss = make()
    children, parents, parent_ids, regions = batch()
    children.requires_grad_()
    parents.requires_grad_()
    loss(children, parents, parent_ids, regions).mean().backward()
    assert float(children.grad.abs().min(1).values.max()) > 0
    assert parents.grad is None
    for parameter in loss.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_which_projectors_learn():
    assert all(p.requires_grad for p in ContrastiveAlignment(12).parameters())
    predictive = PredictiveAlignment(12)
    assert all(p.requires_grad for p in predictive.query.parameters())
    assert not any(p.requires_grad for p in predictive.key.parameters())


@pytest.mark.parametrize("n_regions", [8, 216])
def test_with_random_features_the_loss_starts_near_the_log_of_the_regions(n_regions):
    losses = [
        ContrastiveAlignment(96, temperature=1)(*batch(m=16, p=4, r=n_regions, f=96)).mean().item() for _ in range(5)
    ]
    assert sum(losses) / 5 == pytest.approx(log(n_regions), abs=0.06)


def test_the_contrastive_loss_reaches_its_bound():
    loss = ContrastiveAlignment(24, temperature=1)
    child, parents = nn.Parameter(torch.randn(1, 24)), torch.randn(1, 8, 24)
    where = torch.tensor([0]), torch.tensor([3])
    optimizer = torch.optim.Adam([child, *loss.parameters()], 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        error = loss(child, parents, *where).mean()
        error.backward()
        optimizer.step()
    bound = log(1 + 7 * exp(-2))
    assert bound == pytest.approx(0.6665, abs=1e-4)
    assert bound - 1e-6 <= error.item() < bound + 2e-3


@pytest.mark.parametrize("make", KINDS)
def test_the_loss_depends_on_the_parents_own_region(make):
    loss = make()
    children, parents, parent_ids, regions = batch()
    before = loss(children, parents, parent_ids, regions)
    changed = parents.clone()
    changed[parent_ids[0], regions[0]] = torch.randn(12)
    assert (loss(children, changed, parent_ids, regions) - before)[0].abs() > 1e-3
    assert (loss(children, parents.roll(1, 0), parent_ids, regions) - before).abs().min() > 1e-4
    assert torch.equal(loss(children, parents * 2, parent_ids, regions) == before, torch.zeros(5, dtype=torch.bool))


def test_negatives_are_the_other_regions_of_the_same_parent_only():
    loss = ContrastiveAlignment(12)
    children, parents, _, regions = batch()
    first = torch.zeros(5, dtype=torch.long)
    before = loss(children, parents, first, regions)
    other_parent = torch.stack([parents[0], torch.randn(8, 12)])
    assert torch.equal(loss(children, other_parent, first, regions), before)
    other_region = parents.clone()
    other_region[0, (regions[0] + 1) % 8] += 1
    assert loss(children, other_region, first, regions)[0] != before[0]


def test_contrastive_loss_knows_the_temperature():
    loss = ContrastiveAlignment(12, temperature=0.1)
    data = batch()
    cold = loss(*data)
    loss.temperature = 1.0
    assert not torch.allclose(cold, loss(*data))
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            ContrastiveAlignment(12, temperature)


@pytest.mark.parametrize("make", KINDS)
def test_mixed_precision_keeps_the_cosine_in_float32(make):
    loss, data = make(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(*data)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss(*data), atol=0.1, rtol=0.05)


def predictive_toy(target_learns=False, center_keys=True):
    """200 steps of a small network on the predictive loss alone: loss, and variance of its normalised features."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 12))
    loss = PredictiveAlignment(12, center_keys)
    coarse = torch.randn(16, 8, 16)  # 16 parents of 8 regions; a child is its region, seen more sharply
    parent_ids, regions = torch.arange(16).repeat_interleave(4), torch.randint(8, (64,))
    children = coarse[parent_ids, regions] + 0.3 * torch.randn(64, 16)

    def variance():
        with torch.no_grad():
            return float(nn.functional.normalize(network(children), dim=-1).var(0).sum())

    optimizer = torch.optim.Adam([*network.parameters(), *loss.query.parameters()], 3e-3)
    before, losses = variance(), []
    for _ in range(200):
        optimizer.zero_grad()
        if target_learns:
            queries, keys = loss.query(network(children)), loss.key(network(coarse)[parent_ids, regions])
            error = (2 - 2 * nn.functional.cosine_similarity(queries, keys)).mean()
        else:
            error = loss(network(children), network(coarse), parent_ids, regions).mean()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    after = variance()
    print(f"loss {losses[0]:.3f} to {losses[-1]:.4f}, variance {before:.3f} to {after:.3f}")
    return losses[-1] / losses[0], after / before


@pytest.mark.parametrize("center_keys", [True, False])
def test_features_do_not_collapse_in_200_steps_of_the_predictive_loss(center_keys):
    falls_to, keeps = predictive_toy(center_keys=center_keys)
    assert falls_to < 0.2
    assert keeps > 0.5


def test_they_would_collapse_if_the_target_learned():
    assert predictive_toy(target_learns=True, center_keys=False)[1] < 0.2
