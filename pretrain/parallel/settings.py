"""How the ranks share the work: the `parallel` section, and accelerate's configuration files, which say the same.

Of accelerate's keys some are honoured (`_FSDP`, `_DEEPSPEED`), some say nothing that could be otherwise here and are
accepted (`_HARMLESS`), and every other is refused by name with what serves in its place: none is dropped in silence.
`accelerate launch` passes its file on in the environment, which is read by the same rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from data_prep.settings import SWITCHES, Settings, UserError

if TYPE_CHECKING:  # it brings torch, for which who reads settings alone does not wait
    from model.memory import Placement

Strategy = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


class ParallelSettings(Settings):
    """How the ranks share the work. A configuration file of accelerate says the same and is accepted in its place."""

    strategy: Strategy = Field(
        "auto",
        description="single, ddp, zero1, zero2, zero3, fsdp2, or auto: what `accelerate launch` was configured for, "
        "else ddp on several ranks and single on one",
    )
    world_size: int | None = Field(None, ge=1, description="ranks that must run; any other number is refused")
    reshard_after_forward: bool = Field(
        True, description="fsdp2: free a unit's gathered weights after each use; false gathers once per optimizer step"
    )
    shard_size: int | None = Field(
        None, ge=1, description="fsdp2: ranks that share one copy of the model (hybrid sharding); default all"
    )
    min_unit_parameters: int = Field(
        2**20,
        ge=0,
        description="fsdp2: layers of fewer parameters are gathered with the root, once for each forward and backward "
        "pass: what they hold costs less than the delay of a gather of their own; 0: every layer by itself",
    )
    offload_optimizer: bool = Field(False, description="zero1, zero2, zero3: keep optimizer states in host memory")
    offload_parameters: bool = Field(
        False,
        description="zero3, fsdp2: keep weights in host memory and bring a layer to the device for its use; under "
        "fsdp2 gradients, optimizer states and the update are there too",
    )
    activation_checkpointing: bool = Field(
        False, description="as accelerate's files say it: recompute: block, where recompute is none"
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="as accelerate's files say it: bf16 is held against precision, no leaves it to precision"
    )
    timeout_seconds: float = Field(1800, gt=0, description="longest wait of one collective before the run fails")
    watchdog_seconds: float = Field(
        900,
        ge=0,
        description="longest time without progress before the watchdog names the stalled rank and stops all; 0: off",
    )

    def placement(self, world_size: int, **step: Any) -> Placement:
        """What memory and communication hang on, on so many ranks. step: the fields of Placement that are not here."""
        from model.memory import Placement

        assert self.strategy != "auto"  # resolve_strategy has settled it
        return Placement(
            strategy=self.strategy,
            world_size=world_size,
            shard_size=self.shard_size,
            reshard_after_forward=self.reshard_after_forward,
            min_unit_parameters=self.min_unit_parameters,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            **step,
        )

    @model_validator(mode="before")
    @classmethod
    def _read_accelerate(cls, values: Any) -> Any:
        return translate_accelerate(values) if isinstance(values, dict) and "distributed_type" in values else values

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        if self.offload_optimizer and self.strategy in ("single", "ddp", "fsdp2"):
            raise ValueError(f"offload_optimizer needs zero1, zero2 or zero3, not strategy {self.strategy}")
        if self.offload_parameters and self.strategy not in ("auto", "zero3", "fsdp2"):
            raise ValueError(f"offload_parameters needs zero3 or fsdp2, not strategy {self.strategy}")
        sharding = ("min_unit_parameters", "reshard_after_forward", "shard_size")
        given = [name for name in sharding if getattr(self, name) != type(self).model_fields[name].default]
        if self.strategy not in ("auto", "fsdp2") and given:
            raise ValueError(f"{', '.join(given)} belong to fsdp2, not to strategy {self.strategy}")
        if self.strategy == "single" and self.world_size not in (None, 1):
            raise ValueError(f"strategy single runs on 1 rank, world_size asks for {self.world_size}")
        return self


# --- accelerate's files ---------------------------------------------------------------------------------------------

ANY = object()  # any value will do
_LAUNCHER = {  # the launcher's business alone
    "compute_environment", "debug", "machine_rank", "main_process_ip", "main_process_port", "main_training_function",
    "num_machines", "rdzv_backend", "same_network", "use_cpu", "enable_cpu_affinity", "gpu_ids", "mpirun_config",
    "deepspeed_hostfile", "deepspeed_multinode_launcher", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter",
}  # fmt: skip
# Keys that say what holds here in any case, with the values that do so; empty ones (null, [], false) always do.
_HARMLESS: dict[str, Any] = {
    **dict.fromkeys(_LAUNCHER, ANY),
    "downcast_bf16": ("no",),
    "fsdp_version": (2,),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"),
    "fsdp_backward_prefetch": ("BACKWARD_PRE", "NO_PREFETCH"),
    "fsdp_backward_prefetch_policy": ("BACKWARD_PRE", "NO_PREFETCH"),
    "fsdp_cpu_ram_efficient_loading": ANY,
    "fsdp_sync_module_states": ANY,
    "fsdp_use_orig_params": ANY,
    "fsdp_min_num_params": ANY,
    "fsdp_state_dict_type": ("SHARDED_STATE_DICT",),
    "fsdp_transformer_layer_cls_to_wrap": ("MoRDecoderLayer",),
    "zero3_init_flag": ANY,
    "zero3_save_16bit_model": ANY,
    "gradient_accumulation_steps": (1, "1", "auto"),
    "gradient_clipping": ("auto", "none"),
    "offload_optimizer_nvme_path": ("none",),
    "offload_param_nvme_path": ("none",),
    "dynamo_backend": ("NO", "no"),
}
_INSTEAD = {  # what to do in place of a key that is not served
    "mixed_precision": "precision of the experiment says it (bf16 or fp32)",
    "gradient_accumulation_steps": "it follows from batch.size, batch.micro_size and the ranks",
    "gradient_clipping": "optimizer.clip_norm says it",
    "fsdp_transformer_layer_cls_to_wrap": "the model names its own units; parallel.min_unit_parameters joins them",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP and SIZE_BASED_WRAP are served",
    "fsdp_state_dict_type": "checkpoints are sharded; `python -m pretrain.checkpoint convert` makes whole ones",
    "fsdp_sharding_strategy": "FULL_SHARD and SHARD_GRAD_OP are served; else give fsdp_reshard_after_forward",
    "fsdp_forward_prefetch": "FSDP2 gathers ahead by itself",
    "dynamo_backend": "compile: true of the experiment compiles the model",
    "deepspeed_config_file": "give zero_stage and the offload keys here instead",
    "deepspeed_moe_layer_cls_names": "no layer of these models is a DeepSpeed MoE layer",
    "offload_optimizer_nvme_path": "cpu is served",
    "offload_param_nvme_path": "cpu is served",
    "zero_stage": "1, 2 and 3 are served; 0 is distributed_type: MULTI_GPU",
    "parallelism_config_dp_replicate_size": "give parallelism_config_dp_shard_size",
}
_TOP = {
    "distributed_type", "num_processes", "mixed_precision", "downcast_bf16", "fsdp_config", "deepspeed_config",
    "parallelism_config", "dynamo_config", "fp8_config", "megatron_lm_config", "tpu_name", "tpu_zone", "tpu_env",
    "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "command_file", "commands",
}  # fmt: skip
_FSDP = {"fsdp_reshard_after_forward", "fsdp_sharding_strategy", "fsdp_offload_params", "fsdp_activation_checkpointing"}
_DEEPSPEED = {"zero_stage", "offload_optimizer_device", "offload_param_device"}
_PARALLELISM = {"parallelism_config_dp_shard_size"}
_KNOWN = sorted({*_HARMLESS, *_INSTEAD, *_TOP, *_FSDP, *_DEEPSPEED, *_PARALLELISM})


def translate_accelerate(values: dict[str, Any]) -> dict[str, Any]:
    """Read an accelerate configuration (`distributed_type`, `fsdp_config`, ...) as `ParallelSettings` fields.

    Fields of `ParallelSettings` beside accelerate's keys count too, and win. ValueError names a key that is not served.
    """
    fields = ParallelSettings.model_fields.keys() - {"mixed_precision"}  # accelerate's key too, which has more values
    own = {key: value for key, value in values.items() if key in fields}
    rest = {key: value for key, value in values.items() if key not in own}
    kind = rest.pop("distributed_type")
    fsdp, deepspeed = _section(rest, "fsdp_config"), _section(rest, "deepspeed_config")
    replication, dynamo = _section(rest, "parallelism_config"), _section(rest, "dynamo_config")
    if (count := rest.pop("num_processes", None)) not in (None, -1):
        own.setdefault("world_size", count)
    own.setdefault("mixed_precision", _precision(rest.pop("mixed_precision", None)))
    for section, prefix in ((rest, ""), (dynamo, "dynamo_config.")):
        _refuse_others(section, prefix)
    if kind == "FSDP":
        found = _of_fsdp(fsdp) | _of_replication(replication)
    elif kind == "DEEPSPEED":
        found = _of_deepspeed(deepspeed)
        _refuse_others(replication, "parallelism_config.")
    elif kind in ("MULTI_GPU", "NO"):
        found = {"strategy": "ddp" if kind == "MULTI_GPU" else "single"}
        _refuse_others(replication, "parallelism_config.")
    elif kind == "MULTI_CPU":
        raise ValueError("distributed_type MULTI_CPU starts one process; give MULTI_GPU, which serves CPUs too")
    else:
        raise ValueError(f"distributed_type {kind!r} is not one of NO, MULTI_GPU, DEEPSPEED, FSDP")
    for name, section in (("FSDP", fsdp), ("DEEPSPEED", deepspeed)):
        if section and kind != name:
            raise ValueError(f"{name.lower()}_config belongs to distributed_type {name}, not to {kind}; leave it out")
    return found | own


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    section = values.pop(key, None) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{key}: expected keys and values (given: {section!r})")
    return dict(section)


def _of_fsdp(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("fsdp_version") != 2:
        raise ValueError(f"fsdp_config.fsdp_version must be 2 (given: {config.get('fsdp_version')!r})")
    found: dict[str, Any] = {"strategy": "fsdp2"}
    sharding = config.pop("fsdp_sharding_strategy", None)
    strategies = {None: True, 1: True, "1": True, "FULL_SHARD": True, 2: False, "2": False, "SHARD_GRAD_OP": False}
    if sharding not in strategies:
        raise ValueError(_refusal("fsdp_config.", "fsdp_sharding_strategy", sharding))
    reshard = config.pop("fsdp_reshard_after_forward", strategies[sharding])
    found["reshard_after_forward"] = strategies[reshard] if reshard in ("FULL_SHARD", "SHARD_GRAD_OP") else reshard
    found["offload_parameters"] = _switch("fsdp_offload_params", config.pop("fsdp_offload_params", False))
    recompute = config.pop("fsdp_activation_checkpointing", False)
    found["activation_checkpointing"] = _switch("fsdp_activation_checkpointing", recompute)
    if config.get("fsdp_auto_wrap_policy") == "SIZE_BASED_WRAP":
        found["min_unit_parameters"] = config.get("fsdp_min_num_params", 10**8)
    _refuse_others(config, "fsdp_config.")
    return found


def _of_replication(config: dict[str, Any]) -> dict[str, Any]:
    shard_size = config.pop("parallelism_config_dp_shard_size", None)
    config.pop("parallelism_config_dp_replicate_size", None)  # what the number of ranks leaves
    _refuse_others(config, "parallelism_config.")
    return {} if shard_size is None else {"shard_size": shard_size}


def _of_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    stage = config.pop("zero_stage", None)
    if str(stage) not in ("1", "2", "3"):
        raise ValueError(_refusal("deepspeed_config.", "zero_stage", stage))
    found: dict[str, Any] = {"strategy": f"zero{stage}"}
    for key, field in (
        ("offload_optimizer_device", "offload_optimizer"),
        ("offload_param_device", "offload_parameters"),
    ):
        device = config.pop(key, None) or "none"
        if device not in ("none", "cpu"):
            raise ValueError(f"deepspeed_config.{key}: {device!r} is not served; give cpu or none")
        found[field] = device == "cpu"
    _refuse_others(config, "deepspeed_config.")
    return found


def _precision(value: Any) -> str:
    if value in (None, False, "no", "bf16"):
        return value or "no"
    raise ValueError(_refusal("", "mixed_precision", value))


def _switch(key: str, value: Any) -> bool:
    found = SWITCHES.get(str(value).lower())
    if found is None:
        raise ValueError(f"{key}: expected true or false (given: {value!r})")
    return found


def _refuse_others(section: Mapping[str, Any], prefix: str) -> None:
    """Refuse by name every key that says something that is not served."""
    for key, value in section.items():
        accepted = _HARMLESS.get(key, ())
        known = key in _KNOWN or key.startswith(("tpu_", "parallelism_config_", "megatron_lm_", "dynamo_"))
        empty = value is not True and (value in (None, False, "", "none", 1) or value in ([], {}))
        size = key.startswith("parallelism_config_") and not key.endswith("_size")  # of a size that is 1
        if accepted is ANY or (isinstance(accepted, tuple) and value in accepted) or (known and (empty or size)):
            continue
        if key.startswith("dynamo_") and section.get("dynamo_backend", "NO") in ("NO", "no"):
            continue
        raise ValueError(_refusal(prefix, key, value))


def _refusal(prefix: str, key: str, value: Any) -> str:
    if key in _INSTEAD:
        return f"{prefix}{key}: {value!r} is not served; {_INSTEAD[key]}"
    if key in _KNOWN or key.startswith(("parallelism_config_", "tpu_")):
        return f"{prefix}{key}: {value!r} is not served here; leave it out"
    near = difflib.get_close_matches(key, [*_KNOWN, *ParallelSettings.model_fields], n=3, cutoff=0.6)
    return f"unknown key {prefix}{key!r}" + (f"; nearest valid: {', '.join(near)}" if near else "")


# --- what the launcher started --------------------------------------------------------------------------------------


def resolve_strategy(settings: ParallelSettings, environment: Mapping[str, str]) -> ParallelSettings:
    """Settle `auto` and hold the settings against what the launcher started.

    Raises UserError where the two differ: another number of ranks, another strategy than accelerate's configuration
    asked for, or a launcher that meant several ranks and started one (accelerate does so on a machine without GPUs).
    """
    launched, world_size = "WORLD_SIZE" in environment, int(environment.get("WORLD_SIZE", "1"))
    start = "torchrun --nproc_per_node N pretrain/main.py ... or accelerate launch --multi_gpu --num_processes N ..."
    if not launched and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate launch was asked for several processes and started one, alone (it does so without GPUs, and "
            f"with --cpu). Start ranks with {start}"
        )
    asked = strategy_of_launcher(environment)
    if settings.strategy == "auto":
        found = asked or {"strategy": "ddp" if world_size > 1 else "single"}
        settings = ParallelSettings(**{**settings.model_dump(exclude_unset=True), **found})
    elif asked and asked["strategy"] != settings.strategy:
        raise UserError(
            f"parallel.strategy is {settings.strategy}, but accelerate launch was configured for {asked['strategy']}; "
            "leave parallel.strategy at auto, or give accelerate launch the matching --config_file"
        )
    if settings.strategy == "single" and world_size > 1:
        raise UserError(f"parallel.strategy is single, but {world_size} ranks run; choose ddp, zero1-3 or fsdp2")
    if settings.strategy != "single" and not launched:
        raise UserError(f"parallel.strategy {settings.strategy} needs a launcher; use {start}")
    if settings.world_size not in (None, world_size):
        raise UserError(f"parallel.world_size asks for {settings.world_size} ranks, {world_size} were started")
    if settings.shard_size is not None and world_size % settings.shard_size:
        raise UserError(
            f"parallel.shard_size {settings.shard_size} does not divide the {world_size} ranks; "
            f"values that do: {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    return settings


def check_precision(settings: ParallelSettings, precision: str, environment: Mapping[str, str]) -> None:
    """Hold the experiment's precision against what accelerate's file or launcher was told. Raises UserError.

    `no`, accelerate's default, leaves it to the experiment.
    """
    asked = {settings.mixed_precision, environment.get("ACCELERATE_MIXED_PRECISION", "no")} - {"no"}
    wrong = sorted(asked - {precision})
    if wrong:
        raise UserError(
            f"accelerate was configured for mixed_precision {wrong[0]}, the experiment says precision: {precision}; "
            "give mixed_precision: no there, or the same precision here"
        )


def strategy_of_launcher(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Fields that `accelerate launch --config_file` passed on in the environment; None under any other launcher."""
    try:
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            if environment.get("FSDP_VERSION") != "2":
                raise UserError("accelerate launch was configured for FSDP1; set fsdp_config.fsdp_version: 2")
            return _of_fsdp(_fsdp_environment(environment)) | _of_replication(_parallelism_environment(environment))
        if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return _of_deepspeed(_deepspeed_environment(environment))
    except ValueError as error:
        raise UserError(f"accelerate launch: {error}") from None
    return None


def _fsdp_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """`fsdp_config` as accelerate launch passes it on. What it passes on unasked, its defaults, is left out."""
    found: dict[str, Any] = {"fsdp_version": 2}
    for key in ("reshard_after_forward", "offload_params", "activation_checkpointing"):
        if (value := environment.get(f"FSDP_{key}".upper())) is not None:
            found[f"fsdp_{key}"] = SWITCHES.get(value.lower(), value)
    # FULL_SHARD is the launcher's default; under version 2 the resharding is told apart from it
    if (sharding := environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")) not in ("FULL_SHARD", "1"):
        found["fsdp_sharding_strategy"] = sharding
        if sharding in ("SHARD_GRAD_OP", "2") and found.get("fsdp_reshard_after_forward") is True:
            del found["fsdp_reshard_after_forward"]
    # Under another policy the launcher passes its default on, which nobody asked for.
    if environment.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        found |= {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": environment["FSDP_MIN_NUM_PARAMS"]}
    elif policy := environment.get("FSDP_AUTO_WRAP_POLICY"):
        found["fsdp_auto_wrap_policy"] = policy
    for key, name in (
        ("state_dict_type", "STATE_DICT_TYPE"),
        ("transformer_layer_cls_to_wrap", "TRANSFORMER_CLS_TO_WRAP"),
    ):
        if value := environment.get(f"FSDP_{name}"):
            found[f"fsdp_{key}"] = value
    return found


def _parallelism_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for size in ("dp_shard", "tp", "cp", "sp"):
        value = environment.get(f"PARALLELISM_CONFIG_{size}_SIZE".upper())
        if value is not None and (value != "1" or size == "dp_shard"):
            found[f"parallelism_config_{size}_size"] = int(value)
    return found


def _deepspeed_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    names = {
        "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        "deepspeed_moe_layer_cls_names": "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    }
    given = {key: environment[name] for key, name in names.items() if name in environment}
    return {key: value for key, value in given.items() if value not in ("none", "None", "")}
