"""Parallel strategies: the one place where a model meets several ranks (DDP; beside it fsdp2.py and zero.py).

The trainer speaks to `Parallel` alone. The model knows nothing of it and only publishes its sharding units
(`model.units()`).

Losses. Every loss that reaches `micro_step` is this rank's share of the *global* mean: its sum divided by a count over
all ranks and all micro-batches of the step. The strategies average gradients over ranks, so `micro_step` multiplies by
the number of ranks, here and nowhere else; the gradient that reaches the optimizer is then the sum of the shares.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from data_prep.settings import UserError
from model.attention.flex import can_compile
from pretrain.parallel.settings import ParallelSettings, check_precision
from pretrain.parallel.timing import StepClock
from pretrain.parallel.watchdog import Watchdog
from pretrain.stop import CANNOT_WRITE, disk_error

Precision = Literal["fp32", "bf16"]
OptimizerFactory = Callable[[nn.Module], Optimizer]
Result = TypeVar("Result")
POLL_SECONDS = 0.2  # between two looks at the store, of a rank that waits for rank 0


class RunFailed(Exception):
    """The run cannot go on, for what its message says; raised on every rank alike. exit_code: of the process."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def failure_of(error: BaseException) -> RunFailed:
    """What `error`, of one rank, is to all of them."""
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, UserError):
        return RunFailed(str(error), 2)
    if text := disk_error(error):
        return RunFailed(f"{text}: make room, then run the same command again; checkpoints are whole", CANNOT_WRITE)
    return RunFailed(f"{type(error).__name__}: {error}")


def _check_devices(visible: int, environment: Mapping[str, str]) -> None:
    """Raise UserError, on all ranks of a machine alike, where it runs more ranks than GPUs are visible."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    ranks = max(ranks, int(environment.get("LOCAL_RANK", "0")) + 1)
    if ranks > visible:
        limits = environment.get("CUDA_VISIBLE_DEVICES")
        why = "" if limits is None else f" (CUDA_VISIBLE_DEVICES={limits})"
        raise UserError(f"{ranks} ranks run on this machine, but {visible} GPUs are visible{why}: start a rank a GPU")


class Parallel:
    """One process alone; the subclasses are the strategies over several ranks. Made by `start_parallel`.

    rank, world_size: of this process; is_main: rank 0, which writes and prints. local_rank: among those of its machine.
    device: where this rank computes. clock: the seconds of a step by part.
    module: the model as it was given to `prepare`; model: as the strategy calls it.
    """

    module: nn.Module
    model: nn.Module
    optimizer: Optimizer
    checkpoint_format: Literal["sharded", "deepspeed"] = "sharded"

    def __init__(self, settings: ParallelSettings, precision: Precision, seed: int) -> None:
        self.settings, self.precision, self.seed = settings, precision, seed
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.is_main = self.rank == 0
        if torch.cuda.is_available():
            _check_devices(torch.cuda.device_count(), os.environ)
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("highest")  # fp32 means fp32, not TF32
            torch.backends.cudnn.allow_tf32 = False
        else:
            self.device = torch.device("cpu")
        self.background_group: dist.ProcessGroup | None = None
        self.store: dist.Store | None = None
        self._solos = 0  # calls of `on_main`
        self.watchdog: Watchdog | None = None
        self.clock = StepClock(self.device)

    def compute_in(self, precision: Precision) -> None:
        """Set the precision of the passes, before `prepare`. Raises UserError where the launcher was told another."""
        check_precision(self.settings, precision, os.environ)
        self.precision = precision

    def compiles(self, asked: bool | Literal["auto"]) -> bool:
        """Whether layers are to be compiled: as asked, or on a GPU where that works."""
        if asked != "auto":
            return asked
        return self.device.type == "cuda" and self.checkpoint_format != "deepspeed" and can_compile()

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Around work of this rank for which the others may have to wait, however long: the watchdog lets it be."""
        return self.watchdog.busy(what) if self.watchdog else nullcontext()

    def on_main(self, what: str, action: Callable[[], Result]) -> Result | None:
        """Run `action` on rank 0, however long it takes; the others look at a key now and then, outside any collective.

        Returns its result on rank 0, None elsewhere. What it raises ends every rank: alone, a process raises it as it
        is; of several, all raise RunFailed.
        """
        if self.world_size == 1:
            return action()
        assert self.store is not None
        self._solos += 1
        key = f"on_main/{self._solos}"
        with self.busy(what):
            if not self.is_main:
                self._wait_for_main(key)
                return None
            try:
                result = action()
            except Exception as error:
                failure = failure_of(error)
                if failure.exit_code == 1:
                    traceback.print_exception(error, file=sys.stderr)
                self.store.set(key, f"{failure.exit_code}\t{failure}")
                raise failure from error
            self.store.set(key, "0\t")
            return result

    def _wait_for_main(self, key: str) -> None:
        assert self.store is not None
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        code, _, message = self.store.get(key).decode().partition("\t")
        if code != "0":
            raise RunFailed(message, int(code))

    def fail_together(self, error: Exception | None) -> NoReturn:
        """Some rank cannot go on, with `error` where it is this one; collective. Raises RunFailed on every rank."""
        if self.world_size == 1 and error is not None:
            raise error
        failure = None if error is None else failure_of(error)
        if failure and failure.exit_code == 1:
            traceback.print_exception(error, file=sys.stderr)
        told = self.gather(None if failure is None else (str(failure), failure.exit_code))
        found = [(rank, *entry) for rank, entry in enumerate(told) if entry is not None]
        message = "; ".join(f"rank {rank}: {text}" for rank, text, _ in found)
        raise RunFailed(message, found[0][2]) from error

    def building(self) -> AbstractContextManager[Any]:
        """Where a new model is built: under fsdp2 only rank 0 draws and holds weights, which `prepare` hands round."""
        return nullcontext()

    def prepare(self, model: nn.Module, optimizer_factory: OptimizerFactory) -> None:
        """Place `model` on the device, shard or replicate it, then build its optimizer with `optimizer_factory(model)`.

        Afterwards each rank draws its own random numbers (dropout, a random router).
        """
        self.module = model.to(self.device)
        self.model = self._wrap(self.module)
        self.optimizer = optimizer_factory(self.module)
        self._begin()

    def _begin(self) -> None:
        """The ranks run from here on: watch them, and let each draw its own random numbers."""
        torch.manual_seed(self.seed * 1_000_003 + self.rank + 1)
        limit = self.settings.watchdog_seconds
        if self.world_size > 1 and limit > 0:
            store = Watchdog.open_store(self.rank, self.world_size, limit, 0) if self.is_main else None
            port = self.gather(store.port if store else None)[0]
            store = store or Watchdog.open_store(self.rank, self.world_size, limit, port)
            self.watchdog = Watchdog(self.rank, self.world_size, limit, store)

    def _reached(self, place: str, part: str) -> None:
        """This rank comes to `place`, where ranks meet; a `part` of the step begins."""
        self.clock.begin(part)
        if self.watchdog:
            self.watchdog.reached(place)

    def _wrap(self, model: nn.Module) -> nn.Module:
        return model

    def forward(self, last: bool = True, **inputs: Any) -> Any:
        """Call the model in the run's precision. Under fsdp2 and zero3 every rank must call it equally often.

        last: in training, whether this is the last micro-batch of the step, as `micro_step` will be told.
        """
        self._reached("forward", "forward")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(**inputs)

    def micro_step(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; ranks exchange gradients on the `last` one of the step alone.

        loss: scalar, this rank's and micro-batch's share of the global mean (see the module's opening).
        """
        self._reached("backward", "backward")
        (loss * self.world_size).backward()

    def optimizer_step(self, learning_rate: float, max_norm: float = 0.0) -> tuple[Tensor, Tensor]:
        """Clip, update, clear the gradients. Returns the global gradient norm before clipping and whether it is finite,
        both scalars of the device, for which nothing waits.

        learning_rate: of every parameter group, times the group's `learning_rate_scale` where it has one.
        max_norm: of the gradient; 0 does not clip. A non-finite gradient, on any rank, updates nothing on any rank.
        """
        self._reached("the update", "optimizer")
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = whole = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            self.clock.begin("communication")
            whole = norm.full_tensor()
            self.clock.begin("optimizer")
        finite = whole < float("inf")  # False for nan too; the norm is global, so all ranks agree
        if max_norm > 0:
            clip_grads_with_norm_(self.module.parameters(), max_norm, norm)
        self._set_learning_rate(learning_rate)
        self._step_if(finite)
        self.optimizer.zero_grad(set_to_none=True)
        return whole, finite

    def _step_if(self, finite: Tensor) -> None:
        """Fused optimizers decide on the device, as gradient scalers have them do; others make the host wait."""
        if all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "mean", "max", "min"] = "sum") -> Tensor:
        """`tensor` reduced over all ranks, as a new tensor."""
        self._reached("a reduction", "communication")
        result = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(result, getattr(dist.ReduceOp, "SUM" if op == "mean" else op.upper()))
        return result / self.world_size if op == "mean" else result

    def agree(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any."""
        return bool(self.all_reduce(torch.tensor(int(flag)), "max"))

    def gather(self, value: Any, background: bool = False) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank. Small picklable objects only.

        background: over the group of the checkpoint thread, which may run beside training.
        """
        if not background:
            self._reached("a gathering", "communication")
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.background_group if background else None)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            self.agree(False)  # unlike dist.barrier, needs no device of its own

    def finish(self) -> None:
        """Leave the group. The barrier right before keeps a late rank from finding its peers gone."""
        if self.watchdog:
            self.watchdog.stop()
            self.watchdog = None
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    # state, as checkpoints see it -----------------------------------------------------------------------------------

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name; a tied or shared tensor appears once. DTensors under fsdp2."""
        persistent = self.module.state_dict().keys()
        tensors: dict[str, Tensor] = dict(self.module.named_parameters())
        tensors.update((name, buffer) for name, buffer in self.module.named_buffers() if name in persistent)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def model_shapes(self) -> dict[str, torch.Size]:
        """Whole shapes of `model_tensors`."""
        return {name: tensor.shape for name, tensor in self.model_tensors().items()}

    def optimizer_tensors(self) -> dict[tuple[str, str], Tensor]:
        """Optimizer state by (parameter name, state key), for instance ("lm_head.weight", "exp_avg")."""
        found = {}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[name, key] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def allocate_optimizer_state(self, shapes: Mapping[tuple[str, str], torch.Size]) -> None:
        """Replace the optimizer's state by zeros of these shapes, to be filled from a checkpoint."""
        parameters = dict(self.module.named_parameters())
        on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        self.optimizer.state.clear()
        for (name, key), shape in shapes.items():
            parameter = parameters[name]
            place = parameter.device if on_device else torch.device("cpu")  # where AdamW itself would put its `step`
            zeros = torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(shape, device=place)
            self.optimizer.state[parameter][key] = zeros.detach()

    def save_native(self, folder: Path) -> None:
        """Write a checkpoint in the strategy's own format, where `checkpoint_format` is not `sharded`."""
        raise NotImplementedError

    def load_native(self, folder: Path) -> None:
        """Read a checkpoint in the strategy's own format."""
        raise NotImplementedError

    def set_model_tensor(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter or buffer by its whole value, the same on every rank."""
        _copy_into(self.model_tensors()[name], value)

    def set_optimizer_tensor(self, name: str, key: str, value: Tensor) -> None:
        """Overwrite one optimizer state by its whole value, after `allocate_optimizer_state`."""
        _copy_into(self.optimizer.state[self.module.get_parameter(name)][key], value)


def _copy_into(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        whole = value.to(target.device, target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(value)


class DDP(Parallel):
    def _wrap(self, model: nn.Module) -> nn.Module:
        # a router may be unused in a step (warm-up, a depth without tokens), hence find_unused_parameters;
        # buffers are updated from global statistics, equal on every rank, hence no broadcast
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            find_unused_parameters=True,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def forward(self, last: bool = True, **inputs: Any) -> Any:
        self.model.require_backward_grad_sync = last  # type: ignore[assignment]  # read by DDP's forward, and not again in the backward
        return super().forward(**inputs)

    def micro_step(self, loss: Tensor, last: bool) -> None:
        assert self.model.require_backward_grad_sync == last, "forward and micro_step were told different things"
        super().micro_step(loss, last)
