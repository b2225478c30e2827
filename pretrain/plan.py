"""What a run consists of, when it ends and how its steps are laid out: budgets, schedules, placement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.settings import UserError
from model.memory import Placement
from pretrain.config import ExperimentSettings, micro_size_of
from pretrain.parallel.settings import ParallelSettings
from pretrain.precision import expected
from pretrain.schedule import Schedule


@dataclass
class RunState:
    """How far a run has come.

    flops: in the run's convention. seconds: in training steps, over all resumes, without validation and checkpoints.
    joules: in the same, of all ranks, up to the last step's update; None where those of any step are not known.
    """

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    joules: float | None = None


@dataclass(frozen=True)
class Plan:
    """The end and the schedule of one run directory.

    settings: of this run directory alone. total: the budget, in FLOPs where `in_flops`, else in steps. step_cost: what
    one step is expected to spend of it. trunk: stop where the cool-down would begin.
    """

    settings: ExperimentSettings
    total: int
    in_flops: bool
    step_cost: int
    schedule: Schedule
    trunk: bool = False

    @property
    def folder(self) -> Path:
        return self.settings.run_dir

    def progress(self, state: RunState) -> float:
        """Share of the budget spent, 0..1 and at most one step beyond."""
        return self._spent(state) / self.total

    def goes_on(self, state: RunState) -> bool:
        """Whether one more step is to be taken."""
        if self.trunk and self.schedule.cooling(self.progress(state)):
            return False
        return 2 * self._spent(state) + self.step_cost <= 2 * self.total

    def begins_cooling(self, before: RunState, state: RunState) -> bool:
        """Whether the step from `before` to `state` was the last one of the plateau, of which the cool-down is left."""
        cooling = self.schedule.cooling
        falls = self.schedule.kind == "trapezoid" and not self.trunk and self.goes_on(state)
        return falls and cooling(self.progress(state)) and not cooling(self.progress(before))

    @property
    def planned_steps(self) -> int:
        """Steps that the budget is expected to buy."""
        return round(self.total / self.step_cost)

    def _spent(self, state: RunState) -> int:
        return state.flops if self.in_flops else state.step


def make_plans(
    settings: ExperimentSettings, step_flops: int, tokens_per_step: int, begun_warmup: int | None = None
) -> list[Plan]:
    """The runs that an experiment consists of: one, or a trunk followed by a branch for each budget.

    step_flops: expected FLOPs of a step, in the budget's convention. begun_warmup: warm-up steps of a run that has
    begun, which a budget that has grown since does not change. Raises UserError for a budget below one step, and
    where the warm-up does not end before the first branch leaves.
    """
    budget, rule = settings.budget, settings.schedule
    in_flops = budget.flops is not None
    totals = budget.totals or [budget.steps or round((budget.tokens or 0) / tokens_per_step)]
    cost = step_flops if in_flops else 1
    if totals[0] < cost:
        given = f"budget.flops {totals[0]:.6g}" if in_flops else f"budget.tokens {budget.tokens}"
        raise UserError(
            f"{given} is less than one step, which takes {step_flops:.6g} FLOPs ({budget.convention}) and "
            f"{tokens_per_step} tokens; raise it or lower batch.size"
        )
    warmup = rule.warmup_steps if rule.warmup_steps is not None else begun_warmup
    if warmup is None:
        warmup = round(rule.warmup_share * round(totals[0] / cost))
    plans = []
    for total in totals:
        schedule = Schedule(rule.kind, warmup, min(warmup * cost / total, 1.0), rule.decay_share, rule.final_share)
        plans.append(Plan(settings, total, in_flops, cost, schedule))
    if len(plans) == 1:
        return plans
    if warmup * cost >= (1 - rule.decay_share) * totals[0]:
        raise UserError(
            f"schedule.warmup_steps: {warmup} steps are not over where the branch of {totals[0]:.6g} leaves"
        )
    branches = [replace(plan, settings=branch_settings(settings, plan.total, warmup)) for plan in plans]
    return [replace(plans[-1], trunk=True), *branches]


def branch_settings(settings: ExperimentSettings, flops: int, warmup_steps: int) -> ExperimentSettings:
    """Settings of the run that a branch equals: one budget, the trunk's warm-up, a directory of its own."""
    label = f"{flops:.6g}".replace("+", "")
    return settings.model_copy(
        update={
            "name": f"{settings.name}-{label}",
            "run_dir": settings.run_dir / "branches" / label,
            "budget": settings.budget.model_copy(update={"flops": flops}),
            "schedule": settings.schedule.model_copy(update={"warmup_steps": warmup_steps}),
        }
    )


def placement_of(settings: ExperimentSettings, parallel: ParallelSettings, world_size: int, on_gpu: bool) -> Placement:
    """How the steps of an experiment are laid out. parallel: its section, with the strategy settled."""
    micro_batches = settings.batch.size // (micro_size_of(settings.batch, world_size) * world_size)
    by_itself = settings.compile == "auto" and not parallel.strategy.startswith("zero")
    return parallel.placement(
        world_size,
        micro_batches=max(1, micro_batches),
        precision=expected(settings.precision, on_gpu),
        recompute=settings.recompute,
        document_masking=settings.data.document_masking,
        on_gpu=on_gpu,
        compiled=on_gpu and (settings.compile is True or by_itself),
    )
