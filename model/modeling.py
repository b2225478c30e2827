"""`MoRForCausalLM`: vanilla Llama, recursive models and those of adaptive depth in one implementation.

Shapes: B batch, T positions of a row, D hidden size, Nr recursions, G gates, V vocabulary.

A shared layer is one module that is called at every depth of its `sharing` map; nothing is tied by assignment.
What happens between embedding and final norm stands in `model.decoder`; this is transformers' side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import ModelOutput, can_return_tuple, logging

from .attention import see, through
from .attention.visible import Rows, Visible
from .cache import MoRCache
from .config import MoRConfig
from .decoder import Batch, Run
from .depth import METHODS, current_name, method_of
from .depth.routers import Router
from .hardware import chunk_rows
from .layers import DecoderLayer, LMHead, RMSNorm, Tokens, cross_entropy_sum
from .record import RoutingRecord
from .relaxation import RelaxedLinear
from .sharing import applications, num_unique_layers

logger = logging.get_logger(__name__)
RecomputePolicy = Literal["none", "block", "recursion", "selective"]


@dataclass
class MoRModelOutput(ModelOutput):
    """last_hidden_state: [B, T, D]; losses: unweighted fp32 scalars of the routers (training only).

    hidden_states: [B, T, D] each: the embedding, the states after every layer, the last one normed, as in Llama. With
        routing: the embedding, the state after each layer that is not shared and after each recursion (token-choice:
        after all of them), the normed state.
    exits: states [B, T, D] that are to be read out for the loss, and the weights of their losses.
    attentions: None; transformers' generation looks for the field.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    losses: dict[str, Tensor] | None = None
    routing: RoutingRecord | None = None
    exits: Any = None


@dataclass
class MoRCausalLMOutput(ModelOutput):
    """Output of `MoRForCausalLM`.

    loss: fp32 scalar, "lm" plus every other loss times its coefficient. logits: [B, T, V] or None.
    losses: fp32 scalars, without coefficients: "lm", and where they exist "selection", "balancing", "z"; "exits" is the
        mean over the exits' losses by their weights, which take theirs from that of "lm".
    routing: what was routed; None for vanilla and recursive models.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    losses: dict[str, Tensor] | None = None
    routing: RoutingRecord | None = None


# Names of parameters in checkpoints written before routers belonged to the method, and now (`depth.current_name`).
_RENAMED = {r"(?<!depth\.)(?<!\w)(routers\.|aux_routers\.|router_bias$)": r"depth.\1"}


def _rename(module: nn.Module, state: dict[str, Tensor], *args: Any) -> None:
    for name in list(state):
        if (now := current_name(name)) != name:
            state[now] = state.pop(name)


class MoRPreTrainedModel(PreTrainedModel):
    """Initialisation and the features that transformers asks about."""

    config_class = MoRConfig
    config: MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (transformers declares it as an instance's)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for matrices; relaxation starts as the identity."""
        super()._init_weights(module)
        if isinstance(module, Router):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, RelaxedLinear):
            module.reset_delta()
        elif isinstance(module, MoRModel):
            if module.recursion_encoding is not None:
                nn.init.ones_(module.recursion_encoding)
            if module.router_bias is not None:
                nn.init.zeros_(module.router_bias)
            module.depth.reset_parameters(self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; parameters of older checkpoints are found by their names of then."""
        loaded: Any = super().from_pretrained(*args, **({"key_mapping": _RENAMED} | kwargs))
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        model.__dict__.pop("_weight_conversions", None)  # or it would be saved under those names again
        return loaded

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """The standard switch of transformers: each layer recomputes itself, which is the policy `block`."""
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        decoder = self if isinstance(self, MoRModel) else self.model
        decoder.recompute = "block" if enable else "none"


class MoRModel(MoRPreTrainedModel):
    """Embedding, the decoder in its sharing and routing, and the final norm."""

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        uses = applications(config)
        shared = {use.layer for use in uses if use.recursion is not None}
        self.layers = nn.ModuleList(DecoderLayer(config, i in shared) for i in range(num_unique_layers(config)))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]  # has the fields it reads
        encodings = sum(use.encoding is not None for use in uses) if config.relaxation == "recursion_encoding" else 0
        self.recursion_encoding = nn.Parameter(torch.empty(encodings, config.hidden_size)) if encodings else None
        self.depth = method_of(config)(config)
        self.register_load_state_dict_pre_hook(_rename)
        self.recompute: RecomputePolicy = "none"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        document_ids: Tensor | None = None,
        num_documents: int | None = None,
        step: int | None = None,
        routing_mode: str | None = None,
        global_load: Tensor | None = None,
        routing_only: bool = False,
        max_recursions: int | None = None,
        output_hidden_states: bool | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        prompt_length: Tensor | int | None = None,
        keep_exits: bool = False,
        **kwargs: Any,
    ) -> MoRModelOutput:
        """Shapes and meanings as in `MoRForCausalLM.forward`; keep_exits: output `exits`; further keywords,
        which wrappers pass to every base model of transformers, mean nothing here."""
        levels = self.depth.levels(self.config)
        if max_recursions is not None and not 1 <= max_recursions <= levels:
            raise ValueError(f"max_recursions: {max_recursions} does not fit 1 to {levels} recursions")
        if routing_only and not self.depth.previews:
            able = ", ".join(repr(name) for name, method in METHODS.items() if method.previews)
            raise ValueError(f"routing_only: needs routing {able}, which decides before the first recursion")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if torch.is_autocast_enabled(hidden.device.type):  # bf16 all along the residual stream, under every strategy
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        mode = self._mode(routing_mode)
        if position_ids is not None and document_ids is None and attention_mask is None and past_key_values is None:
            document_ids = None if use_cache else _packed_documents(position_ids, hidden.shape[0])
        cache = self._cache(past_key_values, use_cache, mode, document_ids)
        run = Run(
            self,
            self._describe(hidden, input_ids, attention_mask, position_ids, document_ids, num_documents, cache),
            mode,
            step,
            global_load,
            routing_only,
            max_recursions,
            head,
            None if prompt_length is None else torch.as_tensor(prompt_length, device=hidden.device).view(-1, 1),
            keep_exits,
        )
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            run.hidden_states = [hidden]
        hidden = run.decode(hidden)
        if cache is not None:
            cache.advance(hidden.shape[1])
        hidden = self.norm(hidden)
        if run.hidden_states is not None:
            if not self.depth.gates:
                run.hidden_states.pop()
            run.hidden_states.append(hidden)
        return MoRModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=tuple(run.hidden_states) if run.hidden_states is not None else None,
            losses={name: torch.stack(values).sum() for name, values in run.losses.items()},
            routing=run.record(),
            exits=run.exits,
        )

    def _mode(self, routing_mode: str | None) -> str:
        """How gates decide: in training always as it is trained, otherwise as asked or configured."""
        mode = "topk" if self.training else routing_mode or self.config.routing_mode
        if mode not in ("causal", "topk", "full"):
            raise ValueError(f"routing_mode: expected 'causal', 'topk' or 'full', got {mode!r}")
        if mode == "full" and mode not in self.depth.modes(self.config):
            raise ValueError("routing_mode: 'full' needs exits, which it closes; use 'causal'")
        refused = self.depth.refuses(self.config, mode)
        if refused is not None:
            raise ValueError(f"routing_mode: {refused}")
        return mode

    def _cache(self, cache, use_cache: bool | None, mode: str, document_ids: Tensor | None) -> MoRCache | None:
        """The cache of this pass. A new one only if `use_cache` asks for it: training and validation keep none."""
        if self.training and self.recompute != "none" and (cache is not None or use_cache):
            if cache is not None:
                raise ValueError(
                    "past_key_values: recomputation would enter its tokens twice; use set_recompute('none')"
                )
            logger.warning_once("use_cache: no cache is kept, since recomputation would enter each token twice")
            return None
        if cache is None and not use_cache:
            return None
        if cache is not None and not isinstance(cache, MoRCache):
            raise ValueError(f"past_key_values: expected a MoRCache, got {type(cache).__name__}; use MoRCache(config)")
        if mode == "topk" and self.depth.fixed:
            raise ValueError(
                "routing_mode: 'topk' looks at tokens to come, so nothing can be cached; use routing_mode='causal', or "
                "use_cache=False"
            )
        if document_ids is not None:
            raise ValueError("document_ids: a cached row is one document; leave them out, or use_cache=False")
        return MoRCache(self.config) if cache is None else cache

    def _describe(self, hidden, input_ids, attention_mask, position_ids, document_ids, num_documents, cache) -> Batch:
        """Positions, rotary tables and who sees whom, built once and gathered by every recursion."""
        length, device = hidden.shape[1], hidden.device
        past = cache.begin(hidden.shape[0]) if cache is not None else 0
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and real.shape[1] != past + length:
            raise ValueError(
                f"attention_mask: covers {real.shape[1]} positions; {past} cached and {length} new make {past + length}"
            )
        if position_ids is None and real is not None:
            position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=device)[None]
        cos, sin = self.rotary_emb(hidden, position_ids)
        rows = Rows(hidden.shape[0], length, device, past, real, document_ids, num_documents)
        if cache is None:
            seen = see(Visible(rows), self.config, hidden.dtype, self.training)
        else:
            seen = through(Visible(rows).mask(), self.config, device)
        return Batch(Tokens(cos, sin, seen=seen), rows, position_ids, input_ids, cache)

    @property
    def router_bias(self) -> Tensor | None:
        """[G], of loss-free balancing."""
        return getattr(self.depth, "router_bias", None)


def _packed_documents(position_ids: Tensor, rows: int) -> Tensor | None:
    """[B, T] documents of rows packed as transformers' collators pack them: positions start anew with each. None where
    every row is one document."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not starts.any():
        return None
    return F.pad(starts.long().cumsum(1), (1, 0)).expand(rows, -1)


def _shift(labels: Tensor | None, targets: Tensor | None, shift_labels: Tensor | None) -> tuple[Any, Any]:
    """Labels as they were given, and [B, T] what each position predicts; None, None without any."""
    if targets is not None and (labels is not None or shift_labels is not None):
        raise ValueError("targets: exclusive with labels, which the model shifts, and with shift_labels, their alias")
    if targets is not None or shift_labels is not None:
        return (targets if shift_labels is None else shift_labels,) * 2
    return labels, None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100)


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """The language model: decoder, head, losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.model = MoRModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but weights of another architecture are refused instead of being made up.

        Raises ValueError naming what the folder lacks or has too much, unless `output_loading_info` asks for that list.
        """
        if kwargs.get("output_loading_info"):
            return super().from_pretrained(*args, **kwargs)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(map(str, info[kind]))
            if names and not (kind == "mismatched_keys" and kwargs.get("ignore_mismatched_sizes")):
                raise ValueError(
                    f"{args[0] if args else 'weights'}: not the weights of this {model.config.architecture} model, "
                    f"{len(names)} {kind.replace('_', ' ')}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                )
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_documents: int | None = None,
        step: int | None = None,
        routing_mode: str | None = None,
        num_items_in_batch: Tensor | int | None = None,
        global_load: Tensor | None = None,
        routing_only: bool = False,
        max_recursions: int | None = None,
        prompt_length: Tensor | int | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MoRCausalLMOutput:
        """One forward pass.

        attention_mask: [B, T], 0 for padding, which is never selected and changes nothing for the other tokens.
        labels: [B, T], -100 ignored; the model shifts them (position t predicts labels t+1).
        targets: [B, T], labels already shifted; exclusive with `labels`.
        shift_labels: what transformers calls targets; as there, it replaces `labels` where both are given. A keyword
            outside the signature, by whose names the Trainer tells what it takes for labels.
        document_ids: [B, T] non-decreasing; tokens attend, and compete for slots, within their document only. Without
            them, attention_mask and cache, position_ids that start anew start a document, as in transformers.
        num_documents: of all rows together, or more; it spares a GPU's host the wait for the count.
        step: optimizer steps done before this one, needed while a warm-up runs; None: warm-ups are over.
        routing_mode: overrides `config.routing_mode` at evaluation; training always selects by top-k.
        prompt_length: how many positions of a row, or of each [B], were given; these never leave at an exit. None: the
            whole row is judged as if it had been generated.
        num_items_in_batch: number of labels of the global batch. The LM sum is divided by it, and every other loss, a
            mean over this batch, is multiplied by this batch's share of it, so that the losses of all micro-batches
            and ranks add up to the mean over the global batch.
        global_load: [Nr] share of tokens per depth in the global batch, for the balancing loss; None: this batch's own.
        routing_only: token-choice: run the layers before the recursions and the router alone, for `routing`; no loss.
        max_recursions: no token executes more recursions than this, 1 to Nr (test-time depth, Fig. 5c), or passes the
            exit of this number; None: all.
        return_logits: None returns logits unless training with labels; False never makes them.
        """
        given, shifted = _shift(labels, targets, kwargs.get("shift_labels"))
        output = self.model(
            *(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache),
            **{"document_ids": document_ids, "num_documents": num_documents, "step": step},
            **{"routing_mode": routing_mode, "global_load": global_load},
            **{"routing_only": routing_only, "max_recursions": max_recursions, "prompt_length": prompt_length},
            **{"output_hidden_states": output_hidden_states, "head": self.lm_head, "return_dict": True},
        )
        if routing_only:
            return MoRCausalLMOutput(routing=output.routing)
        if return_logits is None:
            return_logits = given is None or not self.training
        hidden = output.last_hidden_state
        logits = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        loss, losses = None, output.losses
        if given is not None:
            whole = logits if logits is not None and logits.shape[1] == hidden.shape[1] else None
            loss, losses = self._loss(hidden, whole, given, shifted, output, num_items_in_batch)
        return MoRCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            losses=losses,
            routing=output.routing,
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the tokens given are a prompt, none of which leaves at an exit."""
        given = next((x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
        if given is not None:
            kwargs["prompt_length"] = given.shape[1]
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> Any:
        """`generate` of transformers builds a `MoRCache` in place of its own."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: {implementation!r} cannot hold recursions; leave it out")
        if (mask := model_kwargs.get("attention_mask")) is not None:
            model_kwargs["prompt_length"] = mask.sum(1)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MoRCache(self.config)

    def _loss(self, hidden, logits, given, shifted, output, num_items) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its terms. given: labels as passed; shifted: [B, T] the token that each position predicts."""
        if logits is None:
            total = self.lm_head(hidden, shifted)
        else:
            rows = chunk_rows(logits.shape[-1], logits.device.type)
            parts = zip(logits.flatten(0, 1).split(rows), shifted.flatten().split(rows), strict=True)
            total = torch.stack([cross_entropy_sum(part, target) for part, target in parts]).sum()
        if num_items is None:
            count, share = (shifted != -100).sum().clamp(min=1), 1.0
        else:
            count, share = num_items, (given != -100).sum() / num_items
        losses = {"lm": total / count} | {name: value * share for name, value in output.losses.items()}
        coefficients = self.model.depth.coefficients()
        loss = losses["lm"]
        if output.exits:  # the last layer's loss has what the exits leave of 1
            early, of_early = self._exits(output.exits, shifted)
            loss = loss * (1.0 - of_early) + early / count
            losses["exits"] = early.detach() / (count * of_early)
        for name, value in losses.items():
            if name not in ("lm", "exits"):
                loss = loss + coefficients[name] * value
        return loss, losses

    def _exits(self, exits: list[tuple[Tensor, float]], shifted: Tensor) -> tuple[Tensor, float]:
        """The weighted sum of the cross-entropies at exits, and of their weights.

        In one call of the head, so that the gradient of its weight is kept once and not for every exit.
        """
        states = torch.cat([self.model.norm(x).flatten(0, 1) for x, _ in exits])
        # Written on the device: a list would be copied there, and waited for.
        weights = torch.cat([torch.full((shifted.numel(),), weight, device=states.device) for _, weight in exits])
        total = self.lm_head(states, shifted.flatten().repeat(len(exits)), weights)
        return total, sum(weight for _, weight in exits)

    @torch.no_grad()
    def update_router_bias(self, load: Tensor) -> None:
        """Loss-free balancing, once per optimizer step. load: [Nr] share of tokens per depth over the global batch."""
        self.model.depth.update(load)

    def apart(self) -> list[nn.Parameter]:
        """Parameters that learn at a rate of their own."""
        return self.model.depth.apart()

    def units(self) -> list[nn.Module]:
        """Modules that form a unit of sharding and of checkpointing: each unique layer once."""
        return list(self.model.layers)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer by itself, in place, when it first runs; names of parameters stay as they are. So are the
        last norm, and on a GPU what stands between the products of head and routers.

        The layers share their code, so one compilation serves all of them at each kind of selection, however deep the
        recursion is unrolled, where compiling the model as a whole takes time in proportion to the effective depth.
        """
        # A kind of selection is a graph: stages, training or not, with or without gradients. Beyond the limit torch
        # would go on uncompiled, and say so once.
        dynamo_settings: Any = torch._dynamo.config
        dynamo_settings.recompile_limit = max(dynamo_settings.recompile_limit, 64)
        for module in (*self.units(), self.model.norm):
            module.compile(backend=backend)
        self.lm_head.compiled = True
        for module in self.model.depth.modules():
            if hasattr(module, "compiled"):
                module.compiled = True

    def set_recompute(self, policy: RecomputePolicy) -> None:
        """Recompute activations in the backward pass: `none`, each `block`, each `recursion` as a whole, or `selective`
        (keep matrix products and attention, recompute the rest)."""
        if policy not in get_args(RecomputePolicy):
            raise ValueError(f"recompute: expected one of {', '.join(get_args(RecomputePolicy))}, got {policy!r}")
        self._set_gradient_checkpointing(policy == "block", functools.partial(checkpoint, use_reentrant=False))
        self.model.recompute = policy


# The Auto classes find the installed models by this; copies in an exported folder by `auto_map` in its config.json.
if __package__ == "model":
    AutoConfig.register(MoRConfig.model_type, MoRConfig, exist_ok=True)
    AutoModel.register(MoRConfig, MoRModel, exist_ok=True)
    AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
