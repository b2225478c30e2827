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
from .depth.base import DepthMethod
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
from .hardware import chunk_rows
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
    head's chunks are compiled. compiled: so are its layers. Raises ValueError for a shard size that does not divide,
    and ranks of one process.
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
    compiled: bool = False

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
class Moment:
    """Bytes at one moment of a micro-batch: `kept` from the forward pass for the backward pass, what is `working` on
    top of them, and the gradients of the weights that the backward pass has met so far."""

    kept: int
    working: int
    gradients: int


@dataclass(frozen=True)
class Activations:
    """A micro-batch's activations. saved: bytes kept when the forward pass ends. moments: the head's, then one for each
    stretch of layers as the backward pass comes to it, then the embedding's."""

    saved: int
    moments: tuple[Moment, ...]

    def worst(self, gradients: int | None = None) -> Moment:
        """The moment at which most is held. gradients: bytes of those that are there throughout; None: they come with
        the backward pass."""
        moments = self.moments if gradients is None else [replace(m, gradients=gradients) for m in self.moments]
        return max(moments, key=lambda moment: moment.kept + moment.working + moment.gradients)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in training, at the moment that takes most.

    gathered: whole weights or gradients that a sharded strategy holds for a time. activations, working, and gradients
    where they come with the backward pass: as of that `Moment`. host: what is offloaded, of the machine's own memory;
    not part of the total, which is the device's.
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


def layer_activation_bytes(
    config: MoRConfig, passed: Pass, precision: Precision, *, packed: bool = False, compiled: bool = False
) -> int:
    """What autograd saves in one layer of a pass without recomputation.

    fp32, per token: 6h (input, normalised and scaled, of both norms), 2q + 2kv of attention, 4f of SwiGLU. bf16: the
    same in bf16, but for the inputs of the norms, of which fp32 copies are kept. packed: ragged tokens are spread over
    slots for attention and collected again, which keeps its output in both forms. compiled: 4h (input, state between
    the halves, and both after their norms) and 3f (gate, up and their product), all in the precision of the products.
    """
    h, f = config.hidden_size, config.intermediate_size
    (q, kv), size = attention_widths(config), BF16 if precision == "bf16" else FP32
    per_query = 2 * h * (FP32 + 2 * size) + (2 * q + 4 * f) * size
    if compiled:
        per_query = (4 * h + 2 * q + 3 * f) * size
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


@dataclass(frozen=True)
class _Stretch:
    """Uses of layers that the backward pass takes as one: with recomputation, what is computed again together.

    kept: bytes that it leaves for the backward pass, and that this frees. working: what passing it backward takes on
    top. layers: unique layers whose gradients it makes.
    """

    kept: int
    working: int
    layers: tuple[int, ...]


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
    tokens, h, size = work.tokens, config.hidden_size, placement.value_bytes
    recompute, stretches = placement.recompute, _stretches(config, work, placement)
    copies = 0
    if size == BF16 and recompute == "none" and placement.strategy != "fsdp2":  # autocast's
        copies = BF16 * num_unique_layers(config) * layer_parameters(config, norms=False)
    shared_keys = 0
    if recompute != "none":  # keys that later stages read outlive their stretch, then their gradients do
        sources = {use.source for passed in work.passes for use in passed.stage.uses if use.source is not None}
        shared_keys = len(sources) * round(tokens) * 2 * attention_widths(config)[1] * size
    # The record: who passed, scores and positions.
    record = len(method_of(config).shares(config)) * tokens + 12 * round(sum(work.offered))
    # Of exits: states that their next layer keeps, and their gradients.
    exits = round(work.heads) * 2 * h * FP32
    kept = round(record) + copies + shared_keys + exits + sum(stretch.kept for stretch in stretches)
    # Final norm, gradients of the head; with exits, one more of its weight.
    end = tokens * h * (FP32 + size) + (tokens + (2 if work.heads else 1) * config.vocab_size) * h * size
    moments = [Moment(kept + round(end), _head_bytes(config, work, placement), 0)]
    layer, root = unit_parameters(config)
    met: set[int] = set()
    for stretch in reversed(stretches):
        met.update(stretch.layers)
        moments.append(Moment(kept, stretch.working + shared_keys, (root + len(met) * layer) * FP32))
        kept -= stretch.kept
    table = config.vocab_size * h * FP32
    moments.append(Moment(round(record), table, unique_parameters(config) * FP32))
    return Activations(moments[0].kept, tuple(moments))


def _head_bytes(config: MoRConfig, work: Work, placement: Placement) -> int:
    """Of the head and its loss: logits of a chunk of rows, two of the weight's gradients, states of exits side by side
    and their gradients."""
    h, v, heads, size = config.hidden_size, config.vocab_size, round(work.heads), placement.value_bytes
    rows = max(round(work.tokens), heads)
    chunk = min(rows, chunk_rows(v, "cuda" if placement.on_gpu else "cpu"))
    if placement.on_gpu:  # logits and their gradient
        return 2 * (chunk * size + h * FP32) * v + heads * 2 * h * size
    logits = chunk * v * (FP32 if size == FP32 else FP32 + size)  # changed in place
    return logits + h * v * (FP32 + size) + (rows + 2 * heads) * h * size


def _stretches(config: MoRConfig, work: Work, placement: Placement) -> list[_Stretch]:
    """The stretches of a pass, in the order of the forward pass."""
    precision, recompute, masking = placement.precision, placement.recompute, placement.document_masking
    tokens, h, f, size = round(work.tokens), config.hidden_size, config.intermediate_size, placement.value_bytes
    q, kv = attention_widths(config)
    method = method_of(config)
    shares, found = method.shares(config), list[_Stretch]()
    for passed in work.passes:
        if passed.stage.gate is not None and not work.offered[passed.stage.gate]:  # a gate that is open in training
            passed = replace(passed, stage=replace(passed.stage, gate=None))
        packed = passed.stage.selects and not method.fixed and not placement.on_gpu
        # Some are left out whose keys are made all the same.
        gate, of_all = passed.stage.gate, passed.stage.uses[0].keys == "everyone"
        around = gate is not None and not passed.stage.whole and of_all and shares[gate] < 1
        layer = layer_activation_bytes(config, passed, precision, packed=packed, compiled=placement.compiled)
        # Where a top-k takes everyone, causality alone says who sees whom.
        everything = method.fixed and passed.queries == tokens and not masking
        mask = 0 if placement.on_gpu or everything else mask_bytes(passed, precision, masking)
        layer += mask
        if around:
            layer += tokens * (h * (FP32 + 2 * size) + FP32)  # the norm of the states that keys are made of
        inputs = round(passed.queries * h * size)
        products = round(passed.queries * (2 * q + 2 * h + 2 * f) + passed.keys * 2 * kv) * size
        kept = {"none": layer, "selective": inputs + products}.get(recompute, inputs)
        again = {"none": 0, "selective": layer - inputs - products}.get(recompute, layer)
        if around and recompute != "none":  # the states of everyone, for each recomputation
            kept += tokens * h * size
        # Gradients of the inner states and of the stream, while a layer's own are still there.
        passing = round(passed.queries) * (2 * f + h) * size
        before = 0
        if gate is not None:
            passing += tokens * h * size  # and of the states that go past its layers
            before = mask // size + _gate_bytes(config, work, passed, placement, around)
        # The recursion, not the layer, is the stretch that is recomputed.
        whole = recompute == "recursion" and passed.stage.shared
        for uses in [passed.stage.uses] if whole else [(use,) for use in passed.stage.uses]:
            found.append(_Stretch(before + kept, len(uses) * again + passing, tuple(use.layer for use in uses)))
            before = 0
    return found


def _gate_bytes(config: MoRConfig, work: Work, passed: Pass, placement: Placement, around: bool) -> int:
    """What a gate and its merge keep. around: keys are made of the states of everyone, left-out tokens included."""
    method, gate, h = method_of(config), passed.stage.gate, config.hidden_size
    size, recompute = placement.value_bytes, placement.recompute
    assert gate is not None
    offered, scorers = work.offered[gate], [s for s in method.scorers(config) if s.gate == gate]
    prepared = method.prepare is not DepthMethod.prepare  # then states that are scored are not those that it takes
    kept = method.merged(config) * round(passed.queries) * h * size
    if around and prepared:
        kept += round(work.tokens) * h * size
    if passed.stage.selects:  # angles at its positions
        kept += round(passed.queries) * 2 * (attention_widths(config)[0] // config.num_attention_heads) * size
    if method.fixed and passed.queries < offered and size != FP32:
        kept += round(offered) * h * size  # what a selection is gathered from; in fp32 that is the scorer's input
    # The scorers' fp32 inputs. In fp32 they are no copies, and the first layer's, or everyone's states kept already.
    known = passed.queries == work.tokens if gate == 0 else around and not prepared and recompute != "none"
    copies = len(scorers) if size != FP32 else int(bool(scorers) and not (known and offered == work.tokens))
    if placement.compiled and placement.on_gpu:
        copies = 0  # widened inside the kernel
    # Inner layers: before and after their function, which takes a copy on a CPU.
    inner = 4 * sum(width for scorer in scorers for _, width in scorer.shapes[:-1])
    return kept + round(offered) * (copies * h + inner) * FP32


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
    config: MoRConfig,
    sequence_length: int,
    micro_batch_size: int,
    placement: Placement = SINGLE,
    work: Work | None = None,
) -> Memory:
    """Bytes of one rank at the peak of a training step, under expected routing unless `work` says what was routed.

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
    activations = activation_bytes(config, sequence_length, micro_batch_size, placement, work)
    # One process frees its gradients after a step; every other strategy has buckets or shards of them throughout.
    coming = strategy == "single" and placement.micro_batches == 1
    worst = activations.worst(None if coming else gradients)
    gradients = worst.gradients
    host = 0
    if placement.offload_optimizer or (placement.offload_parameters and strategy == "fsdp2"):
        host, optimizer = optimizer, 0
    if placement.offload_parameters:
        host, parameters = host + parameters, 0
        if strategy == "fsdp2":
            host, gradients = host + gradients, 0
    return Memory(parameters, gradients, optimizer, gathered, worst.kept, worst.working, host)


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
