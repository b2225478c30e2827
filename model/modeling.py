"""`MoRForCausalLM`: vanilla Llama, recursive and Mixture-of-Recursions models in one implementation.

Shapes: B batch, T positions of a row, K selected tokens of a row, N tokens packed over the batch, D hidden size,
Nr recursions, V vocabulary. Recursions count from 0 in the code (the paper's r - 1).

A shared layer is one module that is called at every depth of its `sharing` map; nothing is tied by assignment.
`MoRModel._run` is the one place where layers are called.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import ModelOutput, can_return_tuple, logging

from . import routing
from .attention import NAMESPACE
from .cache import MoRCache
from .config import MoRConfig
from .depth import stages_of
from .layers import DecoderLayer, KeyValue, LMHead, RMSNorm, Tokens, chunk_rows, cross_entropy_sum, gather_rows
from .relaxation import RelaxedLinear
from .routing import Router, RoutingRecord
from .sharing import Application, applications, num_unique_layers, segments

logger = logging.get_logger(__name__)
RecomputePolicy = Literal["none", "block", "recursion", "selective"]
# What selective recomputation keeps: the results of matrix products and of attention.
_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    f"{NAMESPACE}::attention",
}


def _keep(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _cast_every_time(function: Callable, x: Tensor):
    """Call `function` without autocast's weight cache: selective recomputation matches operations by their number, and
    the cache would leave out the casts of a weight that an earlier recursion has cast."""
    kind = x.device.type
    with torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    ):
        return function(x)


@dataclass
class MoRModelOutput(ModelOutput):
    """last_hidden_state: [B, T, D]; losses: unweighted fp32 scalars of the routers (training only).

    hidden_states: [B, T, D] each: the embedding, the states after every layer, the last one normed, as in Llama. With
        routing: the embedding, the state after each layer that is not shared and after each recursion (token-choice:
        after all of them), the normed state.
    attentions: None; transformers' generation looks for the field.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    losses: dict[str, Tensor] | None = None
    routing: RoutingRecord | None = None


@dataclass
class MoRCausalLMOutput(ModelOutput):
    """Output of `MoRForCausalLM`.

    loss: fp32 scalar, "lm" plus every other loss times its coefficient. logits: [B, T, V] or None.
    losses: fp32 scalars, without coefficients: "lm", and where they exist "selection", "balancing", "z".
    routing: what was routed; None for vanilla and recursive models.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    losses: dict[str, Tensor] | None = None
    routing: RoutingRecord | None = None


@dataclass
class Row:
    """What a forward pass knows about its rows before any layer runs.

    everyone: the `Tokens` of the layers that compute every position.
    real: [B, T] bool, False for padding; None: no padding. documents: [B, T] non-decreasing ids or None.
    positions: [B or 1, T]. allowed: [B, T, T] bool, who may look at whom; None: plain causal.
    max_recursions: no token executes more; None: as many as are configured.
    """

    everyone: Tokens
    positions: Tensor
    real: Tensor | None = None
    documents: Tensor | None = None
    allowed: Tensor | None = None
    input_ids: Tensor | None = None
    hidden_states: list[Tensor] | None = None
    cache: MoRCache | None = None
    past: int = 0
    routing_only: bool = False
    max_recursions: int | None = None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_loss(self, name: str, value: Tensor) -> None:
        self.losses.setdefault(name, []).append(value)


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
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.layout = stages_of(config)
        self.segments = segments(config)
        self.capacities = list(config.capacity_factors or ())
        self.activation, self.alpha = str(config.router_activation), float(config.router_alpha or 0.0)
        self.router_bias: Tensor | None
        encodings = sum(use.encoding is not None for use in uses) if config.relaxation == "recursion_encoding" else 0
        self.recursion_encoding = nn.Parameter(torch.empty(encodings, config.hidden_size)) if encodings else None
        self._make_routers(config)
        self.recompute: RecomputePolicy = "none"
        self.post_init()

    def _make_routers(self, config: MoRConfig) -> None:
        learned = config.router != "random"
        expert, token = config.routing == "expert_choice", config.routing == "token_choice"
        if (expert or token) and learned:
            count, outputs = (config.num_recursions, 1) if expert else (1, config.num_recursions)
            self.routers = nn.ModuleList(Router(config, outputs) for _ in range(count))
        if expert and learned and config.selection == "aux_router":
            self.aux_routers = nn.ModuleList(Router(config, 1, tempered=False) for _ in range(config.num_recursions))
        bias = torch.zeros(config.num_recursions) if token and config.balancing == "loss_free" else None
        self.register_buffer("router_bias", bias)

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
        step: int | None = None,
        routing_mode: str | None = None,
        global_load: Tensor | None = None,
        routing_only: bool = False,
        max_recursions: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MoRModelOutput:
        """Shapes and meanings as in `MoRForCausalLM.forward`; further keywords, which wrappers pass to every base model
        of transformers, mean nothing here."""
        if max_recursions is not None and not 1 <= max_recursions <= self.config.num_recursions:
            raise ValueError(
                f"max_recursions: {max_recursions} does not fit 1 to {self.config.num_recursions} recursions"
            )
        if routing_only and self.config.routing != "token_choice":
            raise ValueError("routing_only: needs routing 'token_choice', which decides before the first recursion")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if torch.is_autocast_enabled(hidden.device.type):  # bf16 all along the residual stream, under every strategy
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        mode = self._mode(routing_mode)
        if position_ids is not None and document_ids is None and attention_mask is None and past_key_values is None:
            document_ids = None if use_cache else _packed_documents(position_ids, hidden.shape[0])
        cache = self._cache(past_key_values, use_cache, mode, document_ids)
        row = self._describe(hidden, input_ids, attention_mask, position_ids, document_ids, cache)
        row.routing_only, row.max_recursions = routing_only, max_recursions
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            row.hidden_states = [hidden]
        hidden, record = self._decode(hidden, row, mode, step, global_load)
        if cache is not None:
            cache.advance(hidden.shape[1])
        hidden = self.norm(hidden)
        if row.hidden_states is not None:
            if self.config.routing == "none":
                row.hidden_states.pop()
            row.hidden_states.append(hidden)
        return MoRModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=tuple(row.hidden_states) if row.hidden_states is not None else None,
            losses={name: torch.stack(values).sum() for name, values in row.losses.items()},
            routing=record,
        )

    def _mode(self, routing_mode: str | None) -> str:
        """How expert-choice selects: always top-k in training, otherwise as asked or configured."""
        mode = "topk" if self.training else routing_mode or self.config.routing_mode
        if mode not in ("causal", "topk"):
            raise ValueError(f"routing_mode: expected 'causal' or 'topk', got {mode!r}")
        config = self.config
        if (
            mode == "causal"
            and config.routing == "expert_choice"
            and config.selection == "none"
            and config.router != "random"
        ):
            raise ValueError(
                "routing_mode: 'causal' needs a router that was trained to decide without looking ahead, and selection "
                "is 'none'; use routing_mode='topk', or train with selection 'aux_loss' or 'aux_router'"
            )
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
        if mode == "topk" and self.config.routing == "expert_choice":
            raise ValueError(
                "routing_mode: 'topk' looks at tokens to come, so nothing can be cached; use routing_mode='causal', or "
                "use_cache=False"
            )
        if document_ids is not None:
            raise ValueError("document_ids: a cached row is one document; leave them out, or use_cache=False")
        return MoRCache(self.config) if cache is None else cache

    def _describe(self, hidden, input_ids, attention_mask, position_ids, document_ids, cache) -> Row:
        """Positions, rotary tables and masks, built once and gathered by every recursion."""
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
        places = torch.arange(length + past, device=device)
        allowed = None
        if real is not None or document_ids is not None or (past and length > 1):
            allowed = places[past:, None] >= places
            if real is not None:
                # A padded query looks at itself, so that no row of the softmax is empty.
                allowed = (allowed & real[:, None]) | (places[past:, None] == places)
            if document_ids is not None:
                allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
            allowed = allowed.expand(hidden.shape[0], -1, -1)
        mask = None if allowed is None else allowed[:, None]
        everyone = Tokens(cos, sin).look_through(mask)
        real = None if real is None else real[:, past:]
        return Row(everyone, position_ids, real, document_ids, allowed, input_ids, cache=cache, past=past)

    # Running layers --------------------------------------------------------------------------------------------------

    def _decode(self, hidden: Tensor, row: Row, mode: str, step: int | None, global_load: Tensor | None):
        """[B, T, D] -> [B, T, D] and the routing record: unshared layers, then recursions by their routing."""
        config, record = self.config, None
        stretches = self.segments if row.max_recursions is None else self._within(row.max_recursions)
        if config.routing == "none":
            kv: dict[int, KeyValue] = {}
            for segment in stretches:
                hidden = self._run(segment, hidden, row.everyone, kv, row)
            return hidden, None
        middle = config.sharing == "middle_cycle"
        recursions = stretches[1:-1] if middle else stretches
        if middle:
            hidden = self._run(stretches[0], hidden, row.everyone, {}, row)
        if config.routing == "token_choice":
            hidden, record = self._token_choice(recursions, hidden, row, step, global_load)
            if row.routing_only:
                return hidden, record
        elif mode == "topk":
            hidden, record = self._expert_choice(recursions, hidden, row, step)
        else:
            hidden, record = self._expert_choice_causal(recursions, hidden, row)
        if middle:
            hidden = self._run(stretches[-1], hidden, row.everyone, {}, row)
        return hidden, record

    def _within(self, max_recursions: int) -> list[list[Application]]:
        """The segments without the uses of deeper recursions."""
        kept = [[use for use in segment if (use.recursion or 0) < max_recursions] for segment in self.segments]
        return [segment for segment in kept if segment]

    def _run(self, segment: list[Application], x: Tensor, tokens: Tokens, kv: dict[int, KeyValue], row: Row) -> Tensor:
        """Apply the layers of a segment to the given tokens, with recomputation as set. x: [B, K, D] or [N, D].

        kv: keys and values of the first recursion by unique layer, filled and read where `kv_strategy` shares them.
        """
        # The policy `block` is the layers' own: each checkpoints itself.
        policy = self.recompute if self.training and torch.is_grad_enabled() else "none"
        groups = [segment] if policy == "recursion" else [[use] for use in segment]
        whole = self.config.routing == "none" or segment[0].recursion is None
        for group in groups:
            function = functools.partial(self._apply_layers, group, tokens=tokens, kv=dict(kv), cache=row.cache)
            if policy == "recursion":
                x, fresh = checkpoint(function, x, use_reentrant=False)
            elif policy == "selective":
                contexts = functools.partial(create_selective_checkpoint_contexts, _keep)
                counted = functools.partial(_cast_every_time, function)
                x, fresh = checkpoint(counted, x, use_reentrant=False, context_fn=contexts)
            else:
                x, fresh = function(x)
            kv.update(fresh)
            if whole and row.hidden_states is not None:
                row.hidden_states.append(x)
        return x

    def _apply_layers(self, group: list[Application], x: Tensor, *, tokens: Tokens, kv: dict[int, KeyValue], cache):
        """The layer call. Returns the output and the keys and values that later recursions share."""
        sharing = self.config.kv_strategy != "recursion_wise"
        fresh: dict[int, KeyValue] = {}
        for use in group:
            shared_kv = (kv.get(use.layer) or fresh.get(use.layer)) if sharing and use.recursion else None
            x, key, value = self.layers[use.layer](
                x, *(shared_kv or ()), tokens=tokens, recursion=use.recursion or 0, cache=cache, depth=use.depth
            )
            if sharing and use.recursion == 0 and cache is None:
                fresh[use.layer] = (key, value)
            if self.recursion_encoding is not None and use.encoding is not None:
                x = x * self.recursion_encoding[use.encoding].to(x.dtype)
        return x, fresh

    # Selecting tokens ------------------------------------------------------------------------------------------------

    def _select(self, row: Row, index: Tensor, used: Tensor | None) -> Tokens:
        """Tokens of fixed shape: slots [B, K] at positions `index`."""
        everyone, batch = row.everyone, index.shape[0]
        tables = [gather_rows(table.expand(batch, -1, -1), index) for table in (everyone.cos, everyone.sin)]
        return Tokens(tables[0], tables[1], index, used).look_through(self._mask(row, index, used))

    def _pack(self, row: Row, flat: Tensor, batch: int, length: int, recursion: int) -> Tokens:
        """Tokens packed over the batch, which enter a recursion. flat: [N] ascending b * T + t."""
        rows, places = flat // length, flat % length
        counts = flat.new_zeros(batch).index_add(0, rows, torch.ones_like(rows))
        slots = int(counts.max())
        packed = rows * slots + torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[rows]
        index = flat.new_zeros(batch * slots).index_copy(0, packed, places).view(batch, slots)
        used = torch.arange(slots, device=flat.device) < counts[:, None]
        cos, sin = (
            table.expand(batch, -1, -1).flatten(0, 1).index_select(0, flat)
            for table in (row.everyone.cos, row.everyone.sin)
        )
        tokens = Tokens(cos, sin, index, used, packed)
        entered = None if row.cache is None else row.cache.enter(recursion, flat, tokens, length)
        return tokens.look_through(self._mask(row, index, used) if entered is None else entered)

    def _mask(self, row: Row, index: Tensor, used: Tensor | None) -> Tensor | None:
        """Attention mask of selected queries: gathered from the rows of the forward pass. [B, 1, K, S] or None."""
        shared = self.config.kv_strategy != "recursion_wise"
        if row.allowed is None:
            if not shared:
                return None
            places = torch.arange(row.past + row.everyone.cos.shape[1], device=index.device)
            return (index[..., None] + row.past >= places)[:, None]
        allowed = gather_rows(row.allowed, index)
        if not shared:
            allowed = allowed.gather(2, index[:, None].expand(-1, index.shape[1], -1))
            if used is not None:
                itself = torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
                allowed = (allowed & used[:, None]) | itself
        return allowed[:, None]

    def _logits(self, routers: str, recursion: int, x: Tensor, row: Row, flat_or_index: Tensor | None) -> Tensor:
        """Raw fp32 scores of the candidates. x: [B, C, D] or [N, D] -> [B, C] or [N]."""
        if self.config.router != "random":
            return getattr(self, routers)[recursion](x).squeeze(-1)
        kept = self.capacities[recursion] / (self.capacities[recursion - 1] if recursion else 1.0)
        logits = routing.random_logits(row.input_ids, row.positions, recursion, 1).squeeze(-1)
        # Shifted so that a score of at least 0, the causal decision, comes with the share that the capacity keeps.
        left_out = max(1.0 - kept, 1e-6)
        logits = logits - math.log(left_out / (1.0 - left_out))
        if flat_or_index is None:
            return logits.expand(x.shape[0], -1)
        if x.dim() == 2:
            return logits.flatten()[flat_or_index]
        return logits.expand(x.shape[0], -1).gather(1, flat_or_index)

    def _mix(self, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        """h + g * block(h) (eq. 2.1); additive gating leaves the gate out. x, y: [..., D]; logits: [...]."""
        if self.config.gating == "additive":
            return x + y
        if self.config.router == "random":
            logits = torch.zeros_like(logits)
        gate = routing.gate(logits, self.activation, self.alpha)
        return x + gate[..., None].to(y.dtype) * y

    # Expert-choice ---------------------------------------------------------------------------------------------------

    def _expert_choice(self, recursions, hidden: Tensor, row: Row, step: int | None):
        """Each recursion takes the top-k of the tokens of the recursion before (eq. 2.1), at fixed shapes."""
        batch, length = hidden.shape[:2]
        state, index, used, documents = hidden, None, row.real, row.documents
        if row.real is not None:
            # Padding goes last, so that slots stay causal whichever side it is on.
            index = torch.sort((~row.real).long(), dim=1, stable=True).indices
            state, used = gather_rows(hidden, index), row.real.gather(1, index)
            documents = None if documents is None else documents.gather(1, index)
        lengths = None if used is None else used.sum(1, keepdim=True)
        depth = torch.zeros(batch, length, dtype=torch.long, device=hidden.device)
        kv: dict[int, KeyValue] = {}
        trace = _Trace()
        for r, segment in enumerate(recursions):
            factor = self._capacity(r, step)
            slots = routing.selection_size(factor, length)
            size = slots if lengths is None else ((lengths * factor).long()).clamp(min=1).minimum(lengths)
            logits = self._logits("routers", r, state, row, index)
            everything = slots == logits.shape[1]
            if everything:
                chosen = torch.ones_like(logits, dtype=torch.bool) if used is None else used
            else:
                chosen = routing.selected_mask(logits.detach(), documents, used, size)
            self._expert_losses(r, state, logits, chosen, used, row, trace)
            if not everything:
                local = routing.slots_of(chosen, used, slots)
                state, logits = gather_rows(state, local), logits.gather(1, local)
                index = local if index is None else index.gather(1, local)
                used = None if used is None else chosen.gather(1, local)
                documents = None if documents is None else documents.gather(1, local)
            tokens = row.everyone if index is None else self._select(row, index, used)
            state, hidden = self._recurse(segment, state, hidden, tokens, logits, kv, row, r)
            ran = torch.ones_like(logits, dtype=torch.long) if used is None else used.long()
            depth = depth + ran if index is None else depth.scatter_add(1, index, ran)
            trace.selected.append(
                index if index is not None else torch.arange(length, device=depth.device).expand(batch, -1)
            )
            if row.hidden_states is not None:
                row.hidden_states.append(hidden)
        return hidden, self._record(depth, row, trace)

    def _capacity(self, recursion: int, step: int | None) -> float:
        config = self.config
        final = self.capacities[recursion]
        if not self.training or config.capacity_warmup_steps == 0:
            # Without a look at the step: a compiled model would be specialised to it.
            return final
        return routing.capacity(final, step, config.capacity_warmup_steps)

    def _recurse(self, segment, state, hidden, tokens: Tokens, logits, kv, row: Row, recursion: int):
        """Run one recursion on the selected tokens; returns their new states and the hidden states of all."""
        index, used = tokens.index, tokens.used
        if recursion == 0 and self.config.kv_strategy != "recursion_wise" and index is not None:
            # Deeper recursions attend to the first one's keys and values of every token: it computes every token.
            y = self._run(segment, hidden, row.everyone, kv, row)
            y = gather_rows(y, index) if tokens.packed is None else tokens.from_slots(gather_rows(y, index))
        else:
            y = self._run(segment, state, tokens, kv, row)
        fresh = self._mix(state, y, logits)
        if index is None:
            return fresh, fresh
        if tokens.packed is None:
            if used is not None:
                fresh = torch.where(used[..., None], fresh, state)
            return fresh, hidden.scatter(1, index[..., None].expand(-1, -1, hidden.shape[-1]), fresh)
        return fresh, hidden

    def _expert_losses(self, r: int, state, logits, chosen, used, row: Row, trace: _Trace) -> None:
        """Losses of one recursion's routers, and how often the causal decision agrees with the selection."""
        config, learned = self.config, self.config.router != "random"
        decision = logits
        if learned and config.selection == "aux_router":
            decision = self._logits("aux_routers", r, state.detach(), row, None)
        if self.training and learned:
            if config.selection != "none":
                row.add_loss("selection", routing.selection_loss(decision, chosen, used))
            if config.z_loss_coefficient > 0:
                row.add_loss("z", routing.z_loss(logits[..., None], used))
        with torch.no_grad():
            trace.scores.append(logits.detach())
            trace.means.append(routing.masked_mean(logits.detach(), used))
            if config.selection != "none":
                trace.agreement.append(routing.masked_mean(((decision >= 0) == chosen).float(), used))

    def _expert_choice_causal(self, recursions, hidden: Tensor, row: Row):
        """Each recursion keeps the tokens whose own score says so (section 3.1): nothing looks ahead, rows are ragged.

        A recursion of capacity 1 takes every token of the one before, as it does in training.
        """
        config, (batch, length, width) = self.config, hidden.shape
        routers = "aux_routers" if config.selection == "aux_router" and config.router != "random" else "routers"
        active = (
            torch.ones(batch * length, dtype=torch.bool, device=hidden.device)
            if row.real is None
            else row.real.flatten()
        )
        flat = _places(active)
        state = hidden.flatten(0, 1).index_select(0, flat)
        alive = active.index_select(0, flat)
        depth = torch.zeros(batch * length, dtype=torch.long, device=hidden.device)
        kv: dict[int, KeyValue] = {}
        trace = _Trace()
        for r, segment in enumerate(recursions):
            logits = self._logits("routers", r, state, row, flat)
            decision = logits if routers == "routers" else self._logits(routers, r, state, row, flat)
            trace.scores.append(logits)
            trace.means.append(logits.mean())
            keep = alive if self.capacities[r] == 1.0 else alive & (decision >= 0)
            if row.cache is not None and not keep.any():
                if r == 0 and config.kv_strategy != "recursion_wise":
                    self._run(segment, hidden, row.everyone, kv, row)  # later tokens look at these keys and values
                if row.hidden_states is not None:
                    row.hidden_states += [hidden] * (len(recursions) - r)
                break
            local = _places(keep)
            alive = keep.index_select(0, local)
            flat, state, logits = (x.index_select(0, local) for x in (flat, state, logits))
            tokens = self._pack(row, flat, batch, length, r)
            fresh, _ = self._recurse(segment, state, hidden, tokens, logits, kv, row, r)
            # A dummy token, taken where no token is left so that every module runs, changes nothing.
            state = torch.where(alive[:, None], fresh, state)
            hidden = hidden.flatten(0, 1).index_copy(0, flat, state).view(batch, length, width)
            depth = depth.index_add(0, flat, alive.long())
            if row.hidden_states is not None:
                row.hidden_states.append(hidden)
        return hidden, self._record(depth.view(batch, length), row, trace)

    # Token-choice ----------------------------------------------------------------------------------------------------

    def _token_choice(self, recursions, hidden: Tensor, row: Row, step: int | None, global_load: Tensor | None):
        """Each token chooses its depth once (eq. 2.2); its last recursion's output, gated, is added to its state."""
        config, (batch, length, width) = self.config, hidden.shape
        if config.router == "random":
            logits = routing.random_logits(row.input_ids, row.positions, 0, config.num_recursions).expand(batch, -1, -1)
        else:
            logits = self.routers[0](hidden)
        scores = routing.depth_scores(logits, self.activation, self.alpha)
        choice = self._choose_depth(scores.detach(), step)
        if row.max_recursions is not None:
            choice = choice.clamp(max=row.max_recursions - 1)
        depth = choice + 1 if row.real is None else torch.where(row.real, choice + 1, 0)
        trace = _Trace(scores=[logits.detach()], means=list(logits.detach().flatten(0, 1).mean(0)))
        record = self._record(depth, row, trace)
        if row.routing_only:
            return hidden, record
        kv: dict[int, KeyValue] = {}
        last = self._run(recursions[0], hidden, row.everyone, kv, row).flatten(0, 1)
        for r, segment in enumerate(recursions[1:], 1):
            if row.cache is not None and not (depth > r).any():
                break
            flat = _places((depth > r).flatten())
            alive = (depth > r).flatten().index_select(0, flat)
            tokens = self._pack(row, flat, batch, length, r)
            state = last.index_select(0, flat)
            fresh = self._run(segment, state, tokens, kv, row)
            # A dummy token, taken where no token is left so that every module runs, changes nothing.
            state = torch.where(alive[:, None], fresh, state)
            last = last.index_put((flat,), state)  # keeps less for its gradient than index_copy
        last = last.view(batch, length, width)
        if config.gating == "weighted":
            last = scores.gather(-1, choice[..., None]).to(last.dtype) * last
        self._token_losses(logits, scores, row, record.load if global_load is None else global_load)
        hidden = hidden + last
        if row.hidden_states is not None:
            row.hidden_states.append(hidden)
        return hidden, record

    def _choose_depth(self, scores: Tensor, step: int | None) -> Tensor:
        """0-based depth of every token, [B, T]: the best score plus bias; the deepest for all during warm-up."""
        warmup = self.config.balancing_warmup_steps if self.training else 0
        if warmup > 0 and step is not None and step < warmup:
            return scores.new_full(scores.shape[:2], self.config.num_recursions - 1, dtype=torch.long)
        return (scores if self.router_bias is None else scores + self.router_bias).argmax(-1)

    def _token_losses(self, logits: Tensor, scores: Tensor, row: Row, load: Tensor) -> None:
        config = self.config
        if not self.training or config.router == "random":
            return
        if config.balancing == "loss":
            row.add_loss("balancing", routing.balancing_loss(load.float(), scores, row.real))
        if config.z_loss_coefficient > 0:
            row.add_loss("z", routing.z_loss(logits, row.real))

    @torch.no_grad()
    def _record(self, depth: Tensor, row: Row, trace: _Trace) -> RoutingRecord:
        config = self.config
        expert = config.routing == "expert_choice"
        dense_first = expert and config.kv_strategy != "recursion_wise"
        record = routing.make_record(depth, row.real, config, dense_first)
        record.scores, record.selected = trace.scores, trace.selected
        statistics = record.statistics
        statistics |= {f"score_mean_{i + 1}": mean for i, mean in enumerate(trace.means)}
        if trace.agreement:
            statistics["selection_accuracy"] = torch.stack(trace.agreement).mean()
        if expert:
            statistics |= {f"entered_{i + 1}": record.load[i] for i in range(config.num_recursions)}
        else:
            statistics["max_violation"] = routing.max_violation(record.load)
            statistics["entropy"] = routing.entropy(record.load)
        return record


@dataclass
class _Trace:
    """What the routers said, collected over the recursions."""

    scores: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)


def _packed_documents(position_ids: Tensor, rows: int) -> Tensor | None:
    """[B, T] documents of rows packed as transformers' collators pack them: positions start anew with each. None where
    every row is one document."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not starts.any():
        return None
    return F.pad(starts.long().cumsum(1), (1, 0)).expand(rows, -1)


def _places(active: Tensor) -> Tensor:
    """Ascending places of the True entries of a flat mask; [0] where there is none."""
    places = active.nonzero().squeeze(1)
    return places if len(places) else places.new_zeros(1)


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
        step: int | None = None,
        routing_mode: str | None = None,
        num_items_in_batch: Tensor | int | None = None,
        global_load: Tensor | None = None,
        routing_only: bool = False,
        max_recursions: int | None = None,
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
        step: optimizer steps done before this one, needed while a warm-up runs; None: warm-ups are over.
        routing_mode: overrides `config.routing_mode` at evaluation; training always selects by top-k.
        num_items_in_batch: number of labels of the global batch. The LM sum is divided by it, and every other loss, a
            mean over this batch, is multiplied by this batch's share of it, so that the losses of all micro-batches
            and ranks add up to the mean over the global batch.
        global_load: [Nr] share of tokens per depth in the global batch, for the balancing loss; None: this batch's own.
        routing_only: token-choice: run the layers before the recursions and the router alone, for `routing`; no loss.
        max_recursions: no token executes more recursions than this, 1 to Nr (test-time depth, Fig. 5c); None: Nr.
        return_logits: None returns logits unless training with labels; False never makes them.
        """
        given, shifted = _shift(labels, targets, kwargs.get("shift_labels"))
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            document_ids=document_ids,
            step=step,
            routing_mode=routing_mode,
            global_load=global_load,
            routing_only=routing_only,
            max_recursions=max_recursions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
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
            loss, losses = self._loss(hidden, whole, given, shifted, output.losses, num_items_in_batch)
        return MoRCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            losses=losses,
            routing=output.routing,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> Any:
        """`generate` of transformers builds a `MoRCache` in place of its own."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: {implementation!r} cannot hold recursions; leave it out")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MoRCache(self.config)

    def _loss(self, hidden, logits, given, shifted, router_losses, num_items) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its terms. given: labels as passed; shifted: [B, T] the token that each position predicts."""
        if logits is None:
            total = self.lm_head(hidden, shifted)
        else:
            rows = chunk_rows(logits.shape[-1], logits.device)
            parts = zip(logits.flatten(0, 1).split(rows), shifted.flatten().split(rows), strict=True)
            total = torch.stack([cross_entropy_sum(part, target) for part, target in parts]).sum()
        if num_items is None:
            count, share = (shifted != -100).sum().clamp(min=1), 1.0
        else:
            count, share = num_items, (given != -100).sum() / num_items
        losses = {"lm": total / count} | {name: value * share for name, value in router_losses.items()}
        config = self.config
        coefficients = {
            "lm": 1.0,
            "selection": 1.0 if config.selection == "aux_router" else config.selection_coefficient,
            "balancing": config.balancing_coefficient,
            "z": config.z_loss_coefficient,
        }
        loss = losses["lm"]
        for name, value in losses.items():
            if name != "lm":
                loss = loss + coefficients[name] * value
        return loss, losses

    @torch.no_grad()
    def update_router_bias(self, load: Tensor) -> None:
        """Loss-free balancing, once per optimizer step. load: [Nr] share of tokens per depth over the global batch."""
        bias = self.model.router_bias
        if bias is not None:
            bias.copy_(routing.bias_step(bias, load.to(bias), self.config.bias_update_rate))

    def units(self) -> list[nn.Module]:
        """Modules that form a unit of sharding and of checkpointing: each unique layer once."""
        return list(self.model.layers)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer by itself, in place, when it first runs; names of parameters stay as they are.

        The layers share their code, so one compilation serves all of them at each kind of selection, however deep the
        recursion is unrolled, where compiling the model as a whole takes time in proportion to the effective depth.
        """
        for layer in self.units():
            layer.compile(backend=backend)

    def set_recompute(self, policy: RecomputePolicy) -> None:
        """Recompute activations in the backward pass: `none`, each `block`, each `recursion` as a whole, or `selective`
        (keep matrix products and attention, recompute the rest)."""
        if policy not in get_args(RecomputePolicy):
            raise ValueError(f"recompute: expected one of {', '.join(get_args(RecomputePolicy))}, got {policy!r}")
        self._set_gradient_checkpointing(policy == "block", functools.partial(checkpoint, use_reentrant=False))
        self.model.recompute = policy
