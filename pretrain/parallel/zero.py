"""ZeRO 1-3 by DeepSpeed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.settings import UserError
from pretrain.parallel.deepspeed_files import BUFFERS, FACTS, NATIVE_TAG, safe_loading
from pretrain.parallel.strategy import OptimizerFactory, Parallel


class Zero(Parallel):
    """ZeRO 1-3. The engine is driven directly: losses arrive scaled, the trainer says which micro-batch is the last."""

    checkpoint_format = "deepspeed"

    def building(self) -> AbstractContextManager[Any]:
        """ZeRO-3 divides the model while it is handed round, so that no rank but rank 0 ever holds it whole."""
        return torch.device("meta") if self.settings.strategy == "zero3" and not self.is_main else nullcontext()

    def prepare(self, model: nn.Module, optimizer_factory: OptimizerFactory) -> None:
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        if self.device.type == "cpu":  # its shared-memory collectives would be compiled at start; gloo serves
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module, divides = model, self.settings.strategy == "zero3"
        if divides:
            self._stand_in(model)
        else:
            model.to(self.device)
        optimizer = optimizer_factory(model)  # which looks at shapes, as long as there are some
        if divides:
            self._divide(model)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=self._configuration(), dist_init_required=False
        )
        self.model = self.engine
        self.stage = int(self.settings.strategy[-1])
        self._begin()

    def _stand_in(self, model: nn.Module) -> None:
        """Parameters that take no room in place of those on the meta device; one that modules share stays one."""
        twins: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.is_meta:
                    empty = torch.empty(1, dtype=parameter.dtype, device=self.device).expand(parameter.shape)
                    twin = twins.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
                    module.register_parameter(name, twin)

    @torch.no_grad()
    def _divide(self, model: nn.Module) -> None:
        """Rank 0's weights in parts, one parameter after the other; buffers whole, everywhere."""
        import deepspeed

        for parameter in model.parameters():
            if not self.is_main:
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            alone = nn.Module()
            alone.register_parameter("parameter", parameter)
            deepspeed.zero.Init(module=alone, config_dict_or_path=self._configuration())
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                value = torch.empty_like(buffer, device=self.device) if buffer.is_meta else buffer.to(self.device)
                dist.broadcast(value, 0)
                module.register_buffer(name, value, name not in module._non_persistent_buffers_set)

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
