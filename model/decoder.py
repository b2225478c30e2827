"""One pass of the layers, for every way of spending depth: which tokens a stage computes, and where its results go.

Shapes: B batch, T positions of a row, C candidates and K slots of a row, N tokens packed over the batch, D hidden size,
G gates. `Run.decode` is the loop; `Run.apply` is the one place where layers are called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .attention import see, through
from .attention.cpu import NAMESPACE
from .attention.visible import Rows, Visible, rung
from .cache import MoRCache
from .depth.base import DepthMethod
from .depth.capacity import selected_mask, selection_size, slots_of
from .depth.layout import Stage, Use, last_gate, within
from .depth.routers import masked_mean
from .layers import KeyValue, Tokens, gather_rows
from .record import RoutingRecord, make_record

if TYPE_CHECKING:
    from .modeling import MoRModel

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
    "torch_attn::_varlen_attn",
    "flex_attention",
}


# Devices whose work is queued: reading a count, or a new shape for each, would hold it up.
LADDERED = {"cuda"}


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
class Batch:
    """What a forward pass knows about its rows before any layer runs.

    everyone: the `Tokens` of the layers that compute every position. rows: padding, documents, who may look at whom.
    positions: [B or 1, T]. cache: of generation.
    """

    everyone: Tokens
    rows: Rows
    positions: Tensor
    input_ids: Tensor | None = None
    cache: MoRCache | None = None

    @property
    def real(self) -> Tensor | None:
        """[B, T] bool, False for padding; None: no padding."""
        return None if self.rows.real is None else self.rows.real[:, self.rows.past :]

    @property
    def documents(self) -> Tensor | None:
        """[B, T] non-decreasing ids or None."""
        return self.rows.documents


# Selections of tokens -------------------------------------------------------------------------------------------------


class Everyone:
    """Every position, padding included, as it lies in its row: states are [B, T, D]."""

    used: Tensor | None = None

    def __init__(self, run: Run):
        self.run, self.documents = run, run.batch.documents

    @property
    def full(self) -> bool:
        """Whether all of the selection are known to count, without waiting for the device."""
        return self.used is None

    def take(self, x: Tensor) -> Tensor:
        """x: [B, T, ...] -> the selection's own shape."""
        return x

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x [B, T, ...] with the selection's values replaced."""
        return new

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        """`new`, but `old` where a token only stands in for none."""
        return new

    def mask(self) -> Tensor:
        """[B, T] bool: the tokens that count."""
        real = self.run.batch.real
        if real is not None:
            return real
        return torch.ones(self.run.shape, dtype=torch.bool, device=self.run.device)

    def tokens(self, stage: Stage) -> Tokens:
        return self.run.batch.everyone


class Slots(Everyone):
    """A fixed number of tokens: positions `index` [B, K], causal, of which `used` count (None: all)."""

    def __init__(self, run: Run, index: Tensor, used: Tensor | None, documents: Tensor | None):
        self.run, self.index, self.used, self.documents = run, index, used, documents

    @classmethod
    def real(cls, run: Run) -> Everyone:
        """Every token, padding last whichever side it is on, so that slots stay causal."""
        real, documents = run.batch.real, run.batch.documents
        if real is None:
            return Everyone(run)
        index = torch.sort((~real).long(), dim=1, stable=True).indices
        return cls(run, index, real.gather(1, index), None if documents is None else documents.gather(1, index))

    def take(self, x: Tensor) -> Tensor:
        return gather_rows(x, self.index)

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        index = self.index.view(*self.index.shape, *[1] * (x.dim() - 2)).expand_as(new)
        return x.scatter(1, index, new)

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.used is None else torch.where(_wide(self.used, new), new, old)

    def mask(self) -> Tensor:
        used = torch.ones_like(self.index, dtype=torch.bool) if self.used is None else self.used
        return torch.zeros(self.run.shape, dtype=torch.bool, device=used.device).scatter(1, self.index, used)

    def tokens(self, stage: Stage) -> Tokens:
        batch = self.run.batch
        rows = self.index.shape[0]
        cos, sin = (gather_rows(t.expand(rows, -1, -1), self.index) for t in (batch.everyone.cos, batch.everyone.sin))
        tokens = Tokens(cos, sin, self.index, self.used)
        return self.run.seen_by(tokens, Visible(batch.rows, stage.sees_all, self.index, self.used))


class Packed(Everyone):
    """Ragged tokens `flat` [N], ascending b * T + t; states are [N, D].

    Those that are not `alive` [N] stand for none and change nothing: one where no token is left, so that every rank
    runs every module; on a GPU as many more, at the end, as make N a size of the ladder (`attention.visible.rung`).
    """

    def __init__(self, run: Run, flat: Tensor, alive: Tensor):
        self.run, self.flat, self.alive, self.documents = run, flat, alive, None

    @classmethod
    def real(cls, run: Run) -> Everyone:
        """Every token, without the padding."""
        return Everyone(run) if run.batch.real is None else cls.of(run, run.batch.real)

    @property
    def full(self) -> bool:
        return len(self.flat) > 1 and not self.run.laddered

    @classmethod
    def of(cls, run: Run, chosen: Tensor, gate: int | None = None) -> Packed:
        """The True entries of [B, T]."""
        flat, alive = run.compacted(chosen.flatten(), gate)
        return cls(run, flat, alive)

    def take(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.flat)

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        # index_put, since the gradient of index_copy keeps x.
        return x.flatten(0, 1).index_put((self.flat,), new).view_as(x)

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(_wide(self.alive, new), new, old)

    def mask(self) -> Tensor:
        nobody = torch.zeros(self.run.shape, dtype=torch.bool, device=self.flat.device)
        return nobody.flatten().index_put((self.flat,), self.alive).view_as(nobody)

    def tokens(self, stage: Stage) -> Tokens:
        batch, (rows_of_batch, length), flat = self.run.batch, self.run.shape, self.flat
        if self.run.laddered:
            tables = (batch.everyone.cos, batch.everyone.sin)
            cos, sin = (t.expand(rows_of_batch, -1, -1).flatten(0, 1).index_select(0, flat) for t in tables)
            visible = Visible(batch.rows, stage.sees_all, flat=flat, alive=self.alive)
            return self.run.seen_by(Tokens(cos, sin, flat=flat, alive=self.alive), visible)
        rows, positions = flat // length, flat % length
        counts = flat.new_zeros(rows_of_batch).index_add(0, rows, torch.ones_like(rows))
        slots = int(counts.max())
        packed = rows * slots + torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[rows]
        index = flat.new_zeros(rows_of_batch * slots).index_copy(0, packed, positions).view(rows_of_batch, slots)
        used = torch.arange(slots, device=flat.device) < counts[:, None]
        cos, sin = (
            table.expand(rows_of_batch, -1, -1).flatten(0, 1).index_select(0, flat)
            for table in (batch.everyone.cos, batch.everyone.sin)
        )
        tokens, mask = Tokens(cos, sin, index, used, packed), None
        if batch.cache is not None and stage.gate is not None:
            mask = batch.cache.enter(stage.gate, flat, tokens, length)
        return self.run.seen_by(tokens, Visible(batch.rows, stage.sees_all, index, used), mask)


def _wide(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(*flags.shape, *[1] * (x.dim() - flags.dim()))


def _indices(flags: Tensor) -> Tensor:
    """Ascending indices of the True entries of [N]; [0] where there is none."""
    indices = flags.nonzero().squeeze(1)
    return indices if len(indices) else indices.new_zeros(1)


def _true_first(flags: Tensor, size: int) -> Tensor:
    """`size` indices into [N]: those of the True entries, ascending, then of other ones. Nothing waits for a count."""
    place = torch.where(flags, flags.cumsum(0) - 1, flags.sum() + (~flags).cumsum(0) - 1)
    here = torch.arange(len(flags), device=flags.device)
    return torch.empty_like(here).scatter_(0, place, here)[:size]


class Counts:
    """Numbers on their way from a device to the host, which goes on meanwhile."""

    def __init__(self, values: Tensor, first: int = 0):
        """values: integers of the gates from `first` on."""
        self.first = first
        self.event: torch.cuda.Event | None = None
        self.values = values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __getitem__(self, gate: int) -> int:
        if self.event is not None:
            self.event.synchronize()
        return int(self.values[gate - self.first])


class Own:
    """What the tokens of a selection carry, gathered when asked for."""

    def __init__(self, carry: dict[str, Tensor], tokens: Everyone):
        self.carry, self.tokens = carry, tokens

    def __getitem__(self, name: str) -> Tensor:
        return self.tokens.take(self.carry[name])


# The pass -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One forward pass: what the rules of a method may ask (`DepthMethod`), and what it collects.

    mode: how gates decide, one of the method's `modes`. step: optimizer steps done. load: [G] of the global batch.
    routing_only: no layer behind a gate runs. max_recursions: no token executes more; None: as many as there are.
    prompt: [B, 1] positions of each text that were given, of which some methods decide nothing. keep_exits: have states
    at every exit in `exits`. losses: unweighted scalars by name. exits: states [B, T, D] that are to be read out for
    the loss, and the weights of their losses.
    """

    model: MoRModel
    batch: Batch
    mode: str
    step: int | None = None
    load: Tensor | None = None
    routing_only: bool = False
    max_recursions: int | None = None
    head: Callable[[Tensor], Tensor] | None = None
    prompt: Tensor | None = None
    keep_exits: bool = False
    hidden_states: list[Tensor] | None = None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    exits: list[tuple[Tensor, float]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    score_means: list[Tensor] = field(default_factory=list)
    figures: dict[str, list[Tensor]] = field(default_factory=dict)
    selected: list[Tensor] = field(default_factory=list)
    entered: dict[int, Tensor] = field(default_factory=dict)
    offered: dict[int, Tensor] = field(default_factory=dict)
    heads: int = 0
    depth: Tensor | None = None
    kv: dict[int, KeyValue] = field(default_factory=dict)
    ahead: dict[int, Counts] = field(default_factory=dict)
    laddered: bool = False

    def __post_init__(self) -> None:
        self.method: DepthMethod = self.model.depth
        self.layout = within(self.method.layout, self.max_recursions)
        self.last = last_gate(self.layout)
        self.sources = {use.source for stage in self.layout for use in stage.uses if use.source is not None}
        self.fixed = self.method.fixed and self.mode == "topk"

    # What rules may ask -----------------------------------------------------------------------------------------------

    @property
    def input_ids(self) -> Tensor | None:
        """[B, T]"""
        return self.batch.input_ids

    @property
    def positions(self) -> Tensor:
        """[B or 1, T]"""
        return self.batch.positions

    @property
    def real(self) -> Tensor | None:
        """[B, T], False for padding; None: no padding."""
        return self.batch.real

    threshold: float | None = None  # of exits, in place of the model's own
    hidden: Tensor | None = None  # [B, T, D] of everyone, while a gate scores
    all_in = False  # whether every token takes all of the depth there is

    @property
    def cached(self) -> bool:
        """Whether tokens to come will read keys of the tokens at hand."""
        return self.batch.cache is not None

    def known(self, gate: int) -> int | None:
        """How many tokens of the batch will pass a gate, where that was told ahead (`counts`, `foresee`)."""
        return self.ahead[gate][gate] if gate in self.ahead else None

    def loss(self, name: str, value: Tensor) -> None:
        """Add to an auxiliary loss."""
        self.losses.setdefault(name, []).append(value)

    def exit(self, weight: float) -> None:
        """Have everyone's states before this gate read out for the loss, which counts so much of the whole."""
        assert self.hidden is not None
        self.exits.append((self.hidden, weight))

    def executed(self, depth: Tensor) -> None:
        """[B, T] steps that tokens made use of, where these are not the gates that they passed."""
        self.depth = depth

    def figure(self, name: str, value: Tensor) -> None:
        """Add to a statistic, the mean of what is added."""
        self.figures.setdefault(name, []).append(value.detach())

    def scored(self, logits: Tensor, used: Tensor | None = None, *, outputs: bool = False) -> None:
        """Note raw scores for the record: [...] of a gate, or with `outputs` [..., G] of all of them."""
        logits = logits.detach()
        self.scores.append(logits)
        self.score_means.append(logits.flatten(0, -2).mean(0) if outputs else masked_mean(logits, used))

    def readout(self, x: Tensor) -> Tensor:
        """Norm and head: [..., D] -> logits [..., V]."""
        if self.head is None:
            raise ValueError("routing_mode: 'causal' asks the head how sure it is; call MoRForCausalLM, or use 'full'")
        self.heads += x[..., 0].numel()
        return self.head(self.norm(x))

    def norm(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.model.norm(x)

    # The loop ---------------------------------------------------------------------------------------------------------

    def decode(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]: every stage in turn, on the tokens that its gate lets in."""
        method = self.method
        self.shape, self.device, self.dtype = hidden.shape[:2], hidden.device, hidden.dtype
        self.laddered = hidden.device.type in LADDERED and not self.cached
        start: Everyone = Slots.real(self) if self.fixed else Packed.real(self)
        offered: Everyone = start
        x: Tensor | None = None
        carry: dict[str, Tensor] = {}
        for stage in self.layout:
            if stage.gate is None:
                hidden, x = self.apply(stage, hidden, Everyone(self)), None
                continue
            if stage.gate == 0:
                carry = method.begin(hidden, self)
                ahead = method.counts(carry, self) if self.laddered and not self.fixed else None
                if ahead is not None:
                    self.ahead = dict.fromkeys(range(method.gates), Counts(ahead))
            before = offered.take(hidden) if x is None else x
            hidden, x, offered, changed = self._pass(stage, hidden, before, offered, carry)
            carry = carry | changed
            if not method.nested:
                offered, x = start, None
            if stage.gate == self.last:
                hidden = method.end(hidden, carry, self)
                if self.routing_only:
                    return hidden
            if self.hidden_states is not None and (stage.gate == self.last or not method.mixes):
                self.hidden_states.append(hidden)
        return hidden

    def _pass(
        self, stage: Stage, hidden: Tensor, x: Tensor, offered: Everyone, carry: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Everyone, dict[str, Tensor]]:
        """One gate and its stage: the states of all, the states of those let in, who they are, what they carry now.

        x: states of the tokens offered, in their shape.
        """
        method, gate = self.method, stage.gate
        assert gate is not None
        x, self.hidden = method.prepare(gate, x, self), hidden
        logits = method.score(gate, x, Own(carry, offered), self)
        self.hidden = None  # recomputation keeps this object, and would keep the states
        entered, x, logits = self._let_in(gate, x, logits, offered, carry)
        self.offered[gate], self.entered[gate] = offered.mask(), entered.mask()
        everyone = stage.uses[0].keys == "everyone"
        if self.routing_only or self._nobody(stage, entered):
            return hidden, x, entered, {}
        if self.laddered and gate != self.last:
            passes = method.foresee(gate, logits, Own(carry, entered), self)
            if passes is not None:
                passes = passes & entered.alive if isinstance(entered, Packed) else passes
                self.ahead[gate + 1] = Counts(passes.sum()[None], gate + 1)
        if stage.whole:
            after = entered.take(self.apply(stage, method.prepare(gate, hidden, self), Everyone(self)))
        else:
            around = method.prepare(gate, hidden, self) if everyone and type(entered) is not Everyone else None
            after = self.apply(stage, x, entered, around)
        own = Own(carry, entered)
        new, changes = method.merge(gate, x, after, logits, own, self)
        new = entered.settle(new, entered.take(hidden) if self.laddered else x)
        changed = {name: entered.put(carry[name], entered.settle(v, own[name])) for name, v in changes.items()}
        return entered.put(hidden, new), new, entered, changed

    def _nobody(self, stage: Stage, entered: Everyone) -> bool:
        """Whether a stage can be left out: while generating on one process, where nobody needs it."""
        if self.batch.cache is None or stage.whole or not isinstance(entered, Packed):
            return False
        return stage.uses[0].keys != "everyone" and not bool(entered.alive.any())

    def _let_in(
        self, gate: int, x: Tensor, logits: Tensor | None, offered: Everyone, carry: dict[str, Tensor]
    ) -> tuple[Everyone, Tensor, Tensor | None]:
        """Who passes a gate: their selection, and x and logits of them alone."""
        if self.fixed:
            assert logits is not None
            return self._top_k(gate, x, logits, offered)
        if logits is not None:
            self.scored(logits.flatten(), offered.alive if self.laddered and isinstance(offered, Packed) else None)
        chosen = self.method.admit(gate, logits, x, Own(carry, offered), self)
        if chosen is None:
            return offered, x, logits
        if isinstance(offered, Packed):
            local, alive = self.compacted(offered.alive & chosen, gate)
            entered = Packed(self, offered.flat.index_select(0, local), alive)
            return entered, x.index_select(0, local), None if logits is None else logits.index_select(0, local)
        entered = Packed.of(self, chosen, gate)
        return entered, entered.take(x), None if logits is None else entered.take(logits)

    def compacted(self, chosen: Tensor, gate: int | None = None) -> tuple[Tensor, Tensor]:
        """Indices of the True entries of [N], ascending, and whether each is one: see `Packed`.

        gate: whose choice it is, where the host may know its count ahead.
        """
        if not self.laddered:
            local = _indices(chosen)
        elif self.routing_only:
            return torch.arange(len(chosen), device=chosen.device), chosen
        else:
            count = None if gate is None else self.known(gate)
            local = _true_first(chosen, rung(int(chosen.sum()) if count is None else count, self.shape.numel()))
        return local, chosen.index_select(0, local)

    def _top_k(self, gate: int, x: Tensor, logits: Tensor, offered: Everyone) -> tuple[Everyone, Tensor, Tensor]:
        """The best of a row by their scores, as many as the gate's share of the whole row says, at fixed shapes."""
        method, length, real = self.method, self.shape[1], self.batch.real
        share = method.size(gate, self.step)
        slots = selection_size(share, length)
        used, documents = offered.used, offered.documents
        size: Any = slots
        if real is not None:
            lengths = real.sum(1, keepdim=True)
            size = (lengths * share).long().clamp(min=1).minimum(lengths)
        everything = slots == logits.shape[1]
        if everything:
            chosen = torch.ones_like(logits, dtype=torch.bool) if used is None else used
        else:
            chosen = selected_mask(logits.detach(), documents, used, size)
        self.scored(logits, used)
        method.losses(gate, x, logits, chosen, used, self)
        entered = offered
        if not everything:
            local = slots_of(chosen, used, slots)
            x, logits = gather_rows(x, local), logits.gather(1, local)
            index = offered.index.gather(1, local) if isinstance(offered, Slots) else local
            used = None if used is None else chosen.gather(1, local)
            entered = Slots(self, index, used, None if documents is None else documents.gather(1, local))
        self.selected.append(
            entered.index
            if isinstance(entered, Slots)
            else torch.arange(length, device=logits.device).expand(logits.shape[0], -1)
        )
        return entered, x, logits

    # Layers -----------------------------------------------------------------------------------------------------------

    def seen_by(self, tokens: Tokens, visible: Visible, mask: Tensor | None = None) -> Tokens:
        """`tokens` that know who sees whom. mask: of a cache that holds the keys of a gate's tokens alone."""
        config = self.model.config
        if self.cached:
            tokens.seen = through(visible.mask() if mask is None else mask, config, self.device)
        else:
            tokens.seen = see(visible, config, self.dtype, self.model.training)
        return tokens

    def apply(self, stage: Stage, x: Tensor, who: Everyone, around: Tensor | None = None) -> Tensor:
        """The layers of a stage on the tokens of `who`, with recomputation as set. x: [B, K, D] or [N, D].

        around: [B, T, D] the states of everyone, where keys are made of these too.
        """
        model, tokens = self.model, who.tokens(stage)
        # The policy `block` is the layers' own: each checkpoints itself.
        policy = model.recompute if model.training and torch.is_grad_enabled() else "none"
        together = policy == "recursion" and stage.shared
        groups = [stage.uses] if together else [(use,) for use in stage.uses]
        for group in groups:
            function = functools.partial(self._layers, group, tokens=tokens, kv=dict(self.kv), who=who, around=around)
            if policy == "recursion":
                x, fresh = checkpoint(function, x, use_reentrant=False)
            elif policy == "selective":
                contexts = functools.partial(create_selective_checkpoint_contexts, _keep)
                counted = functools.partial(_cast_every_time, function)
                x, fresh = checkpoint(counted, x, use_reentrant=False, context_fn=contexts)
            else:
                x, fresh = function(x)
            self.kv.update(fresh)
            if stage.gate is None and self.hidden_states is not None:
                self.hidden_states.append(x)
        return x

    def _layers(self, uses: tuple[Use, ...], x: Tensor, *, tokens: Tokens, kv, who: Everyone, around: Tensor | None):
        """The layer calls. Returns the output and the keys and values that later stages read."""
        model, cache = self.model, self.batch.cache
        fresh: dict[int, KeyValue] = {}
        for use in uses:
            shared = None
            if use.source is not None and cache is None:
                shared = fresh.get(use.source) or kv.get(use.source)
            states = None
            if around is not None:  # a slot that stands for no token must not change its position's state
                states = who.put(around, x if who.full else who.settle(x, who.take(around)))
            before, kept = x, self.method.kept(use.depth, self)
            keep = use.depth in self.sources and cache is None
            x, added, key, value = model.layers[use.layer](
                x,
                *(shared or (None, None)),
                states,
                tokens=tokens,
                everyone=self.batch.everyone,
                keys=use.keys,
                keep=keep,
                recursion=use.recursion or 0,
                cache=cache,
                depth=use.depth,
            )
            x = x + added
            if keep:
                fresh[use.depth] = (key, value)
            if kept is not None:
                x = torch.where(who.take(kept.expand(self.shape))[..., None], x, before)
            if model.recursion_encoding is not None and use.encoding is not None:
                x = x * model.recursion_encoding[use.encoding].to(x.dtype)
        return x, fresh

    # The record -------------------------------------------------------------------------------------------------------

    def record(self) -> RoutingRecord | None:
        """What was routed; None where nothing is."""
        with torch.no_grad():
            return self._record()

    def _record(self) -> RoutingRecord | None:
        method = self.method
        if not method.gates:
            return None
        real = self.batch.real
        nobody = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        masks = [[of.get(gate, nobody) for gate in range(method.gates)] for of in (self.entered, self.offered)]
        entered, offered = (torch.stack(mask, -1) for mask in masks)
        record = make_record(entered, offered, real, method.layout)
        if self.depth is not None:
            record.depth = self.depth if real is None else self.depth.masked_fill(~real, 0)
        record.heads = self.heads + len(self.exits) * self.shape[0] * self.shape[1]
        record.scores, record.selected = self.scores, self.selected
        means = [mean for means in self.score_means for mean in means.flatten()]
        record.statistics |= {f"score_mean_{i + 1}": mean for i, mean in enumerate(means)}
        record.statistics |= {name: torch.stack(values).mean() for name, values in self.figures.items()}
        method.describe(record, self)
        return record
