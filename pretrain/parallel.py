"""Parallel strategies: the one place where a model meets several ranks (DDP, DeepSpeed ZeRO 1-3, FSDP2).

The trainer speaks to `Parallel` alone. The model knows nothing of it and only publishes its sharding units
(`model.units()`).

Losses. Every loss that reaches `micro_step` is this rank's share of the *global* mean: its sum divided by a count over
all ranks and all micro-batches of the step. The strategies average gradients over ranks, so `micro_step` multiplies by
the number of ranks, here and nowhere else; the gradient that reaches the optimizer is then the sum of the shares.

Shared blocks. FSDP2 gathers a unit each time it is applied, so a block applied Nr times costs Nr gathers per pass.
With `reshard_after_forward: false` a unit is gathered once per optimizer step, whatever Nr and however many
micro-batches, and stays whole until the optimizer runs; it costs the memory of the unique parameters in the forward
precision.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from data_prep.settings import UserError
from model.attention.flex import can_compile
from pretrain.parallel_settings import ParallelSettings, check_precision, resolve_strategy
from pretrain.stop import CANNOT_WRITE, disk_error
from pretrain.timing import StepClock
from pretrain.watchdog import Watchdog

Precision = Literal["fp32", "bf16"]
NATIVE_TAG, FACTS, BUFFERS = "native", "facts.json", "buffers.safetensors"  # in a DeepSpeed checkpoint
OptimizerFactory = Callable[[nn.Module], Optimizer]
Result = TypeVar("Result")
POLL_SECONDS = 0.2  # between two looks at the store, of a rank that waits for rank 0
# Longest wait within a save, whose ranks may write at very different speeds; a rank that is gone ends it at once.
SAVE_TIMEOUT = timedelta(days=2)


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
    """One process alone; the subclasses are the strategies over several ranks. Made by `Parallel.start`.

    rank, world_size: of this process; is_main: rank 0, which writes and prints.
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
        self.is_main = self.rank == 0
        if torch.cuda.is_available():
            _check_devices(torch.cuda.device_count(), os.environ)
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
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

    @staticmethod
    def start(
        settings: ParallelSettings,
        precision: Precision | Literal["auto"] = "fp32",
        seed: int = 0,
        first: Callable[[], None] | None = None,
    ) -> Parallel:
        """Join the other ranks (gloo on CPU, NCCL on GPU) and seed this one so that all build the same model.

        precision: `auto` leaves it to `pretrain.precision.settle`, once the ranks have met.
        first: what rank 0 does before the ranks join, while the others wait without a time limit.
        Raises UserError where the ranks or the strategy asked for are not those that were started.
        """
        settings = resolve_strategy(settings, os.environ)
        parallel = _STRATEGIES[settings.strategy](settings, "fp32", seed)
        if precision != "auto":
            parallel.compute_in(precision)
        store: dist.Store | None = None
        if "WORLD_SIZE" in os.environ:
            store, _, _ = next(dist.rendezvous("env://", parallel.rank, parallel.world_size))
            parallel.store = dist.PrefixStore("pretrain", store)
        if first is not None:
            parallel.on_main("the start", first)
        if store is not None:
            backend = "cpu:gloo,cuda:nccl" if parallel.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=settings.timeout_seconds),
                store=dist.PrefixStore("ranks", store),
                rank=parallel.rank,
                world_size=parallel.world_size,
            )
            # collectives of background threads (checkpoints) must never interleave with those of training
            parallel.background_group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
            assert dist.get_world_size() == parallel.world_size
        torch.manual_seed(seed)
        return parallel

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


def _forget_weights(model: nn.Module) -> None:
    """Put parameters on the meta device; those that modules share stay shared."""
    twins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            empty = torch.empty_like(parameter, device="meta")
            module.register_parameter(
                name, twins.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
            )


class _DDP(Parallel):
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


class _FSDP2(Parallel):
    def building(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.is_main else torch.device("meta")

    def prepare(self, model: nn.Module, optimizer_factory: OptimizerFactory) -> None:
        """Shard the model while it holds nothing, then fill the shards tensor by tensor from rank 0's weights.

        No rank but rank 0 ever holds a whole model, and no device does.
        """
        whole = dict(model.named_parameters()) | dict(model.named_buffers())
        _forget_weights(model)
        self.module = model
        self.model = self._wrap(model)
        model.to_empty(device="cpu" if self.settings.offload_parameters else self.device)
        model.tie_weights()  # type: ignore[operator]  # to_empty parts what was tied
        self._hand_round(whole)
        self.optimizer = optimizer_factory(model)
        self._begin()

    @torch.no_grad()
    def _hand_round(self, whole: dict[str, Tensor]) -> None:
        """Give each rank its part of rank 0's tensors; `whole` is emptied on the way."""
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            value = whole.pop(name)
            value = value.to(self.device) if self.is_main else torch.empty_like(value, device=self.device)
            if isinstance(tensor, DTensor):
                tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=0))
            else:
                dist.broadcast(value, 0)
                tensor.data = tensor.data.to(self.device)  # buffers stay on the device where weights do not
                tensor.copy_(value)

    def _wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        shard_size = self.settings.shard_size or self.world_size
        if shard_size == self.world_size:
            mesh = init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        else:
            shape = (self.world_size // shard_size, shard_size)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        # autocast chooses the precision of each operation as under the other strategies, so inputs are not cast
        half = torch.bfloat16 if self.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        pinned = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pinned) if self.settings.offload_parameters else OffloadPolicy()
        keep = not self.settings.reshard_after_forward
        least = self.settings.min_unit_parameters
        units = [unit for unit in model.units() if sum(p.numel() for p in unit.parameters()) >= least]  # type: ignore[operator]
        self._units: list[Any] = [*units, model]
        for unit in self._units:
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=False if keep else None,
            )
            unit.set_reshard_after_backward(not keep, recurse=False)
        return model

    def micro_step(self, loss: Tensor, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        super().micro_step(loss, last)

    def optimizer_step(self, learning_rate: float, max_norm: float = 0.0) -> tuple[Tensor, Tensor]:
        self._free_gathered()
        return super().optimizer_step(learning_rate, max_norm)

    def model_tensors(self) -> dict[str, Tensor]:
        self._free_gathered()
        return super().model_tensors()

    def _free_gathered(self) -> None:
        """Make the module hold its shards again, which alone carry gradients and may be written to."""
        for unit in self._units:
            unit.reshard()


class _DeepSpeed(Parallel):
    """ZeRO 1-3. The engine is driven directly: losses arrive scaled, the trainer says which micro-batch is the last."""

    checkpoint_format = "deepspeed"

    def prepare(self, model: nn.Module, optimizer_factory: OptimizerFactory) -> None:
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        if self.device.type == "cpu":  # its shared-memory collectives would be compiled at start; gloo serves
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module = model.to(self.device)
        optimizer = optimizer_factory(self.module)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=self._configuration(), dist_init_required=False
        )
        self.model = self.engine
        self.stage = int(self.settings.strategy[-1])
        self._begin()

    def _configuration(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": int(self.settings.strategy[-1]), "overlap_comm": self.device.type == "cuda"}
        if self.settings.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.settings.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # only its product with the next two is checked
            "gradient_accumulation_steps": 1,  # boundaries are set by micro_step
            "zero_optimization": zero,
            # the trainer's own AdamW; DeepSpeed's would be compiled at start
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # fp32 weights under autocast, as under the other strategies
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # whose gradients would be reduced in bf16: fp32 as elsewhere
            },
            "steps_per_print": 2**62,
        }

    def forward(self, last: bool = True, **inputs: Any) -> Any:
        self._reached("forward", "forward")
        return self.engine(**inputs)

    def micro_step(self, loss: Tensor, last: bool) -> None:
        self._reached("backward", "backward")
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size)

    def optimizer_step(self, learning_rate: float, max_norm: float = 0.0) -> tuple[Tensor, Tensor]:
        self._reached("the update", "optimizer")
        self.optimizer.clip_grad = max_norm  # type: ignore[attr-defined]
        self._set_learning_rate(learning_rate)
        self.engine.step()
        norm, overflow = self.engine.get_global_grad_norm(), self.optimizer.overflow  # type: ignore[attr-defined]
        return torch.tensor(float(norm), dtype=torch.float64), torch.tensor(not overflow)

    def model_shapes(self) -> dict[str, torch.Size]:
        shapes = super().model_shapes()
        shapes.update((n, p.ds_shape) for n, p in self.module.named_parameters() if hasattr(p, "ds_shape"))
        return shapes

    def save_native(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint. A rank whose disk is full still meets the others before it raises."""
        failures: list[Exception] = []
        write = self.engine.checkpoint_engine.save

        def guarded(*arguments: Any, **keywords: Any) -> None:
            try:
                write(*arguments, **keywords)
            except Exception as failure:
                failures.append(failure)

        self.engine.checkpoint_engine.save = guarded
        try:
            self.engine.save_checkpoint(str(folder), tag=NATIVE_TAG, save_latest=False)
        finally:
            del self.engine.checkpoint_engine.save
        if failures:
            raise failures[0]
        if self.is_main:
            self._save_facts(folder)

    def _save_facts(self, folder: Path) -> None:
        """What DeepSpeed's converter leaves out: buffers, the optimizer's step, and which names are parameters."""
        shapes = self.model_shapes()
        parameters = {name: list(shapes[name]) for name, _ in self.module.named_parameters()}
        states = self.optimizer.optimizer.state.values()  # type: ignore[attr-defined]
        steps = max((int(state["step"]) for state in states if "step" in state), default=0)
        facts = {"optimizer_steps": steps, "parameters": parameters}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        buffers = {
            f"model/{name}": t.contiguous() for name, t in self.model_tensors().items() if name not in parameters
        }
        save_file(buffers, folder / BUFFERS)

    def load_native(self, folder: Path) -> None:
        """Read what `save_native` wrote under the same strategy on as many ranks. UserError where it could run code."""
        try:
            with safe_loading():
                self.engine.load_checkpoint(str(folder), tag=NATIVE_TAG)
        except pickle.UnpicklingError as error:
            raise UserError(f"{folder}: not read, for it holds more than tensors: {str(error)[:300]}") from None

    def allocate_optimizer_state(self, shapes: Mapping[tuple[str, str], torch.Size]) -> None:
        zero: Any = self.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        sizes = {key: shape.numel() for (_, key), shape in shapes.items()}
        fused = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
        for flat in flats:
            device = flat.device if fused else torch.device("cpu")  # where AdamW itself would put its `step`
            zero.optimizer.state[flat] = {
                key: torch.zeros((), device=device) if key == "step" else torch.zeros_like(flat) for key in sizes
            }
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def set_model_tensor(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter: Any = dict(self.module.named_parameters()).get(name)
        if parameter is None:
            self.module.get_buffer(name).copy_(value)
        elif self.stage == 3:
            safe_set_local_fp32_param(parameter, self._local(parameter, value))
            parameter.ds_tensor.data.copy_(self._local(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def set_optimizer_tensor(self, name: str, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter: Any = self.module.get_parameter(name)
        if key == "step":  # one for each flat group; all parameters have taken the same steps
            for state in self.optimizer.optimizer.state.values():  # type: ignore[attr-defined]
                state["step"].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._local(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _local(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's stretch of a whole tensor, padded as ZeRO-3 pads it."""
        size = parameter.ds_tensor.ds_numel
        flat = torch.zeros(size * self.world_size, dtype=value.dtype)
        flat[: value.numel()] = value.flatten()
        return flat[self.rank * size : (self.rank + 1) * size].to(parameter.ds_tensor.device)


_STRATEGIES: dict[str, type[Parallel]] = {
    "single": Parallel,
    "ddp": _DDP,
    "fsdp2": _FSDP2,
    "zero1": _DeepSpeed,
    "zero2": _DeepSpeed,
    "zero3": _DeepSpeed,
}


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within it torch.load builds tensors and the three plain classes that DeepSpeed writes, and nothing else.

    DeepSpeed's loader and converter unpickle, which could run code of who wrote the file. What may not be built raises
    UnpicklingError.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # outdoes weights_only=False, which DeepSpeed asks for
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[switch]
        os.environ |= {} if before is None else {switch: before}


def convert_deepspeed() -> None:
    """The process that `read_deepspeed` starts: DeepSpeed's converter, on its own command line, reading safely."""
    from deepspeed.checkpoint import ds_to_universal

    with safe_loading():
        ds_to_universal.main(ds_to_universal.parse_arguments())


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """All tensors of a DeepSpeed checkpoint, whole, in fp32, under the names of `pretrain.checkpoint`.

    DeepSpeed's own converter to its universal format does the work, in a process of its own. Raises UserError where it
    fails, as it does for a file that holds more than tensors.
    """
    tensors = load_file(folder / BUFFERS)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tool = [sys.executable, "-m", "pretrain.parallel", "--inject_missing_state"]
        root = Path(__file__).resolve().parent.parent  # where -m finds this module
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        universal = Path(scratch, "universal").resolve()
        folders = ["--input_folder", str(folder.resolve() / NATIVE_TAG), "--output_folder", str(universal)]
        done = subprocess.run([*tool, *workers, *folders], capture_output=True, text=True, cwd=root)
        if done.returncode:
            raise UserError(f"{folder}: DeepSpeed's converter failed:\n{done.stderr[-2000:]}")
        for name, shape in facts["parameters"].items():
            for path in (universal / "zero" / name).glob("*.pt"):
                content = torch.load(path, weights_only=True)
                value = content["param"] if isinstance(content, dict) else content
                if path.stem == "fp32":
                    tensors[f"model/{name}"] = value.float().reshape(shape)
                elif path.stem != "step":
                    tensors[f"optimizer/{name}/{path.stem}"] = value.float().reshape(shape)
            tensors[f"optimizer/{name}/step"] = torch.tensor(float(facts["optimizer_steps"]))
    return tensors


if __name__ == "__main__":
    convert_deepspeed()
