"""Scale on paper: memory, communication and expected MFU of each strategy on many GPUs, from the configurations alone.

python -m pretrain.scale [key=value ...] > configs/parallel/SCALE.md

Memory and bytes are those of model/memory.py, FLOPs those of model/flops.py. The time of a step is a roofline:

    compute        FLOPs of the rank, recomputation included, over peak_flops x compute_efficiency
    communication  bytes that the rank sends over a link's bandwidth, and hop_seconds for each hop of each gather's ring
    step           compute, and what of the communication does not fit into `overlap` of the passes that can hide it

Hidden by the passes: gradients of ddp and zero1 by the last backward pass, of zero2 by every one; all that zero3 and
fsdp2 send by both passes. Nothing hides the weights that zero1 and zero2 gather after the update. Reductions count
their bytes alone: trees and few large buckets make their latency small.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from data_prep.settings import Settings, describe, load, read_yaml, run_command
from model.config import MoRConfig
from model.flops import Recompute, breakdown, effective_parameters, expected_work, training_flops, unique_parameters
from model.memory import communication, training_memory
from pretrain.config import make_model_config
from pretrain.metrics import PEAK_FLOPS
from pretrain.parallel.settings import ParallelSettings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_keep", "fsdp2_hybrid")
BACKWARD = 2 / 3  # of a step's compute
GIB = 2**30


class Cluster(Settings):
    """What the page assumes: a DGX H100 cluster, the paper's batch, and shares that a run on it would correct."""

    peak_flops: float = Field(PEAK_FLOPS["H100"], gt=0, description="dense bf16 FLOP/s of a GPU (H100 SXM data sheet)")
    memory_gib: float = Field(78.0, gt=0, description="GiB of a GPU that a run can have, of an H100's 80 GB")
    gpus_per_node: int = Field(8, gt=0, description="GPUs that NVLink joins")
    node_bandwidth: float = Field(
        450e9, gt=0, description="bytes/s that a GPU sends inside a node (NVLink 4, one direction; H100 data sheet)"
    )
    network_bandwidth: float = Field(
        50e9, gt=0, description="bytes/s that a GPU sends to other nodes (400 Gb/s adapters; DGX H100 data sheet)"
    )
    link_efficiency: float = Field(0.8, gt=0, le=1, description="share of a bandwidth that is reached; an assumption")
    hop_seconds: float = Field(
        3e-6, ge=0, description="latency of a hop in a ring; an assumption, nccl-tests would tell"
    )
    compute_efficiency: float = Field(
        0.45, gt=0, le=1, description="share of the peak that one GPU reaches alone; an assumption, its MFU would tell"
    )
    overlap: float = Field(
        0.8, ge=0, le=1, description="share of a pass that can hide communication; an assumption, a trace would tell"
    )
    sequences: int = Field(1024, gt=0, description="sequences of the global batch (the paper's)")
    sequence_length: int = Field(2048, gt=0, description="tokens of a sequence (the paper's)")
    largest_micro_batch: int = Field(16, gt=0, description="sequences of one forward pass at most")
    document_masking: bool = Field(True, description="attention keeps to documents")
    worlds: list[int] = Field([8, 64, 256, 1024], description="numbers of GPUs")
    models: list[str] = Field(
        [f"{size}_{kind}" for size in ("360m", "1.7b", "7b") for kind in ("vanilla", "mor_expert_nr3")],
        description="configs/model/*.yaml, by name",
    )


@dataclass(frozen=True)
class Estimate:
    """One model under one strategy on so many GPUs. memory, sent: bytes per GPU (and step); seconds of a step."""

    micro_batch: int
    micro_batches: int
    recompute: Recompute
    memory: int
    sent: int
    compute_seconds: float
    communication_seconds: float
    seconds: float
    mfu: float


def link_seconds(
    cluster: Cluster, strategy: ParallelSettings, world: int, config: MoRConfig, micro_batches: int
) -> tuple[float, float, int]:
    """(seconds of communication that passes can hide, seconds of the rest, bytes sent) of one step of one rank.

    A ring over nodes leaves a node once, and there are as many rings as the node has adapters: a rank's bandwidth is
    the smaller of NVLink's and of all adapters of its node. Copies of hybrid shards exchange over one adapter each.
    """
    sent = communication(config, strategy.placement(world, micro_batches=micro_batches))
    ranks = strategy.shard_size or world
    bandwidth = cluster.node_bandwidth
    if ranks > cluster.gpus_per_node:
        bandwidth = min(bandwidth, cluster.gpus_per_node * cluster.network_bandwidth)
    ring = 1 / (bandwidth * cluster.link_efficiency)
    copies = 1 / (cluster.network_bandwidth * cluster.link_efficiency) if strategy.shard_size else ring
    hops = cluster.hop_seconds * (ranks - 1)
    gather, reduce = sent.all_gather * ring + sent.gathers * hops, sent.reduce_scatter * ring + sent.all_reduce * copies
    if strategy.strategy in ("zero1", "zero2"):
        return reduce, gather, sent.total
    return gather + reduce, 0.0, sent.total


def fitting(cluster: Cluster, strategy: ParallelSettings, world: int, config: MoRConfig) -> tuple[int, Recompute, int]:
    """(sequences of a micro-batch, recomputation, bytes): the largest that fits, without recomputation if any does.

    The last that was tried where none fits.
    """
    own = cluster.sequences // world
    sizes = [size for size in range(min(own, cluster.largest_micro_batch), 0, -1) if own % size == 0]
    found: tuple[int, Recompute, int] = (1, "block", 0)
    compiled = not strategy.strategy.startswith("zero")  # as `compile: auto` has it
    for recompute in ("none", "block"):
        for size in sizes:
            step = {"micro_batches": own // size, "recompute": recompute, "on_gpu": True, "compiled": compiled}
            placement = strategy.placement(world, document_masking=cluster.document_masking, **step)
            memory = training_memory(config, cluster.sequence_length, size, placement).total
            found = (size, recompute, memory)  # type: ignore[assignment]
            if memory <= cluster.memory_gib * GIB:
                return found
    return found


def estimate(cluster: Cluster, strategy: ParallelSettings, world: int, config: MoRConfig) -> Estimate:
    """Memory, communication and time of one step.

    Raises ValueError where the batch does not divide among the GPUs, and for offloading, whose transfers to host memory
    the roofline does not know (model/memory.py knows its bytes).
    """
    if strategy.offload_optimizer or strategy.offload_parameters:
        raise ValueError("offload_optimizer, offload_parameters: transfers to host memory are not in this estimate")
    if cluster.sequences % world:
        raise ValueError(f"sequences: {cluster.sequences} do not divide among {world} GPUs")
    size, recompute, memory = fitting(cluster, strategy, world, config)
    micro_batches = cluster.sequences // world // size
    flops = training_flops(config, cluster.sequence_length, cluster.sequences)
    work = expected_work(config, cluster.sequence_length, cluster.sequences)
    again = sum(part.recompute for part in breakdown(config, work, recompute=recompute).values())
    compute = (flops + again) / (world * cluster.peak_flops * cluster.compute_efficiency)
    hideable, exposed, sent = link_seconds(cluster, strategy, world, config, micro_batches)
    window = cluster.overlap * compute
    if strategy.strategy not in ("zero3", "fsdp2"):
        window *= BACKWARD / (1 if strategy.strategy == "zero2" else micro_batches)
    seconds = compute + max(0.0, hideable - window) + exposed
    mfu = flops / (world * cluster.peak_flops * seconds)
    return Estimate(size, micro_batches, recompute, memory, sent, compute, hideable + exposed, seconds, mfu)


HEAD = """# Scale on paper

Made by `python -m pretrain.scale > configs/parallel/SCALE.md`, from the configurations alone; no GPU was asked. A test
holds this file against the command, and what it rests on against what a CPU can measure: the memory of training steps,
the states that each strategy keeps on a rank, and the bytes of every collective of a step on two ranks
(tests/model/test_memory.py, tests/pretrain/test_scale.py). Bandwidths and shares are assumptions, to be replaced as
`key=value` by what a cluster shows. The roofline stands at the top of pretrain/scale.py.

| assumption | value | meaning |
|---|---|---|"""
COLUMNS = """
Columns: sequences of a micro-batch times micro-batches (c: blocks are recomputed; **!**: does not fit); GiB of a GPU at
its peak; GB that a GPU sends in a step; seconds of compute, of communication (hidden or not) and of the step; MFU, of
FLOPs by the `exact` convention, without recomputation."""


def page(cluster: Cluster) -> Iterator[str]:
    """The lines of the page, in Markdown."""
    yield HEAD
    for key, _, meaning in describe(cluster):
        value = getattr(cluster, key)
        yield f"| `{key}` | {format(value, 'g') if isinstance(value, float) else value} | {meaning} |"
    yield COLUMNS
    for name in cluster.models:
        config = make_model_config(read_yaml(CONFIGS / "model" / f"{name}.yaml"))
        unique, effective = unique_parameters(config) / 1e6, effective_parameters(config) / 1e6
        flops = training_flops(config, cluster.sequence_length, 1) / cluster.sequence_length / 1e9
        yield f"\n## {name}\n"
        yield f"{unique:,.0f}M unique parameters, {effective:,.0f}M effective; {flops:.2f} training GFLOPs a token.\n"
        yield "| GPUs | strategy | micro-batch | GiB | GB sent | compute s | communication s | step s | MFU |"
        yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
        yield from (row(cluster, world, strategy, config) for world in cluster.worlds for strategy in STRATEGIES)


def row(cluster: Cluster, world: int, name: str, config: MoRConfig) -> str:
    """One line of a model's table. name: of a file in configs/parallel."""
    strategy = ParallelSettings.model_validate(read_yaml(CONFIGS / "parallel" / f"{name}.yaml"))
    found = estimate(cluster, strategy, world, config)
    marks = (" c" if found.recompute != "none" else "") + (" **!**" if found.memory > cluster.memory_gib * GIB else "")
    times = f"{found.compute_seconds:.3f} | {found.communication_seconds:.3f} | {found.seconds:.3f}"
    batch = f"{found.micro_batch} x {found.micro_batches}{marks}"
    sizes = f"{found.memory / GIB:.1f} | {found.sent / 1e9:.2f}"
    return f"| {world} | {name} | {batch} | {sizes} | {times} | {found.mfu:.1%} |"


def main() -> int:
    """Print the page for the `key=value` on the command line."""
    cluster = load(Cluster, None, sys.argv[1:])
    print("\n".join(page(cluster)))
    return 0


if __name__ == "__main__":
    run_command(main)
