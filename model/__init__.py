"""The architectures, on torch and transformers alone: vanilla Llama, recursive, Mixture-of-Recursions.

The names below bring the models when one of them is first asked for, and make them known to transformers' Auto classes;
what reads a configuration alone (`model.config`) does not wait for them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MoRConfig
    from .modeling import MoRForCausalLM, MoRModel

__all__ = ["MoRConfig", "MoRForCausalLM", "MoRModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import modeling

    return getattr(modeling, name)
