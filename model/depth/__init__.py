"""Ways of spending depth, one to a file. A new file in this folder is all that a new one takes: it registers itself."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .base import METHODS, DepthMethod, Setting
from .layout import Stage

if TYPE_CHECKING:
    from ..config import MoRConfig

# Colours of architectures that name none; kinds that are told apart by people who see few colours.
_FREE = ("#f0e442", "#882255", "#44aa99", "#117733", "#999933", "#661100", "#6699cc", "#888888")


def find_methods() -> None:
    """Import every file of this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


find_methods()


def method_of(config: MoRConfig) -> type[DepthMethod]:
    """The way of spending depth that a configuration names. Raises ValueError for a name that no file registers."""
    if config.routing not in METHODS:
        raise ValueError(f"routing: {config.routing!r} is unknown; use one of {', '.join(map(repr, METHODS))}")
    return METHODS[config.routing]


def stages_of(config: MoRConfig) -> tuple[Stage, ...]:
    """The layout of a configuration."""
    return method_of(config).stages(config)


def all_settings() -> dict[str, Setting]:
    """The settings of every method, by name."""
    return {name: setting for method in METHODS.values() for name, setting in method.settings.items()}


def method_fields() -> frozenset[str]:
    """The fields of a configuration that say how depth is spent: the method's name, and every method's settings."""
    return frozenset({"routing", *all_settings()})


def refuse_foreign(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting, among the fields of a configuration, of another method than the one it names."""
    method = METHODS.get(fields.get("routing", "none"))
    if method is None:  # `method_of` says which there are
        return
    for name in sorted(fields.keys() & all_settings().keys()):
        if fields[name] is not None and name not in method.settings:
            users = ", ".join(repr(other.name) for other in METHODS.values() if name in other.settings)
            raise ValueError(
                f"{name}: means nothing for routing {method.name!r}, only for {users}; got {fields[name]!r}, "
                "leave it out"
            )


def architectures() -> dict[str, str]:
    """What models are called in reports, in their order, with the colour of each."""
    kinds = {kind: colour for m in METHODS.values() for kind, colour in (m.kinds or {m.name: None}).items()}
    free = itertools.cycle(colour for colour in _FREE if colour not in kinds.values())
    return {kind: colour or next(free) for kind, colour in kinds.items()}


def current_name(name: str) -> str:
    """A parameter's name today, from that in a checkpoint written before routers belonged to the method."""
    return re.sub(r"(?<!depth\.)(?<!\w)(?:routers\.|aux_routers\.|router_bias\b)", r"depth.\g<0>", name)
