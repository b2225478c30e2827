"""The other side of `bench_model.py --reference`: steps of the authors' models, in their own Python environment.

    PYTHON reference_worker.py SETTINGS

SETTINGS is a JSON object: folder (a checkout of their repository), base (fields of LlamaConfig), rows, length, clock
(cpu or wall) and models (names as `bench_model.variants` has them). The first line of the answer describes each model;
then every line of the input names a model, and is answered with the seconds of one forward and backward pass.

Their models are built as their training script builds them: bf16 weights under bf16 autocast, their loss and defaults.
Token-choice runs with eager attention; on a CPU its other paths fail.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig

RECURSIONS = 3


def settings_of(name: str) -> Any:
    """Their configuration of a model, with the fields that building it reads."""
    shared = "shared KV" in name
    capacities = [(RECURSIONS - r) / RECURSIONS for r in range(RECURSIONS)]
    return OmegaConf.create(
        {
            "precision": "bf16",
            "num_warmup_steps": 0,
            "gradient_accumulation_steps": 1,
            "recursive": {
                "enable": name != "vanilla",
                "base_depth": None,
                "num_recursion": RECURSIONS,
                "sharing": "middle_cycle",
                "ln_share": True,
                "initialization": "stepwise",
            },
            "kv_sharing": {
                "enable": shared,
                "num_recursion": RECURSIONS,
                "sharing": "middle_cycle",
                "update_cache": False,
            },
            "mor": {
                "type": "token" if "token" in name else "expert",
                "capacity": ",".join(map(str, capacities)),
                "rand_router": False,
                "router_type": "linear",
                "z_loss": False,
                "temp": 1.0,
                "expert": {
                    "cap_warmup_step": 0,
                    "router_func": "sigmoid",
                    "alpha": 0.1,
                    "sampling": "aux_loss",
                    "coeff": 0.001,
                    "gating": "weighted",
                },
                "token": {
                    "router_func": "softmax",
                    "alpha": 1.0,
                    "balancing": "loss",
                    "bal_warmup_step": 0,
                    "coeff": 0.1,
                    "gating": "weighted",
                },
            },
        }
    )


def build(name: str, base: dict[str, Any]) -> Any:
    """One of their models, transformed as their training script does it."""
    config = LlamaConfig(**base, tie_word_embeddings=True)
    options = {"attn_implementation": "eager" if "token" in name else "sdpa", "torch_dtype": torch.bfloat16}
    if name == "vanilla":
        return importlib.import_module("model.base_model.modeling_llama").LlamaForCausalLM._from_config(
            config, **options
        )
    settings = settings_of(name)
    model = importlib.import_module("model.mor_model.modeling_llama").MoRLlamaForCausalLM._from_config(
        config, **options
    )
    model, _ = importlib.import_module("model.sharing_strategy.llama").sharing_strategy(settings, model)
    if settings.kv_sharing.enable:
        model.set_kv_sharing_config(settings)
    if settings.mor.type == "token":
        model.transform_layer_to_mor_token(settings)
    else:
        model.transform_layer_to_mor_expert(settings)
    return model


def make_step(name: str, model: Any, batch: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward; returns the model's output."""

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=batch, labels=batch, num_items_in_batch=batch.numel())
        loss = output.loss
        if "expert" in name:
            loss = loss + 0.001 * output.sampling_loss
        elif "token" in name:
            loss = loss + 0.1 * output.balancing_loss
        loss.backward()
        return output

    return step


def main() -> int:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # their code prints; standard output is for answers
    sys.path[0] = settings["folder"]
    clock = time.process_time if settings["clock"] == "cpu" else time.perf_counter
    torch.manual_seed(0)
    batch = torch.randint(1, settings["base"]["vocab_size"], (settings["rows"], settings["length"]))
    steps: dict[str, Callable[[], Any]] = {}
    described = {}
    for name in settings["models"]:
        torch.manual_seed(0)
        model = build(name, settings["base"]).train()
        steps[name] = make_step(name, model, batch)
        output = steps[name]()
        described[name] = {"loss": output.loss.item(), "parameters": sum(p.numel() for p in model.parameters())}
        if "token" in name:
            described[name]["load"] = [float(share) for share in output.balancing_ratio]
    print(json.dumps(described), file=answers)
    for line in sys.stdin:
        started = clock()
        steps[line.strip()]()
        print(clock() - started, file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
