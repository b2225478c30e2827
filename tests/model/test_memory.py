"""Memory and communication: against the peak that torch tracks for a real step, and against counts by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from model.config import MoRConfig
from model.flops import Work, decode_flops, layer_parameters, unique_parameters, work_of
from model.memory import (
    Placement,
    activation_bytes,
    communication,
    kv_cache_bytes_per_token,
    training_memory,
    unit_parameters,
)
from model.modeling import MoRForCausalLM
from tests.helpers.variants import EXPERT, MOD, PROPAGATED, RECURSIVE, TOKEN, UT

BATCH, LENGTH = 4, 128
EXIT = {"routing": "early_exit", "exit_layers": [2, 4, 6]}
SHARED = {"kv_strategy": "shared"}
PREDICTED = MOD | {"routed_capacity": 0.125, "selection": "predictor"}


def small(**changes) -> MoRConfig:
    fields = {"vocab_size": 211, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MoRConfig(**fields | changes)


def measured(config: MoRConfig, recompute: str, bf16: bool, masked: bool) -> tuple[int, int, Work | None]:
    """(activations after the forward pass, peak of everything) in the second of two training steps, in bytes; and what
    was routed in it."""
    torch.manual_seed(0)
    model = MoRForCausalLM(config).train()
    model.set_recompute(recompute)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 211, (BATCH, LENGTH))
    documents = (torch.arange(LENGTH) // 50).expand(BATCH, -1) if masked else None
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(input_ids=tokens, targets=tokens, document_ids=documents)
            (after,) = tracker.get_tracker_snapshot("current").values()
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            routed = output.routing and [
                value.sum(0).tolist() for value in (output.routing.counts, output.routing.pairs, output.routing.offered)
            ]
            del output
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    named = {str(getattr(kind, "value", kind)): size for kind, size in after.items()}
    total = next(size for kind, size in peak.items() if str(getattr(kind, "value", kind)) == "Total")
    return named["Activation"], total, routed and work_of(config, LENGTH, BATCH, *routed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "recompute", "bf16", "masked"),
    [
        ({}, "none", False, False),
        ({}, "none", True, False),
        ({}, "none", False, True),
        ({}, "selective", False, False),
        ({}, "block", True, False),
        (RECURSIVE, "recursion", False, False),
        (RECURSIVE | SHARED, "block", False, False),
        (EXPERT, "none", True, False),
        (EXPERT, "selective", False, False),
        (EXPERT | SHARED, "none", False, False),
        (EXPERT | SHARED, "recursion", False, False),
        (TOKEN, "none", False, False),
        (TOKEN | SHARED, "none", False, True),
        (EXPERT | {"router": "mlp"}, "none", False, False),
        (EXPERT | PROPAGATED, "none", False, False),
        (TOKEN | PROPAGATED, "block", False, False),
        (MOD, "block", False, False),
        (PREDICTED, "none", False, False),
        (PREDICTED, "block", False, False),
        (PREDICTED, "block", True, False),
        (PREDICTED, "selective", False, False),
        (MOD, "none", True, False),
        (MOD, "block", True, False),
        (EXPERT | PROPAGATED, "none", True, False),
        (EXPERT | PROPAGATED, "recursion", False, False),
        (UT, "none", False, True),
        (UT | {"act_combine": "basic"}, "block", False, False),
        (UT | {"act_combine": "frozen"}, "none", False, False),
        (UT | {"act_combine": "frozen"}, "recursion", False, False),
        (EXIT, "none", False, False),
        (EXIT, "block", True, False),
        (RECURSIVE | {"routing": "early_exit"}, "recursion", False, False),
    ],
)
def test_estimates_stay_close_to_the_measured_activations_and_peak(fields, recompute, bf16, masked):
    config, precision = small(**fields), "bf16" if bf16 else "fp32"
    placement = Placement(precision=precision, recompute=recompute, document_masking=masked)
    activations, peak, work = measured(config, recompute, bf16, masked)
    saved = activation_bytes(config, LENGTH, BATCH, placement, work).saved
    assert saved == pytest.approx(activations, rel=0.1)
    assert 0.97 < training_memory(config, LENGTH, BATCH, placement, work).total / peak < 1.1


def test_the_worst_moment_is_one_of_the_backward_pass_where_gradients_outweigh_what_it_frees():
    """A last layer that few tokens pass has freed its own by then: the estimate is no sum of each part's own peak."""
    placement = Placement(precision="fp32", recompute="block")
    found = activation_bytes(small(**PREDICTED), LENGTH, BATCH, placement)
    worst, (head, *layers, table) = found.worst(), found.moments
    assert head.kept == found.saved and head.gradients == 0
    assert worst in layers and worst.kept < found.saved
    assert all(before.kept > after.kept and before.gradients <= after.gradients for before, after in
               itertools.pairwise([head, *layers, table]))  # fmt: skip
    # Gradients that are there throughout leave the worst moment to activations alone.
    whole = 4 * unique_parameters(small(**PREDICTED))
    assert found.worst(whole).gradients == whole and found.worst(whole).kept >= worst.kept
    once, often = (
        training_memory(small(**PREDICTED), LENGTH, BATCH, replace(placement, micro_batches=n)) for n in (1, 2)
    )
    assert once.gradients == worst.gradients < often.gradients == whole and once.total < often.total


def test_states_by_strategy():
    config, count = small(), unique_parameters(small())
    of = {
        strategy: training_memory(config, 64, 1, Placement(strategy=strategy, world_size=4))
        for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    }
    single = training_memory(config, 64, 1, Placement(micro_batches=2))  # whose gradients stay, as ddp's buckets do
    assert (single.parameters, single.gradients, single.optimizer) == (4 * count, 4 * count, 8 * count)
    assert of["ddp"] == single
    assert (of["zero1"].parameters, of["zero1"].gradients, of["zero1"].optimizer) == (4 * count, 4 * count, 3 * count)
    assert (of["zero2"].parameters, of["zero2"].gradients) == (4 * count, count)
    assert (of["zero3"].parameters, of["zero3"].gradients, of["zero3"].optimizer) == (count, count, 3 * count)
    assert (of["fsdp2"].parameters, of["fsdp2"].gradients, of["fsdp2"].optimizer) == (count, count, 2 * count)
    hybrid = training_memory(config, 64, 1, Placement(strategy="fsdp2", world_size=4, shard_size=2))
    assert hybrid.parameters == 2 * count
    offloaded = training_memory(config, 64, 1, Placement(strategy="zero1", world_size=4, offload_optimizer=True))
    assert (offloaded.optimizer, offloaded.host) == (0, 3 * count)
    assert offloaded.total == of["zero1"].total - 3 * count
    for strategy, stays in (("zero3", (0, count, 3 * count)), ("fsdp2", (0, 0, 0))):
        away = training_memory(config, 64, 1, Placement(strategy=strategy, world_size=4, offload_parameters=True))
        assert (away.parameters, away.gradients, away.optimizer) == stays
        assert away.total + away.host == of[strategy].total and away.gathered == of[strategy].gathered


def test_keeping_gathered_weights_costs_their_bytes_and_gathers_once_whatever_the_recursions():
    for recursions in (1, 2, 3):
        config = small(num_recursions=recursions, num_hidden_layers=2 + 2 * recursions)
        options = {"strategy": "fsdp2", "world_size": 8, "precision": "fp32"}
        kept = communication(config, Placement(reshard_after_forward=False, micro_batches=4, **options))
        units = 4  # unique layers; two of them are shared
        assert kept.gathers == units + 1
        assert kept.all_gather == round(7 / 8 * 4 * unique_parameters(config))
        freed = communication(config, Placement(micro_batches=4, **options))
        assert freed.gathers == 4 * (2 * config.num_hidden_layers + 1)
        shared = 2 * unit_parameters(config)[0] if recursions > 1 else 0  # their gradients travel in two parts
        assert freed.reduce_scatter == kept.reduce_scatter == round(7 / 8 * 4 * (unique_parameters(config) + shared))
        whole = training_memory(config, 64, 1, Placement(reshard_after_forward=False, **options))
        assert whole.gathered > training_memory(config, 64, 1, Placement(**options)).gathered


def test_communication_of_replicas_and_hybrid_shards():
    config, states = small(), 4 * unique_parameters(small())
    assert communication(config, Placement(strategy="single", world_size=1)).total == 0
    assert communication(config, Placement(strategy="ddp", world_size=4)).total == round(2 * 3 / 4 * states)
    options = {"world_size": 4, "micro_batches": 3, "precision": "fp32"}
    assert communication(config, Placement(strategy="zero1", **options)).total == 3 * round(3 / 4 * states)
    assert communication(config, Placement(strategy="zero2", **options)).all_reduce == 3 * round(2 * 3 / 4 * states)
    assert communication(config, Placement(strategy="zero3", **options)).total == 2 * 3 * round(3 / 4 * states)
    hybrid = communication(config, Placement(strategy="fsdp2", world_size=8, shard_size=4))
    assert hybrid.all_reduce == round(2 * 1 / 2 * states / 4)
    assert communication(config, Placement(strategy="fsdp2", world_size=8)).all_reduce == 0


@pytest.mark.parametrize("fields", [{}, RECURSIVE | {"share_norms": False}, EXPERT | {"relaxation": "lora"}])
def test_units_and_root_hold_every_parameter(fields):
    config = small(**fields)
    layer, root = unit_parameters(config)
    shared = 8 if config.num_recursions == 1 else 2
    outside = 0 if config.num_recursions == 1 else 2 * layer_parameters(config)
    assert shared * layer + outside + root == unique_parameters(config)


def test_kv_cache_against_vanilla():
    """Recursion blocks only: (Nr + 1) / (2 Nr) with the recursions' own keys, 1 / Nr with shared ones."""
    per_layer = 2 * 2 * 16 * 2
    assert kv_cache_bytes_per_token(small()) == 8 * per_layer == kv_cache_bytes_per_token(small(**RECURSIVE))
    assert kv_cache_bytes_per_token(small(**EXPERT)) == pytest.approx((2 + 6 * 4 / 6) * per_layer)
    assert kv_cache_bytes_per_token(small(**TOKEN | SHARED)) == pytest.approx((2 + 6 / 3) * per_layer)


def test_decoding_flops_by_hand():
    layer = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160) + 4 * 64 * 100
    assert decode_flops(small(), 100) == decode_flops(small(**RECURSIVE), 100) == 8 * layer + 2 * 64 * 211
    assert decode_flops(small(**EXPERT), 100) < decode_flops(small(**EXPERT | SHARED), 100) < decode_flops(small(), 100)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="strategy: 'zero4'"):
        Placement(strategy="zero4", world_size=2)
    with pytest.raises(ValueError, match="shard_size: 3 must divide the 8 ranks"):
        Placement(strategy="fsdp2", world_size=8, shard_size=3)
    with pytest.raises(ValueError, match="world_size"):
        Placement(world_size=2)
