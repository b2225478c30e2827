"""Sweeps: which values of which keys are tried for a model, by short runs first, and which of them won.

A sweep of n points is a halving search (Jamieson and Talwalkar, arXiv 1502.07943): every round spends the same, on half
as many points as the round before it, each for twice as long. Its seeds are not those of the report.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.report.runs import Run

TIE = 0.005  # nats: two points of a sweep that differ by less are called a tie
Values = dict[str, Any]  # dotted key -> value


def halving(points: int, allowance: float) -> list[tuple[int, float]]:
    """The rounds of a sweep: (points that take part, share of the budget that each spends).

    allowance: what the sweep may spend, in whole runs. It spends no more; a share is at most 1, and the first round
    of whole runs is the last.
    """
    count = max(1, math.ceil(math.log2(points)))
    rounds: list[tuple[int, float]] = []
    for number in range(count):
        taking = math.ceil(points / 2**number)
        share = min(1.0, allowance / (count * taking))
        rounds.append((taking, share))
        if share == 1.0:
            break
    return rounds


def points_of(keys: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Every combination of the keys' values, in order."""
    return [dict(zip(keys, values)) for values in itertools.product(*keys.values())]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested keys as dotted ones."""
    flat: Values = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def settings_of(run: Run) -> Values:
    """What a sweep may vary, by dotted key: of optimizer, schedule and model."""
    return flatten({**run.facts.get("settings", {}), "model": run.facts["model"]})


def sweep_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the runs of sweeps say, for each name: points, winner, whether it is settled.

    name, model: of the swept runs; keys: dotted key -> values tried, rising; flops: of the last round; points: values,
    flops, mean loss over the seeds that ended, number of seeds; winner: the values of the lowest loss in the last
    round; edge: keys whose winning value is the smallest or the largest one tried; ties: other points within `TIE`.
    """
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        same = [run for run in runs if run.name == name and run.finished]
        every = [settings_of(run) for run in same]
        keys = {
            key: _sorted([values.get(key) for values in every])
            for key in dict.fromkeys(itertools.chain(*every))
            if len({json.dumps(values.get(key)) for values in every}) > 1
        }
        if not keys:
            continue
        points: dict[str, dict[str, Any]] = {}
        for run, values in zip(same, every):
            point = {key: values.get(key) for key in keys}
            budget = _budget(run)
            entry = points.setdefault(json.dumps([budget, point]), {"values": point, "flops": budget, "losses": []})
            entry["losses"].append(run.last_validation.get("validation_loss"))
        rows.append(_row(name, same[-1], keys, list(points.values())))
    return rows


def _row(name: str, run: Run, keys: dict[str, list[Any]], points: list[dict[str, Any]]) -> dict[str, Any]:
    told = []
    for point in points:
        losses = [math.inf if loss is None else loss for loss in point["losses"]]
        mean = sum(losses) / len(losses)
        told.append({"values": point["values"], "flops": point["flops"], "seeds": len(losses), "loss": mean})
    last = max(point["flops"] for point in told)
    final = sorted((point for point in told if point["flops"] == last), key=lambda point: point["loss"])
    best = final[0]
    edge = [key for key, tried in keys.items() if len(tried) > 2 and best["values"][key] in (tried[0], tried[-1])]
    edge += [key for key, tried in keys.items() if len(tried) == 2]
    return {
        "name": name,
        "model": run.facts["model"],
        "keys": keys,
        "flops": last,
        "points": [point | {"loss": point["loss"] if math.isfinite(point["loss"]) else None} for point in told],
        "winner": best["values"],
        "loss": best["loss"] if math.isfinite(best["loss"]) else None,
        "edge": edge,
        "ties": [point["values"] for point in final[1:] if point["loss"] - best["loss"] < TIE],
    }


def _sorted(values: Sequence[Any]) -> list[Any]:
    distinct = list({json.dumps(value): value for value in values}.values())
    return sorted(distinct, key=lambda value: (isinstance(value, str), value is not None, value))


def _budget(run: Run) -> int:
    flops = run.facts["budget"]["flops"]
    return int(flops[-1] if isinstance(flops, list) else flops)
