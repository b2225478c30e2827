"""From a FLOP budget to steps, tokens and schedule: `python -m pretrain.budget --models A.yaml --budgets 2e18 16.5e18`.

The rule is the paper's: a run takes the whole number of steps nearest to its budget; warm-up is 5% of the steps of the
smallest budget, cool-down the last 20% of each budget's own steps, so that one trunk with one plateau serves every
budget and a branch leaves it where its cool-down begins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.settings import UserError, read_yaml, run_command
from model.config import MoRConfig
from model.flops import CONVENTIONS, exit_costs, training_flops
from pretrain.config import check_model_fields, make_model_config


@dataclass(frozen=True)
class Plan:
    """A run that spends a budget.

    budget, flops: FLOPs given, and spent by `steps` steps, in `convention`. residual: budget - flops, at most half a
    step either way. flops_per_token: in `convention`. warmup_steps, decay_steps: first and last steps of the
    trapezoid. branch_step: steps taken when the cool-down begins. exact_flops: what the run executes, forward and
    backward.
    """

    model: str
    budget: int
    convention: str
    steps: int
    tokens: int
    flops_per_token: float
    warmup_steps: int
    decay_steps: int
    branch_step: int
    residual: int
    flops: int
    exact_flops: int


def plan(
    config: MoRConfig,
    budget: int,
    *,
    model: str = "",
    smallest_budget: int | None = None,
    convention: str = "exact",
    sequence_length: int = 2048,
    batch_size: int = 1024,
    warmup: float = 0.05,
    decay: float = 0.2,
) -> Plan:
    """Plan one run of expected routing.

    smallest_budget: of the runs that share a trunk with this one (default: this budget); its steps set the warm-up.
    batch_size: sequences per step. warmup, decay: shares of steps.
    Raises ValueError for an unknown convention, shares that do not fit, or a budget below one step.
    """
    if not 0 <= warmup < 1 or not 0 <= decay < 1:
        raise ValueError(f"warmup {warmup} and decay {decay} must be shares of the steps, 0 to below 1")
    step = training_flops(config, sequence_length, batch_size, convention=convention)
    first = min(budget, smallest_budget or budget)
    if first < step:
        raise ValueError(
            f"budget {first:.4g} is below one step of {model or config.architecture}, {step:.4g} FLOPs ({convention}); "
            "give a larger budget or a smaller batch"
        )
    steps = _nearest(budget, step)
    warmup_steps = _nearest(Fraction(str(warmup)) * _nearest(first, step))
    decay_steps = _nearest(Fraction(str(decay)) * steps)
    if warmup_steps + decay_steps > steps:
        raise ValueError(f"warmup {warmup} and decay {decay} leave no steps between them for a budget of {budget:.4g}")
    tokens = steps * batch_size * sequence_length
    return Plan(
        model=model,
        budget=budget,
        convention=convention,
        steps=steps,
        tokens=tokens,
        flops_per_token=step / (batch_size * sequence_length),
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        branch_step=steps - decay_steps,
        residual=budget - steps * step,
        flops=steps * step,
        exact_flops=steps * training_flops(config, sequence_length, batch_size),
    )


def _nearest(numerator: int | Fraction, denominator: int = 1) -> int:
    """The nearest whole number, halves up."""
    return int((Fraction(numerator) / denominator + Fraction(1, 2)) // 1)


# --- what the paper printed ---------------------------------------------------------------------------------------

# 360M at 16.5e18: steps, warm-up and cool-down of the authors' configuration files (warm-up: 57 for every vanilla and
# recursive model, 86 for every MoR), and tokens in billions as the paper's tables of these runs round them.
PUBLISHED = {
    "360m_vanilla": (9438, 57, 1888, 20),
    "360m_recursive_nr2": (9438, 57, 1888, 20),
    "360m_recursive_nr3": (9438, 57, 1888, 20),
    "360m_recursive_nr4": (8883, 57, 1777, 19),
    "360m_mor_expert_nr2": (12619, 86, 2524, 27),
    "360m_mor_expert_nr3": (14161, 86, 2832, 30),
    "360m_mor_expert_nr4": (14216, 86, 2843, 30),
    "360m_mor_expert_nr3_shared_kv": (14672, 86, 2934, 31),
    "360m_mor_token_nr3": (14161, 86, 2832, 30),
}
PUBLISHED_BUDGET = 16_500_000_000_000_000_000
PUBLISHED_SMALLEST = 2_000_000_000_000_000_000


def disagreements(plans: Sequence[Plan]) -> list[str]:
    """Where the paper's own figures do not follow from its rule, for the plans of runs that it published.

    Pass plans of the `paper` convention with the paper's budgets, 2,048 tokens and 1,024 sequences.
    """
    lines = []
    for row in plans:
        if row.model not in PUBLISHED or row.budget != PUBLISHED_BUDGET:
            continue
        steps, warmup, decay, billions = PUBLISHED[row.model]
        pairs = [("steps", steps, row.steps), ("warm-up steps", warmup, row.warmup_steps)]
        pairs += [("cool-down steps", decay, row.decay_steps), ("billion tokens", billions, round(row.tokens / 1e9))]
        for what, published, ruled in pairs:
            if published != ruled:
                detail = f" ({row.tokens / 1e9:.2f})" if what == "billion tokens" else ""
                lines.append(f"{row.model}: {what}: published {published}, the rule gives {ruled}{detail}")
    return lines


# --- command line -------------------------------------------------------------------------------------------------


def read_model(path: str | Path) -> MoRConfig:
    """The configuration in a YAML file of MoRConfig fields. Raises UserError that names the file and the field."""
    fields = read_yaml(path)
    try:
        check_model_fields(fields)
        return make_model_config(fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def plan_files(paths: Sequence[str], budgets: Sequence[int], **options: Any) -> list[Plan]:
    """A plan for every model file and budget; the budgets of one model share a trunk. Raises UserError."""
    plans = []
    for path in paths:
        config, model = read_model(path), Path(path).stem
        for budget in budgets:
            try:
                plans.append(plan(config, budget, model=model, smallest_budget=min(budgets), **options))
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
    return plans


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of plans, or with --json a list of objects."""
    options = _parser().parse_args(arguments)
    plans = plan_files(
        options.models,
        options.budgets,
        convention=options.convention,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        warmup=options.warmup,
        decay=options.decay,
    )
    rows = [asdict(row) | _time(row, options.rate, options.gpus) for row in plans]
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    _print(rows, options)
    published = (options.sequence_length, options.batch_size, options.convention) == (2048, 1024, "paper")
    if published and min(options.budgets) == PUBLISHED_SMALLEST:
        lines = disagreements(plans)
        if lines:
            print("The paper's own figures that its rule does not give:")
            print("\n".join(f"  {line}" for line in lines))
    return 0


def _time(row: Plan, rate: float | None, gpus: int) -> dict[str, float]:
    """Hours of a run at `rate` executed FLOPs per second and GPU; nothing without a rate."""
    if rate is None:
        return {}
    gpu_hours = row.exact_flops / rate / 3600
    return {"gpu_hours": gpu_hours, "wall_clock_hours": gpu_hours / gpus}


def _print(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"FLOPs by the `{options.convention}` convention; {options.batch_size} sequences of "
        f"{options.sequence_length} tokens per step"
    )
    formats = {
        "model": "{}", "budget": "{:.4g}", "steps": "{:,}", "tokens": "{:,}", "flops_per_token": "{:.5g}",
        "warmup_steps": "{:,}", "decay_steps": "{:,}", "branch_step": "{:,}", "residual": "{:.2e}",
        "gpu_hours": "{:,.1f}", "wall_clock_hours": "{:,.2f}",
    }  # fmt: skip
    columns = [name for name in formats if name in rows[0]]
    for name in columns:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(formats[name].format(row[name]) for name in columns))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for path in options.models:
        _print_exits(Path(path), options.sequence_length, console)
    if options.rate is not None:
        print(f"Hours: executed FLOPs (`exact`) at {options.rate:.4g} FLOP/s per GPU on {options.gpus} GPU(s).")


def _print_exits(path: Path, length: int, console: Console) -> None:
    """Which exits pay: what a check costs, what leaving saves, and how many of those asked have to leave."""
    costs = exit_costs(read_model(path), length)
    if not costs:
        return
    title = f"Exits of {path.stem}: forward FLOPs (`exact`) of a token at the mean context of {length} tokens"
    table = Table(
        "after layer", "a check", "in layers", "leaving saves", "pays if so many of those asked leave", title=title
    )
    for cost in costs:
        share = "never" if cost.pays_from is None else f"{cost.pays_from:.1%}"
        table.add_row(str(cost.layer), f"{cost.check:.4g}", f"{cost.layers:.2f}", f"{cost.saved:.4g}", share)
    console.print(table)


def _whole(text: str) -> int:
    try:
        value = Decimal(text)
        if value.is_finite() and value > 0:
            return int(value)
    except InvalidOperation:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no positive number, for instance 16.5e18")


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pretrain.budget", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="YAML", help="files of MoRConfig fields, configs/model/*.yaml")
    add("--budgets", nargs="+", required=True, type=_whole, metavar="FLOPS", help="FLOP budgets, for instance 2e18")
    add("--convention", choices=CONVENTIONS, default="exact", help="how FLOPs are counted (default: exact)")
    add("--sequence-length", type=_positive, default=2048, help="tokens of a sequence (default: 2048)")
    add("--batch-size", type=_positive, default=1024, help="sequences per step (default: 1024)")
    add("--warmup", type=float, default=0.05, help="warm-up, share of the smallest budget's steps (default: 0.05)")
    add("--decay", type=float, default=0.2, help="cool-down, share of each budget's steps (default: 0.2)")
    add("--rate", type=_whole, help="executed FLOP/s that one GPU reaches, for hours")
    add("--gpus", type=_positive, default=1, help="GPUs, for wall-clock hours (default: 1)")
    add("--json", action="store_true", help="print a list of objects")
    return parser


if __name__ == "__main__":
    run_command(main)
