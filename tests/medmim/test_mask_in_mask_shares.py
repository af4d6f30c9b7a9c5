"""The loss of Mask in Mask taken in shares: gradients, memory, and what is left out."""

from weakref import finalize

import pytest
import torch

from tests.medmim.nested import SMALL, TWO_2D, batch_of, gradients, gradients_of_shares, make


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
def test_shares_give_the_gradients_of_the_loss_taken_at_once(chunk_size):
    network = make(SMALL, chunk_size=100)
    batch = batch_of(network, 2)
    loss = network(batch)["loss"]
    expected = gradients(network, loss)
    network.chunk_size = chunk_size
    total, found = gradients_of_shares(network, batch)
    assert total == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-6
    n = -(-2 // chunk_size) + -(-6 // chunk_size) + -(-12 // chunk_size)
    assert network.n_shares(2) == len(list(network.shares(batch))) == n


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass: now, and at most."""

    def __init__(self):
        self.now = self.peak = 0
        super().__init__(self.pack, lambda kept: kept[0])

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        kept = Kept([tensor])
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(kept, self.drop, size)
        return kept

    def drop(self, size):
        self.now -= size


class Kept(list):
    """A list that can be watched."""


def saved_bytes(network, batch, at_once):
    network.zero_grad()
    with SavedBytes() as saved:
        if at_once:
            network(batch)["loss"].backward()
        else:
            for loss, _ in network.shares(batch):
                loss.backward()
                del loss
    return saved.peak


def test_memory_does_not_grow_with_the_number_of_sub_volumes():
    few, many = ([SMALL[0], {**SMALL[1], "samples": a}, {**SMALL[2], "samples": b}] for a, b in ((1, 1), (4, 5)))
    peaks = {}
    for name, levels, n in (("few", few, 1), ("many", many, 1), ("many, three images", many, 3)):
        network = make(levels, patch_size=(4, 4, 2), chunk_size=1)
        batch = batch_of(network, n)
        peaks[name] = [saved_bytes(network, batch, at_once) for at_once in (False, True)]
    print(peaks)
    in_shares, at_once = zip(*peaks.values(), strict=True)
    assert max(in_shares) <= 1.01 * min(in_shares)
    assert at_once[1] > 5 * at_once[0]
    assert at_once[2] > 2.5 * at_once[1]


def test_a_weight_of_0_leaves_out_the_term_its_work_and_its_parameters():
    network = make(SMALL, level_weights=[1, 0, 0], alignment_weights=[0, 0], chunk_size=100)
    assert not list(network.alignment.parameters())
    assert set(network(batch_of(network, 1))) == {"loss", "reconstruction_1"}
    assert network.encoder.calls == 1

    network = make(SMALL, level_weights=[1, 0, 1], alignment_weights=[0, 0], chunk_size=100)
    assert set(network(batch_of(network, 1))) == {"loss", "reconstruction_1", "reconstruction_3"}
    assert network.encoder.calls == 2

    network = make(SMALL, level_weights=[0, 0, 1], alignment_weights=[0, 1], chunk_size=100)
    assert set(network.alignment) == {"2_3"}
    assert set(network(batch_of(network, 1))) == {"loss", "reconstruction_3", "alignment_2_3"}
    assert network.encoder.calls == 2  # level 2 for its features, without gradient
    assert network.n_shares(1) == 1

    network = make(SMALL)
    assert set(network.alignment) == {"1_2", "2_3"}
    terms = [set(t) for _, t in network.shares(batch_of(network, 1), level_weights=[1, 1, 0])]
    assert set().union(*terms) == {"reconstruction_1", "reconstruction_2", "alignment_1_2", "alignment_2_3"}


def test_a_level_that_is_parent_only_gets_no_gradient():
    network = make(TWO_2D, level_weights=[0, 0], alignment_weights=[1], chunk_size=100)
    grads = []
    network.encoder.embed.register_forward_hook(lambda module, _, output: grads.append(output.requires_grad))
    for loss, _ in network.shares(batch_of(network, 2)):
        loss.backward()
    assert grads == [False, True]


def test_every_parameter_gets_a_gradient():
    for alignment in ("contrastive", "byol"):
        network = make(SMALL, alignment=alignment)
        gradients_of_shares(network, batch_of(network, 1))
        silent = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert silent == []


def test_the_last_share_of_several_processes_touches_every_parameter():
    network = make(SMALL, chunk_size=4, level_weights=[1, 1, 0])
    batch = batch_of(network, 1)
    parts = []

    def run(part):
        parts.append(part)
        return network(part)

    for loss, _ in network.shares(batch, run=run):
        network.zero_grad()
        loss.backward()
    assert [part.touch_all for part in parts] == [False, False, False, True][-len(parts) :]
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_other_weights_in_a_step_must_not_all_be_0():
    network = make(SMALL, alignment_weights=[0, 0])
    with pytest.raises(ValueError, match="every weight is 0"):
        next(network.shares(batch_of(network, 1), level_weights=[0, 0, 0]))
