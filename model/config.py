"""`MoRConfig`: one configuration class for vanilla Llama, recursive Transformers and Mixture-of-Recursions.

Names follow the paper (arXiv 2507.10524). Which architecture a configuration describes is read off two fields,
`num_recursions` and `routing`, and spelled out by the property `architecture`.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import as_validated_field, strict, type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .depth import all_settings, method_of, refuse_foreign

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
KVStrategy = Literal["recursion_wise", "shared", "shared_update", "propagated"]
RoutingMode = Literal["causal", "topk", "full"]
# What configurations hold, though nothing reads it, that were resolved without routing.
UNUSED = {"router_activation": "sigmoid", "router_alpha": 0.1}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@as_validated_field
def _share(value: float) -> None:
    """A field from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"must lie between 0 and 1, got {value}")


@strict
class LlamaFields(PreTrainedConfig):
    """The fields of transformers' Llama, by its names and with its meanings.

    Not its `LlamaConfig` itself: importing that brings attention kernels and compilers along, which takes longer than
    all of torch, and whoever only reads a configuration needs none of it.
    """

    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = _share(default=0.02)
    use_cache: bool = True
    pad_token_id: int | None = None
    pretraining_tp: int | None = 1
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None


@strict
class MoRConfig(LlamaFields):
    """Everything of transformers' Llama (`LlamaFields`), and the fields below.

    `num_hidden_layers` is the effective depth L: the number of layers that a token of full depth passes.

    num_recursions: Nr, how often the shared block is applied; 1 is a vanilla Llama.
    sharing: map from depth to unique layer (Table 1); the `middle_` maps keep the first and the last layer unshared.
    share_norms: whether shared layers share their RMSNorm weights too; False gives each depth its own.
    kv_strategy: `recursion_wise` (a token attends to the tokens of its recursion), `shared` (keys and values of the
        first recursion serve every deeper one), `shared_update` (as shared, but a token that enters a deeper recursion
        replaces its keys and values), `propagated` (a token attends to every token: one that has stopped gives keys
        and values at each deeper layer from the state with which it stopped).
    routing: the way of spending depth, by its name in `model/depth/`: `none`, `expert_choice` (each recursion picks its
        top-k tokens, section 2.2.1), `token_choice` (each token picks its depth once, section 2.2.1),
        `mixture_of_depths` (untied layers, some of which pick their top-k tokens, arXiv 2404.02258), `universal` (a
        token halts when its halting probabilities add up, arXiv 1807.03819), `early_exit` (a token leaves when the
        model is sure of it, arXiv 2207.07061, 2404.16710). Its own settings stand in its file (`DepthMethod.settings`),
        and are fields here as well; those of other methods are refused, unless they have their default value.
    routing_mode: at evaluation and generation, `causal` (no look-ahead), `topk` (the paper's; sees all of the text) or
        `full` (early_exit: nobody leaves).
    relaxation: `lora`, `dora` (per-depth low-rank deltas on shared weights), `recursion_encoding` (a vector per
        recursion that scales the block's output) or `none`.
    lora_rank, lora_alpha, lora_dropout, lora_targets: of `lora` and `dora`; the delta is scaled by alpha / rank.
    """

    model_type = "mor"
    # What the outputs hold beside tensors: the Trainer's `evaluate` and `predict` leave it out.
    keys_to_ignore_at_inference = ["past_key_values", "losses", "routing"]  # noqa: RUF012

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
    routing: str = "none"
    routing_mode: RoutingMode = "causal"
    relaxation: Literal["none", "lora", "dora", "recursion_encoding"] = "none"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | tuple[str, ...] = ("q_proj", "v_proj")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Settings of the methods of `model/depth/`."""

    def __post_init__(self, **kwargs):
        method = method_of(self)
        for name, setting in all_settings().items():
            value = kwargs.pop(name, setting.default)
            try:
                type_validator(name, value, setting.kind)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
            setattr(self, name, value)
        for name, value in (UNUSED | method.resolved(self)).items():
            if getattr(self, name, None) is None:
                setattr(self, name, value)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
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
        if self.kv_strategy in ("shared_update", "propagated") and not routed:
            works = "shared" if self.kv_strategy == "shared_update" else "recursion_wise"
            raise ValueError(f"kv_strategy: {self.kv_strategy!r} needs routing, or no token would stop; use {works!r}")
        if self.relaxation != "none" and not recursive:
            raise ValueError(f"relaxation: {self.relaxation!r} needs num_recursions of at least 2; use 'none'")

    def _validate_meaning(self):
        """Refuse settings of other methods. Resolved configurations name every default, so defaults are let through."""
        settings = all_settings()
        told = {name: getattr(self, name) for name in settings}
        unsaid = {name for name, value in told.items() if value in (settings[name].default, UNUSED.get(name))}
        refuse_foreign({"routing": self.routing} | {name: told[name] for name in told.keys() - unsaid})

    def _validate_lora(self):
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank: must be at least 1, got {self.lora_rank}; use 16")
        unknown = [name for name in self.lora_targets if name not in PROJECTIONS]
        if unknown or not self.lora_targets:
            raise ValueError(f"lora_targets: {unknown or 'none given'}; use names from {', '.join(PROJECTIONS)}")

    @property
    def architecture(self) -> str:
        """What reports call the model, one of `depth.architectures()`."""
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
