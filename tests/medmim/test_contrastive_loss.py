"""NT-Xent loss and scores of pairs of views."""

import math

import ignite.distributed as idist
import pytest
import torch
from monai.losses import ContrastiveLoss
from torch import Tensor

from medmim.losses import NTXentLoss, contrastive, pair_scores


def embeddings(n: int = 5, size: int = 7) -> Tensor:
    return torch.randn(n, 2, size, generator=torch.Generator().manual_seed(n))


def slow_scores(pairs: Tensor, temperature: float) -> dict[str, float]:
    """Word for word, one anchor after the other."""
    views = [view.double() / view.double().norm() for pair in pairs for view in pair]
    losses, hits = [], 0
    for i, anchor in enumerate(views):
        others = [j for j in range(len(views)) if j != i]
        positive = i + 1 if i % 2 == 0 else i - 1
        weights = {j: math.exp(float(anchor @ views[j]) / temperature) for j in others}
        losses.append(-math.log(weights[positive] / sum(weights.values())))
        hits += max(others, key=weights.__getitem__) == positive
    size = pairs.shape[-1]
    spreads = [
        torch.stack(views[first::2]).var(dim=0, correction=1).sqrt().mean() * math.sqrt(size) for first in (0, 1)
    ]
    cosines = [float(views[i] @ views[i + 1]) for i in range(0, len(views), 2)]
    return {
        "loss": sum(losses) / len(losses),
        "accuracy": hits / len(views),
        "alignment": sum(cosines) / len(cosines),
        "spread": float(sum(spreads)) / 2,
    }


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 5, 16])
def test_loss_is_that_of_monai(n: int, temperature: float) -> None:
    pairs = embeddings(n)
    ours = NTXentLoss(temperature)(pairs)
    torch.testing.assert_close(ours, ContrastiveLoss(temperature)(pairs[:, 0], pairs[:, 1]))
    # a batch size given beforehand changes nothing in MONAI's
    torch.testing.assert_close(ours, ContrastiveLoss(temperature, batch_size=n)(pairs[:, 0], pairs[:, 1]))


def test_gradient_is_that_of_monai() -> None:
    ours, theirs = embeddings().requires_grad_(), embeddings().requires_grad_()
    NTXentLoss(0.2)(ours).backward()
    ContrastiveLoss(0.2)(theirs[:, 0], theirs[:, 1]).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_scores_word_for_word(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    pairs = embeddings(6)
    pairs[:3, 1] = pairs[:3, 0] + 0.1 * pairs[:3, 1]  # some that are found
    found = {name: float(value) for name, value in pair_scores(pairs, 0.3).items()}
    expected = slow_scores(pairs, 0.3)
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["accuracy"] < 1
    assert float(NTXentLoss(0.3)(pairs)) == pytest.approx(expected["loss"], rel=1e-5)


def test_standardized_embeddings() -> None:
    """Loss, accuracy and alignment are those of standardised embeddings, whatever they share; the spread is not."""
    pairs = embeddings(6) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7]) + 100
    views = pairs.flatten(0, 1).double()
    by_hand = (views - views.mean(0)) / ((views - views.mean(0)).square().sum(0) / 11).sqrt()
    expected = slow_scores(by_hand.reshape(6, 2, 7), 0.3)
    found = {name: float(value) for name, value in pair_scores(pairs, 0.3, standardize=True).items()}
    assert found.pop("spread") == pytest.approx(slow_scores(pairs, 0.3)["spread"], rel=1e-3)
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-3)
    assert float(NTXentLoss(0.3, standardize=True)(pairs)) == pytest.approx(expected["loss"], rel=1e-3)
    same = torch.ones(3, 2, 7)
    assert float(NTXentLoss(standardize=True)(same)) == pytest.approx(math.log(5), rel=1e-5)


def test_length_of_an_embedding_does_not_matter() -> None:
    pairs = embeddings()
    longer = pairs * torch.rand(5, 2, 1).add(0.1)
    torch.testing.assert_close(NTXentLoss()(longer), NTXentLoss()(pairs))


def test_order_of_pairs_and_views_does_not_matter() -> None:
    pairs = embeddings()
    torch.testing.assert_close(NTXentLoss()(pairs.flip(0, 1)), NTXentLoss()(pairs))


def test_spread_of_random_and_of_collapsed_embeddings() -> None:
    scores = pair_scores(torch.randn(500, 2, 64), 0.5)
    assert float(scores["spread"]) == pytest.approx(1, abs=0.02)
    assert float(scores["loss"]) == pytest.approx(math.log(999), abs=0.2)
    assert float(scores["accuracy"]) < 0.02
    same = torch.randn(64).expand(500, 2, 64)
    scores = pair_scores(same + 1e-4 * torch.randn(500, 2, 64), 0.5)
    assert float(scores["spread"]) < 0.001
    assert float(scores["alignment"]) == pytest.approx(1, abs=1e-4)
    assert float(scores["loss"]) == pytest.approx(math.log(999), abs=1e-3)


def test_pairs_that_agree_alone_give_the_smallest_loss() -> None:
    pairs = torch.eye(4).unsqueeze(1).repeat(1, 2, 1)
    assert float(NTXentLoss(0.5)(pairs)) == pytest.approx(math.log(1 + 6 * math.exp(-2)), rel=1e-6)
    assert float(pair_scores(pairs, 0.5)["accuracy"]) == 1


def test_float32_inside_autocast() -> None:
    pairs = embeddings().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = NTXentLoss(0.1)(pairs)
        scores = pair_scores(pairs, 0.1)
    assert found.dtype == torch.float32
    assert {value.dtype for value in scores.values()} == {torch.float32}
    torch.testing.assert_close(found, NTXentLoss(0.1)(pairs.float()), rtol=1e-6, atol=0)


def test_refusals() -> None:
    for loss in (NTXentLoss(), lambda pairs: pair_scores(pairs, 0.5)):
        with pytest.raises(ValueError, match="one pair of views has no negatives"):
            loss(embeddings(1))
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        NTXentLoss(0)


def test_nothing_is_exchanged_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an evaluation, processes with fewer batches would be waited for."""
    expected = NTXentLoss()(embeddings())

    def fail(*args: object) -> None:
        raise AssertionError("exchanged")

    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "all_gather", fail)
    assert torch.equal(NTXentLoss()(embeddings()), expected)
    with torch.no_grad():
        weight = torch.ones(1, requires_grad=True)
        assert torch.equal(NTXentLoss()(embeddings() * weight), expected)
    with pytest.raises(AssertionError, match="exchanged"):
        NTXentLoss()(embeddings().requires_grad_())
