"""Scale on paper: the committed page is what the command makes; its bytes and states are those of real steps on two
ranks; the roofline behaves as its opening says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile

from model.config import MoRConfig
from model.memory import Placement, communication, training_memory
from model.modeling import MoRForCausalLM
from model.sharing import num_unique_layers
from pretrain.parallel.fsdp2 import FSDP2
from pretrain.parallel.settings import ParallelSettings
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel
from pretrain.scale import CONFIGS, Cluster, estimate
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import ROUTED

# Matrices above 100,000 values, which ZeRO-3 divides; smaller ones it keeps whole.
MODEL = ROUTED["mor_expert"] | {"hidden_size": 320, "intermediate_size": 384, "vocab_size": 384}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
# name: (parallel section, precision)
STRATEGIES: dict[str, tuple[dict[str, Any], Any]] = {
    "ddp": ({"strategy": "ddp"}, "bf16"),
    "zero1": ({"strategy": "zero1"}, "fp32"),
    "zero2": ({"strategy": "zero2"}, "fp32"),
    "zero3": ({"strategy": "zero3"}, "bf16"),
    "fsdp2": ({"strategy": "fsdp2", "min_unit_parameters": 0}, "bf16"),
    "fsdp2_keep": ({"strategy": "fsdp2", "reshard_after_forward": False, "min_unit_parameters": 0}, "bf16"),
    "fsdp2_one_unit": ({"strategy": "fsdp2", "min_unit_parameters": 2**20}, "bf16"),
}
TYPES = {"float": 4, "c10::BFloat16": 2}


def take_a_step(parallel: Parallel, micro_batches: int) -> None:
    tokens = torch.randint(0, MODEL["vocab_size"], (1, 8))
    for number in range(micro_batches):
        last = number == micro_batches - 1
        parallel.micro_step(parallel.forward(last, input_ids=tokens, labels=tokens).loss, last)
    parallel.optimizer_step(1e-3, 1.0)


def sent_bytes(events: list[dict[str, Any]], world_size: int) -> dict[str, int]:
    """Bytes that a rank sends in the collectives of a trace, by ring algorithms; the whole tensor is the larger one."""
    share, sent = (world_size - 1) / world_size, {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    for event in (event for event in events if str(event.get("name")).startswith("c10d::")):
        name, shapes, kinds = event["name"], event["args"]["Input Dims"], event["args"]["Input type"]
        if name == "c10d::allreduce_":  # of fp32 tensors: the trace does not tell
            sent["all_reduce"] += round(2 * share * 4 * sum(shape[0] for shape in shapes[0] if shape))
            continue
        kind = {"c10d::_allgather_base_": "all_gather", "c10d::_reduce_scatter_base_": "reduce_scatter"}[name]
        sent[kind] += round(share * TYPES[kinds[0]] * max(shapes[0][0], shapes[1][0]))
    return sent


def held_bytes(parallel: Parallel) -> tuple[int, int]:
    """Bytes of the parameters and of the optimizer's states that lie on this rank."""
    zero = parallel.settings.strategy.startswith("zero")
    optimizer: Any = parallel.optimizer.optimizer if zero else parallel.optimizer  # type: ignore[attr-defined]
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    masters = [p for group in optimizer.param_groups for p in group["params"]] if zero else []
    masters = getattr(parallel.optimizer, "fp32_partitioned_groups_flat", masters)  # where ZeRO-3 keeps them
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in parallel.module.parameters()]

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in (getattr(t, "_local_tensor", t) for t in tensors))

    return size(weights), size(states + masters)


def measure(name: str, micro_batches: int, folder: Path) -> tuple[dict[str, int], int, tuple[int, int]]:
    """(bytes sent, gathers, bytes held) of the second step of a rank."""
    section, precision = STRATEGIES[name]
    parallel = start_parallel(ParallelSettings(**section), precision, 0)
    parallel.prepare(MoRForCausalLM(MoRConfig(**MODEL)), lambda module: torch.optim.AdamW(module.parameters()))
    take_a_step(parallel, micro_batches)
    with profile(record_shapes=True) as profiled:
        take_a_step(parallel, micro_batches)
    path = folder / f"trace-{parallel.rank}.json"
    profiled.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    gathers = sum(event.get("name") == "c10d::_allgather_base_" for event in events)
    held = held_bytes(parallel)
    parallel.finish()
    return sent_bytes(events, 2), gathers, held


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_bytes_sent_and_states_held_are_those_of_a_real_step(tmp_path: Path, name: str) -> None:
    section, precision = STRATEGIES[name]
    options: dict[str, Any] = {"world_size": 2, "micro_batches": 2, "precision": precision} | section
    sent, gathers, (weights, states) = run_ranks(measure, 2, name, 2, tmp_path)[0]
    expected = communication(MoRConfig(**MODEL), Placement(**options))
    for kind, count in sent.items():
        assert count == pytest.approx(getattr(expected, kind), rel=0.01, abs=2000), kind  # norms, flags; padding
    if name.startswith("fsdp2"):
        assert gathers == expected.gathers
    memory = training_memory(MoRConfig(**MODEL), 8, 1, Placement(**options))
    assert weights == pytest.approx(memory.parameters, rel=0.01)
    assert states == pytest.approx(memory.optimizer, rel=0.01)


def test_the_committed_page_is_what_the_command_makes() -> None:
    done = subprocess.run([sys.executable, "-m", "pretrain.scale"], cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (CONFIGS / "parallel" / "SCALE.md").read_text(encoding="utf-8")


def test_mistakes_at_the_command_line_are_named() -> None:
    command = [sys.executable, "-m", "pretrain.scale", "overlapp=0.5"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "overlap" in done.stderr and not done.stdout


def small(hidden_size: int = 64) -> MoRConfig:
    fields = {"vocab_size": 64, "intermediate_size": 160, "num_hidden_layers": 8}
    return MoRConfig(hidden_size=hidden_size, num_attention_heads=4, num_key_value_heads=4, **fields)


def test_offloading_is_refused_by_name() -> None:
    strategy = ParallelSettings(strategy="fsdp2", offload_parameters=True)
    with pytest.raises(ValueError, match="offload_parameters: transfers to host memory"):
        estimate(Cluster(), strategy, 8, MoRConfig(**MODEL))


def test_the_roofline_by_hand() -> None:
    config = small()
    slow = {"node_bandwidth": 1.0, "link_efficiency": 1.0, "hop_seconds": 0.0, "sequences": 8, "sequence_length": 64}
    ddp = ParallelSettings(strategy="ddp")
    bare = estimate(Cluster(**slow | {"node_bandwidth": 1e30}), ddp, 4, config)
    assert bare.mfu == pytest.approx(0.45) and bare.seconds == pytest.approx(bare.compute_seconds)
    bound = estimate(Cluster(**slow), ddp, 4, config)
    assert bound.communication_seconds == communication(config, Placement("ddp", 4)).total == bound.sent
    assert bound.seconds == pytest.approx(bound.communication_seconds, rel=1e-3)
    exposed = estimate(Cluster(**slow | {"overlap": 0.0, "node_bandwidth": 1e12}), ddp, 4, config)
    assert exposed.seconds == pytest.approx(exposed.compute_seconds + exposed.communication_seconds)
    with pytest.raises(ValueError, match="8 do not divide among 3"):
        estimate(Cluster(**slow), ddp, 3, config)


def at_scale(world_size: int, section: dict[str, Any], micro_batches: int, folder: Path) -> tuple[dict, dict[str, int]]:
    """(bytes sent, collectives by kind) of the second step of rank 0, by torch's process group that moves nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    parallel = FSDP2(ParallelSettings(strategy="fsdp2", watchdog_seconds=0, **section), "bf16", 0)
    parallel.prepare(MoRForCausalLM(MoRConfig(**MODEL)), lambda module: torch.optim.AdamW(module.parameters()))
    take_a_step(parallel, micro_batches)
    with profile(record_shapes=True) as profiled:
        take_a_step(parallel, micro_batches)
    path = folder / "trace.json"
    profiled.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"] for event in events if str(event.get("name")).startswith("c10d::")]
    dist.destroy_process_group()
    return sent_bytes(events, section.get("shard_size") or world_size), dict(Counter(names))


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "micro_batches"), [(False, 2), (True, 2), (False, 1)])
def test_collectives_are_as_many_on_1024_ranks_as_on_8(tmp_path: Path, keep: bool, micro_batches: int) -> None:
    """FSDP2 over all ranks, and over groups of 8 whose copies sum their gradients."""
    placed = {"reshard_after_forward": not keep, "min_unit_parameters": 0}
    for world_size, shard_size in ((8, None), (64, None), (64, 8), (1024, None), (1024, 8)):
        section = placed | {"shard_size": shard_size}
        ((sent, counted),) = run_ranks(at_scale, 1, world_size, section, micro_batches, tmp_path)
        options: dict[str, Any] = {"strategy": "fsdp2", "world_size": world_size, "micro_batches": micro_batches}
        expected = communication(MoRConfig(**MODEL), Placement(precision="bf16", **options, **section))
        assert counted["c10d::_allgather_base_"] == expected.gathers, (world_size, shard_size)
        units = num_unique_layers(MoRConfig(**MODEL)) + 1
        scatters = counted["c10d::_reduce_scatter_base_"]
        assert units <= scatters <= 2 * units  # shared layers once more, where gradients of earlier passes wait
        # The norm's, and the sums of the copies: one for each unit that scatters.
        assert (counted["c10d::allreduce_"] > scatters) == (shard_size is not None)
        if (shard_size or world_size) <= 64:  # beyond, small matrices are padded
            assert sent["all_gather"] == pytest.approx(expected.all_gather, rel=0.05)
            assert sent["reduce_scatter"] == pytest.approx(expected.reduce_scatter, rel=0.05)


def test_a_model_that_does_not_fit_is_recomputed_and_then_marked() -> None:
    config, ddp = small(hidden_size=256), ParallelSettings(strategy="ddp")
    options: dict[str, Any] = {"strategy": "ddp", "world_size": 256, "document_masking": True, "on_gpu": True}
    options["compiled"] = True
    below_one_sequence = training_memory(config, 2048, 1, Placement(**options)).total / 2**30 - 1e-6
    roomy, tight, none = (estimate(Cluster(memory_gib=gib), ddp, 256, config) for gib in (78, below_one_sequence, 0.01))
    assert (roomy.micro_batch, roomy.micro_batches, roomy.recompute) == (4, 1, "none")
    assert tight.recompute == "block" and tight.memory <= below_one_sequence * 2**30
    assert tight.mfu < roomy.mfu
    assert none.memory > 0.01 * 2**30 and none.micro_batch == 1
