"""Ways of spending depth, one to a file: name -> class, in the order of reports."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .base import DepthMethod
from .dense import Dense
from .early_exit import EarlyExit
from .expert_choice import ExpertChoice
from .layout import Stage
from .mixture_of_depths import MixtureOfDepths
from .token_choice import TokenChoice
from .universal import Universal

if TYPE_CHECKING:
    from ..config import MoRConfig

METHODS: dict[str, type[DepthMethod]] = {
    "none": Dense,
    "expert_choice": ExpertChoice,
    "token_choice": TokenChoice,
    "mixture_of_depths": MixtureOfDepths,
    "universal": Universal,
    "early_exit": EarlyExit,
}


def method_of(config: MoRConfig) -> type[DepthMethod]:
    """The way of spending depth that a configuration names."""
    return METHODS[config.routing]


def stages_of(config: MoRConfig) -> tuple[Stage, ...]:
    """The layout of a configuration."""
    return method_of(config).stages(config)


def current_name(name: str) -> str:
    """A parameter's name today, from that in a checkpoint written before routers belonged to the method."""
    return re.sub(r"(?<!depth\.)(?<!\w)(?:routers\.|aux_routers\.|router_bias\b)", r"depth.\g<0>", name)
