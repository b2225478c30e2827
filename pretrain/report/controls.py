"""Control models, which isolate one part of what a model differs in, and what they say of a difference.

A control is built from the fields of the model that it controls, and recognised by its configuration alone: whatever
trained it, under whatever name, a run of that configuration is that control.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from model import flops
from model.config import MoRConfig
from model.depth import method_fields, method_of
from pretrain.config import LLAMA_FIELDS, make_model_config
from pretrain.report import analysis
from pretrain.report.runs import Variant

# name -> what it is, in the order of reports
CONTROLS = {
    "shallower": "a vanilla model of fewer layers that costs the same FLOPs per token",
    "recursive": "the same shared block without routing or gate, every token at full depth",
    "mean_depth": "the shared block applied as often as a token of the model is on average, without routing or gate",
    "gate_only": "the gate with every token at full depth",
    "random_router": "the same capacities, tokens chosen at random",
    "gate_on_vanilla": "the gate on untied layers that take every token",
    "equal_tokens": "the vanilla model with as many tokens as the model sees",
}
# What each step from the baseline to the model adds; a control that is missing joins its step to the next one.
STEPS = {"recursive": "sharing", "gate_only": "gate", "random_router": "more tokens"}
LAST_STEP = "choice of tokens"
# Tokens that count as equal: token-choice's learned routing sees a few percent more or fewer than its budget plans.
EQUAL_TOKENS_SHARE = 0.03
UNSTABLE = ("transformers_version", "dtype", "architectures", "_name_or_path")  # of a configuration that was written
Fields = dict[str, Any]


def control_fields(
    kind: str, model: Mapping[str, Any], vanilla: Mapping[str, Any] | None, sequence_length: int
) -> Fields:
    """The fields of the control `kind` of `model`; both as fields of MoRConfig.

    vanilla: the model that it is compared with. Raises ValueError that says why there is no such control of it.
    """
    if kind not in CONTROLS:
        raise ValueError(f"unknown control; use {', '.join(CONTROLS)}")
    config = make_model_config(dict(model))
    if kind == "equal_tokens":
        if vanilla is None:
            raise ValueError("no vanilla model to give its tokens to")
        return dict(vanilla)
    if kind == "shallower":
        return _shallower(config, model, sequence_length)
    if kind in ("recursive", "mean_depth"):
        return _unrouted(config, model, whole=kind == "recursive")
    changes = method_of(config).controls(config).get(kind)
    if changes is None:
        raise ValueError(f"there is none for {config.architecture}")
    fields = {name: value for name, value in {**model, **changes}.items() if value is not None}
    _refuse_itself(make_model_config(fields), config)
    return fields


def _shallower(config: MoRConfig, model: Mapping[str, Any], sequence_length: int) -> Fields:
    plain = {name: value for name, value in model.items() if name in LLAMA_FIELDS}
    wanted = flops.flops_per_token(config, sequence_length)
    layers = min(
        range(1, config.num_hidden_layers + 1),
        key=lambda count: abs(
            flops.flops_per_token(make_model_config({**plain, "num_hidden_layers": count}), sequence_length) - wanted
        ),
    )
    if layers == config.num_hidden_layers:
        raise ValueError(f"it costs as much per token as all {layers} layers of a vanilla model")
    return {**plain, "num_hidden_layers": layers}


def _unrouted(config: MoRConfig, model: Mapping[str, Any], whole: bool) -> Fields:
    if config.num_recursions < 2:
        raise ValueError("it shares no block")
    mean = sum(flops.capacities(config)) if not whole else config.num_recursions
    if mean != int(mean):
        raise ValueError(f"a token passes its block {float(mean):.2f} times on average, which is no whole number")
    layers = flops.unshared_layers(config) + int(mean) * flops.recursion_layers(config)
    fields = {name: value for name, value in model.items() if name not in method_fields()}
    fields |= {"num_recursions": int(mean), "num_hidden_layers": layers}
    _refuse_itself(make_model_config(fields), config)
    return fields


def _refuse_itself(control: MoRConfig, config: MoRConfig) -> None:
    if described(control) == described(config):
        raise ValueError("it would be the model itself")


def described(config: MoRConfig) -> Fields:
    """What decides a model, as a mapping: equal for equal models."""
    return {name: value for name, value in config.to_dict().items() if name not in UNSTABLE}


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two mappings, resolved or not, are of the same model."""
    return _resolved(json.dumps(one, sort_keys=True)) == _resolved(json.dumps(other, sort_keys=True))


@functools.lru_cache(maxsize=512)  # a report asks for every pair of its models
def _resolved(model: str) -> Fields:
    return described(MoRConfig.from_dict(json.loads(model)))


# --- among the runs of a report ---------------------------------------------------------------------------------------


def find_controls(
    variant: Variant, kinds: Sequence[str], members: Sequence[Variant], others: Sequence[Variant]
) -> dict[str, Variant]:
    """The controls of a variant: kind -> variant. members: at matched FLOPs; others: of all budgets."""
    length = int(variant.runs[0].facts["sequence_length"])
    vanilla = [other for other in others if other.architecture == "vanilla"]
    found: dict[str, Variant] = {}
    for kind in kinds:
        if kind == "equal_tokens":
            same = [other for other in vanilla if abs(other.tokens / variant.tokens - 1) < EQUAL_TOKENS_SHARE]
            same.sort(key=lambda other: abs(other.tokens / variant.tokens - 1))
        else:
            wanted = control_fields(kind, variant.model, None, length)
            same = [other for other in members if same_model(other.model, wanted)]
        if same:
            found[kind] = same[0]
    return found


def buildable(model: Mapping[str, Any], has_vanilla: bool, sequence_length: int) -> list[str]:
    """The controls that a model has. None for one that routes nothing: it is a control itself."""
    if not method_of(make_model_config(dict(model))).settings:
        return []
    kinds = []
    for kind in CONTROLS:
        try:
            control_fields(kind, model, {} if has_vanilla else None, sequence_length)
        except ValueError:
            continue
        kinds.append(kind)
    return kinds


def decomposition(variant: Variant, baseline: Variant, controls: Mapping[str, Variant]) -> list[Fields]:
    """What the difference of a variant to its baseline is made of: steps whose means add up to it.

    Each step is the paired difference between two runs that follow one another on the way baseline, the same block
    without a gate, the gate alone, the random router, the model, over the seeds that all of them have. One step alone
    where there is no control on the way; empty where no seed is in all.
    """
    way = [(None, baseline), *((kind, controls[kind]) for kind in STEPS if kind in controls), (LAST_STEP, variant)]
    seeds = set.intersection(*(set(member.losses()) for _, member in way))
    if not seeds:
        return []
    names = [*STEPS, LAST_STEP]
    rows: list[Fields] = []
    done = 0
    for (_, before), (kind, after) in itertools.pairwise(way):
        at = names.index(str(kind)) + 1
        what = " + ".join(STEPS.get(name, name) for name in names[done:at])
        done = at
        with_step, without = ({seed: member.losses()[seed] for seed in seeds} for member in (after, before))
        difference = analysis.paired_difference(with_step, without)
        rows.append({"step": what, "from": before.name, "to": after.name, **analysis.plain(difference)})
    return rows
