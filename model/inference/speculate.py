"""Self-speculative decoding (LayerSkip, arXiv 2404.16710): the first layers draft, the others check.

A draft is made token by token by the layers before an exit, or by the first recursions of a recursive model, and read
out at once (after recursions, through the layers that follow the loop). Then the remaining layers pass all of the draft
in one go: they take up the states and the keys that drafting left behind, so that no layer computes a token twice, and
say what full depth would have chosen. What agrees is kept, with the first token that does not: greedy decoding at full
depth, token for token, whatever was drafted.

Shapes: one sequence; K tokens of a draft, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from model.cache import MoRCache
from model.decoder import Run
from model.depth.layout import Stage
from model.flops import Pass, Work, forward_flops, gates_of
from model.modeling import MoRForCausalLM


@dataclass
class Speculated:
    """What was decoded, and at which cost. flops: of everything after the prompt, by the `exact` convention; plain:
    what decoding the same tokens one by one at full depth takes."""

    tokens: list[int] = field(default_factory=list)
    finished: str = ""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    flops: int = 0
    plain: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that full depth would have chosen too."""
        return self.accepted / max(self.drafted, 1)


@dataclass(frozen=True)
class Parts:
    """Stages that draft, those left out between, and those after a loop, which a draft passes at once."""

    first: tuple[Stage, ...]
    rest: tuple[Stage, ...]
    tail: tuple[Stage, ...]


def parts_of(model: MoRForCausalLM, exit: int) -> Parts:
    """Cut the layers behind exit or recursion `exit`, from 1. Raises ValueError where there is none."""
    method, config = model.model.depth, model.config
    layout, levels = method.layout, method.levels(config)
    if any(stage.level is None for stage in layout) and (method.gates or levels == 1):
        raise ValueError(
            f"speculate: needs exits to draft from, or recursions without routing, and this is a {config.architecture} "
            "model; leave it out"
        )
    if not 1 <= exit < levels:
        raise ValueError(f"speculate: exit {exit} does not fit 1 to {levels - 1}; use 1")
    if layout[-1].level is not None:
        return Parts(layout[:exit], layout[exit:], ())
    ends = [at for at, stage in enumerate(layout) if stage.uses[0].recursion is not None]
    if not all(stage.uses[-1].recursion == turn for turn, stage in enumerate(layout[at] for at in ends)):
        raise ValueError(f"speculate: sharing {config.sharing!r} has no recursion that ends early; leave it out")
    cut = ends[exit - 1] + 1
    return Parts(layout[:cut], layout[cut:], layout[ends[-1] + 1 :])


class Speculator:
    """Decodes greedily with one model. exit: exit, or recursion, that drafts; draft: tokens drafted in a round."""

    def __init__(self, model: MoRForCausalLM, exit: int = 1, draft: int = 4):
        if draft < 1:
            raise ValueError(f"speculate: a draft of {draft} tokens; use 4")
        self.model, self.inner, self.draft = model.eval(), model.model, draft
        self.parts = parts_of(model, exit)

    @torch.inference_mode()
    def __call__(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Speculated:
        """Continue a prompt. stop: tokens that end the text, and are left out. Raises ValueError for a prompt that
        leaves no room in the context."""
        context = self.model.config.max_position_embeddings
        if not prompt or len(prompt) >= context:
            raise ValueError(f"prompt: {len(prompt)} tokens leave no room in a context of {context}")
        cache, found, limit = MoRCache(self.model.config), Speculated(), min(max_tokens, context - len(prompt))
        hidden = self._pass(self.inner.depth.layout, self._embed(prompt), cache, 0)
        fresh = [self._best(hidden[:, -1:])[0]]
        while not found.finished:
            for token in fresh:
                if token in stop:
                    found.finished = "stop"
                    break
                found.tokens.append(token)
                if len(found.tokens) >= limit:
                    found.finished = "length"
                    break
            if not found.finished:
                fresh = self._round(found, cache, min(self.draft, limit - len(found.tokens)))
        return found

    def _round(self, found: Speculated, cache: MoRCache, size: int) -> list[int]:
        """Draft up to `size` tokens, check them, and leave the cache with what was right. Returns the new tokens."""
        start, states, draft = cache.seen, [], [found.tokens[-1]]
        for place in range(start, start + size):
            hidden = self._pass(self.parts.first, self._embed(draft[-1:]), cache, place)
            states.append(hidden)
            if self.parts.tail:
                hidden = self._pass(self.parts.tail, hidden, cache, place)
            draft += self._best(hidden)
        drafted = draft[1:]
        for use in (use for stage in self.parts.tail for use in stage.uses):
            cache.crop_layer(use.depth, size)  # keys of drafted states, which the check makes anew
        best = self._best(self._pass(self.parts.rest, torch.cat(states, 1), cache, start))
        right = next((i for i, pair in enumerate(zip(drafted, best, strict=True)) if pair[0] != pair[1]), size)
        kept = min(right + 1, size)
        if kept < size:
            cache.crop(kept - size)
        found.rounds, found.drafted, found.accepted = found.rounds + 1, found.drafted + size, found.accepted + right
        found.flops += self._flops((*self.parts.first, *self.parts.tail), start, size, size)
        found.flops += self._flops(self.parts.rest, start, size, size)
        found.plain += self._flops(self.inner.depth.layout, start, kept, kept)
        return best[:kept]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self.inner.embed_tokens(torch.tensor([list(tokens)], device=self.model.device))

    def _pass(self, stages: tuple[Stage, ...], hidden: Tensor, cache: MoRCache, start: int) -> Tensor:
        """States [1, K, D] of the tokens from position `start` on, behind the stages."""
        cache.seen = start
        batch = self.inner._describe(hidden, *[None] * 5, cache)
        run = Run(self.inner, batch, "full")
        run.layout = stages
        hidden = run.decode(hidden)
        cache.advance(hidden.shape[1])
        return hidden

    def _best(self, hidden: Tensor) -> list[int]:
        return self.model.lm_head(self.inner.norm(hidden))[0].argmax(-1).tolist()  # type: ignore[no-any-return]

    def _flops(self, stages: tuple[Stage, ...], start: int, tokens: int, heads: int) -> int:
        """Forward FLOPs of tokens from position `start` on behind the stages, and of the head for so many."""
        config, pairs = self.model.config, sum(range(start + 1, start + tokens + 1))
        passes = []
        for stage in stages:
            computed = sum(use.keys != "none" for use in stage.uses)
            passes.append(Pass(stage, tokens, Fraction(tokens * computed, len(stage.uses)), pairs, pairs))
        work = Work(heads, tuple(passes), (0,) * gates_of(config))
        return round(sum(forward_flops(config, work).values()))
