"""The interface: a way of spending depth is a layout, and rules on the tokens at hand, whatever their shape.

From the configuration alone: which stages there are, what its gates cost, how many tokens they are expected to let in.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from .layout import Stage

if TYPE_CHECKING:
    from ..config import MoRConfig


@dataclass(frozen=True)
class Scorer:
    """The matrices that score the tokens offered to a gate.

    name: of the component in `flops.breakdown`. shapes: (inputs, outputs) of each, one after the other. biases: their
    number. to_weights, to_input: whether gradients reach them, and the states that they score.
    """

    name: str
    gate: int
    shapes: tuple[tuple[int, int], ...]
    biases: int = 0
    to_weights: bool = True
    to_input: bool = True

    @property
    def parameters(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.shapes) + self.biases


class DepthMethod(nn.Module):
    """One way of spending depth. Subclasses stand one to a file, under the name of their paper."""

    # Only tokens that passed a gate are offered the next.
    nested: ClassVar[bool] = True
    # Training lets in as many tokens as `size` says, at fixed shapes; otherwise batches are ragged.
    fixed: ClassVar[bool] = False

    @classmethod
    def stages(cls, config: MoRConfig) -> tuple[Stage, ...]:
        """The layout."""
        raise NotImplementedError

    @classmethod
    def scorers(cls, config: MoRConfig) -> list[Scorer]:
        """What scores tokens, in the order of the gates."""
        return []

    @classmethod
    def shares(cls, config: MoRConfig) -> list[Fraction]:
        """Expected share of the tokens that each gate lets in, [G]."""
        return []

    @classmethod
    def selected(cls, config: MoRConfig, gate: int, length: int) -> Fraction | int:
        """Tokens of a sequence that a gate is expected to let in, in whole tokens where the method counts them."""
        return cls.shares(config)[gate] * length
