"""FSDP2: parameters, gradients and optimizer states in shards.

Shared blocks. FSDP2 gathers a unit each time it is applied, so a block applied Nr times costs Nr gathers per pass.
With `reshard_after_forward: false` a unit is gathered once per optimizer step, whatever Nr and however many
micro-batches, and stays whole until the optimizer runs; it costs the memory of the unique parameters in the forward
precision.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.parallel.strategy import OptimizerFactory, Parallel


class FSDP2(Parallel):
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


def _forget_weights(model: nn.Module) -> None:
    """Put parameters on the meta device; those that modules share stay shared."""
    twins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            empty = torch.empty_like(parameter, device="meta")
            module.register_parameter(
                name, twins.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
            )
