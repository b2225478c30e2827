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
from typing import Literal, get_args

from .config import MoRConfig
from .sharing import applications, num_unique_layers, segments

Convention = Literal["exact", "paper", "palm", "six_n"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
Recompute = Literal["none", "block", "recursion", "selective"]
Number = int | Fraction


@dataclass(frozen=True)
class Pass:
    """One pass of tokens through consecutive layers: the unshared layers, or one recursion.

    layers: number of layers passed. queries: tokens that pass. keys: tokens whose keys and values are computed.
    pairs: causal (query, key) pairs of one attention layer. dense: queries times the keys that each could attend to.
    """

    layers: int
    queries: Number
    keys: Number
    pairs: Number
    dense: Number


@dataclass(frozen=True)
class Work:
    """What a batch makes a model execute. tokens: B * T. offered: tokens that routers score, summed over routers."""

    tokens: Number
    passes: tuple[Pass, ...]
    offered: Number


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
    """Share of the tokens in each recursion: 1 without routing, the given c_r, or (Nr - r + 1) / Nr.

    For token-choice this is the expectation under perfect balance.
    """
    depth = config.num_recursions
    if config.routing == "none":
        return [Fraction(1)] * depth
    if config.routing == "expert_choice" and config.capacity_factors is not None:
        return [Fraction(c).limit_denominator(10**6) for c in config.capacity_factors]
    return [Fraction(depth - r, depth) for r in range(depth)]


def work_of(
    config: MoRConfig, sequence_length: int, num_sequences: int, counts: Sequence[Number], pairs: Sequence[Number]
) -> Work:
    """The work of a batch whose recursion r processes counts[r] tokens and pairs[r] causal pairs, summed over B.

    Linear in (num_sequences, counts, pairs). `counts` and `pairs` are ignored where nothing is routed. With shared keys
    the first recursion computes every token, since deeper ones need all keys: counts[0] is B * T there.
    """
    tokens = num_sequences * sequence_length
    all_pairs = num_sequences * (sequence_length * (sequence_length + 1) // 2)
    unshared = Pass(unshared_layers(config), tokens, tokens, all_pairs, tokens * sequence_length)
    if config.num_recursions == 1:
        return Work(tokens, (unshared,), 0)
    if config.routing == "none":
        counts, pairs = [tokens] * config.num_recursions, [all_pairs] * config.num_recursions
    recursions = []
    for r, (queries, causal) in enumerate(zip(counts, pairs, strict=True)):
        if config.kv_strategy == "recursion_wise":
            keys, dense = queries, 2 * causal - queries  # the sum of n^2, from the sum of n(n + 1) / 2
        else:
            deeper = queries if config.kv_strategy == "shared_update" else 0
            keys, dense = deeper if r else tokens, queries * sequence_length
        recursions.append(Pass(recursion_layers(config), queries, keys, causal, dense))
    offered: Number = tokens
    if config.routing == "expert_choice":  # each router scores the tokens that the recursion before it selected
        own = config.kv_strategy == "recursion_wise"
        offered += counts[0] if own else num_sequences * _selected(config, 0, sequence_length)
        offered += sum(counts[1:-1])
    return Work(tokens, (unshared, *recursions), 0 if config.routing == "none" else offered)


def _selected(config: MoRConfig, recursion: int, sequence_length: int) -> int:
    """Tokens that expert-choice selects: max(1, floor(c_r T)) in floating point, as the model computes it."""
    assert config.capacity_factors is not None
    return max(1, int(config.capacity_factors[recursion] * sequence_length))


def expected_work(config: MoRConfig, sequence_length: int, num_sequences: int, *, whole: bool = True) -> Work:
    """The work of a batch under the configured capacities, or under perfect balance for token-choice.

    whole: take max(1, floor(c_r T)) tokens in each recursion, as expert-choice does; else exactly c_r T.
    """
    own = config.kv_strategy == "recursion_wise"
    counts: list[Number] = []
    pairs: list[Number] = []
    for r, capacity in enumerate(capacities(config)):
        n: Number = capacity * sequence_length
        if whole and config.routing == "expert_choice":
            n = _selected(config, r, sequence_length) if own or r else sequence_length
        attended = n + 1 if own else sequence_length + 1
        counts.append(num_sequences * n)
        pairs.append(num_sequences * n * Fraction(attended, 2))
    return work_of(config, sequence_length, num_sequences, counts, pairs)


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


def router_shapes(config: MoRConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the matrices of one router; empty where none is learned."""
    if config.routing == "none" or config.router == "random":
        return []
    h = config.hidden_size
    outputs = config.num_recursions if config.routing == "token_choice" else 1
    return [(h, outputs)] if config.router == "linear" else [(h, 2 * h), (2 * h, outputs)]


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
    for r, passed in enumerate(work.passes):
        for name, shape in projection_shapes(config).items():
            flops[name] += passed.layers * linear_flops(projection_tokens(name, passed), *shape)
        pairs = passed.dense if attention == "full" else passed.pairs
        flops["attention"] += passed.layers * attention_flops(config, pairs)
        if r > 0:  # deltas stand on shared layers only
            flops["relaxation"] += passed.layers * relaxation_flops(config, passed)
    router = sum((linear_flops(work.offered, *shape) for shape in router_shapes(config)), 0)
    flops["router"] = router
    flops["aux_router"] = router if config.routing == "expert_choice" and config.selection == "aux_router" else 0
    flops["head"] = linear_flops(work.tokens, config.hidden_size, config.vocab_size)
    return flops


def _router_learns(config: MoRConfig) -> bool:
    """Whether a gradient reaches the main router: through the gate, or through a loss on its scores."""
    trained = config.selection == "aux_loss" if config.routing == "expert_choice" else config.balancing == "loss"
    return config.gating == "weighted" or trained or config.z_loss_coefficient > 0


def backward_flops(config: MoRConfig, work: Work, forward: dict[str, Number]) -> dict[str, Number]:
    """Twice the forward FLOPs (gradients of both factors), but none towards the auxiliary router's detached input."""
    flops = {name: 2 * value for name, value in forward.items()}
    if forward["aux_router"]:
        flops["aux_router"] -= linear_flops(work.offered, *router_shapes(config)[0])
    if not _router_learns(config):
        flops["router"] = 0
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
    flops |= {name: value for name, value in forward.items() if name not in ("router", "aux_router", "head")}
    h, f = config.hidden_size, config.intermediate_size
    targeted = config.relaxation in ("lora", "dora") and "down_proj" in config.lora_targets
    for stretch in segments(config) if policy == "recursion" else [[use] for use in applications(config)]:
        last = stretch[-1]
        queries = work.passes[0 if last.recursion is None else last.recursion + 1].queries
        if last.recursion is None or not targeted:
            scaled = policy == "recursion" and config.relaxation == "recursion_encoding" and last.encoding is not None
            flops["down_proj"] -= 0 if scaled else linear_flops(queries, f, h)
        elif config.relaxation == "lora":
            flops["relaxation"] -= linear_flops(queries, delta_rank(config, (f, h)), h)
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
    `aux_router`, `head`. Forward and backward add up to `training_flops`; recomputation comes on top.
    attention: `full` counts all the keys that a dense kernel multiplies before its mask, as FlopCounterMode does.
    """
    forward = forward_flops(config, work, attention)
    backward = backward_flops(config, work, forward)
    again = recompute_flops(config, work, forward, recompute)
    return {name: Part(round(forward[name]), round(backward[name]), round(again[name])) for name in forward}


def measured_flops(step: Callable[[], object]) -> int:
    """FLOPs that torch counts while `step` runs, with attention on the MATH backend, the one that it counts in full.

    Comparable with `breakdown(..., attention="full")`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


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
    return 3 * (sum(forward.values()) - forward["attention"] - forward["head"])


def _palm(config: MoRConfig, work: Work) -> Number:
    forward = forward_flops(config, work, attention="full")
    return _six_n(config, work) + 3 * (forward["head"] + forward["attention"])


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
) -> int:
    """FLOPs of one training step on a batch of `num_sequences` sequences.

    counts, pairs: tokens and causal pairs of each recursion, summed over the batch (`RoutingRecord`); without them,
    those expected from the capacities. Raises ValueError for an unknown convention or counts of the wrong length.
    """
    total = _total(convention)
    if counts is None or pairs is None:
        if counts is not None or pairs is not None:
            raise ValueError("counts and pairs: give both or neither")
        return round(total(config, expected_work(config, sequence_length, num_sequences, whole=convention != "paper")))
    if config.routing != "none" and not len(counts) == len(pairs) == config.num_recursions:
        raise ValueError(f"counts, pairs: expected {config.num_recursions} numbers each, one per recursion")
    return round(total(config, work_of(config, sequence_length, num_sequences, counts, pairs)))


class StepFlops:
    """`training_flops` of actual routing, for a loop: the same integer by one dot product (microseconds).

    Every convention is linear in (num_sequences, counts, pairs), so its coefficients are its values on unit vectors.
    """

    def __init__(self, config: MoRConfig, sequence_length: int, convention: str = "exact") -> None:
        total, depth = _total(convention), config.num_recursions
        units = [[int(i == j) for j in range(2 * depth + 1)] for i in range(2 * depth + 1)]
        works = [work_of(config, sequence_length, u[0], u[1 : depth + 1], u[depth + 1 :]) for u in units]
        values = [int(total(config, work)) for work in works]
        self._sequence, self._count, self._pair = values[0], values[1 : depth + 1], values[depth + 1 :]
        self._recursions = 0 if config.routing == "none" else depth

    def __call__(self, num_sequences: int, counts: Sequence[int] = (), pairs: Sequence[int] = ()) -> int:
        """FLOPs of a step; `counts` and `pairs` [Nr] summed over its batch, left out where nothing is routed."""
        if self._recursions and not len(counts) == len(pairs) == self._recursions:
            raise ValueError(f"counts, pairs: expected {self._recursions} numbers each, one per recursion")
        flops = self._sequence * num_sequences
        for coefficient, count in zip(self._count, counts):
            flops += coefficient * count
        for coefficient, pair in zip(self._pair, pairs):
            flops += coefficient * pair
        return flops


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

    By the `exact` convention. A token reaches recursion r with probability c_r and finds c_r of the context there, or
    all of it under shared keys.
    """
    keys = Fraction(context_length)
    passes = [Pass(unshared_layers(config), 1, 1, keys, keys)]
    for r, share in enumerate(capacities(config) if config.num_recursions > 1 else []):
        own = config.kv_strategy == "recursion_wise"
        attended = share * keys * (share if own else 1)
        computed = share if own or config.kv_strategy == "shared_update" else Fraction(r == 0)
        passes.append(Pass(recursion_layers(config), share, computed, attended, attended))
    offered: Number = 1 if config.routing != "none" else 0
    if config.routing == "expert_choice":
        offered += sum(capacities(config)[:-1])
    return float(sum(forward_flops(config, Work(1, tuple(passes), offered)).values()))


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
    """Of all routers: one per recursion for expert-choice (two with an auxiliary one), one for token-choice."""
    one = sum(inputs * outputs for inputs, outputs in router_shapes(config))
    if config.routing != "expert_choice":
        return one
    return one * config.num_recursions * (2 if config.selection == "aux_router" else 1)


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
