"""Universal Transformer with adaptive computation time (arXiv 1807.03819, after Graves, arXiv 1603.08983).

A shared block is applied up to `num_recursions` times; before each step n a token's halting probability is
p_n = sigmoid(w . x_n + b), x_n its state plus the step's embedding. It halts at the first step N where
p_1 + .. + p_n > 1 - epsilon, and at the last step in any case. Step n weighs w_n = p_n before N, and the remainder
R = 1 - sum of p at N; its output is the sum of w_n times the state after step n. The loss adds the mean of N + R.

accumulated  as above. Halted tokens go on through the block, since others look at their keys, until the last token of
             the batch has halted; with a cache, and in one compiled graph, to the last step.
basic        y <- w_n s_n + (1 - w_n) y, as in the published results; nobody is forced to halt, so that the weights of a
             token that reaches the last step may add up to less than 1.
frozen       as accumulated, but a halted token keeps its state, and at later steps gives its keys from that state plus
             the step's embedding: no query, no feed-forward. The one variant that saves FLOPs.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Carry, DepthMethod, Scorer, Setting
from .layout import Stage, looped
from .routers import compiled_exact_linear, elementwise, exact_linear

if TYPE_CHECKING:
    from ..config import MoRConfig


class Halting(nn.Linear):
    """D -> 1, in fp32. compiled: as of `Router`."""

    compiled = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: [..., D] -> logits [...]."""
        with torch.autocast(x.device.type, enabled=False):
            product = compiled_exact_linear() if self.compiled and x.is_cuda else exact_linear
            return (product(x, self.weight) + self.bias.float()).squeeze(-1)


class Universal(DepthMethod):
    """A gate before each step, which those pass who have not halted."""

    name, place = "universal", 40
    kinds: ClassVar[dict[str, str | None]] = {"ut": "#56b4e9"}
    settings: ClassVar[dict[str, Setting]] = {
        "act_combine": Setting(
            "accumulated",
            Literal["accumulated", "basic", "frozen"],
            "the output is the mean of a token's states (accumulated), folded as published (basic), or the mean with "
            "the states of halted tokens kept, which alone saves FLOPs (frozen); num_recursions limits the steps",
        ),
        "act_epsilon": Setting(0.01, float, "a token halts when its probabilities add up to more than 1 - epsilon"),
        "act_bias": Setting(1.0, float, "bias of the halting unit at the start of training"),
        "ponder_coefficient": Setting(0.01, float, "weight of the ponder loss, the mean of steps and remainder"),
    }

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.halt = Halting(config.hidden_size, 1)
        self.step_embedding = nn.Embedding(self.gates, config.hidden_size)

    # --- from the configuration alone ---------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        if config.kv_strategy != "recursion_wise":
            raise ValueError(
                f"kv_strategy: {config.kv_strategy!r} does not fit universal, where each step has keys of every token; "
                "use 'recursion_wise'"
            )
        if not 0.0 < config.act_epsilon < 1.0:
            raise ValueError(f"act_epsilon: must lie between 0 and 1, got {config.act_epsilon}; use 0.01")
        if config.ponder_coefficient < 0:
            raise ValueError(f"ponder_coefficient: must not be below 0, got {config.ponder_coefficient}; use 0.01")

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        layout = looped(config, gated=True, first_takes_all=True)
        if config.act_combine != "frozen":  # those who enter a step are all of the batch, or none
            return layout
        return tuple(replace(s, uses=tuple(replace(use, keys="everyone") for use in s.uses)) for s in layout)

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        shapes = ((config.hidden_size, 1),)
        return [
            Scorer("halt", gate, shapes, biases=1, counted=gate == 0)  # one unit for every step
            for gate in range(config.num_recursions)
        ]

    @classmethod
    def other_parameters(cls, config: MoRConfig) -> int:
        return config.num_recursions * config.hidden_size

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        """Every step for every token; of `frozen`, as many halting at each step."""
        depth = config.num_recursions
        return [Fraction(depth - r if config.act_combine == "frozen" else depth, depth) for r in range(depth)]

    @classmethod
    def merged(cls, config: MoRConfig) -> int:
        return 2 if config.act_combine == "basic" else 1  # the output so far is multiplied as well

    @classmethod
    def shown(cls, config: MoRConfig, record: Any) -> Tensor | None:
        """Halting probabilities of every step, NaN after the last; where tokens dropped out, only of those offered."""
        if config.act_combine == "frozen":
            return None
        known = (s if s.numel() == record.depth.numel() else record.depth * torch.nan for s in record.scores)
        return torch.stack([torch.sigmoid(s.view_as(record.depth)) for s in known], -1)

    # --- rules --------------------------------------------------------------------------------------------------------

    def begin(self, x: Tensor, run: Any) -> dict[str, Tensor]:
        zero = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
        counts = {"sum": zero, "remainder": zero, "halted": zero.bool(), "steps": zero.long()}
        return counts | {"output": torch.zeros_like(x)}

    def prepare(self, gate: int, x: Tensor, run: Any) -> Tensor:
        return x + self.step_embedding(torch.full((), gate, device=x.device)).to(x.dtype)

    def score(self, gate: int, x: Tensor, carry: Carry, run: Any) -> Tensor:
        return self.halt(x)

    def admit(self, gate: int, logits: Tensor | None, x: Tensor, carry: Carry, run: Any) -> Tensor | None:
        if gate == 0:
            return None
        running = ~carry["halted"]
        if self.config.act_combine == "frozen":
            return running
        if run.cached:  # tokens to come may take more steps, and look at keys of all there
            return torch.ones_like(running)
        # Nobody looks at a step that nobody runs. (A graph of one piece cannot ask.)
        return None if torch.compiler.is_compiling() or self._anyone(gate, running, run) else running

    def _anyone(self, gate: int, running: Tensor, run: Any) -> bool:
        count = run.known(gate)
        return bool(running.any()) if count is None else count > 0

    def foresee(self, gate: int, logits: Tensor | None, carry: Carry, run: Any) -> Tensor:
        """Who halts at a step is settled by its score, before its layers."""
        assert logits is not None
        return ~carry["halted"] & ~self._halts(gate, elementwise(torch.sigmoid, logits.detach()), carry, run)

    def _halts(self, gate: int, p: Tensor, carry: Carry, run: Any) -> Tensor:
        """Who halts at this step. p: [...] halting probabilities."""
        running = ~carry["halted"]
        if run.all_in:  # exactly as many steps as are allowed
            return running if gate == run.last else torch.zeros_like(running)
        if gate == run.last and self.config.act_combine != "basic":
            return running
        return running & (carry["sum"] + p > 1.0 - self.config.act_epsilon)

    def merge(
        self, gate: int, before: Tensor, after: Tensor, logits: Tensor | None, carry: Carry, run: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert logits is not None
        combine, total, running = self.config.act_combine, carry["sum"], ~carry["halted"]
        p = elementwise(torch.sigmoid, logits)
        halts = self._halts(gate, p, carry, run)
        weight = torch.where(halts, 1.0 - total, torch.where(running, p, 0.0))
        wide = weight[..., None].to(after.dtype)
        output = carry["output"] * (1.0 - wide) if combine == "basic" else carry["output"]
        changes = {
            "sum": total + weight,
            "remainder": carry["remainder"] + torch.where(halts, weight, 0.0),
            "halted": carry["halted"] | halts,
            "steps": carry["steps"] + running,
            "output": output + wide * after,
        }
        return after, changes

    def end(self, x: Tensor, carry: Carry, run: Any) -> Tensor:
        run.executed(carry["steps"])
        if self.training:
            ponder = carry["steps"] + carry["remainder"]
            run.loss("ponder", ponder.mean() if run.real is None else ponder[run.real].mean())
        return carry["output"]

    # --- training -----------------------------------------------------------------------------------------------------

    def coefficients(self) -> dict[str, float]:
        return {"ponder": self.config.ponder_coefficient}

    def describe(self, record: Any, run: Any) -> None:
        """Mean steps, and the share of tokens that took all of them."""
        tokens = record.depth.numel() if run.real is None else run.real.sum().clamp(min=1)
        record.statistics["mean_steps"] = record.depth.sum() / tokens
        record.statistics["at_step_limit"] = (record.depth == run.last + 1).sum() / tokens

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """The halting unit starts at its bias, so that tokens halt early at first."""
        nn.init.constant_(self.halt.bias, self.config.act_bias)
