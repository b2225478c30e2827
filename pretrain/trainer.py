"""The training loop, top to bottom.

    Trainer.run            every budget in turn: one run, or a trunk and its branches
    Trainer.fit            one run directory, from its latest checkpoint (or from nothing) to its end
    Trainer.training_step  one optimizer step, whole
    Trainer.after_step     its line of metrics, then validation and a checkpoint where they are due

Losses. The model divides by the targets of the global batch (`num_items_in_batch`), so that the losses of all
micro-batches and ranks add up to means over the global batch, whatever the accumulation and the number of ranks. The
balancing loss alone is a product of two means: its load comes from a routing pass over the whole batch beforehand.

Budget. A step is taken while at least half of its expected cost is left, so that a run ends within half a step of its
budget, on either side, where routing is as expected, and never beyond it by more than one step.

Faults. What goes wrong on one rank (its data, rank 0's disk, a thread) waits in `fault` until the ranks next bring
their sums together, and ends them all there: no rank leaves alone.

Shapes: B sequences of the global batch, m of a micro-batch, T tokens of a sequence, Nr recursions.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from data_prep.settings import UserError
from model.config import MoRConfig
from model.convert.uptrain import from_vanilla
from model.depth import method_of
from model.flops import StepFlops, gates_of, training_flops
from model.modeling import MoRForCausalLM
from model.record import depth_counts
from pretrain import extend, parent, run_folder
from pretrain.checkpoint import Checkpoints, Outcome, committed, export, folder_of
from pretrain.config import ExperimentSettings, StartSettings, micro_size_of, resolve_model
from pretrain.data import BlockLoader, MicroBatch
from pretrain.energy import EnergyMeter
from pretrain.evaluate import TaskSettings, run_tasks, task_line
from pretrain.lock import RunLock, owner_of
from pretrain.manifest import Manifest
from pretrain.metrics import (
    METRICS,
    LossSpikes,
    Output,
    Sums,
    Tracker,
    last_line,
    memory_bytes,
    peak_flops,
    rank_spread,
    tracker_id,
)
from pretrain.opened import wrap_tokenizer
from pretrain.parallel.strategy import Parallel, RunFailed
from pretrain.parallel.timing import traced
from pretrain.plan import Plan, RunState, make_plans
from pretrain.precision import settle
from pretrain.stop import CANNOT_WRITE, REQUEUE, REQUEUE_FILE, StopRequest
from pretrain.validation import Validation


def make_model(settings: ExperimentSettings, config: MoRConfig, parallel: Parallel) -> MoRForCausalLM:
    """A new model in fp32, or one that starts from a trained vanilla model. UserError where that does not fit."""
    start = settings.initialize_from
    if start is None:
        with parallel.building():
            return MoRForCausalLM(config)
    if not (start.folder / "config.json").exists():
        raise UserError(f"initialize_from.folder: {start.folder} holds no model (no config.json)")
    try:
        return from_vanilla(str(start.folder), config, start.method, settings.seed, start.svd).float()
    except ValueError as error:
        raise UserError(f"initialize_from.folder: {start.folder} does not fit the model: {error}") from None


def make_optimizer(model: nn.Module, settings: ExperimentSettings) -> torch.optim.AdamW:
    """AdamW: matrices and embeddings decay; norms, biases and other vectors do not; auxiliary routers learn faster."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    apart = set(map(id, model.apart()))  # type: ignore[operator]
    for parameter in model.parameters():
        groups.setdefault((parameter.dim() > 1, id(parameter) in apart), []).append(parameter)
    rule = settings.optimizer
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": rule.weight_decay if decays else 0.0,
                "learning_rate_scale": rule.auxiliary_router_factor if own_rate else 1.0,
            }
            for (decays, own_rate), parameters in groups.items()
        ],
        lr=rule.learning_rate,
        betas=rule.betas,
        eps=rule.epsilon,
        fused=True,
    )


class Trainer:
    """Trains one experiment. Built alike on every rank."""

    def __init__(
        self,
        settings: ExperimentSettings,
        manifest: Manifest,
        parallel: Parallel,
        energy: EnergyMeter | None = None,
    ) -> None:
        """Build model, optimizer and loader. Raises UserError where settings, data and ranks contradict each other.

        energy: what this rank's joules are read from; None: what is found here.
        """
        if settings.precision == "auto":
            settings = settle(settings, parallel)
        self.settings, self.manifest, self.parallel = settings, manifest, parallel
        if settings.evaluation.tasks and parallel.settings.strategy in ("fsdp2", "zero3"):
            raise UserError(
                f"evaluation.tasks: {parallel.settings.strategy} leaves no rank a whole model; leave it out, and run "
                "`python -m pretrain.evaluate --checkpoint RUN` on the checkpoints"
            )
        self.config = resolve_model(settings, manifest)
        self.method = method_of(self.config)
        self.micro_size = micro_size_of(settings.batch, parallel.world_size)
        self.loader = BlockLoader(
            manifest,
            "train",
            settings.batch.size,
            self.micro_size,
            parallel.rank,
            parallel.world_size,
            seed=settings.seed if settings.data.order_seed is None else settings.data.order_seed,
            document_masking=settings.data.document_masking,
            device=parallel.device,
        )
        length, convention = manifest.sequence_length, settings.budget.convention
        self.step_flops = StepFlops(self.config, length, convention)
        self.exact_flops = StepFlops(self.config, length)
        self.tokens_per_step = settings.batch.size * length
        self.plans = self.make_plans()
        self.validation = Validation(
            self.config,
            manifest,
            settings.evaluation.micro_size or self.micro_size,
            settings.evaluation.sequences,
            settings.data.document_masking,
        )
        self.peak_flops = settings.metrics.peak_flops or peak_flops(parallel.device)
        torch.manual_seed(settings.seed)
        self.model = make_model(settings, self.config, parallel)
        blocks = parallel.settings.activation_checkpointing and settings.recompute == "none"
        self.model.set_recompute("block" if blocks else settings.recompute)
        if parallel.compiles(settings.compile):
            self.model.compile_layers()
        parallel.prepare(self.model, lambda module: make_optimizer(module, settings))
        first = parallel.local_rank == 0
        self.energy = energy or EnergyMeter.of_rank(parallel.device, first)
        kinds = parallel.gather((first, set(self.energy.counters)))
        self.energy_counted = self.energy.agree(kinds, parallel.device.type == "cuda")  # in words; None: nothing is
        self.state, self.spikes = self.state_of({}), LossSpikes()
        self.output: Output | None = None  # on rank 0, while a run directory is open
        self.cooldown_step: int | None = None  # the last one of the plateau, once the cool-down has begun
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.lock: RunLock | None = None  # on rank 0, while the run is trained
        self.fault: Exception | None = None  # what keeps this rank from going on, until the ranks meet
        self.checkpoint_seconds = 0.0  # that training has stood still for checkpoints since a line told

    def make_plans(self) -> list[Plan]:
        """The runs of the experiment; a run that has begun keeps its warm-up, whatever its budget grows to."""
        settings = self.settings
        expected = training_flops(
            self.config, self.manifest.sequence_length, settings.batch.size, convention=settings.budget.convention
        )
        return make_plans(settings, expected, self.tokens_per_step, extend.begun_warmup(settings.run_dir))

    def state_of(self, snapshot: dict[str, Any]) -> RunState:
        """How far the run of a checkpoint has come, or a new one; joules are known where all steps counted the same."""
        state = RunState(**snapshot["run"]) if snapshot else RunState(joules=0.0)
        if self.energy_counted is None or (snapshot and snapshot.get("energy") != self.energy_counted):
            state.joules = None
        return state

    # --- runs ---------------------------------------------------------------------------------------------------------

    def run(self, restart: bool = False) -> int:
        """Train every plan to its end; returns the process's exit code: 0, or that of a requested stop.

        restart: begin anew; what is in the run directory is kept in a folder beside it.
        Raises RunFailed on every rank alike where the run cannot go on, UserError where it cannot begin.
        """
        with ExitStack() as stack:
            folder = self.settings.run_dir
            self.lock = self.parallel.on_main("taking the lock", lambda: stack.enter_context(RunLock(owner_of(folder))))
            if self.parallel.gather(restart or run_folder.set_aside_by_half(folder))[0]:
                self.parallel.on_main("setting the old run aside", lambda: run_folder.set_aside(folder))
                self.plans = self.make_plans()
            if grown := self.parallel.on_main("looking at the budget", lambda: extend.grow(self.settings)):
                print(f"{folder}: {grown}")
            self.stop = stack.enter_context(StopRequest(folder))
            for plan in self.plans:
                if not self.fit(plan):
                    return self.stop.exit_code
        return 0

    def rehearse(self, steps: int, folder: Path) -> list[float]:
        """Take a few real steps without a run directory: nothing is written, no budget is spent. Returns the seconds
        of each, on this rank. Collective. folder: any that exists.
        """
        self.stop, self.plan = StopRequest(folder), self.plans[0]
        self.checkpoints = self.checkpoints_of(replace(self.plan, settings=self.settings))
        seconds = []
        for _ in range(steps):
            before = self.state.seconds
            self.training_step()
            seconds.append(self.state.seconds - before)
        self.loader.close()
        return seconds

    def fit(self, plan: Plan) -> bool:
        """Train one run directory from where it stands to its end; False if a stop was asked for first."""
        parallel = self.parallel
        parallel.on_main("claiming the run directory", lambda: run_folder.claim(plan.settings))
        if parallel.gather((last_line(plan.folder / METRICS) or {}).get("event"))[0] in ("finished", "branched"):
            if parallel.is_main:
                print(f"{plan.folder}: finished, nothing to do")
            return True
        self.plan, self.stopping = plan, False
        self.open_run()
        try:
            while plan.goes_on(self.state) and not self.stopping:
                before = replace(self.state)
                with traced(self.trace_path()):
                    line = self.training_step()
                self.after_step(before, line)
            self.last_checkpoint()
            if plan.goes_on(self.state):
                self.leave()
                return False
            self.finish_run()
            return True
        finally:
            self.close_run()

    # --- faults -------------------------------------------------------------------------------------------------------

    def guarded(self, action: Callable[[], Any]) -> None:
        """Do what this rank does alone; should it fail, the ranks learn of it when they meet."""
        try:
            action()
        except Exception as error:
            self.fault = self.fault or error

    def faulty(self) -> bool:
        """Whether this rank cannot go on: for a fault of its own, or of a thread that serves it."""
        for thread in (self.parallel.watchdog, self.lock):
            if thread is not None and thread.failure is not None:
                self.fault = self.fault or thread.failure
        return self.fault is not None

    def meet(self, action: Callable[[], Any] | None = None) -> None:
        """Do `action` on rank 0, then end all ranks if any of them cannot go on. Collective."""
        if action is not None and self.parallel.is_main:
            self.guarded(action)
        if self.parallel.agree(self.faulty()):
            self.fail()

    def fail(self) -> NoReturn:
        """Some rank cannot go on: raise on all."""
        error, self.fault = self.fault, None
        self.parallel.fail_together(error)

    def next_batch(self) -> list[MicroBatch]:
        """This rank's micro-batches; where they cannot be read, others, so that no rank waits for this one in vain."""
        try:
            return next(self.loader)
        except Exception as error:
            self.fault = self.fault or error
            if self.parallel.world_size == 1:
                self.fail()
            return self.loader.stand_in()

    # --- one step -----------------------------------------------------------------------------------------------------

    def training_step(self) -> dict[str, Any]:
        """One optimizer step over the global batch [B, T]; returns its line of metrics."""
        parallel, rule = self.parallel, self.settings.optimizer
        started = time.perf_counter()
        self.energy.resume()
        parallel.clock.restart()
        parallel.clock.begin("data")
        batch = [micro.to(parallel.device) for micro in self.next_batch()]
        share = 1 / (len(batch) * parallel.world_size)
        global_load = self.global_load(batch, share)
        sums = Sums()
        for number, micro in enumerate(batch):
            last = number == len(batch) - 1
            output = parallel.forward(
                last,
                input_ids=micro.input_ids,
                targets=micro.targets,
                document_ids=micro.document_ids,
                num_documents=micro.num_documents,
                step=self.state.step,
                num_items_in_batch=self.tokens_per_step,
                global_load=global_load,
            )
            self.collect(sums, output, share)
            parallel.micro_step(output.loss, last)
        sums.add("stop", float(self.stop.requested))
        sums.add("save", float(self.minutes_have_passed()))
        sums.add("fault", float(self.faulty()))
        if self.energy_counted:
            sums.add("joules", self.energy.take())
        reduced = sums.over_ranks(parallel)

        rate = rule.learning_rate * self.plan.schedule.factor(self.state.step, self.plan.progress(self.state))
        self.wait_for_copy()
        norm_and_finite = parallel.optimizer_step(rate, rule.clip_norm)
        # The one place where the host waits for the device. Whatever is decided from here on, every rank decides from
        # the same figures; what a fault has done to the weights ends with the run.
        totals = sums.read(reduced, **dict(zip(("norm", "finite"), norm_and_finite, strict=True)))
        norm, finite = totals.pop("norm"), totals.pop("finite") > 0
        if totals.pop("fault"):
            self.fail()
        if finite and self.method.follows_load(self.config):
            self.model.update_router_bias(torch.tensor(totals["load"], device=parallel.device))
        parallel.clock.stop()
        parts = self.parts() if (self.state.step + 1) % self.settings.metrics.every_steps == 0 else {}
        self.energy.pause()
        seconds = time.perf_counter() - started
        rates = self.advance(totals, seconds, finite)
        return self.line(totals, rate, norm) | rates | parts

    def global_load(self, batch: list[MicroBatch], share: float) -> Tensor | None:
        """Share of the global batch's tokens at each depth [Nr], for the balancing loss; None where it is not needed.

        Takes a forward pass up to the router, without gradients. It belongs to no FLOP convention and is not counted.
        """
        if share == 1 or not self.method.needs_load(self.config):
            return None
        load: Tensor | float = 0.0
        with torch.no_grad():
            for micro in batch:
                output = self.parallel.forward(
                    input_ids=micro.input_ids,
                    document_ids=micro.document_ids,
                    num_documents=micro.num_documents,
                    step=self.state.step,
                    routing_only=True,
                )
                load = load + output.routing.load * share
        assert isinstance(load, Tensor)
        return self.parallel.all_reduce(load)

    def collect(self, sums: Sums, output: Any, share: float) -> None:
        """Add a micro-batch's losses and routing to the step's sums.

        Losses are shares of the global mean already; other means enter with this micro-batch's `share` of the batch.
        """
        sums.add("total_loss", output.loss)
        for name, value in output.losses.items():
            sums.add("loss" if name == "lm" else f"{name}_loss", value)
        if output.routing is None:
            return
        routing = output.routing
        sums.add("counts", routing.counts.sum(0))
        sums.add("pairs", routing.pairs.sum(0))
        sums.add("offered", routing.offered.sum(0))
        sums.add("heads", float(routing.heads))
        depths = depth_counts(routing.depth, gates_of(self.config))
        sums.add("depth_shares", depths * (share / routing.depth.numel()))
        sums.add("load", routing.load * share)
        for name, value in routing.statistics.items():
            sums.add(name, value * share)

    def wait_for_copy(self) -> None:
        """Let a checkpoint that is copied beside the passes come to its end before weights change."""
        self.parallel.clock.begin("checkpoint")
        started = time.perf_counter()
        self.settle(self.checkpoints.wait_for_copy())
        self.checkpoint_seconds += time.perf_counter() - started

    def parts(self) -> dict[str, float]:
        """Seconds of this step by part and by rank, and of the checkpoints since a line last told them. Collective."""
        seconds = self.parallel.clock.read()
        spread = rank_spread(self.parallel, seconds["data"] + seconds["forward"])
        seconds["checkpoint"], self.checkpoint_seconds = self.checkpoint_seconds, 0.0
        return {f"{part}_seconds": value for part, value in seconds.items()} | spread

    def trace_path(self) -> Path | None:
        """Where the trace of the next step goes; None where none is asked for."""
        step = self.state.step + 1
        if step not in self.settings.metrics.profile_steps:
            return None
        return self.plan.folder / "profile" / f"step-{step:08d}-rank-{self.parallel.rank}.json"

    def advance(self, totals: dict[str, Any], seconds: float, finite: bool) -> dict[str, float]:
        """Count the step; returns its rates. Takes from `totals` what is not a figure of the step's own."""
        routed: list[Any] = [[round(n) for n in totals.pop(name, [])] for name in ("counts", "pairs", "offered")]
        routed.append(round(totals.pop("heads", 0)))
        self.stopping, self.save_due = totals.pop("stop") > 0, totals.pop("save") > 0
        size = self.settings.batch.size
        self.state.step += 1
        self.state.tokens += self.tokens_per_step
        self.state.flops += self.step_flops(size, *routed)
        self.state.seconds += seconds
        if (joules := totals.pop("joules", None)) is not None and self.state.joules is not None:
            self.state.joules = self.state.joules + joules if math.isfinite(joules) else None
        self.state.skipped_steps += not (finite and math.isfinite(totals["total_loss"]))
        rates = {"tokens_per_second": self.tokens_per_step / seconds, "loss_spike": self.spikes(totals["loss"])}
        if self.peak_flops is not None:
            executed = self.exact_flops(size, *routed)
            rates["mfu"] = executed / seconds / self.peak_flops / self.parallel.world_size
        return rates

    def line(self, totals: dict[str, Any], rate: float, norm: float) -> dict[str, Any]:
        """The step's line of metrics, without its rates."""
        totals |= self.method.summarize(totals)  # of the whole batch, in place of the mean over micro-batches
        if "entropy" in totals:
            totals["routing_entropy"] = totals.pop("entropy")
        memory = memory_bytes(self.parallel.device)
        epochs = {"source_epochs": self.loader.source_epochs} if self.loader.source_epochs else {}
        figures = {"learning_rate": rate, "gradient_norm": norm, "memory_bytes": memory}
        return self.counters() | totals | figures | epochs

    # --- after a step -------------------------------------------------------------------------------------------------

    def after_step(self, before: RunState, line: dict[str, Any]) -> None:
        """Write the step's line; stop past the limit of skipped steps; branch, validate, save where it is due."""
        state, plan = self.state, self.plan
        ends = not plan.goes_on(state) or self.stopping
        failed = state.skipped_steps > before.skipped_steps
        if state.step % self.settings.metrics.every_steps == 0 or ends or failed or line["loss_spike"]:
            self.write(line)
        if line["loss_spike"] and self.output:
            self.output.say(
                f"step {state.step}: loss {line['loss']:.4f} stands out from a mean of {self.spikes.mean:.4f}"
            )
        if failed:
            self.skipped(line)
        for branch in self.plans[1:] if plan.trunk else []:
            cooling = branch.schedule.cooling
            if cooling(branch.progress(state)) and not cooling(branch.progress(before)):
                self.start_branch(branch)
        if plan.goes_on(state) and self.validation_due(before):
            self.validate()
        self.tell_repetition(before)
        rule = self.settings.checkpoint
        if plan.begins_cooling(before, state):  # what a larger budget would go on from
            self.cooldown_step = state.step
            self.checkpoints.held.add(state.step)
            self.checkpoint()
        elif self.save_due or any(
            every and state.step % every == 0 for every in (rule.every_steps, rule.milestone_every)
        ):
            self.checkpoint()

    def counters(self) -> dict[str, Any]:
        """How far the run is, for a line of metrics. samples: sequences seen; epoch: share of the data handed out."""
        samples = self.state.tokens // self.manifest.sequence_length
        state = {name: value for name, value in asdict(self.state).items() if value is not None}
        return state | {"samples": samples, "epoch": self.loader.position / len(self.loader)}

    def tell_repetition(self, before: RunState) -> None:
        """Say once that the data begins to repeat itself."""
        size, samples = len(self.loader), (self.state.tokens - before.tokens) // self.manifest.sequence_length
        if self.output and self.loader.position - samples <= size < self.loader.position:
            self.output.say(
                f"step {self.state.step}: the data repeats itself from here on: all {size} sequences of "
                f"{self.manifest.folder} have been seen"
            )

    def validation_due(self, before: RunState) -> bool:
        """Whether the step since `before` has passed a point at which to validate."""
        rule = self.settings.evaluation
        if rule.every_steps is not None:
            return self.state.step % rule.every_steps == 0
        passed = [math.floor(self.plan.progress(state) * rule.times) for state in (before, self.state)]
        return passed[0] < passed[1]

    def validate(self, **extra: Any) -> None:
        """Validate and write the line, with what `extra` adds to it."""
        self.write(self.counters() | self.validation(self.parallel) | self.task_figures() | extra)

    def task_figures(self) -> dict[str, Any]:
        """Figures of `evaluation.tasks`; every rank answers every question, so that none runs ahead."""
        rule = self.settings.evaluation
        if not rule.tasks:
            return {}
        tokenizer = Tokenizer.from_file(str(self.manifest.folder / "tokenizer.json"))
        watchdog = self.parallel.watchdog
        hook = self.model.register_forward_pre_hook(lambda *_: watchdog.reached("a task") if watchdog else None)
        scores = run_tasks(
            self.model,
            wrap_tokenizer(tokenizer, self.config),
            [TaskSettings(name=name) for name in rule.tasks],
            folder=rule.task_folder,
            batch_size=self.validation.micro_size,
            limit=rule.task_limit,
            precision=self.parallel.precision,
        )
        hook.remove()
        self.parallel.model.train()
        return task_line(scores)

    def write(self, line: dict[str, Any]) -> None:
        if (output := self.output) is not None:
            self.guarded(lambda: output.write(line, self.plan.progress(self.state)))

    def minutes_have_passed(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock."""
        minutes = self.settings.checkpoint.every_minutes
        return self.parallel.is_main and minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def checkpoint(self) -> None:
        """Save this step's checkpoint, unless it is there already or under way."""
        if self.saved_step == self.state.step:
            return
        self.meet(self.output.sync if self.output else None)  # it relies on the lines before it
        started = time.perf_counter()
        outcome = self.checkpoints.save(self.parallel, self.snapshot(), self.state.step)
        self.checkpoint_seconds += time.perf_counter() - started
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        self.settle(outcome)

    def settle(self, outcome: Outcome | None) -> None:
        """Take in what became of a save: one that failed is not there."""
        if outcome is not None and not outcome.written and outcome.step == self.saved_step:
            self.saved_step = -1

    def last_checkpoint(self) -> None:
        """The checkpoint that a run ends with, whole. Raises RunFailed, on every rank, if it cannot be written."""
        self.settle(self.checkpoints.wait())  # one of this very step may have been under way, and have failed
        self.checkpoint()
        outcome = self.checkpoints.wait()
        self.settle(outcome)
        if self.saved_step != self.state.step and outcome is not None:
            raise RunFailed(
                f"{self.plan.folder}: training stands after step {self.state.step}, whose checkpoint could not be "
                f"written ({outcome.error}). Make room, then run the same command again: it goes on from the "
                "checkpoint before",
                CANNOT_WRITE,
            )

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors and random numbers: JSON, the same on every rank."""
        return {
            "run": asdict(self.state),
            "energy": self.energy_counted,
            "loss_spikes": asdict(self.spikes),
            "loader": self.loader.state(),
            "tracker_id": self.tracker_id,
            "cooldown_step": self.cooldown_step,
            "settings": self.plan.settings.model_dump(mode="json"),
            "versions": run_folder.versions(),
        }

    def skipped(self, line: dict[str, Any]) -> None:
        """A step had a loss or a gradient that is not finite. Raises UserError past the limit, on every rank alike."""
        limit = self.settings.optimizer.max_skipped_steps
        what = f"step {self.state.step}: loss {line['loss']}, gradient norm {line['gradient_norm']}: not finite"
        if self.state.skipped_steps <= limit:
            if self.output:
                self.output.say(f"{what}; skipped ({self.state.skipped_steps} of {limit})")
            return
        self.checkpoints.wait()
        last = self.checkpoints.latest(self.parallel)
        raise UserError(
            f"{what}; stopped. Last good checkpoint: {last or 'none yet'}. Lower optimizer.learning_rate in a new "
            "run_dir, or raise optimizer.max_skipped_steps to skip such steps"
        )

    # --- the ends of a run --------------------------------------------------------------------------------------------

    def open_run(self) -> None:
        """Take the run directory up where its latest checkpoint stands, or begin it."""
        parallel, plan = self.parallel, self.plan
        facts = {"planned_steps": plan.planned_steps, "warmup_steps": plan.schedule.warmup_steps}

        def describe() -> None:
            run_folder.describe_run(plan.settings, self.config, self.manifest, facts, parallel, self.energy_counted)
            (plan.folder / REQUEUE_FILE).unlink(missing_ok=True)

        parallel.on_main("describing the run", describe)
        self.checkpoints = self.checkpoints_of(plan)
        found = self.checkpoints.latest(parallel)
        if found is None:
            parallel.on_main("looking for what was trained", lambda: run_folder.check_history(plan.folder))
        snapshot: dict[str, Any] = {}
        if found is not None:
            snapshot = self.checkpoints.load(parallel, found)
            self.require_precision(found, snapshot)
            self.state, self.spikes = self.state_of(snapshot), LossSpikes(**snapshot.get("loss_spikes", {}))
            self.loader.load_state(snapshot["loader"])
        elif plan.settings.start_from is not None and plan is self.plans[0]:
            snapshot = self.begin_from_parent(plan.settings.start_from)
        elif plan is not self.plans[0]:
            raise UserError(
                f"{plan.folder}: the trunk's checkpoint is lost; remove {self.settings.run_dir} and start anew"
            )
        self.cooldown_step = snapshot.get("cooldown_step")
        self.checkpoints.held = set() if self.cooldown_step is None else {self.cooldown_step}
        self.loader.spread_over(plan.planned_steps * plan.settings.batch.size)
        self.saved_step, self.saved_at = self.state.step if found else -1, time.monotonic()
        self.tracker_id = snapshot.get("tracker_id")
        if plan is self.plans[0] and plan.settings.start_from is not None:
            if found is None:
                self.checkpoints.save(parallel, self.snapshot(), self.state.step)
                self.checkpoints.wait()  # one that fails is no loss: the parent is there
                self.saved_step = self.state.step
            parallel.on_main("taking the metrics", lambda: parent.copy_metrics(plan.settings, self.state.step))
        self.output = parallel.on_main("opening the metrics", self.open_output)
        if self.output and found is not None:
            self.output.say(f"goes on from {found}")
        if self.output and (epochs := self.loader.epochs_at(plan.planned_steps * plan.settings.batch.size)):
            told = ", ".join(f"{name} {count:.2f}" for name, count in epochs.items())
            self.output.say(f"epochs of each source over the whole budget: {told}")
        if found is None and plan.settings.evaluation.at_start:
            self.validate()

    def begin_from_parent(self, start: StartSettings) -> dict[str, Any]:
        """Take from another run what `start_from` says; returns what the run's own checkpoint goes on from."""
        snapshot = parent.take_parent(self.parallel, self.settings)
        self.state, self.spikes = self.state_of({}), LossSpikes()
        if start.take == "run":
            self.state, self.spikes = self.state_of(snapshot), LossSpikes(**snapshot.get("loss_spikes", {}))
        if start.data_order == "continue":
            if "loader" not in snapshot:
                raise UserError(f"start_from.data: {start.path} is a model alone: it has no place in the data")
            self.loader.load_state(snapshot["loader"])
            step, batch = snapshot["run"]["step"], snapshot["settings"]["batch"]["size"]
            self.loader.skipped = parent.skipped_samples(start, batch, self.loader.position, step)
        if not self.plan.goes_on(self.state):
            raise UserError(
                f"budget: {start.path} has spent this run's budget by step {self.state.step} already; give a larger "
                "one, an earlier start_from.step, or start_from.take: optimizer, which counts anew"
            )
        return {"cooldown_step": snapshot.get("cooldown_step") if start.take == "run" else None}

    def require_precision(self, checkpoint: Any, snapshot: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained in another precision, as one that was copied here may be."""
        before, now = snapshot.get("settings", {}).get("precision"), self.settings.precision
        if before not in (None, "auto", now):
            raise UserError(
                f"{checkpoint}: was trained in {before}, this run in {now}; a run goes on in the precision that it was "
                f"started with: give precision={before} and another run_dir, or remove this checkpoint"
            )

    def open_output(self) -> Output:
        """Where the run's figures go; on rank 0."""
        folder = self.plan.folder
        self.tracker_id = tracker_id(folder / "tracker", self.tracker_id)
        tracker = Tracker(self.plan.settings, folder / "tracker", self.tracker_id)
        return Output(folder, self.plan.settings.name, self.saved_step, self.plan.progress(self.state), tracker)

    def close_run(self) -> None:
        """Whatever ended it: let a save that is under way come to its end, and close what is open."""
        try:
            self.checkpoints.wait()
        finally:
            self.loader.close()
            if self.output:
                with suppress(OSError):  # what had to be on the disk was brought there before
                    self.output.close()
                self.output = None

    def checkpoints_of(self, plan: Plan) -> Checkpoints:
        """The checkpoints in a run directory, by the settings."""
        rule, folder = plan.settings.checkpoint, plan.folder
        return Checkpoints(
            folder / "checkpoints",
            rule.keep,
            rule.milestone_every,
            rule.asynchronous,
            report=print if self.parallel.is_main else lambda message: None,
            written=lambda step: run_folder.note_checkpoint(folder, step),
        )

    def start_branch(self, branch: Plan) -> None:
        """Begin a branch's run directory as if it had been trained up to here: the metrics and this checkpoint."""
        trunk = self.plan.folder
        if self.parallel.gather(bool(committed(branch.folder / "checkpoints")))[0]:
            return  # begun before the trunk went back to an earlier checkpoint, and maybe finished: it stands

        def begin() -> None:
            run_folder.claim(branch.settings)
            shutil.copyfile(trunk / METRICS, branch.folder / METRICS)

        self.meet()
        self.parallel.on_main("beginning a branch", begin)
        checkpoints = self.checkpoints_of(branch)
        begun = {"tracker_id": None, "cooldown_step": self.state.step}
        checkpoints.save(self.parallel, self.snapshot() | begun, self.state.step)
        outcome = checkpoints.wait()
        if outcome is not None and not outcome.written:
            raise RunFailed(
                f"{branch.folder}: this branch could not be begun ({outcome.error}). Make room, then run the same "
                "command again: the trunk goes on from its checkpoint before",
                CANNOT_WRITE,
            )

    def leave(self) -> None:
        """The end of a run that was asked to stop before its budget was spent, with its checkpoint written."""
        if self.stop.exit_code == REQUEUE:
            self.meet((self.plan.folder / REQUEUE_FILE).touch)
        if self.output:
            self.output.say(
                f"stopped after step {self.state.step}, with a checkpoint; run the same command again to go on"
            )

    def finish_run(self) -> None:
        """The end of a run whose budget is spent: validate, export the model, and write the last line."""
        if self.plan.trunk:
            self.write(self.counters() | {"event": "branched"})
        else:
            last = self.validation(self.parallel) | self.task_figures()
            last["validation_look_ahead"] = self.validation.look_ahead(self.parallel)
            source, tokenizer = (
                folder_of(self.checkpoints.folder, self.state.step),
                self.manifest.folder / "tokenizer.json",
            )
            final, line = self.plan.folder / "final", self.counters() | last
            self.parallel.on_main("exporting the model", lambda: export(source, final, tokenizer, line))
            self.write(line | {"event": "finished"})
        self.meet(self.output.sync if self.output else None)
