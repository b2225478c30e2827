"""`MoRConfig`: one configuration class for vanilla Llama, recursive Transformers and Mixture-of-Recursions.

Names follow the paper (arXiv 2507.10524). Which architecture a configuration describes is read off two fields,
`num_recursions` and `routing`, and spelled out by the property `architecture`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from .depth import METHODS, method_of

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
Routing = Literal["none", "expert_choice", "token_choice", "mixture_of_depths", "universal", "early_exit"]
KVStrategy = Literal["recursion_wise", "shared", "shared_update"]
RoutingMode = Literal["causal", "topk", "full"]
ARCHITECTURES = ("vanilla", "recursive", "mor_expert", "mor_token", "mod", "ut", "early_exit")
# What configurations hold, though nothing reads it, that were resolved without routing.
UNUSED = {"router_activation": "sigmoid", "router_alpha": 0.1}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@strict
class MoRConfig(LlamaConfig):
    """Everything of `LlamaConfig`, and the fields below.

    `num_hidden_layers` is the effective depth L: the number of layers that a token of full depth passes.

    num_recursions: Nr, how often the shared block is applied; 1 is a vanilla Llama.
    sharing: map from depth to unique layer (Table 1); the `middle_` maps keep the first and the last layer unshared.
    share_norms: whether shared layers share their RMSNorm weights too; False gives each depth its own.
    kv_strategy: `recursion_wise` (a token attends to the tokens of its recursion), `shared` (keys and values of the
        first recursion serve every deeper one), `shared_update` (as shared, but a token that enters a deeper recursion
        replaces its keys and values).
    routing: `expert_choice` (each recursion picks its top-k tokens, section 2.2.1), `token_choice` (each token picks
        its depth once, section 2.2.1), `mixture_of_depths` (untied layers, some of which pick their top-k tokens, arXiv
        2404.02258), `universal` (a token halts when its halting probabilities add up, arXiv 1807.03819), `early_exit`
        (a token leaves when the model is sure of it, arXiv 2207.07061 and 2404.16710) or `none`. A field that means nothing for the chosen one is refused, unless it has its default value.
    router: `linear`, `mlp` and `wide_mlp` score a token from its hidden state; `random` is the control without one.
    router_activation: sigmoid, tanh or none for expert_choice; softmax or sigmoid for token_choice; sigmoid or none
        (the raw score) for mixture_of_depths.
    router_alpha: scale of the gate; None takes 0.1 for expert_choice and 1.0 otherwise.
    router_temperature: divides the router's input, which for a linear router is to divide its logits.
    gating: `weighted` (h + g * block(h)) or `additive` (h + block(h)).
    selection: how expert-choice decides without looking ahead: `aux_loss` (the router's own score, trained by BCE),
        `aux_router` (a second router, trained on detached states), `predictor` (mixture_of_depths: the same, a small
        MLP), `none` (no causal decision can be made).
    selection_coefficient: weight of that BCE in the loss. Auxiliary router and predictor train apart from the model.
    capacity_factors: c_1 .. c_Nr, the share of the sequence that recursion r takes; None is (Nr - r + 1) / Nr.
    routed_every: mixture_of_depths: each so many-th layer is routed, the others take every token.
    routed_capacity: mixture_of_depths: share of the sequence that a routed layer takes.
    residual: mixture_of_depths: the gate multiplies what a layer changes (`delta`: x + g (layer(x) - x)) or what it
        gives (`block`: x + g layer(x)).
    capacity_warmup_steps: optimizer steps over which every capacity falls from 1 to its value (cosine).
    balancing: token-choice: `loss`, `loss_free` (a bias on the choice, never on the gate) or `none`.
    balancing_coefficient: weight of the balancing loss.
    bias_update_rate: u of the loss-free update b <- b + u * sign(mean load - load).
    balancing_warmup_steps: optimizer steps during which every token takes the full depth.
    act_combine: universal: the output is the mean of a token's states (`accumulated`), folded as published (`basic`),
        or the mean with the states of halted tokens kept, which alone saves FLOPs (`frozen`). num_recursions limits the
        steps.
    act_epsilon: universal: a token halts when its probabilities add up to more than 1 - epsilon.
    act_bias: universal: bias of the halting unit at the start of training.
    ponder_coefficient: universal: weight of the ponder loss, the mean of steps and remainder.
    exit_layers: early_exit: layers after which tokens may leave; None is after every one. Recursions end in exits of
        their own.
    exit_measure: early_exit: confidence of a token at an exit: `softmax` (gap of its two best probabilities), `state`
        (cosine of its states at this exit and the one before), `classifier` (a probability, fitted once the model is
        trained); or what must have become small since the exit before, for loops (arXiv 2502.05171): `kl`, `min_p_kl`,
        `entropy` (of the predictions), `latent` (relative change of the state).
    exit_threshold: early_exit: a token leaves where its confidence reaches this, or a change falls below it.
    exit_first: early_exit: no token leaves before it has passed this many layers.
    exit_decay: early_exit: thresholds that fall along the output: as in the paper (`paper`: 0.9 lambda + 0.1 exp(-rate
        t / N), clipped) or its code (`t5x`: lambda (0.9 + 0.1 exp(-rate t / N))); `none` keeps lambda.
    exit_decay_rate, exit_decay_length: early_exit: that rate, and N, the longest output.
    exit_weights: early_exit: weight of the loss after layer i: `linear` (i), `equal`, `double` (2^(i - 1)), `sum` (1 + 2
        + .. + i - 1), `enabled_sum` (sum of the layers up to i whose exits learn), `sqrt`, `inverse`; they add up to 1.
    exit_scale: early_exit: multiplies these weights, but for the last layer's.
    exit_rotation: early_exit: each so many-th exit learns in a step, the next ones in the step after; 1 is all of them.
    layer_dropout: early_exit: probability that a sequence skips the last layer in training, p; layer l of L, from 0, is
        skipped with p (2^(l / (L - 1)) - 1).
    layer_dropout_steps: early_exit: optimizer steps over which p grows from 0 by the same curve; 0: from the start.
    z_loss_coefficient: weight of the router z-loss; 0 leaves it out.
    routing_mode: at evaluation and generation, `causal` (no look-ahead), `topk` (the paper's; sees all of the text) or
        `full` (early_exit: nobody leaves).
    relaxation: `lora`, `dora` (per-depth low-rank deltas on shared weights), `recursion_encoding` (a vector per
        recursion that scales the block's output) or `none`.
    lora_rank, lora_alpha, lora_dropout, lora_targets: of `lora` and `dora`; the delta is scaled by alpha / rank.
    """

    model_type = "mor"
    # What the outputs hold beside tensors: the Trainer's `evaluate` and `predict` leave it out.
    keys_to_ignore_at_inference = ["past_key_values", "losses", "routing"]  # noqa: RUF012
    # Llama's plans name its modules and what goes between them; none was made for shared layers and routed tokens.
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]

    vocab_size: int = 49152
    hidden_size: int = 960
    intermediate_size: int = 2560
    num_hidden_layers: int = 32
    num_attention_heads: int = 15
    num_key_value_heads: int | None = 5
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    num_recursions: int = 1
    sharing: Sharing = "middle_cycle"
    share_norms: bool = True
    kv_strategy: KVStrategy = "recursion_wise"
    routing: Routing = "none"
    router: Literal["linear", "mlp", "wide_mlp", "random"] = "linear"
    router_activation: Literal["sigmoid", "tanh", "softmax", "none"] | None = None
    router_alpha: float | None = None
    router_temperature: float = 1.0
    gating: Literal["weighted", "additive"] = "weighted"
    selection: Literal["aux_loss", "aux_router", "predictor", "none"] = "aux_loss"
    selection_coefficient: float = 0.001
    capacity_factors: list[float] | tuple[float, ...] | None = None
    routed_every: int = 2
    routed_capacity: float = 0.125
    residual: Literal["delta", "block"] = "delta"
    capacity_warmup_steps: int = 0
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balancing_coefficient: float = 0.1
    bias_update_rate: float = 0.001
    balancing_warmup_steps: int = 0
    act_combine: Literal["accumulated", "basic", "frozen"] = "accumulated"
    act_epsilon: float = 0.01
    act_bias: float = 1.0
    ponder_coefficient: float = 0.01
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_measure: Literal["softmax", "state", "classifier", "kl", "min_p_kl", "entropy", "latent"] = "softmax"
    exit_threshold: float = 0.9
    exit_first: int = 1
    exit_decay: Literal["none", "paper", "t5x"] = "none"
    exit_decay_rate: float = 4.0
    exit_decay_length: int = 0
    exit_weights: Literal["linear", "equal", "double", "sum", "enabled_sum", "sqrt", "inverse"] = "linear"
    exit_scale: float = 1.0
    exit_rotation: int = 1
    layer_dropout: float = 0.0
    layer_dropout_steps: int = 0
    z_loss_coefficient: float = 0.0
    routing_mode: RoutingMode = "causal"
    relaxation: Literal["none", "lora", "dora", "recursion_encoding"] = "none"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self, **kwargs):
        for name, value in method_of(self).resolved(self).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Refuse configurations that no model can be built from: ValueError with the field and a value that works."""
        self._validate_heads()
        self._validate_depth()
        self._validate_strategy()
        self._validate_meaning()
        method_of(self).check(self)
        if self.relaxation in ("lora", "dora"):
            self._validate_lora()

    def _validate_heads(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                f"use {_nearest_divisor(self.hidden_size, self.num_attention_heads)}"
            )
        kv_heads, head_dim = self.num_key_value_heads or 0, self.head_dim or 0
        if kv_heads < 1 or self.num_attention_heads % kv_heads:
            works = _nearest_divisor(self.num_attention_heads, kv_heads)
            raise ValueError(
                f"num_key_value_heads: {kv_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; use {works}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim: rotary positions need an even number, got {head_dim}; use {head_dim + 1}")

    def _validate_depth(self):
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions: must be at least 1, got {self.num_recursions}")
        unshared = 2 if self.sharing.startswith("middle_") else 0
        shared = self.num_hidden_layers - unshared
        if self.num_recursions > 1 and (shared < self.num_recursions or shared % self.num_recursions):
            repeats = max(1, -(-shared // self.num_recursions))
            works = unshared + repeats * self.num_recursions
            raise ValueError(
                f"num_hidden_layers: {self.num_hidden_layers} leaves {max(shared, 0)} layers for num_recursions "
                f"{self.num_recursions} with sharing {self.sharing!r}; use {works}, or another num_recursions"
            )
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers: must be at least 1, got {self.num_hidden_layers}")

    def _validate_strategy(self):
        recursive, routed = self.num_recursions > 1, self.routing != "none"
        method_of(self).check_recursions(self)
        if self.kv_strategy != "recursion_wise" and not recursive:
            raise ValueError(
                f"kv_strategy: {self.kv_strategy!r} needs num_recursions of at least 2; use 'recursion_wise'"
            )
        if self.kv_strategy == "shared_update" and not routed:
            raise ValueError("kv_strategy: 'shared_update' needs routing, or it would share nothing; use 'shared'")
        if self.relaxation != "none" and not recursive:
            raise ValueError(f"relaxation: {self.relaxation!r} needs num_recursions of at least 2; use 'none'")
        allowed = method_of(self).activations
        if allowed and self.router_activation not in allowed:
            raise ValueError(
                f"router_activation: {self.router_activation!r} does not fit routing {self.routing!r}; "
                f"use one of {', '.join(map(repr, allowed))}"
            )
        if self.router_temperature <= 0:
            raise ValueError(f"router_temperature: must be above 0, got {self.router_temperature}; use 1.0")

    def _validate_meaning(self):
        """Refuse settings of other methods. Resolved configurations name every default, so defaults are let through."""
        method, defaults = method_of(self), {f.name: f.default for f in dataclasses.fields(MoRConfig)}
        for name in sorted(set().union(*(other.fields for other in METHODS.values())) - method.fields):
            value = getattr(self, name)
            if value not in (None, defaults[name], UNUSED.get(name)):
                users = [repr(other) for other, of in METHODS.items() if name in of.fields]
                raise ValueError(
                    f"{name}: means nothing for routing {self.routing!r}, only for {', '.join(users)}; got {value!r}, "
                    "leave it out"
                )

    def _validate_lora(self):
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank: must be at least 1, got {self.lora_rank}; use 16")
        unknown = [name for name in self.lora_targets if name not in PROJECTIONS]
        if unknown or not self.lora_targets:
            raise ValueError(f"lora_targets: {unknown or 'none given'}; use names from {', '.join(PROJECTIONS)}")

    @property
    def architecture(self) -> str:
        """One of `ARCHITECTURES`."""
        return method_of(self).architecture(self)


def _raise_value_errors(init: Callable[..., None]) -> Callable[..., None]:
    """Field checks of `strict` raise an error of their own kind; users get a ValueError for every wrong field alike."""

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from None

    return wrapped


MoRConfig.__init__ = _raise_value_errors(MoRConfig.__init__)  # type: ignore[method-assign]


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
