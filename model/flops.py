"""FLOPs of training and inference, from the configuration and, for routed models, from the routing that happened.

A multiply-add is two FLOPs. Matrix products are counted; norms, rotary embeddings, softmax, activations, gates and the
embedding look-up are not. Four conventions, and every number must be shown with the name of its own:

exact  forward and backward of every product that is executed: grouped keys and values as they are, routers and head
       included, attention as causal work (a query at position t covers t + 1 keys; document boundaries ignored).
       Recomputation under gradient checkpointing is reported by `breakdown` and is in no total.
paper  forward only, per token and layer 2(4h^2 + 3hf) + 2hn with n the tokens attended to: as many key and value heads
       as query heads, half of the attention, no router, no head. Recovered from the step counts of Bae et al.,
       arXiv 2507.10524, and its Table 9.
palm   6N + 12LhT: N counts the layers' and the head's matrix parameters once for each time that a token passes them;
       attention is not halved. Chowdhery et al., arXiv 2204.02311, appendix B.
six_n  6N without the head and without attention. Kaplan et al., arXiv 2001.08361, section 2.1.

Legend: B sequences, T tokens of a sequence, h hidden size, f intermediate size, H query heads, G key/value heads,
d head size, V vocabulary, L effective depth, Nr recursions, D layers of one recursion, n tokens in a recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from .config import MoRConfig
from .depth import method_of, stages_of
from .depth.layout import Stage
from .sharing import applications, num_unique_layers

Convention = Literal["exact", "paper", "palm", "six_n"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
Recompute = Literal["none", "block", "recursion", "selective"]
Number = int | Fraction


@dataclass(frozen=True)
class Pass:
    """Tokens that pass the layers of one stage.

    queries: tokens that pass. keys: tokens whose keys and values are computed, mean over the layers. pairs: causal
    (query, key) pairs of one attention layer. dense: queries times the keys that each could attend to.
    """

    stage: Stage
    queries: Number
    keys: Number
    pairs: Number
    dense: Number

    @property
    def layers(self) -> int:
        return len(self.stage.uses)

    @property
    def shared_layers(self) -> int:
        """Those of a shared block, on which deltas stand."""
        return sum(use.recursion is not None for use in self.stage.uses)


@dataclass(frozen=True)
class Work:
    """What a batch makes a model execute. tokens: B * T. offered: tokens that each gate scores, [G]. heads: tokens read
    out before the end."""

    tokens: Number
    passes: tuple[Pass, ...]
    offered: tuple[Number, ...]
    heads: Number = 0


@dataclass(frozen=True)
class Part:
    """FLOPs of one component in the forward pass, in the backward pass, and in the backward pass's recomputation."""

    forward: int
    backward: int
    recompute: int = 0


# --- what is executed -------------------------------------------------------------------------------------------


def unshared_layers(config: MoRConfig) -> int:
    """Layers outside the recursions: all L of a vanilla model, 2 under the `middle_` sharings, else 0."""
    return sum(use.recursion is None for use in applications(config))


def recursion_layers(config: MoRConfig) -> int:
    """D, the layers of one recursion (0 for a vanilla model)."""
    return (config.num_hidden_layers - unshared_layers(config)) // config.num_recursions


def capacities(config: MoRConfig) -> list[Fraction]:
    """Expected share of the tokens at each gate; where nothing is routed, 1 for each recursion."""
    return method_of(config).shares(config) or [Fraction(1)] * config.num_recursions


def work_of(
    config: MoRConfig,
    sequence_length: int,
    num_sequences: int,
    counts: Sequence[Number],
    pairs: Sequence[Number],
    offered: Sequence[Number] | None = None,
    heads: Number | None = None,
) -> Work:
    """The work of a batch that passes counts[g] tokens and pairs[g] causal pairs through the stage of gate g.

    All summed over B; a stage that is computed for every token counts B * T of them. offered: tokens that each gate
    scores; None: those that follow from the counts. heads: tokens read out early; None: as expected in training. Linear
    in all of these and in num_sequences. `counts` and `pairs` are ignored where nothing is routed.
    """
    method, tokens = method_of(config), num_sequences * sequence_length
    all_pairs = num_sequences * (sequence_length * (sequence_length + 1) // 2)
    passes = []
    for stage in method.stages(config):
        queries, causal = (tokens, all_pairs) if stage.gate is None else (counts[stage.gate], pairs[stage.gate])
        of_use: dict[str, Number] = {"everyone": tokens, "entered": queries, "none": 0}
        keys = sum(of_use[use.keys] for use in stage.uses) * Fraction(1, len(stage.uses))
        # Without the others' keys: the sum of n^2, from the sum of n(n + 1) / 2.
        dense = queries * sequence_length if stage.sees_all else 2 * causal - queries
        passes.append(Pass(stage, queries, keys, causal, dense))
    if offered is None:
        offered = _offered(config, sequence_length, num_sequences, counts)
    return Work(tokens, tuple(passes), tuple(offered), method.heads(config, tokens) if heads is None else heads)


def _offered(config: MoRConfig, length: int, num_sequences: int, counts: Sequence[Number]) -> list[Number]:
    """Tokens that each gate scores, from those that the gate before let in."""
    method = method_of(config)
    scored = method.scored(config, num_sequences * length)
    if scored is not None:
        return scored
    gated = sorted((s for s in method.stages(config) if s.gate is not None), key=lambda stage: stage.gate or 0)
    if not gated or not method.nested:
        return [num_sequences * length for _ in gated]
    # A stage that is computed for every token tells nothing of how many were let in.
    let_in = [
        num_sequences * method.selected(config, g, length) if stage.whole else counts[g]
        for g, stage in enumerate(gated[:-1])
    ]
    return [num_sequences * length, *let_in]


def expected_work(config: MoRConfig, sequence_length: int, num_sequences: int, *, whole: bool = True) -> Work:
    """The work of a batch under the configured capacities, or under perfect balance for token-choice.

    whole: take max(1, floor(c_r T)) tokens at each gate, as expert-choice does; else exactly c_r T.
    """
    method, shares = method_of(config), method_of(config).shares(config)
    entered: list[Number] = [method.selected(config, g, sequence_length) for g in range(len(shares))]
    tokens = [c * sequence_length for c in shares]
    return routed_work(config, sequence_length, num_sequences, entered if whole else tokens, training=True)


def entered_of(config: MoRConfig, depth_shares: Sequence[float], sequence_length: int) -> list[float]:
    """Tokens of a sequence behind each gate, from the shares of tokens by the number of gates that they passed."""
    gates = range(gates_of(config))
    if not method_of(config).nested:  # which of the gates it was, the number does not say
        return [sequence_length * sum(d * share for d, share in enumerate(depth_shares)) / len(gates)] * len(gates)
    return [sequence_length * sum(depth_shares[gate + 1 :]) for gate in gates]


def routed_work(
    config: MoRConfig,
    sequence_length: int,
    num_sequences: int,
    entered: Sequence[Number | float],
    *,
    training: bool = False,
) -> Work:
    """The work of a batch in which each sequence lets `entered[g]` tokens in at gate g; keys and pairs follow.

    training: where that differs, as a training step reads out and scores tokens; else as an evaluation does.
    """
    counts: list[Any] = [0] * len(entered)
    pairs: list[Any] = [0] * len(entered)
    for stage in stages_of(config):
        if stage.gate is not None:
            n: Any = sequence_length if stage.whole else entered[stage.gate]
            attended = sequence_length if stage.sees_all else n
            counts[stage.gate] = num_sequences * n
            pairs[stage.gate] = num_sequences * n * (attended + 1) * Fraction(1, 2)
    before: list[Any] = [sequence_length] * len(entered)
    if method_of(config).nested:
        before[1:] = entered[:-1]
    offered: Any = [num_sequences * n for n in before]
    if training:
        scored = method_of(config).scored(config, num_sequences * sequence_length)
        return work_of(config, sequence_length, num_sequences, counts, pairs, scored or offered)
    heads = method_of(config).checks(config, offered)
    return work_of(config, sequence_length, num_sequences, counts, pairs, offered, heads)


# --- the equations, one per kind of module ------------------------------------------------------------------------


def linear_flops(tokens: Number, inputs: int, outputs: int) -> Number:
    """Forward FLOPs of a matrix [inputs, outputs] applied to `tokens` rows; the backward pass takes twice as many."""
    return 2 * tokens * inputs * outputs


def attention_widths(config: MoRConfig) -> tuple[int, int]:
    """(H * d, G * d): widths of the queries and of the keys (and values) of one token."""
    d = config.head_dim or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * d, (config.num_key_value_heads or config.num_attention_heads) * d


def attention_flops(config: MoRConfig, pairs: Number) -> Number:
    """Scores and weighted values of one layer: 2 * 2d per (query, key) pair and query head. Backward: twice."""
    return 4 * attention_widths(config)[0] * pairs


def projection_shapes(config: MoRConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every matrix in one layer, by the module's name."""
    h, f = config.hidden_size, config.intermediate_size
    q, kv = attention_widths(config)
    attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
    return attention | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}


def projection_tokens(name: str, passed: Pass) -> Number:
    """Tokens that the projection `name` processes in one layer of a pass."""
    return passed.keys if name in ("k_proj", "v_proj") else passed.queries


def delta_rank(config: MoRConfig, shape: tuple[int, int]) -> int:
    """Rank of a low-rank delta on a matrix of this shape."""
    return min(config.lora_rank, *shape)


def relaxation_flops(config: MoRConfig, passed: Pass) -> Number:
    """Low-rank deltas of one layer: 2 * rank * (inputs + outputs) per token and target. Backward: twice.

    DoRA's norm of W + BA costs the same whatever the batch, once per forward pass: `dora_norm_flops`, in no total.
    """
    if config.relaxation not in ("lora", "dora"):
        return 0
    total: Number = 0
    for name in config.lora_targets:
        shape, tokens = projection_shapes(config)[name], projection_tokens(name, passed)
        total += linear_flops(tokens, delta_rank(config, shape), sum(shape))
        if (
            config.relaxation == "dora" and config.lora_dropout > 0
        ):  # the dropped input passes the shared matrix as well
            total += linear_flops(tokens, *shape)
    return total


def dora_norm_flops(config: MoRConfig) -> int:
    """B @ A of every shared layer and recursion, for DoRA's norm; once per forward pass, no backward pass."""
    if config.relaxation != "dora":
        return 0
    shapes = [projection_shapes(config)[name] for name in config.lora_targets]
    one_layer = sum(2 * inputs * delta_rank(config, (inputs, outputs)) * outputs for inputs, outputs in shapes)
    return config.num_recursions * recursion_layers(config) * one_layer


# --- conventions ----------------------------------------------------------------------------------------------------


def forward_flops(config: MoRConfig, work: Work, attention: Literal["causal", "full"] = "causal") -> dict[str, Number]:
    """Forward FLOPs of each component. attention: `full` counts every key that a query could attend to (dense)."""
    flops: dict[str, Number] = dict.fromkeys([*projection_shapes(config), "attention", "relaxation"], 0)
    for passed in work.passes:
        for name, shape in projection_shapes(config).items():
            flops[name] += passed.layers * linear_flops(projection_tokens(name, passed), *shape)
        pairs = passed.dense if attention == "full" else passed.pairs
        flops["attention"] += passed.layers * attention_flops(config, pairs)
        flops["relaxation"] += passed.shared_layers * relaxation_flops(config, passed)
    flops |= {"router": 0, "aux_router": 0}
    for scorer in method_of(config).scorers(config):
        scored = sum(linear_flops(work.offered[scorer.gate], *shape) for shape in scorer.shapes)
        flops[scorer.name] = flops.get(scorer.name, 0) + scored
    flops["head"] = linear_flops(work.tokens, config.hidden_size, config.vocab_size)
    flops["exit_heads"] = linear_flops(work.heads, config.hidden_size, config.vocab_size)
    return flops


def backward_flops(config: MoRConfig, work: Work, forward: dict[str, Number]) -> dict[str, Number]:
    """Twice the forward FLOPs (gradients of both factors), but none towards what a scorer's gradient does not reach."""
    flops = {name: 2 * value for name, value in forward.items()}
    for scorer in method_of(config).scorers(config):
        offered = work.offered[scorer.gate]
        if not scorer.to_weights:
            flops[scorer.name] -= 2 * sum(linear_flops(offered, *shape) for shape in scorer.shapes)
        elif not scorer.to_input:
            flops[scorer.name] -= linear_flops(offered, *scorer.shapes[0])
    return flops


def recompute_flops(config: MoRConfig, work: Work, forward: dict[str, Number], policy: Recompute) -> dict[str, Number]:
    """What the backward pass computes again under a policy of gradient checkpointing.

    `selective` keeps every product. `block` and `recursion` run the layers again, but for the product that ends each
    recomputed stretch (a layer, or a recursion), whose result no gradient needs unless DoRA, or within a recursion an
    encoding, scales it. What fused attention kernels recompute inside, and DoRA's norm, are not counted.
    """
    flops: dict[str, Number] = dict.fromkeys(forward, 0)
    if policy not in ("block", "recursion"):
        return flops
    scorers = {scorer.name for scorer in method_of(config).scorers(config)}
    flops |= {name: value for name, value in forward.items() if name not in {*scorers, "head", "exit_heads"}}
    h, f = config.hidden_size, config.intermediate_size
    targeted = config.relaxation in ("lora", "dora") and "down_proj" in config.lora_targets
    stretches = (
        (p, use)
        for p in work.passes
        for use in (p.stage.uses[-1:] if policy == "recursion" and p.stage.shared else p.stage.uses)
    )
    for passed, last in stretches:
        if last.recursion is None or not targeted:
            scaled = policy == "recursion" and config.relaxation == "recursion_encoding" and last.encoding is not None
            flops["down_proj"] -= 0 if scaled else linear_flops(passed.queries, f, h)
        elif config.relaxation == "lora":
            flops["relaxation"] -= linear_flops(passed.queries, delta_rank(config, (f, h)), h)
    return flops


def breakdown(
    config: MoRConfig,
    work: Work,
    *,
    attention: Literal["causal", "full"] = "causal",
    recompute: Recompute = "none",
) -> dict[str, Part]:
    """FLOPs of a training step per component, from `expected_work` or `work_of`; by the `exact` convention.

    Components: the seven projections by their names, `attention` (scores and weighted values), `relaxation`, `router`,
    `aux_router`, `head`, `exit_heads` (tokens read out early). Forward and backward add up to `training_flops`;
    recomputation comes on top.
    attention: `full` counts all the keys that a dense kernel multiplies before its mask, as FlopCounterMode does.
    """
    forward = forward_flops(config, work, attention)
    backward = backward_flops(config, work, forward)
    again = recompute_flops(config, work, forward, recompute)
    return {name: Part(round(forward[name]), round(backward[name]), round(again[name])) for name in forward}


def measured_flops(step: Callable[[], object]) -> int:
    """FLOPs that torch counts while `step` runs, with attention on the MATH backend, the one that it counts in full.

    Comparable with `breakdown(..., attention="full")`. The table of rotary angles is left out: it is positions times
    frequencies, which transformers 5.17 writes as a product of matrices, counted, and 5.23 element by element, not.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    tables = [
        ops for name, ops in counter.get_flop_counts().items() if name.endswith((".rotary_emb", "RotaryEmbedding"))
    ]
    return counter.get_total_flops() - sum(sum(ops.values()) for ops in tables)


def _exact(config: MoRConfig, work: Work) -> Number:
    forward = forward_flops(config, work)
    return sum(forward.values()) + sum(backward_flops(config, work, forward).values())


def _paper(config: MoRConfig, work: Work) -> Number:
    h, f = config.hidden_size, config.intermediate_size
    return sum(
        p.layers * (2 * (2 * h * h + 3 * h * f) * p.queries + 4 * h * h * p.keys + 2 * h * p.dense) for p in work.passes
    )


def _six_n(config: MoRConfig, work: Work) -> Number:
    forward = forward_flops(config, work)
    return 3 * (sum(forward.values()) - forward["attention"] - _heads(forward))


def _palm(config: MoRConfig, work: Work) -> Number:
    forward = forward_flops(config, work, attention="full")
    return _six_n(config, work) + 3 * (_heads(forward) + forward["attention"])


def _heads(forward: dict[str, Number]) -> Number:
    return forward["head"] + forward["exit_heads"]


_TOTALS: dict[str, Callable[[MoRConfig, Work], Number]] = {
    "exact": _exact,
    "paper": _paper,
    "palm": _palm,
    "six_n": _six_n,
}


def _total(convention: str) -> Callable[[MoRConfig, Work], Number]:
    if convention not in _TOTALS:
        raise ValueError(f"convention: {convention!r} is unknown; choose from {', '.join(CONVENTIONS)}")
    return _TOTALS[convention]


# --- what others call -----------------------------------------------------------------------------------------------


def training_flops(
    config: MoRConfig,
    sequence_length: int,
    num_sequences: int,
    counts: Sequence[int] | None = None,
    pairs: Sequence[int] | None = None,
    convention: str = "exact",
    offered: Sequence[int] | None = None,
    heads: int | None = None,
) -> int:
    """FLOPs of one training step on a batch of `num_sequences` sequences.

    counts, pairs, offered: of each gate, summed over the batch (`RoutingRecord`), and heads; without them, those
    expected from the capacities. Raises ValueError for an unknown convention or counts of the wrong length.
    """
    total = _total(convention)
    if counts is None or pairs is None:
        if counts is not None or pairs is not None:
            raise ValueError("counts and pairs: give both or neither")
        return round(total(config, expected_work(config, sequence_length, num_sequences, whole=convention != "paper")))
    _check_counts(gates_of(config), counts, pairs)
    return round(total(config, work_of(config, sequence_length, num_sequences, counts, pairs, offered, heads)))


def gates_of(config: MoRConfig) -> int:
    """G, the number of gates; 0 where nothing is routed."""
    return len(method_of(config).shares(config))


def _check_counts(gates: int, counts: Sequence[int], pairs: Sequence[int]) -> None:
    if gates and not len(counts) == len(pairs) == gates:
        raise ValueError(f"counts, pairs: expected {gates} numbers each, one per gate")


class StepFlops:
    """`training_flops` of actual routing, for a loop: the same integer by one dot product (microseconds).

    Every convention is linear in what `work_of` takes, so its coefficients are its values on unit vectors.
    """

    def __init__(self, config: MoRConfig, sequence_length: int, convention: str = "exact") -> None:
        total, gates = _total(convention), gates_of(config)
        self._config, self._length, self._gates = config, sequence_length, gates
        size = 2 + 3 * gates
        units = [[int(i == j) for j in range(size)] for i in range(size)]
        counts, pairs, offered = (slice(1 + i * gates, 1 + (i + 1) * gates) for i in range(3))
        works = [
            work_of(config, sequence_length, unit[0], unit[counts], unit[pairs], unit[offered], unit[-1])
            for unit in units
        ]
        self._coefficients = [int(total(config, work)) for work in works]

    def __call__(
        self,
        num_sequences: int,
        counts: Sequence[int] = (),
        pairs: Sequence[int] = (),
        offered: Sequence[int] | None = None,
        heads: int | None = None,
    ) -> int:
        """FLOPs of a step; `counts`, `pairs`, `offered` [G] and `heads`, summed over its batch; left out where nothing
        is routed."""
        _check_counts(self._gates, counts, pairs)
        if offered is None:
            offered = [int(n) for n in _offered(self._config, self._length, num_sequences, counts)]
        values = [num_sequences]
        if self._gates:
            values += [*counts, *pairs, *offered]
        tokens = num_sequences * self._length
        values.append(int(method_of(self._config).heads(self._config, tokens)) if heads is None else heads)
        return sum(coefficient * value for coefficient, value in zip(self._coefficients, values, strict=True))


def flops_per_token(
    config: MoRConfig, sequence_length: int, convention: str = "exact", part: Literal["train", "forward"] = "train"
) -> float:
    """Expected FLOPs per token of a sequence; `paper` has no backward pass, so that both parts are the same."""
    work = expected_work(config, sequence_length, 1, whole=convention != "paper")
    total = _total(convention)(config, work)
    if part == "forward" and convention == "exact":
        total = sum(forward_flops(config, work).values())
    elif part == "forward" and convention != "paper":
        total = Fraction(total) / 3
    return float(Fraction(total) / sequence_length)


def decode_flops(config: MoRConfig, context_length: int) -> float:
    """Expected forward FLOPs of one new token that finds `context_length` tokens in the cache, itself included.

    By the `exact` convention. A token reaches the stage of a gate with the share c that it lets in, and finds c of the
    context there, or all of it where keys are of everyone.
    """
    method, shares, keys = method_of(config), method_of(config).shares(config), Fraction(context_length)
    passes = []
    for stage in method.stages(config):
        share = Fraction(1) if stage.gate is None or stage.whole else shares[stage.gate]
        attended = share * keys * (1 if stage.sees_all else share)
        of_use = {"everyone": Fraction(1), "entered": share, "none": Fraction(0)}
        computed = sum((of_use[use.keys] for use in stage.uses), Fraction(0)) / len(stage.uses)
        passes.append(Pass(stage, share, computed, attended, attended))
    offered = [Fraction(1), *shares[:-1]] if method.nested else [Fraction(1)] * len(shares)
    heads = method.checks(config, offered)
    return float(sum(forward_flops(config, Work(1, tuple(passes), tuple(offered), heads)).values()))


@dataclass(frozen=True)
class ExitCost:
    """Forward FLOPs of one token at an exit, by the `exact` convention, at the mean context of a sequence.

    layer: layers passed there. check: of asking how sure the model is, also in `layers` of the model. saved: what a
    token does not take any more that leaves there; its keys above are still made. pays_from: share of the tokens asked
    that must leave for the check to pay; None where it cannot.
    """

    layer: int
    check: float
    layers: float
    saved: float
    pays_from: float | None


def exit_costs(config: MoRConfig, sequence_length: int) -> list[ExitCost]:
    """What each exit costs and saves outside training; empty for models without exits."""
    method = method_of(config)
    if "full" not in method.modes(config):
        return []
    gates, context = gates_of(config), Fraction(sequence_length + 1, 2)

    def cost(stages: Sequence[Stage], queries: int, asked: int | None = None) -> Number:
        passes = tuple(Pass(stage, queries, 1, queries * context, queries * context) for stage in stages)
        offered = tuple(int(gate == asked) for gate in range(gates))
        return sum(forward_flops(config, Work(0, passes, offered, method.checks(config, offered))).values())

    stages, found = method.stages(config), []
    layer_cost = Fraction(cost(stages, 1), config.num_hidden_layers)
    for gate in range(gates):
        below, above = stages[: gate + 1], stages[gate + 1 :]
        check, saved = cost((), 0, gate), cost(above, 1) - cost(above, 0)
        share = float(check / saved)
        layers = sum(len(stage.uses) for stage in below)
        found.append(
            ExitCost(layers, float(check), float(check / layer_cost), float(saved), share if share <= 1 else None)
        )
    return found


# --- parameters -----------------------------------------------------------------------------------------------------


def layer_parameters(config: MoRConfig, *, norms: bool = True) -> int:
    """Parameters of one layer: seven matrices, their biases where configured, and two RMSNorms."""
    shapes = projection_shapes(config)
    total = sum(inputs * outputs for inputs, outputs in shapes.values())
    for name, (_, outputs) in shapes.items():
        total += outputs * bool(config.attention_bias if name[0] in "qkvo" else config.mlp_bias)
    return total + 2 * config.hidden_size * norms


def relaxation_parameters(config: MoRConfig) -> int:
    """Low-rank deltas, with DoRA's magnitudes, of every shared layer and recursion; or the recursion encodings."""
    if config.relaxation == "recursion_encoding":
        return config.hidden_size * sum(use.encoding is not None for use in applications(config))
    if config.relaxation == "none":
        return 0
    per_layer = 0
    for name in config.lora_targets:
        inputs, outputs = projection_shapes(config)[name]
        per_layer += delta_rank(config, (inputs, outputs)) * (inputs + outputs)
        per_layer += outputs if config.relaxation == "dora" else 0
    return config.num_recursions * recursion_layers(config) * per_layer


def router_parameters(config: MoRConfig) -> int:
    """Of everything that belongs to the method: what scores tokens, and what else it learns."""
    method = method_of(config)
    return sum(scorer.parameters for scorer in method.scorers(config)) + method.other_parameters(config)


def _parameters(config: MoRConfig, layers: int, norm_layers: int, embeddings: bool) -> int:
    total = layers * layer_parameters(config, norms=False) + (2 * norm_layers + 1) * config.hidden_size
    total += relaxation_parameters(config) + router_parameters(config)
    if embeddings:
        total += config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return total


def unique_parameters(config: MoRConfig, *, embeddings: bool = True) -> int:
    """Parameters that the model holds, each counted once, as `sum(p.numel() for p in model.parameters())`.

    embeddings: False leaves out the embedding table and the head, as the paper's tables do.
    """
    layers = num_unique_layers(config)
    return _parameters(config, layers, layers if config.share_norms else config.num_hidden_layers, embeddings)


def effective_parameters(config: MoRConfig, *, embeddings: bool = True) -> int:
    """As `unique_parameters`, but a layer counts once for each time that a token of full depth passes it."""
    return _parameters(config, config.num_hidden_layers, config.num_hidden_layers, embeddings)
