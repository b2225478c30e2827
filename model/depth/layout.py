"""The layout of a model: which layers the same tokens pass together, what lets tokens in, whose keys are computed.

Whatever counts or stores (FLOPs, memory, caches, the engine's pool) reads this and asks no method for its name. No
tensors here. L effective depth, Nr recursions, G gates (decisions that let tokens in, from 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..sharing import Application, applications, segments

if TYPE_CHECKING:
    from ..config import MoRConfig

Keys = Literal["entered", "everyone", "none"]


@dataclass(frozen=True)
class Use:
    """One use of a unique layer.

    depth: position among the L effective layers. layer: index of the unique layer. recursion: 0-based recursion that
    the use belongs to; None for unshared layers. encoding: index of the recursion encoding that scales its output.
    keys: whose keys and values it computes: of the tokens that entered its stage, of every token, or none at all.
    source: depth of the use whose keys it reads (`none`) or replaces (`entered`); None: it reads its own alone.
    """

    depth: int
    layer: int
    recursion: int | None = None
    encoding: int | None = None
    keys: Keys = "everyone"
    source: int | None = None


@dataclass(frozen=True)
class Stage:
    """Consecutive uses of layers that the same tokens pass.

    gate: the decision that lets tokens in; None: every token passes. whole: the layers are computed for every token,
    though only those let in take the result (later stages need keys of every token, made from passed states).
    call: stages of one call share their layers and their weights: the engine runs them together. level: depth, from 0,
    that a token of limited depth has to be allowed for this stage; None: its uses have recursions that say so.
    """

    uses: tuple[Use, ...]
    gate: int | None = None
    whole: bool = False
    call: int = 0
    level: int | None = None

    @property
    def selects(self) -> bool:
        """Whether its queries may be fewer than the tokens."""
        return self.gate is not None and not self.whole

    @property
    def sees_all(self) -> bool:
        """Whether its queries find keys of every token before them."""
        return self.uses[0].keys == "everyone" or self.uses[0].source is not None

    @property
    def shared(self) -> bool:
        """Whether a recursion of a shared block is part of it."""
        return any(use.recursion is not None for use in self.uses)


def looped(config: MoRConfig, gated: bool, first_takes_all: bool) -> tuple[Stage, ...]:
    """Unshared layers and the recursions of a shared block: `sharing` and `kv_strategy` meet here, and nowhere else.

    gated: a gate before each recursion; first_takes_all: the first one lets every token in.
    """
    first = {use.layer: use.depth for use in reversed(applications(config)) if not use.recursion}
    # Recursions with weights of their own (deltas, norms, encodings) cannot share a call.
    apart = not gated or config.relaxation != "none" or not config.share_norms
    stages: list[Stage] = []
    for segment in segments(config):
        recursion = segment[0].recursion
        uses = tuple(_use(config, use, gated, first_takes_all, first) for use in segment)
        gate = recursion if gated else None
        # Keys of everyone made from passed states, unless those of the states with which tokens stopped will do.
        passed = config.kv_strategy != "propagated" and any(use.keys == "everyone" for use in uses)
        whole = gate == 0 and (first_takes_all or passed)
        together = bool(stages) and gate is not None and stages[-1].gate is not None and not apart
        call = stages[-1].call + (not together) if stages else 0
        stages.append(Stage(uses, gate, whole, call))
    return tuple(stages)


def _use(config: MoRConfig, use: Application, gated: bool, first_takes_all: bool, first: dict[int, int]) -> Use:
    """The keys of one use, by `kv_strategy`."""
    keys: Keys = "everyone"
    source = None
    if use.recursion is not None and config.kv_strategy == "recursion_wise":
        keys = "entered" if gated and not (first_takes_all and use.recursion == 0) else "everyone"
    elif use.recursion and config.kv_strategy != "propagated":
        keys, source = ("none" if config.kv_strategy == "shared" else "entered"), first[use.layer]
    return Use(use.depth, use.layer, use.recursion, use.encoding, keys, source)


def stack(config: MoRConfig, gate_of: Callable[[int], int | None], keys: Keys) -> tuple[Stage, ...]:
    """Untied layers. gate_of: depth -> gate before that layer; neighbours of one gate form a stage.

    keys: whose keys and values the gated layers compute.
    """
    stages: list[Stage] = []
    for depth in range(config.num_hidden_layers):
        gate = gate_of(depth)
        use = Use(depth, depth, keys="everyone" if gate is None else keys)
        if stages and stages[-1].gate == gate:
            stages[-1] = replace(stages[-1], uses=(*stages[-1].uses, use))
        else:
            stages.append(Stage((use,), gate, call=len(stages)))
    return tuple(stages)


def within(stages: tuple[Stage, ...], recursions: int | None) -> tuple[Stage, ...]:
    """The stages without deeper levels, or uses of deeper recursions, than so many; None: all of them."""
    if recursions is None:
        return stages
    if any(stage.level is not None for stage in stages):
        return tuple(stage for stage in stages if (stage.level or 0) < recursions)
    kept = ((stage, tuple(use for use in stage.uses if (use.recursion or 0) < recursions)) for stage in stages)
    return tuple(replace(stage, uses=uses) for stage, uses in kept if uses)


def last_gate(stages: tuple[Stage, ...]) -> int:
    """The last decision that a token meets; -1 where it meets none."""
    return max([-1, *[stage.gate for stage in stages if stage.gate is not None]])
