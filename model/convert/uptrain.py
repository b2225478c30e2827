"""Start a recursive or Mixture-of-Recursions model from a trained vanilla one ("uptraining", paper section 4.1).

A source layer is a 0-based layer of the vanilla model. Where the depths do not fit, the source is resampled first:
layers spread evenly over it (over its middle, if the sharing keeps the first and last layer), rounded half to even.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config import MoRConfig
from ..modeling import MoRForCausalLM
from ..relaxation import RelaxedLinear
from ..sharing import applications, layer_index

Initialization = Literal["stepwise", "average", "lower", "upper", "random"]
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
)


def _spread(first: int, last: int, count: int) -> list[int]:
    return [round(x) for x in np.linspace(first, last, count)]


def _layout(source_depth: int, config: MoRConfig) -> tuple[int, int, int, list[int]]:
    """(unshared layers at each end, shared layers, repeats, the source layer that stands at each depth)."""
    ends = 1 if config.sharing.startswith("middle_") else 0
    unique = (config.num_hidden_layers - 2 * ends) // config.num_recursions
    repeats = config.num_recursions
    if repeats == 1:
        repeats = max(1, (source_depth - 2 * ends) // unique)
    middle = _spread(ends, source_depth - 1 - ends, unique * repeats)
    return ends, unique, repeats, [*range(ends), *middle, *range(source_depth - ends, source_depth)]


def source_layers(source_depth: int, config: MoRConfig, strategy: Initialization, seed: int = 0) -> list[list[int]]:
    """Source layers whose mean starts each unique layer of the model that `config` describes.

    stepwise: layers spread evenly; average: all the layers that a shared layer stands in for; lower, upper: the first
    or last; random: a sorted draw without replacement. Raises ValueError for an unknown strategy or a shallow source.
    """
    if strategy not in get_args(Initialization):
        raise ValueError(f"strategy: expected one of {', '.join(get_args(Initialization))}, got {strategy!r}")
    ends, unique, repeats, standing = _layout(source_depth, config)
    count = len(standing)
    if source_depth < unique + 2 * ends:
        raise ValueError(
            f"source: has {source_depth} layers, fewer than the {unique + 2 * ends} unique layers to start"
        )
    first, last = ends, count - 1 - ends
    if strategy == "stepwise":
        chosen = [[i] for i in _spread(first, last, unique)]
    elif strategy == "lower":
        chosen = [[first + i] for i in range(unique)]
    elif strategy == "upper":
        chosen = [[last + 1 - unique + i] for i in range(unique)]
    elif strategy == "random":
        draw = np.random.default_rng(seed).choice(np.arange(first, last + 1), unique, replace=False)
        chosen = [[int(i)] for i in sorted(draw)]
    else:
        sharing = config.sharing.removeprefix("middle_")
        chosen = [[] for _ in range(unique)]
        for place in range(unique * repeats):
            chosen[layer_index(place, unique * repeats, repeats, sharing) if repeats > 1 else place].append(
                first + place
            )
    middle = [[standing[i] for i in places] for places in chosen]
    return [[i] for i in range(ends)] + middle + [[i] for i in range(source_depth - ends, source_depth)]


@torch.no_grad()
def from_vanilla(
    source: str | PreTrainedModel,
    config: MoRConfig,
    strategy: Initialization = "stepwise",
    seed: int = 0,
    svd: bool = False,
) -> MoRForCausalLM:
    """Build the model of `config` from a trained vanilla model (Llama, or this project's vanilla).

    source: model or folder. svd: start LoRA or DoRA deltas from the difference between each depth's original weights
    and the shared ones, so that with full rank these projections equal the (resampled) original's.
    Routers and recursion encodings start as in a new model. Raises ValueError naming a field on which the two differ.
    """
    if isinstance(source, str):
        source = AutoModelForCausalLM.from_pretrained(source)
    theirs = source.config
    if getattr(theirs, "num_recursions", 1) > 1:
        raise ValueError("source: num_recursions is above 1; start from a vanilla model")
    for name in _SAME_FIELDS:
        if getattr(theirs, name) != getattr(config, name):
            raise ValueError(
                f"{name}: the source has {getattr(theirs, name)!r}, the new model {getattr(config, name)!r}"
            )
    if svd and config.relaxation not in ("lora", "dora"):
        raise ValueError(f"svd: needs relaxation 'lora' or 'dora', the configuration has {config.relaxation!r}")
    weights = source.state_dict()
    model: Any = MoRForCausalLM(config)
    model = model.to(source.dtype)
    origins = source_layers(theirs.num_hidden_layers, config, strategy, seed)
    state = model.state_dict()
    for name, parameter in state.items():
        value = _source_value(name, weights, origins)
        if value is not None:
            parameter.copy_(value)
    if not config.tie_word_embeddings and theirs.tie_word_embeddings:
        state["lm_head.weight"].copy_(weights["model.embed_tokens.weight"])
    if config.relaxation in ("lora", "dora"):
        _start_deltas(model, weights, theirs.num_hidden_layers, svd)
    return model


def _source_value(name: str, weights: dict[str, Tensor], origins: list[list[int]]) -> Tensor | None:
    """The value that a parameter starts from, None where the source has none (routers, deltas, encodings)."""
    if not name.startswith("model.layers."):
        return weights.get(name)
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    kind, norm_of_depth = rest.split(".")[0], rest.split(".")[1]
    if kind.endswith("layernorm") and norm_of_depth.isdigit():
        rest = f"{kind}.weight"
    parts = [weights[key] for i in origins[int(layer)] if (key := f"model.layers.{i}.{rest}") in weights]
    return torch.stack([part.float() for part in parts]).mean(0) if parts else None


def _start_deltas(model: MoRForCausalLM, weights: dict[str, Tensor], source_depth: int, svd: bool) -> None:
    standing = _layout(source_depth, model.config)[3]
    for use in applications(model.config):
        for name, module in model.model.layers[use.layer].named_modules():
            if isinstance(module, RelaxedLinear) and use.recursion is not None:
                if use.recursion == 0 and not svd:
                    module.reset_delta()
                elif svd:
                    original = weights[f"model.layers.{standing[use.depth]}.{name}.weight"]
                    module.fit_delta(use.recursion, original)
