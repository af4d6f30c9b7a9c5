"""``MaskInMaskStep`` in the trainer: shares, accumulation, mixed precision, curricula, processes, validation."""

from copy import deepcopy

import pytest
import torch
import torch.distributed
from ignite.metrics import Loss
from monai.data import DataLoader, MetaTensor
from monai.engines import IterationEvents, SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from medmim.commands import compile_network
from medmim.engines import batch_length, prediction_and_targets
from medmim.losses import curriculum_factors
from medmim.mim_step import MaskInMaskStep, NamedTerm, prepare_nested_batch, term_metrics, training_scalars
from tests.medmim.nested import SMALL, TWO_2D, batch_of, make

CPU = torch.device("cpu")
TERMS = {"loss", "reconstruction_1", "reconstruction_2", "reconstruction_3", "alignment_1_2", "alignment_2_3"}


def trainer_of(network, batches, step=None, epochs=1, optimizer=None):
    return SupervisedTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer or torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1),
        loss_function=torch.nn.Identity(),  # MONAI wants one
        prepare_batch=prepare_nested_batch,
        inferer=SimpleInferer(),
        iteration_update=step or MaskInMaskStep(CPU),
        decollate=False,
    )


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


def part(batch, start, stop):
    return {key: value[start:stop] for key, value in batch.items()}


def assert_same(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)


def test_batch_is_taken_apart_and_only_the_image_is_moved():
    batch = {**batch_of(make(SMALL), 2), "case": ["a", "b"]}
    batch["image"] = MetaTensor(batch["image"])
    inputs, targets, args, kwargs = prepare_nested_batch(batch, torch.device("meta"), dtype=torch.float64)
    assert set(inputs) == set(batch) - {"case"}
    assert type(inputs["image"]) is torch.Tensor
    assert inputs["image"].dtype == torch.float64
    assert {key for key, value in inputs.items() if value.device.type == "meta"} == {"image"}
    assert batch_length(targets) == 2
    assert (args, kwargs) == ((), {})


def test_a_step_is_that_of_the_whole_loss():
    network = make(SMALL, chunk_size=2)
    reference = deepcopy(network)
    batch = batch_of(network, 2)
    expected = reference(batch)
    expected["loss"].backward()
    for p in reference.parameters():
        if p.grad is not None:
            p.data -= 0.1 * p.grad
    trainer = trainer_of(network, [batch])
    trainer.run()
    assert_same(weights(network), weights(reference))
    (output,) = trainer.state.output  # as decollating leaves it
    assert set(output) == TERMS
    assert not any(value.requires_grad for value in output.values())
    assert_same(output, {name: value.detach() for name, value in expected.items()})


def test_two_batches_of_an_accumulation_are_one_of_twice_the_size():
    network = make(SMALL)
    reference = deepcopy(network)
    batch = batch_of(network, 4)
    trainer_of(reference, [batch, batch]).run()
    halves = [part(batch, 0, 2), part(batch, 2, 4)]
    trainer_of(network, halves * 2, MaskInMaskStep(CPU, accumulation_steps=2)).run()
    assert_same(weights(network), weights(reference))


def test_events_come_once_and_in_order():
    network = make(TWO_2D, chunk_size=1)
    trainer = trainer_of(network, [batch_of(network, 2)] * 2)
    seen = []
    for event in IterationEvents:
        trainer.add_event_handler(event, lambda engine, name: seen.append(name), event.name)
    trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED, lambda engine: seen.append(float(engine.state.output["loss"]) > 0)
    )
    trainer.run()
    once = ["FORWARD_COMPLETED", "LOSS_COMPLETED", True, "BACKWARD_COMPLETED", "MODEL_COMPLETED"]
    assert seen == once * 2


@pytest.mark.parametrize("curriculum", ["concurrent", "coarse_to_fine", "fine_to_coarse"])
def test_curriculum_changes_the_weights_of_the_levels_over_the_epochs(curriculum):
    network = make(SMALL, level_weights=[1, 0.5, 2])
    trainer = trainer_of(network, [batch_of(network, 1)], MaskInMaskStep(CPU, curriculum=curriculum), epochs=4)
    outputs = []
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda engine: outputs.append(dict(engine.state.output)))
    trainer.run()
    for epoch, output in enumerate(outputs):
        factors = curriculum_factors(curriculum, epoch, 4)
        learned = [n for n, factor in enumerate(factors, 1) if factor > 0]
        assert {f"reconstruction_{n}" for n in learned} == {name for name in output if name.startswith("rec")}
        expected = sum(
            weight * factor * output.get(f"reconstruction_{n}", 0)
            for n, (weight, factor) in enumerate(zip([1, 0.5, 2], factors, strict=True), 1)
        )
        expected = expected + 0.1 * (output["alignment_1_2"] + output["alignment_2_3"])
        assert float(output["loss"]) == pytest.approx(float(expected), abs=1e-5)


def test_unknown_curriculum_is_refused():
    with pytest.raises(ValueError, match="curriculum must be one of concurrent, coarse_to_fine, fine_to_coarse"):
        MaskInMaskStep(CPU, curriculum="slow")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_stays_near_full_precision(dtype):
    network = make(SMALL)
    reference, start = deepcopy(network), weights(network)
    batch = batch_of(network, 2)
    step = MaskInMaskStep(CPU, amp=True, dtype=dtype)
    assert step.scaler.is_enabled() == (dtype == torch.float16)
    assert step.state_dict().get("scale") == (65536.0 if dtype == torch.float16 else None)
    trainer = trainer_of(network, [batch], step)
    trainer.run()
    expected = trainer_of(reference, [batch])
    expected.run()
    for name, value in expected.state.output[0].items():
        assert trainer.state.output[0][name].dtype == torch.float32
        torch.testing.assert_close(trainer.state.output[0][name], value, atol=0.05, rtol=0.03)
    assert step.state_dict().get("scale") == (65536.0 if dtype == torch.float16 else None)  # no step was skipped
    every = [torch.cat([p.flatten() for p in of.values()]) for of in (start, weights(network), weights(reference))]
    before, after, exact = every
    assert (after - exact).norm() < 0.1 * (exact - before).norm()


def test_training_lowers_every_term_and_validation_sees_it():
    network = make(TWO_2D)
    batch = batch_of(network, 8)
    items = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    terms = ("loss", "reconstruction_1", "reconstruction_2", "alignment_1_2")
    metrics = term_metrics(network)
    assert [name.removeprefix("val_") for name in metrics] == list(terms[1:])
    evaluator = SupervisedEvaluator(
        device=CPU,
        val_data_loader=DataLoader(items, batch_size=4),
        network=network,
        prepare_batch=prepare_nested_batch,
        inferer=SimpleInferer(),
        key_val_metric={"val_loss": Loss(NamedTerm(), prediction_and_targets, batch_length)},
        additional_metrics=metrics,
        decollate=False,
    )
    evaluator.run()
    before = dict(evaluator.state.metrics)
    with torch.no_grad():
        halves = [network(part(batch, 0, 4)), network(part(batch, 4, 8))]
    for name in terms:
        expected = float(halves[0][name] + halves[1][name]) / 2
        assert before[f"val_{name}"] == pytest.approx(expected, abs=1e-5)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 0.003)
    trainer_of(network, [batch], epochs=60, optimizer=optimizer).run()
    evaluator.run()
    for name in terms:
        assert evaluator.state.metrics[f"val_{name}"] < before[f"val_{name}"]


def test_terms_of_weight_0_are_no_metrics():
    network = make(SMALL, level_weights=[1, 0, 1], alignment_weights=[0, 0.1])
    assert network.term_names == ["reconstruction_1", "reconstruction_3", "alignment_2_3"]
    assert set(network(batch_of(network, 1))) == {"loss", *network.term_names}
    assert [*term_metrics(network)] == [f"val_{name}" for name in network.term_names]


def test_scalars_for_the_log():
    network = make(TWO_2D)
    trainer = trainer_of(network, [batch_of(network, 1)])
    trainer.run()
    found = training_scalars(trainer.state.output)
    assert set(found) == {"train_loss", *(f"train_{name}" for name in network.term_names)}
    assert found["train_loss"] is trainer.state.output[0]["loss"]


def test_compiling_is_for_the_transformer_blocks(monkeypatch):
    network = make(TWO_2D)
    batch, names = batch_of(network, 2), network.state_dict().keys()
    expected, compiled = network(batch), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function.__self__) or function)
    compile_network(network)
    assert compiled == list(network.decoder.blocks)
    assert network.state_dict().keys() == names
    assert_same(network(batch), expected)


# --------------------------------------------------------------------------------------------------- two processes
RUNS = {  # options of the network, of the step, batches, epochs
    "contrastive": ({}, {}, 1, 1),
    "byol, finest level not reconstructed at first": ({"alignment": "byol"}, {"curriculum": "coarse_to_fine"}, 1, 2),
    "levels 2 and 3 for alignment only": ({"level_weights": [1, 0, 0]}, {}, 1, 1),
    "no alignment, accumulation": ({"alignment_weights": [0, 0]}, {"accumulation_steps": 2}, 3, 1),
}


def run_one(name, rank=None):
    """Train on all batches, or as one process on its half of each; gradients, weights, and number of exchanges."""
    options, step, n_batches, epochs = RUNS[name]
    torch.manual_seed(3)
    network = make(SMALL, chunk_size=5, **options)
    batches = [batch_of(network, 4, seed=seed) for seed in range(n_batches)]
    exchanges = []
    wrapped = network
    if rank is not None:
        batches = [part(batch, 2 * rank, 2 * rank + 2) for batch in batches]
        wrapped = DistributedDataParallel(network)

        def count(state, bucket):
            exchanges.append(bucket.index())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, count)
    trainer_of(wrapped, batches, MaskInMaskStep(CPU, **step), epochs).run()
    gradients = {key: p.grad for key, p in network.named_parameters() if p.requires_grad}
    return {"gradients": gradients, "weights": weights(network), "exchanges": exchanges}


def run_process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: run_one(name, rank) for name in RUNS}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("fork")  # the test's modules are there already
    processes = [context.Process(target=run_process, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns_from_both_their_batches(ranks, name):
    expected = run_one(name)
    for rank in ranks:
        for kind in ("gradients", "weights"):
            assert_same(rank[name][kind], expected[kind], atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected["gradients"].values()) > 1e-2
    steps = {"no alignment, accumulation": 2, "byol, finest level not reconstructed at first": 2}.get(name, 1)
    assert ranks[0][name]["exchanges"] == [0] * steps  # one bucket, once for each step of the optimiser
