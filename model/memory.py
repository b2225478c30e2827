"""Memory of training and inference, and the bytes that ranks exchange, from the configuration alone.

What is assumed is what this project runs: fp32 parameters, gradients and AdamW moments under every strategy; with bf16,
autocast (FSDP2 gathers bf16 weights in its place); attention that keeps no scores; the head fused with its loss. Bytes
are per rank. Estimates err on the high side: what the parts need at their own peaks is added up.

Legend as in model/flops.py: B sequences, T tokens, h hidden size, f intermediate size, H query heads, q = H d and
kv = G d widths of queries and keys, V vocabulary, L effective depth, Nr recursions, D layers of one recursion.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Literal, get_args

from .config import MoRConfig
from .depth import method_of, stages_of
from .flops import (
    Pass,
    Recompute,
    Work,
    attention_widths,
    effective_parameters,
    expected_work,
    layer_parameters,
    recursion_layers,
    relaxation_parameters,
    router_parameters,
    unique_parameters,
    unshared_layers,
)
from .sharing import num_unique_layers

Precision = Literal["fp32", "bf16"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
FP32, BF16 = 4, 2
ZERO3_LIVE = 10**9  # parameters that DeepSpeed may keep gathered, and over which it looks ahead for their next use


@dataclass(frozen=True)
class Placement:
    """How a training step is laid out over ranks and computed: what its memory and its communication hang on.

    shard_size: fsdp2, ranks that share one copy (hybrid). min_unit_parameters: fsdp2, smaller layers are gathered with
    the root. offload_parameters: under fsdp2 gradients and optimizer states are in host memory too. micro_batches:
    forward passes of a step. document_masking: attention takes a dense mask, which every layer keeps. on_gpu: attention
    makes no masks and packs no slots, weights that stand side by side for one product are copied at each use, and the
    head's chunks are compiled. Raises ValueError for a shard size that does not divide, and ranks of one process.
    """

    strategy: Strategy = "single"
    world_size: int = 1
    shard_size: int | None = None
    reshard_after_forward: bool = True
    min_unit_parameters: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    micro_batches: int = 1
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    document_masking: bool = False
    on_gpu: bool = False

    def __post_init__(self) -> None:
        ranks, shards = self.world_size, self.shard_size
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy: {self.strategy!r} is none of {', '.join(get_args(Strategy))}")
        if shards is not None and (self.strategy != "fsdp2" or ranks % shards):
            raise ValueError(f"shard_size: {shards} must divide the {ranks} ranks, and belongs to fsdp2")
        if self.strategy == "single" and ranks != 1:
            raise ValueError(f"world_size: strategy single runs on 1 rank, not {ranks}")

    @property
    def shards(self) -> int:
        """Ranks that share one copy of what is sharded."""
        return self.shard_size or self.world_size

    @property
    def value_bytes(self) -> int:
        """Of a value that is computed with."""
        return BF16 if self.precision == "bf16" else FP32


SINGLE = Placement()


@dataclass(frozen=True)
class Activations:
    """Bytes of the activations of one micro-batch. saved: kept from the forward to the backward pass. working: on top
    of them at the worst moment, of the head's forward pass or of one recomputed stretch."""

    saved: int
    working: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in training.

    gathered: whole weights or gradients that a sharded strategy holds for a time. working, activations: `Activations`.
    host: what is offloaded, of the machine's own memory; not part of the total, which is the device's.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in an optimizer step (ring algorithms), by collective, and collectives that gather."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int
    gathers: int

    @property
    def total(self) -> int:
        return self.all_gather + self.reduce_scatter + self.all_reduce


# --- activations --------------------------------------------------------------------------------------------------


def layer_activation_bytes(config: MoRConfig, passed: Pass, precision: Precision, *, packed: bool = False) -> int:
    """What autograd saves in one layer of a pass without recomputation.

    fp32, per token: 6h (input, normalised and scaled, of both norms), 2q + 2kv of attention, 4f of SwiGLU. bf16: the
    same in bf16, but for the inputs of the norms, of which fp32 copies are kept. packed: ragged tokens are spread over
    slots for attention and collected again, which keeps its output in both forms.
    """
    h, f = config.hidden_size, config.intermediate_size
    (q, kv), size = attention_widths(config), BF16 if precision == "bf16" else FP32
    per_query = 2 * h * (FP32 + 2 * size) + (2 * q + 4 * f) * size
    per_query += FP32 * (2 + config.num_attention_heads)  # of norms and of softmax
    per_key = 2 * kv * size
    if packed:
        per_query += q * size
    return round(passed.queries * per_query + passed.keys * per_key)


def mask_bytes(passed: Pass, precision: Precision, document_masking: bool) -> int:
    """The dense mask, a value for each query and key, that attention keeps in one layer; causal needs none.

    Documents need one everywhere, keys of everyone wherever the queries are a selection.
    """
    if not (document_masking or (passed.stage.selects and passed.stage.sees_all)):
        return 0
    return round(passed.dense) * (BF16 if precision == "bf16" else FP32)


def activation_bytes(
    config: MoRConfig,
    sequence_length: int,
    num_sequences: int,
    placement: Placement = SINGLE,
    work: Work | None = None,
) -> Activations:
    """Activations of one micro-batch, under expected routing unless `work` says what was routed.

    Autocast keeps each weight in bf16 too; fsdp2 gathers its weights in bf16 and needs no copies.
    """
    work = expected_work(config, sequence_length, num_sequences) if work is None else work
    precision, recompute, on_gpu = placement.precision, placement.recompute, placement.on_gpu
    tokens, h, size = num_sequences * sequence_length, config.hidden_size, placement.value_bytes
    q, kv = attention_widths(config)
    method = method_of(config)
    saved, stretches, shares = 0, [0], method.shares(config)
    for passed in work.passes:
        if passed.stage.gate is not None and not work.offered[passed.stage.gate]:  # a gate that is open in training
            passed = replace(passed, stage=replace(passed.stage, gate=None))
        packed = passed.stage.selects and not method.fixed and not on_gpu
        # Some are left out whose keys are made all the same.
        gate, of_all = passed.stage.gate, passed.stage.uses[0].keys == "everyone"
        around = gate is not None and not passed.stage.whole and of_all and shares[gate] < 1
        layer = layer_activation_bytes(config, passed, precision, packed=packed)
        layer += 0 if on_gpu else mask_bytes(passed, precision, placement.document_masking)
        if around:
            layer += tokens * (h * (FP32 + 2 * size) + FP32)  # the norm of the states that keys are made of
        inputs = round(passed.queries * h * size)
        products = round(passed.queries * (2 * q + 2 * h + 2 * config.intermediate_size) + passed.keys * 2 * kv) * size
        whole = (
            recompute == "recursion" and passed.stage.shared
        )  # the recursion, not the layer, is the stretch that is recomputed
        if passed.layers:
            stretches.append(layer * (passed.layers if whole else 1))
        saved += {
            "none": passed.layers * layer,
            "selective": passed.layers * (inputs + products),
            "block": passed.layers * inputs,
            "recursion": inputs if whole else passed.layers * inputs,
        }[recompute]
        if passed.stage.gate is not None:
            saved += method.merged(config) * round(passed.queries) * h * size
        if around:
            # The states of everyone, that keys are made of, before the stage, and of each stretch's recomputation.
            saved += tokens * h * size * (1 if recompute == "none" else 2 if whole else 1 + passed.layers)
    shared_keys = 0
    if recompute != "none":  # keys that later stages read outlive their stretch, then their gradients do
        sources = {use.source for passed in work.passes for use in passed.stage.uses if use.source is not None}
        shared_keys = len(sources) * tokens * 2 * kv * size
    saved += shared_keys
    # fp32 inputs of the scorers. In fp32 the first one's is the first layer's, and detached copies are no more.
    gates = [scorer.gate for scorer in method.scorers(config)]
    whole = any(passed.stage.gate == 0 and passed.queries == tokens for passed in work.passes)
    copied = gates if precision == "bf16" else {gate for gate in gates if gate > 0 or not whole}
    saved += round(sum(work.offered[gate] for gate in copied)) * h * FP32
    for scorer in method.scorers(config):  # inner layers: before and after their function, which takes a copy on a CPU
        saved += round(work.offered[scorer.gate]) * 4 * sum(inner for _, inner in scorer.shapes[:-1]) * FP32
    saved += len(shares) * tokens + 12 * round(sum(work.offered))  # the record: who passed; scores and positions
    saved += tokens * h * (FP32 + size) + (tokens + config.vocab_size) * h * size  # final norm, gradients of the head
    if work.heads:  # the same of exits, whose states their next layer keeps, and one more gradient of the head's weight
        saved += round(work.heads) * 2 * h * FP32 + config.vocab_size * h * size
    if precision == "bf16" and recompute == "none" and placement.strategy != "fsdp2":
        saved += BF16 * num_unique_layers(config) * layer_parameters(config, norms=False)  # autocast's copies
    if on_gpu:
        rows = min(tokens, max(64, 2 ** ((2**27 // config.vocab_size).bit_length() - 1)))
        head = 2 * (rows * size + h * FP32) * config.vocab_size  # logits and their gradient; the weight's, twice
    else:
        rows = min(tokens, max(64, 2**24 // config.vocab_size))  # of logits at a time
        head = (3 * rows + h) * config.vocab_size * FP32
    head += round(work.heads) * 2 * h * size  # states of exits, side by side, and their gradients
    return Activations(saved, max(head, 0 if recompute == "none" else max(stretches) + shared_keys))


# --- one rank -----------------------------------------------------------------------------------------------------


def unit_parameters(config: MoRConfig) -> tuple[int, int]:
    """Parameters of the largest sharding unit, a unique layer, and of the root: all that is outside the layers."""
    layer = layer_parameters(config)
    if config.num_recursions > 1:
        layer += 0 if config.share_norms else 2 * config.hidden_size * (config.num_recursions - 1)
        if config.relaxation in ("lora", "dora"):
            layer += relaxation_parameters(config) // recursion_layers(config)
    embeddings = unique_parameters(config) - unique_parameters(config, embeddings=False)
    encodings = relaxation_parameters(config) if config.relaxation == "recursion_encoding" else 0
    return layer, embeddings + router_parameters(config) + encodings + config.hidden_size


def training_memory(
    config: MoRConfig, sequence_length: int, micro_batch_size: int, placement: Placement = SINGLE
) -> Memory:
    """Bytes of one rank at the peak of a training step.

    fsdp2 keeps whole gradients between the forward passes of a step, on the device also where it offloads.
    """
    strategy, world_size, shards = placement.strategy, placement.world_size, placement.shards
    states = unique_parameters(config) * FP32
    parts = {"single": (1, 1, 1), "ddp": (1, 1, 1), "zero1": (1, 1, world_size)}
    parts |= {"zero2": (1, world_size, world_size), "zero3": (world_size,) * 3, "fsdp2": (shards,) * 3}
    parameters, gradients, moments = (-(-states // part) for part in parts[strategy])
    optimizer = 2 * moments
    if strategy.startswith("zero"):
        optimizer += moments  # DeepSpeed steps on a flat copy of its partition of the parameters
    layer, root = unit_parameters(config)
    gathered = 0
    if strategy == "zero3":
        gathered = min(unique_parameters(config), ZERO3_LIVE) * FP32
    elif strategy == "fsdp2":
        freed = placement.reshard_after_forward and layer >= placement.min_unit_parameters
        weights = 2 * layer + root if freed else unique_parameters(config)
        gathered = weights * placement.value_bytes + (states if placement.micro_batches > 1 else (layer + root) * FP32)
    activations = activation_bytes(config, sequence_length, micro_batch_size, placement)
    host = 0
    if placement.offload_optimizer or (placement.offload_parameters and strategy == "fsdp2"):
        host, optimizer = optimizer, 0
    if placement.offload_parameters:
        host, parameters = host + parameters, 0
        if strategy == "fsdp2":
            host, gradients = host + gradients, 0
    return Memory(parameters, gradients, optimizer, gathered, activations.saved, activations.working, host)


def communication(config: MoRConfig, placement: Placement) -> Communication:
    """Bytes that one rank sends in an optimizer step.

    ddp reduces whole gradients once. So do zero1 and zero2, to every rank (DeepSpeed's default on any device), zero2
    in every micro-batch; both then gather the fp32 weights once. zero3, and fsdp2 with resharding, gather a layer for
    each of its applications, forward and backward; this is a bound for zero3, which keeps what it needs again within
    `ZERO3_LIVE` parameters, and so gathers a small model once a micro-batch. fsdp2 without resharding gathers each unit
    once a step, whatever Nr. Accumulated gradients of shared layers travel twice under fsdp2: those of the last
    micro-batch, and those before. With bf16, fsdp2 gathers in bf16; all else travels in fp32. Hybrid copies sum their
    gradients. Gradients of layers that are gathered with the root travel with its own.
    """
    strategy, world_size, micro_batches = placement.strategy, placement.world_size, placement.micro_batches
    states = unique_parameters(config) * FP32
    layer, root = unit_parameters(config)
    count, size, shards = unique_parameters(config), placement.value_bytes, placement.shards
    share, copies = Fraction(shards - 1, shards), world_size // shards
    uses, units = config.num_hidden_layers, num_unique_layers(config)
    gather = scatter = reduce = gathers = 0
    if strategy == "ddp":
        reduce = round(2 * share * states)
    elif strategy in ("zero1", "zero2"):
        gather, gathers = round(share * states), 1
        reduce = round(2 * share * states) * (micro_batches if strategy == "zero2" else 1)
    elif strategy == "zero3":
        kept = 2 * effective_parameters(config) <= ZERO3_LIVE
        uses_of_all = 1 if kept else Fraction(2 * _applied_parameters(config), count)
        gather = round(share * states * uses_of_all) * micro_batches
        gathers = micro_batches * (units + 1 if kept else 2 * uses + 2)
        scatter = round(share * states) * micro_batches
    elif strategy == "fsdp2":
        alone = layer >= placement.min_unit_parameters
        gathers, weights = units + 1 if alone else 1, count
        if placement.reshard_after_forward:  # it keeps its root between the passes
            gathers = micro_batches * (2 * uses + 1 if alone else 1)
            weights = micro_batches * (2 * (_applied_parameters(config) - root) + root if alone else count)
        gather = round(share * weights * size)
        recurring = alone and config.num_recursions > 1 and micro_batches > 1
        shared = layer * (units - unshared_layers(config)) if recurring else 0
        scatter = round(share * (count + shared) * FP32)
        reduce = round(2 * Fraction(copies - 1, copies) * Fraction((count + shared) * FP32, shards))
    return Communication(gather, scatter, reduce, gathers)


def _applied_parameters(config: MoRConfig) -> int:
    """Parameters of the root and of all layers, each as often as it is applied."""
    (shared_layer, root), outside = unit_parameters(config), unshared_layers(config)
    return root + outside * layer_parameters(config) + (config.num_hidden_layers - outside) * shared_layer


# --- inference ----------------------------------------------------------------------------------------------------


def kv_cache_bytes_per_token(config: MoRConfig, bytes_per_value: int = BF16) -> float:
    """Expected bytes of keys and values that a cached token takes.

    In the recursions, against vanilla: (Nr + 1) / (2 Nr) with `recursion_wise` keys of routed models, 1 / Nr with
    `shared`. `shared_update` keeps the replaced keys beside the first recursion's, as much as `recursion_wise`.
    """
    shares, layers = method_of(config).shares(config), Fraction(0)
    for stage in stages_of(config):
        for use in stage.uses:
            entered = Fraction(1) if stage.gate is None else shares[stage.gate]
            layers += {"everyone": Fraction(1), "entered": entered, "none": Fraction(0)}[use.keys]
    return float(layers * 2 * attention_widths(config)[1] * bytes_per_value)
