"""The interface: a way of spending depth is a layout, and rules on the tokens at hand, whatever their shape.

From the configuration alone: which stages there are, what its gates cost, how many tokens they are expected to let in.
The rules on tokens: `begin`, then for each gate `prepare`, `score`, `admit` (or a top-k of `size`) and `merge`, then
`end`. `model.decoder` runs them on whole batches, the engine on the tokens in flight; both in the same order.

Shapes: states x are [..., D] and scores [...] of the same leading shape: rows [B, T], slots [B, C], or packed [N].
What tokens carry from gate to gate is a name for each tensor [..., *] of that leading shape. G gates count from 0.
`run` is a `model.decoder.Run`, or the engine's likeness of one: rules ask it for `mode`, `step`, `input_ids`,
`positions`, `prompt` (of each text: how many positions were given; None: unknown), `threshold` (asked for in place of
the configured one), `real`, `load`, `last` (the last gate), `cached`, `all_in` (every token takes all of the depth),
`norm`, `readout` (norm and head), `keep_exits` and, of whole batches, `known` (how many pass a gate, told ahead); they
give it `loss`, `exit`, `scored`, `figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .layout import Stage

if TYPE_CHECKING:
    from ..config import MoRConfig

# Every way of spending depth: value of `routing` -> class, in the order of reports.
METHODS: dict[str, type[DepthMethod]] = {}


@dataclass(frozen=True)
class Setting:
    """A field of the configuration that methods own. kind: its type, a `Literal` for a choice; meaning: for people."""

    default: Any
    kind: Any
    meaning: str


@dataclass(frozen=True)
class Scorer:
    """The matrices that score the tokens offered to a gate.

    name: of the component in `flops.breakdown`. shapes: (inputs, outputs) of each, one after the other. biases: their
    number. to_weights, to_input: whether gradients reach them, and the states that they score. counted: False where an
    earlier gate has the same ones.
    """

    name: str
    gate: int
    shapes: tuple[tuple[int, int], ...]
    biases: int = 0
    to_weights: bool = True
    to_input: bool = True
    counted: bool = True

    @property
    def parameters(self) -> int:
        return (sum(inputs * outputs for inputs, outputs in self.shapes) + self.biases) * self.counted


class Carry(Protocol):
    """What the tokens at hand carry, by name."""

    def __getitem__(self, name: str) -> Tensor: ...


class DepthMethod(nn.Module):
    """One way of spending depth. Subclasses stand one to a file; one that has a `name` registers itself.

    name: value of `routing`. place: where it stands in reports. kinds: names of its models (`architecture`), with the
    colour that each has in reports; None: the next free one. settings: the fields of the configuration that mean
    something to it; those of other methods are refused. Methods that share a setting name the same `Setting`.
    """

    name: ClassVar[str]
    place: ClassVar[int] = 1000
    kinds: ClassVar[dict[str, str | None]] = {}
    settings: ClassVar[dict[str, Setting]] = {}

    # Only tokens that passed a gate are offered the next.
    nested: ClassVar[bool] = True
    # Training lets in as many tokens as `size` says, at fixed shapes; otherwise batches are ragged.
    fixed: ClassVar[bool] = False

    # Whether a token chooses a depth, so that scores are of depths and not of gates.
    chooses_depth: ClassVar[bool] = False
    # Whether a generating model may be asked for its load before the first gate (`routing_only`).
    previews: ClassVar[bool] = False
    # Whether what it computes on every token is compiled, on a GPU.
    compiled = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            register(cls)

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.config, self.layout = config, self.stages(config)
        self.gates = len(self.shares(config))
        # Whether the states between its gates are what it gives, or only what `end` makes of them.
        self.mixes = type(self).end is not DepthMethod.end

    # --- from the configuration alone ---------------------------------------------------------------------------------

    @classmethod
    def architecture(cls, config: MoRConfig) -> str:
        """What reports call a model, one of `kinds`."""
        return next(iter(cls.kinds), cls.name)

    @classmethod
    def resolved(cls, config: MoRConfig) -> dict[str, Any]:
        """Values of fields that were left None."""
        return {}

    @classmethod
    def check_recursions(cls, config: MoRConfig) -> None:
        """Raise ValueError where the layers' sharing does not fit; by default what is no loop over a shared block."""
        if config.num_recursions < 2:
            raise ValueError(
                f"num_recursions: routing {config.routing!r} needs at least 2, got {config.num_recursions}; use 2"
            )
        if config.sharing not in ("cycle", "middle_cycle"):
            raise ValueError(f"sharing: routing cannot use {config.sharing!r}; use 'middle_cycle' or 'cycle'")

    @classmethod
    def check(cls, config: MoRConfig) -> None:
        """Raise ValueError, naming the field and a value that works, where the method's own settings do not fit."""

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        """The layout."""
        raise NotImplementedError

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        """What scores tokens, in the order of the gates."""
        return []

    @classmethod
    def other_parameters(cls, config: MoRConfig) -> int:
        """Parameters of the method outside what scores tokens."""
        return 0

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        """Expected share of the tokens that each gate lets in, [G]."""
        return []

    @classmethod
    def selected(cls, config: MoRConfig, gate: int, length: int) -> Fraction | int:
        """Tokens of a sequence that a gate is expected to let in, in whole tokens where the method counts them."""
        return cls.shares(config)[gate] * length

    @classmethod
    def merged(cls, config: MoRConfig) -> int:
        """States of those let in that `merge` keeps for the backward pass."""
        return 1

    @classmethod
    def levels(cls, config: MoRConfig) -> int:
        """Depths that tokens can be limited to, from 1 to this many (`layout.within`)."""
        return config.num_recursions

    @classmethod
    def scored(cls, config: MoRConfig, tokens: Any) -> list[Any] | None:
        """Tokens that each gate scores in training, of a batch of so many; None: those that it is offered."""
        return None

    @classmethod
    def heads(cls, config: MoRConfig, tokens: Any) -> Any:
        """Tokens that training is expected to read out before the end, for losses there, of a batch of so many."""
        return 0

    @classmethod
    def checks(cls, config: MoRConfig, offered: Sequence[Any]) -> Any:
        """Tokens read out by gates that ask the head, from the tokens offered to each, outside training."""
        return 0

    @classmethod
    def modes(cls, config: MoRConfig) -> tuple[str, ...]:
        """Ways to decide at evaluation; first the one that a generating model can use, if there is one."""
        return ("causal",)

    @classmethod
    def confident(cls, config: MoRConfig) -> bool:
        """Of methods with exits: whether tokens leave at a large score, not at a small one."""
        return True

    @classmethod
    def refuses(cls, config: MoRConfig, mode: str) -> str | None:
        """Why a model cannot be evaluated in this mode."""
        return None

    @classmethod
    def controls(cls, config: MoRConfig) -> dict[str, dict[str, Any]]:
        """Models that isolate a part of the method: name of the control -> fields that change, None to leave one out.

        `random_router`: the same work by a router without a choice. `gate_only`: its gate, every token at full depth.
        `gate_on_vanilla`: the gate on untied layers that take every token.
        """
        return {}

    @classmethod
    def follows_load(cls, config: MoRConfig) -> bool:
        """Whether `update` has something to do after an optimizer step."""
        return False

    @classmethod
    def needs_load(cls, config: MoRConfig) -> bool:
        """Whether a loss is a function of the whole batch's load, which is then asked for first (`routing_only`)."""
        return False

    @classmethod
    def shown(cls, config: MoRConfig, record: Any) -> Tensor | None:
        """Scores [B, T, G] in 0..1 for pictures; None: the sigmoid at each gate, of the tokens offered there."""
        return None

    @classmethod
    def summarize(cls, totals: dict[str, Any]) -> dict[str, float]:
        """Figures of a step that are no means over micro-batches. totals: sums over the global batch."""
        return {}

    # --- rules on the tokens at hand ----------------------------------------------------------------------------------

    def begin(self, x: Tensor, run: Any) -> dict[str, Tensor]:
        """What tokens carry, from their states before the first gate. x: [..., D]."""
        return {}

    def counts(self, carry: dict[str, Tensor], run: Any) -> Tensor | None:
        """[G] tokens of the batch that each gate will let in, where `begin` settles it; None: each gate decides."""
        return None

    def foresee(self, gate: int, logits: Tensor | None, carry: Carry, run: Any) -> Tensor | None:
        """Which of those let in will pass the next gate, bool [...], where that is settled before this one's stage.

        A GPU's host is told their number while the stage's layers wait in the queue. None: the next gate decides.
        """
        return None

    def prepare(self, gate: int, x: Tensor, run: Any) -> Tensor:
        """The states that a gate scores and its stage computes. x: [..., D]."""
        return x

    def score(self, gate: int, x: Tensor, carry: Carry, run: Any) -> Tensor | None:
        """Raw fp32 scores [...] of the tokens offered; None: the gate needs none."""
        return None

    def admit(self, gate: int, logits: Tensor | None, x: Tensor, carry: Carry, run: Any) -> Tensor | None:
        """Who passes the gate, bool [...], each token by itself; None: all that are offered."""
        return None

    def size(self, gate: int, step: int | None) -> float:
        """Share of the sequence that a top-k takes in training. step: optimizer steps done; None: warm-ups are over."""
        raise NotImplementedError

    def merge(
        self, gate: int, before: Tensor, after: Tensor, logits: Tensor | None, carry: Carry, run: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The states of those let in after their stage, and what changes of what they carry.

        before, after: [..., D] states that went into the layers and came out.
        """
        return after, {}

    def end(self, x: Tensor, carry: Carry, run: Any) -> Tensor:
        """The states of all tokens after the last gate. x: [..., D]."""
        return x

    # --- the training step --------------------------------------------------------------------------------------------

    def apart(self) -> list[nn.Parameter]:
        """Parameters that learn at a rate of their own (`optimizer.auxiliary_router_factor`)."""
        return []

    def losses(self, gate: int, x: Tensor, logits: Tensor, chosen: Tensor, used: Tensor | None, run: Any) -> None:
        """Auxiliary losses and figures of a top-k. x: [B, C, D]; logits, chosen, used (None: all): [B, C]."""

    def kept(self, depth: int, run: Any) -> Tensor | None:
        """Rows [B, 1] that pass the layer at this depth, the others skip it; None: all of them."""
        return None

    def coefficients(self) -> dict[str, float]:
        """Weight of each auxiliary loss; "lm" is 1 unless named."""
        return {}

    def describe(self, record: Any, run: Any) -> None:
        """Add the method's own figures to a `RoutingRecord`."""
        record.statistics |= {f"entered_{gate + 1}": record.load[gate] for gate in range(self.gates)}

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        """Once an optimizer step. load: [G] of the global batch."""

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Start what is neither a router nor a plain linear layer."""


def register(cls: type[DepthMethod]) -> None:
    """Make a method known by its name. Raises ValueError where that, or one of its settings, is another method's."""
    for other in METHODS.values():
        if other.name == cls.name and other.__module__ != cls.__module__:
            raise ValueError(f"name: {cls.name!r} is the method of {other.__module__}; give {cls.__module__} another")
        for name, setting in cls.settings.items():
            if other.name != cls.name and other.settings.get(name, setting) != setting:
                raise ValueError(
                    f"settings: {name} of {cls.__module__} is another one in {other.__module__}; use another name"
                )
    METHODS[cls.name] = cls
    for name in sorted(METHODS, key=lambda name: METHODS[name].place):
        METHODS[name] = METHODS.pop(name)
