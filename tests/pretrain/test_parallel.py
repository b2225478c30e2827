"""Strategy: every parallel configuration trains the same tiny model on the same data; the loss curve of one process is
the law. The same runs leave checkpoints at half way, from which every strategy and world then goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from torch import nn
from torch.profiler import profile

from data_prep.settings import UserError, read_yaml
from model.config import MoRConfig
from model.modeling import MoRForCausalLM
from pretrain.checkpoint import Marker, committed
from pretrain.parallel.settings import ParallelSettings, check_precision, resolve_strategy
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel
from tests.helpers.corpus import prepare_tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.experiments import ROUTED, read_lines, settings_for, trainer_for

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "parallel"
RUNNING = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}


# --- settings ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("single", {"strategy": "single", "world_size": 1}),
        ("ddp", {"strategy": "ddp"}),
        ("zero1", {"strategy": "zero1", "offload_optimizer": False}),
        ("zero2", {"strategy": "zero2", "offload_optimizer": False}),
        ("zero3", {"strategy": "zero3", "offload_optimizer": False}),
        ("zero3_offload", {"strategy": "zero3", "offload_optimizer": True}),
        ("fsdp2", {"strategy": "fsdp2", "reshard_after_forward": True, "shard_size": None}),
        ("fsdp2_keep", {"strategy": "fsdp2", "reshard_after_forward": False}),
        ("fsdp2_hybrid", {"strategy": "fsdp2", "shard_size": 8}),
    ],
)
def test_configuration_files_mean_what_they_say(name: str, fields: dict[str, Any]):
    settings = ParallelSettings.model_validate(read_yaml(CONFIGS / f"{name}.yaml"))
    assert {key: getattr(settings, key) for key in fields} == fields


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero3", "fsdp2"])
def test_a_resolved_configuration_which_names_every_default_is_accepted_again(strategy: str):
    settings = ParallelSettings.model_validate({"strategy": strategy})
    assert ParallelSettings.model_validate(settings.model_dump()) == settings


def test_accelerate_says_how_small_a_unit_may_be():
    policy = {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 5000}
    values = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **policy}}
    assert ParallelSettings.model_validate(values).min_unit_parameters == 5000


# What accelerate 1.15 writes for `accelerate config default`, and what its questions write.
DEFAULT_FILE = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "MULTI_GPU", "downcast_bf16": False,
    "enable_cpu_affinity": False, "machine_rank": 0, "main_training_function": "main", "mixed_precision": "no",
    "num_machines": 1, "num_processes": 2, "rdzv_backend": "static", "same_network": False, "tpu_env": [],
    "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False, "gpu_ids": "all",
}  # fmt: skip
FSDP_FILE = DEFAULT_FILE | {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_activation_checkpointing": True, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": True, "fsdp_reshard_after_forward": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_version": 2,
    },
}  # fmt: skip
DEEPSPEED_FILE = DEFAULT_FILE | {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {
        "gradient_accumulation_steps": 1, "offload_optimizer_device": "cpu", "offload_param_device": "cpu",
        "zero3_init_flag": False, "zero3_save_16bit_model": False, "zero_stage": 3,
        "deepspeed_multinode_launcher": "standard", "offload_param_nvme_path": "none",
    },
}  # fmt: skip
OFFLOADING = {"offload_parameters": True, "offload_optimizer": True}
RECOMPUTING = {"offload_parameters": True, "activation_checkpointing": True, "reshard_after_forward": False}


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        (DEFAULT_FILE, {"strategy": "ddp", "world_size": 2}),
        (FSDP_FILE, {"strategy": "fsdp2", "world_size": 2, **RECOMPUTING}),
        (DEEPSPEED_FILE, {"strategy": "zero3", "world_size": 2, **OFFLOADING}),
    ],
)
def test_what_accelerate_writes_is_honoured_whole(values: dict[str, Any], fields: dict[str, Any]):
    settings = ParallelSettings.model_validate(values)
    assert settings.model_dump(exclude_unset=True, exclude_defaults=True) == fields


def within(section: str, **values: Any) -> dict[str, Any]:
    """A file of accelerate with these keys in one of its sections."""
    kind = {"fsdp_config": FSDP_FILE, "deepspeed_config": DEEPSPEED_FILE}.get(section, DEFAULT_FILE)
    return kind | {section: {**kind.get(section, {}), **values}} if section else DEFAULT_FILE | values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            within("fsdp_config", fsdp_sharding_strategy="HYBRID_SHARD"),
            "fsdp_sharding_strategy.*HYBRID_SHARD.*FULL_SHARD",
        ),
        (within("fsdp_config", fsdp_ofload_params=True), "fsdp_ofload_params.*nearest valid: fsdp_offload_params"),
        (within("fsdp_config", fsdp_state_dict_type="FULL_STATE_DICT"), "fsdp_state_dict_type.*convert"),
        (within("fsdp_config", fsdp_auto_wrap_policy="NO_WRAP"), "fsdp_auto_wrap_policy.*NO_WRAP"),
        (within("fsdp_config", fsdp_transformer_layer_cls_to_wrap="BertLayer"), "BertLayer.*the model names its own"),
        (within("deepspeed_config", gradient_clipping=0.5), "gradient_clipping: 0.5.*optimizer.clip_norm"),
        (within("deepspeed_config", gradient_accumulation_steps=4), "gradient_accumulation_steps: 4.*batch.micro_size"),
        (within("deepspeed_config", offload_param_device="nvme"), "offload_param_device: 'nvme'.*cpu or none"),
        (within("deepspeed_config", deepspeed_config_file="ds.json"), "deepspeed_config_file.*zero_stage"),
        (within("deepspeed_config", zero_stage=0), "zero_stage: 0.*MULTI_GPU"),
        (within("deepspeed_config", zero_stage=2), "offload_parameters needs zero3 or fsdp2"),
        (within("parallelism_config", parallelism_config_tp_size=2), "parallelism_config_tp_size: 2"),
        (within("dynamo_config", dynamo_backend="INDUCTOR"), "dynamo_backend: 'INDUCTOR'.*compile: true"),
        (within("", mixed_precision="fp16"), "mixed_precision: 'fp16'.*precision of the experiment"),
        (within("", tpu_use_cluster=True), "tpu_use_cluster: True is not served"),
        (within("", fp8_config={"backend": "TE"}), "fp8_config"),
        (within("", num_procesess=2), "num_procesess.*nearest valid: num_processes"),
        (within("", fsdp_config={"fsdp_version": 2}), "fsdp_config belongs to distributed_type FSDP"),
        (within("", distributed_type="MULTI_CPU"), "MULTI_CPU.*MULTI_GPU"),
    ],
)
def test_what_is_not_served_of_accelerates_files_is_refused_by_name(values: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        ParallelSettings.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "perhaps"}, "fsdp_offload_params"),
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "fsdp_state_dict_type"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
         | {"ACCELERATE_GRADIENT_CLIPPING": "0.3"}, "gradient_clipping"),
    ],
)  # fmt: skip
def test_what_the_launcher_passes_on_is_refused_alike(changes: dict[str, str], words: str):
    environment = RUNNING | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | changes
    with pytest.raises(UserError, match=words):
        resolve_strategy(ParallelSettings(), environment)


def test_the_launchers_precision_is_held_against_the_experiments():
    asked = ParallelSettings.model_validate(DEFAULT_FILE | {"mixed_precision": "bf16"})
    check_precision(asked, "bf16", {})
    check_precision(ParallelSettings(), "bf16", {"ACCELERATE_MIXED_PRECISION": "no"})
    with pytest.raises(UserError, match=r"mixed_precision bf16.*precision: fp32"):
        check_precision(asked, "fp32", {})
    with pytest.raises(UserError, match="mixed_precision fp16"):
        check_precision(ParallelSettings(), "bf16", {"ACCELERATE_MIXED_PRECISION": "fp16"})


def test_every_configuration_file_is_tested():
    tested = {mark.args[1][i][0] for mark in test_configuration_files_mean_what_they_say.pytestmark for i in range(9)}
    assert tested == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(
    "values",
    [
        {"strategy": "ddp", "offload_optimizer": True},
        {"strategy": "ddp", "shard_size": 2},
        {"strategy": "zero2", "min_unit_parameters": 0},
        {"strategy": "zero3", "reshard_after_forward": False},
        {"strategy": "single", "world_size": 2},
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}},
        {"distributed_type": "TPU"},
        {"strategy": "ddp", "bogus": 1},
    ],
)
def test_settings_that_contradict_themselves_are_refused(values: dict[str, Any]):
    with pytest.raises(ValidationError):
        ParallelSettings.model_validate(values)


@pytest.mark.parametrize(
    ("values", "environment", "message"),
    [
        ({}, {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, "started one"),
        ({"strategy": "ddp"}, {}, "needs a launcher"),
        ({"strategy": "single"}, RUNNING, "8 ranks"),
        ({"strategy": "ddp", "world_size": 4}, RUNNING, "asks for 4 ranks, 8"),
        ({"strategy": "fsdp2", "shard_size": 3}, RUNNING, "1, 2, 4, 8"),
        ({"strategy": "ddp"}, RUNNING | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "configured for fsdp2"),
        ({}, RUNNING | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
    ],
)
def test_a_world_other_than_asked_for_is_refused(values: dict[str, Any], environment: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        resolve_strategy(ParallelSettings.model_validate(values), environment)


@pytest.mark.parametrize(
    ("environment", "fields"),
    [
        ({}, {"strategy": "single"}),
        (RUNNING, {"strategy": "ddp"}),
        (
            RUNNING | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            {"strategy": "fsdp2", "reshard_after_forward": False},
        ),
        (
            RUNNING
            | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}
            | {"FSDP_MIN_NUM_PARAMS": "100000000"},
            {"strategy": "fsdp2", "shard_size": 4, "min_unit_parameters": 2**20},
        ),
        (
            RUNNING
            | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "5000"},
            {"strategy": "fsdp2", "min_unit_parameters": 5000},
        ),
        (
            RUNNING
            | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
            | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"strategy": "fsdp2", "offload_parameters": True, "activation_checkpointing": True},
        ),
        (
            RUNNING
            | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
            | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
            {"strategy": "zero3", "offload_optimizer": False, "offload_parameters": True},
        ),
        (
            RUNNING | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            {"strategy": "zero2", "offload_optimizer": False},
        ),
    ],
)
def test_auto_follows_the_launcher(environment: dict[str, str], fields: dict[str, Any]):
    settings = resolve_strategy(ParallelSettings(timeout_seconds=7), environment)
    assert {key: getattr(settings, key) for key in fields} == fields
    assert settings.timeout_seconds == 7


# --- one process ------------------------------------------------------------


def small(seed: int = 0) -> tuple[Parallel, nn.Linear]:
    parallel = start_parallel(ParallelSettings(strategy="single"), "fp32", seed)
    model = nn.Linear(4, 1, bias=False)
    parallel.prepare(model, lambda module: torch.optim.SGD(module.parameters(), lr=1.0))
    return parallel, model


def test_accumulated_shares_equal_the_whole_batch():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    weights = []
    for parts in (1, 3):
        parallel, model = small()
        for number, part in enumerate(x.chunk(parts)):
            parallel.micro_step(parallel.forward(input=part).square().sum() / 6, last=number == parts - 1)
        parallel.optimizer_step(0.5, 0.0)
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


def test_clipping_and_its_norm():
    parallel, model = small()
    before = model.weight.detach().clone()
    parallel.micro_step((parallel.forward(input=torch.full((1, 4), 3.0))).sum(), last=True)
    norm, finite = parallel.optimizer_step(1.0, 1.5)
    assert finite and norm == pytest.approx(6.0)
    assert float((model.weight - before).norm()) == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float):
    parallel, model = small()
    before = model.weight.detach().clone()
    parallel.micro_step(parallel.forward(input=torch.tensor([[bad, 1.0, 1.0, 1.0]])).sum(), last=True)
    assert not parallel.optimizer_step(1.0, 1.0)[1]
    assert torch.equal(model.weight, before) and model.weight.grad is None


def test_layers_are_compiled_as_asked_and_by_itself_on_gpus_alone(monkeypatch):
    parallel, _ = small()
    assert parallel.compiles(True) and not parallel.compiles(False) and not parallel.compiles("auto")
    parallel.device = torch.device("cuda", 0)
    for able in (True, False):
        monkeypatch.setattr("pretrain.parallel.strategy.can_compile", lambda able=able: able)
        assert parallel.compiles("auto") is able
    monkeypatch.setattr("pretrain.parallel.strategy.can_compile", lambda: True)
    parallel.checkpoint_format = "deepspeed"  # whose hooks gather weights at each module's call
    assert not parallel.compiles("auto")


# --- several ranks ------------------------------------------------------------

STEPS = 24
OFFLOADED = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
OFFLOADED_FSDP = {"fsdp_version": 2, "fsdp_offload_params": True, "fsdp_activation_checkpointing": True}
# name: (architecture, ranks, parallel section)
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ddp": ("mor_expert", 2, {"strategy": "ddp"}),
    "ddp_4": ("mor_expert", 4, {"strategy": "ddp"}),
    "zero1": ("mor_expert", 2, {"strategy": "zero1"}),
    "zero2": ("mor_expert", 2, {"strategy": "zero2"}),
    "zero3": ("mor_expert", 2, {"strategy": "zero3"}),
    "zero3_offload": ("mor_expert", 2, {"strategy": "zero3", "offload_optimizer": True}),
    "fsdp2": ("mor_expert", 2, {"strategy": "fsdp2"}),
    "fsdp2_4": ("mor_expert", 4, {"strategy": "fsdp2"}),
    "fsdp2_keep": ("mor_expert", 2, {"strategy": "fsdp2", "reshard_after_forward": False}),
    "fsdp2_hybrid": ("mor_expert", 4, {"strategy": "fsdp2", "shard_size": 2}),
    "zero3_offload_all": ("mor_expert", 2, {"distributed_type": "DEEPSPEED", "deepspeed_config": OFFLOADED}),
    "fsdp2_offload": ("mor_expert", 2, {"distributed_type": "FSDP", "fsdp_config": OFFLOADED_FSDP}),
    "fsdp2_one_unit": ("mor_expert", 2, {"strategy": "fsdp2", "min_unit_parameters": 10**6}),
    "token_ddp_4": ("mor_token", 4, {"strategy": "ddp"}),
    "token_zero2": ("mor_token", 2, {"strategy": "zero2"}),
    "token_fsdp2_4": ("mor_token", 4, {"strategy": "fsdp2", "reshard_after_forward": False}),
    "exit_ddp": ("early_exit", 2, {"strategy": "ddp"}),
    "exit_zero2": ("early_exit", 2, {"strategy": "zero2"}),
    "exit_fsdp2": ("early_exit", 2, {"strategy": "fsdp2"}),
}


def train_on_ranks(run_dir: Path, data: Path, architecture: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank does: the run, to its end, and its lines of metrics."""
    trainer = trainer_for(settings_for(run_dir, data, architecture, **changes))
    assert trainer.run() == 0
    trainer.parallel.finish()
    return read_lines(run_dir)


def changes_for(parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "budget": {"steps": STEPS},
        "batch": {"size": 4, "micro_size": 1},
        "checkpoint": {"every_steps": STEPS // 2, "keep": 9, "asynchronous": True},
        "parallel": parallel,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_tiny(folder, samples=200)  # what each step sees follows from the whole, and some tests from that
    return folder


class Runs:
    """Runs each named configuration once, when first asked for."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data
        self.lines: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, name: str) -> list[dict[str, Any]]:
        if name not in self.lines:
            architecture, ranks, parallel = RUNS.get(name, (name, 1, {"strategy": "single"}))
            arguments = (self.root / name, self.data, architecture, changes_for(parallel))
            self.lines[name] = run_ranks(train_on_ranks, ranks, *arguments)[0]
        return self.lines[name]

    def go_on(self, source: str, target: str) -> list[dict[str, Any]]:
        """Resume, under configuration `target`, from the checkpoint that `source` made at half way."""
        self(source)
        folder = self.root / f"{source}-then-{target}"
        shutil.copytree(self.root / source, folder)
        shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
        lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "finished" not in line]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        architecture, ranks, parallel = RUNS.get(target, (target, 1, {"strategy": "single"}))
        return run_ranks(train_on_ranks, ranks, folder, self.data, architecture, changes_for(parallel))[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    found = [line["loss"] for line in lines if "loss" in line]
    assert len(found) == STEPS
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_same_losses_as_one_process(runs: Runs, name: str):
    expected, found = runs(RUNS[name][0]), runs(name)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert found[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-5)
    norms = [[line["gradient_norm"] for line in lines if "loss" in line] for lines in (expected, found)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


# Of halting by `accumulated`, at a threshold where sequences, and so ranks, end at different steps.
ACCUMULATED = {"act_combine": "accumulated", "act_epsilon": 0.1, "initializer_range": 0.1}
# Of exits: who skips a layer, and in validation who leaves where, is another number of tokens on each rank. After a few
# steps the best two tokens' probabilities are so far apart.
DROPPING = {"layer_dropout": 0.5, "layer_dropout_steps": 4, "exit_threshold": 4e-4}
# architecture, changes of its model, ranks and strategies
OTHERS: list[tuple[str, dict[str, Any], list[tuple[int, str]]]] = [
    ("mod", {}, [(4, "ddp"), (2, "zero1"), (2, "zero3"), (4, "fsdp2")]),
    ("ut", {}, [(4, "ddp"), (2, "zero2"), (2, "fsdp2")]),
    ("ut", ACCUMULATED, [(4, "ddp"), (2, "zero3"), (2, "fsdp2")]),
    ("mor_expert", {"kv_strategy": "propagated"}, [(2, "fsdp2")]),
    ("early_exit", DROPPING, [(2, "zero1"), (2, "zero3")]),
    ("early_exit", DROPPING, [(4, "ddp"), (4, "fsdp2")]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "model", "strategies"), OTHERS)
def test_other_ways_of_spending_depth_train_alike_on_ranks(
    data: Path, tmp_path: Path, architecture: str, model: dict[str, Any], strategies: list[tuple[int, str]]
):
    """A few steps, one sequence a rank and pass, so that ranks differ in how many tokens go on, or whether any do."""
    changes = {"budget": {"steps": 6}, "batch": {"size": 4, "micro_size": 1}, "model": model}
    expected = train_on_ranks(tmp_path / "alone", data, architecture, changes | {"parallel": {"strategy": "single"}})
    if model == ACCUMULATED:
        spent = [line["flops"] for line in expected if "loss" in line]
        assert len({after - before for before, after in pairwise(spent)}) > 2  # of four sequences, how many went on
    for ranks, strategy in strategies:
        arguments = (tmp_path / strategy, data, architecture, changes | {"parallel": {"strategy": strategy}})
        found = run_ranks(train_on_ranks, ranks, *arguments)[0]
        assert [line["loss"] for line in found if "loss" in line] == pytest.approx(
            [line["loss"] for line in expected if "loss" in line], rel=1e-5
        )
        assert found[-1]["flops"] == expected[-1]["flops"]
        for key in {"validation_loss", "validation_loss_full"} & expected[-1].keys():
            assert found[-1][key] == pytest.approx(expected[-1][key], rel=1e-5), key
    assert ("validation_loss_full" in expected[-1]) == (architecture == "early_exit")
    if architecture == "early_exit":
        assert found[-1]["validation_loss"] != found[-1]["validation_loss_full"]
        assert 0 < found[-1]["validation_depth_shares"][0] < 1  # some leave at the first exit, not all of them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "source", "target"),
    [
        ("mod", (2, "zero3"), (4, "ddp")),
        ("ut", (4, "ddp"), (2, "fsdp2")),
        ("early_exit", (2, "fsdp2"), (2, "zero1")),
    ],
)
def test_other_ways_of_spending_depth_resume_under_another_strategy(
    data: Path, tmp_path: Path, architecture: str, source: tuple[int, str], target: tuple[int, str]
):
    """Three steps of one, three of the other."""
    changes: dict[str, Any] = {"budget": {"steps": 6}, "batch": {"size": 4, "micro_size": 1}}
    if architecture == "early_exit":
        changes["model"] = DROPPING
    alone = changes | {"parallel": {"strategy": "single"}}
    expected = train_on_ranks(tmp_path / "alone", data, architecture, alone)
    run, stopping = tmp_path / "run", {"checkpoint": {"every_steps": 3, "keep": 9}}
    for ranks, strategy in (source, target):
        arguments = (run, data, architecture, changes | stopping | {"parallel": {"strategy": strategy}})
        found = run_ranks(train_on_ranks, ranks, *arguments)[0]
        if (ranks, strategy) == source:  # as if it had died after its first checkpoint
            shutil.rmtree(run / "checkpoints" / "step-00000006")
            lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "finished" not in line]
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [line["loss"] for line in found if "loss" in line] == pytest.approx(
        [line["loss"] for line in expected if "loss" in line], rel=1e-5
    )
    assert found[-1]["flops"] == expected[-1]["flops"]
    assert found[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-5)


BF16_CHANGES: dict[str, Any] = {
    "budget": {"steps": 6},
    "batch": {"size": 4, "micro_size": 1},
    "evaluation": {"times": 0},
    "recompute": "block",
}


REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "all_to_all_single")


def train_and_listen(
    run_dir: Path, data: Path, architecture: str, changes: dict[str, Any]
) -> tuple[list[dict[str, Any]], set[str]]:
    """The run's lines, and the types of all numbers that Python code had reduced over the ranks."""
    reduced: set[str] = set()

    def listening(reduce: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            values = [*arguments, *keywords.values()]
            tensors = [item for value in values for item in (value if isinstance(value, list) else [value])]
            reduced.update(str(item.dtype) for item in tensors if isinstance(item, torch.Tensor))
            return reduce(*arguments, **keywords)

        return call

    for name in REDUCTIONS:
        setattr(dist, name, listening(getattr(dist, name)))
    return train_on_ranks(run_dir, data, architecture, changes), reduced


@pytest.fixture(scope="module")
def bf16_references(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of one process, in either precision."""
    root, lines = tmp_path_factory.mktemp("references"), {}
    for precision in ("fp32", "bf16"):
        changes = BF16_CHANGES | {"precision": precision, "parallel": {"strategy": "single"}}
        lines[precision] = run_ranks(train_on_ranks, 1, root / precision, data, "recursive", changes)[0]
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_keep"])
def test_bf16_recomputation_and_accumulation_together(
    data: Path, tmp_path: Path, bf16_references: dict[str, list[dict[str, Any]]], name: str
):
    """Without routing, whose choices flip in bf16. It differs from fp32 by rounding alone, and every strategy trains
    the same model: the residual stream and the weights are rounded alike, and gradients are reduced in fp32.

    ZeRO-3 adds the gradients of a layer's uses in fp32, and FSDP2 takes all gradients of a rank in bf16: theirs differ
    by rounding. The reductions of DDP and FSDP2 are not made by functions that can be listened to.
    """
    half = BF16_CHANGES | {"precision": "bf16", "parallel": RUNS[name][2]}
    found, reduced = run_ranks(train_and_listen, 2, tmp_path / "half", data, "recursive", half)[0]
    assert "torch.bfloat16" not in reduced and ("torch.float32" in reduced) == name.startswith("zero")
    loss, norm = {"zero3": (5e-5, 1e-2), "fsdp2": (5e-5, 2e-3), "fsdp2_keep": (5e-5, 2e-3)}.get(name, (1e-6, 1e-5))
    fp32, bf16 = bf16_references["fp32"], bf16_references["bf16"]
    for expected, key, tolerance in ((fp32, "loss", 5e-3), (bf16, "loss", loss), (bf16, "gradient_norm", norm)):
        values = [[line[key] for line in lines if "loss" in line] for lines in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("ddp", "zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_all"),
        *("fsdp2", "fsdp2_keep", "fsdp2_hybrid", "fsdp2_offload"),
    ],
)
def test_resumes_on_the_same_ranks_bit_for_bit(runs: Runs, name: str):
    assert losses(runs.go_on(name, name)) == losses(runs(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("ddp", "ddp_4"),
        ("fsdp2_4", "fsdp2"),
        ("fsdp2", "fsdp2_hybrid"),
        ("fsdp2", "mor_expert"),
        ("zero3", "ddp_4"),
        ("zero1", "zero3"),
        ("zero3_offload", "fsdp2_keep"),
        ("fsdp2_keep", "zero1"),
        ("fsdp2_hybrid", "fsdp2_one_unit"),
        ("fsdp2", "zero2"),
        ("zero2", "fsdp2"),
        ("mor_expert", "zero3"),
    ],
)
def test_resumes_under_another_strategy_or_world(runs: Runs, source: str, target: str):
    assert losses(runs.go_on(source, target)) == pytest.approx(losses(runs("mor_expert")), rel=1e-5)


# --- what fsdp2 builds


def build(parallel_section: dict[str, Any]) -> tuple[bool, dict[str, torch.Tensor], bool]:
    """(whether this rank built without weights, all tensors whole, whether head and embedding are still one)."""
    parallel = start_parallel(ParallelSettings(**parallel_section), "fp32", 7)
    fields = ROUTED["mor_token"] | {"balancing": "loss_free", "relaxation": "lora", "vocab_size": 64}
    with parallel.building():
        model = MoRForCausalLM(MoRConfig(**fields))
    empty = all(parameter.is_meta for parameter in model.parameters())
    parallel.prepare(model, lambda module: torch.optim.AdamW(module.parameters()))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    whole = {name: getattr(tensor, "full_tensor", tensor.clone)().detach() for name, tensor in tensors.items()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    parallel.finish()
    return empty, whole, tied


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "section"), [(2, {}), (4, {"shard_size": 2})])
def test_fsdp2_starts_from_the_weights_of_one_process_which_rank_0_alone_builds(ranks: int, section: dict[str, Any]):
    ((_, expected, _),) = run_ranks(build, 1, {"strategy": "single"})
    found = run_ranks(build, ranks, {"strategy": "fsdp2", "min_unit_parameters": 0, **section})
    assert [empty for empty, _, _ in found] == [False] + [True] * (ranks - 1)
    for _, tensors, tied in found:
        assert tied and tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def divide(seed: int) -> tuple[bool, float, dict[str, torch.Tensor], bool]:
    """(whether this rank built without weights, most bytes of parameters that it held while they were divided, over
    those of a whole model; all tensors whole; whether head and embedding are still one)."""
    import deepspeed

    parallel = start_parallel(ParallelSettings(strategy="zero3"), "fp32", seed)
    fields = ROUTED["mor_token"] | {"balancing": "loss_free", "relaxation": "lora", "vocab_size": 64}
    fields |= {"hidden_size": 320, "intermediate_size": 384}  # small matrices are not divided
    with parallel.building():
        model = MoRForCausalLM(MoRConfig(**fields))
    empty, bytes_whole = all(p.is_meta for p in model.parameters()), 4 * sum(p.numel() for p in model.parameters())
    held, hand_round = [0], deepspeed.comm.broadcast

    def watched(tensor: torch.Tensor, *options: Any, **more: Any) -> Any:
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if p.numel()
        }
        parts = [p.ds_tensor for p in model.parameters() if getattr(p, "ds_tensor", None) is not None]
        held.append(sum(storages.values()) + sum(part.numel() * part.element_size() for part in parts))
        return hand_round(tensor, *options, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.comm.broadcast", watched)  # by which each parameter is handed round
        parallel.prepare(model, lambda module: torch.optim.AdamW(module.parameters()))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        whole = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert len(held) > 10
    parallel.finish()
    return empty, max(held) / bytes_whole, whole, tied


@pytest.mark.slow
def test_zero3_starts_from_the_weights_that_rank_0_alone_builds_and_divides_as_it_hands_them_round():
    ((_, _, expected, _),) = run_ranks(divide, 1, 7)
    found = run_ranks(divide, 2, 7)
    assert [empty for empty, _, _, _ in found] == [False, True]
    assert found[1][1] < 0.75  # half of the model, and one parameter
    for _, _, tensors, tied in found:
        assert tied and tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# --- what fsdp2 gathers


def count_gathers(reshard: bool, num_recursions: int, micro_batches: int, least: int = 0) -> tuple[int, int]:
    """All-gathers and reduce-scatters of one optimizer step of a model with three unique layers, one of them shared."""
    units = {"reshard_after_forward": reshard, "min_unit_parameters": least}
    parallel = start_parallel(ParallelSettings(strategy="fsdp2", **units), "fp32", 0)
    fields = ROUTED["mor_expert"] | {"num_recursions": num_recursions, "num_hidden_layers": 2 + num_recursions}
    model = MoRForCausalLM(MoRConfig(**fields, vocab_size=64))
    parallel.prepare(model, lambda module: torch.optim.AdamW(module.parameters()))
    tokens = torch.randint(0, 64, (1, 8))
    with profile() as profiled:  # CommDebugMode cannot follow a module that is called several times
        for number in range(micro_batches):
            last = number == micro_batches - 1
            parallel.micro_step(parallel.forward(last, input_ids=tokens, labels=tokens).loss, last)
        parallel.optimizer_step(1e-3, 1.0)
    parallel.finish()
    counts = {event.key: event.count for event in profiled.key_averages()}
    return counts["c10d::_allgather_base_"], counts["c10d::_reduce_scatter_base_"]


@pytest.mark.slow
def test_kept_units_are_gathered_once_a_step_whatever_the_recursions():
    counts = {
        key: run_ranks(count_gathers, 2, *key)[0]
        for key in [(True, 2, 1), (True, 4, 1), (False, 2, 1), (False, 4, 1), (False, 4, 2), (True, 4, 2, 10**6)]
    }
    units = 4  # three layers and the root
    assert counts[False, 2, 1] == counts[False, 4, 1] == (units, units)
    # with accumulation the shared layer's gradients travel in two parts: earlier micro-batches, and the last
    assert counts[False, 4, 2] == (units, units + 1)
    # freed after each use: the root once, a layer at each application forward and again backward
    assert counts[True, 2, 1] == (1 + 2 * (2 + 2), units)
    assert counts[True, 4, 1] == (1 + 2 * (2 + 4), units)
    # layers too small to be units: once a micro-batch, and one reduction
    assert counts[True, 4, 2, 10**6] == (2, 1)


# --- the real launchers


def launch(arguments: list[str], timeout: float = 400) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    programs = Path(sys.executable).parent
    command = [str(programs / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    settings = settings_for(Path("unset"), data, "mor_expert", budget={"steps": 3}, batch={"micro_size": 2})
    path = tmp_path_factory.mktemp("experiment") / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"parallel"}, exclude_unset=True)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "name", "strategy"),
    [("accelerate", "fsdp2_keep", "fsdp2"), ("accelerate", "zero2", "zero2"), ("torchrun", "fsdp2", "fsdp2")],
)
def test_the_launchers_start_what_was_asked_for(
    experiment: Path, tmp_path: Path, launcher: str, name: str, strategy: str
):
    config = str(CONFIGS / f"{name}.yaml")
    run = ["pretrain/main.py", "--config", str(experiment), f"run_dir={tmp_path}"]
    start = {
        "accelerate": [
            "accelerate",
            "launch",
            "--config_file",
            config,
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    done = launch([*start, *run, *([f"parallel={config}"] if launcher == "torchrun" else [])])
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "run.json").read_text())
    assert "2 x cpu" in json.dumps(facts)
    checkpoint = committed(tmp_path / "checkpoints")[-1][1]
    marker = Marker.read(checkpoint)
    assert (marker.strategy, marker.world_size, marker.step) == (strategy, 2, 3)


@pytest.mark.slow
def test_accelerate_starting_one_process_for_two_is_refused(experiment: Path, tmp_path: Path):
    run = ["pretrain/main.py", "--config", str(experiment), f"run_dir={tmp_path}"]
    done = launch(["accelerate", "launch", "--cpu", "--num_processes", "2", *run])
    assert done.returncode != 0
    assert "error: accelerate launch was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
