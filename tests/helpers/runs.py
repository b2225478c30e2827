"""Run directories as the trainer writes them, made up: for the report's and the comparison's tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from model import flops
from model.config import MoRConfig

SEQUENCE_LENGTH = 64
MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "recursive_nr3": {"num_recursions": 3},
    "mor_expert_nr3": {"num_recursions": 3, "routing": "expert_choice"},
    "mor_token_nr3": {"num_recursions": 3, "routing": "token_choice"},
    "calm_nr3": {"num_recursions": 3, "routing": "early_exit"},
}


def make_run(
    folder: Path,
    model_name: str = "vanilla",
    *,
    seed: int = 0,
    loss: float = 3.0,
    budget: float = 1e12,
    lines: int = 8,
    finished: bool = True,
    hidden_size: int = 32,
    name: str | None = None,
    model: dict[str, Any] | None = None,
    rate: float = 3e-3,
    look_ahead: float = 0.0,
    epoch: float = 0.5,
    watts: float | None = None,
    **facts: Any,
) -> Path:
    """Write run.json and metrics.jsonl of a run that ends at `loss` after about `budget` exact FLOPs.

    model: fields beside those of `model_name`; rate: its learning rate; look_ahead, epoch: what its last line says of
    them; watts: what a second of it takes, where that is known.
    """
    fields = {
        "vocab_size": 64,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **MODELS.get(model_name, {}),
        **(model or {}),
    }
    config = MoRConfig(**fields)
    static = {
        "name": name or model_name,
        "architecture": config.architecture,
        "seed": seed,
        "unique_parameters": flops.unique_parameters(config),
        "effective_parameters": flops.effective_parameters(config),
        "convention": "exact",
        "attention": "causal work",
        "corpus": "made-up",
        "data_fingerprint": "d" * 64,
        "tokenizer_fingerprint": "t" * 64,
        "vocab_size": 64,
        "unigram_loss": 4.1,
        "document_masking": True,
        "sequence_length": SEQUENCE_LENGTH,
        "budget": {"flops": int(budget), "convention": "exact"},
        "model": fields,
        "code": ["c" * 12],
        "settings": {"optimizer": {"learning_rate": rate}},
        "precision": "fp32",
        **facts,
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(static))
    step_flops = flops.training_flops(config, SEQUENCE_LENGTH, 4)
    steps = round(budget / step_flops)
    gates = flops.gates_of(config)
    shares = [0.0, *[1 / gates] * gates] if gates else None
    rows: list[dict[str, Any]] = []
    for place in range(1, lines + 1):
        step = steps * place // lines
        row = {"step": step, "tokens": step * 4 * SEQUENCE_LENGTH, "flops": step * step_flops, "seconds": float(place)}
        row |= {} if watts is None else {"joules": watts * place}
        now = loss + math.exp(-4 * place / lines) - math.exp(-4)
        rows.append({**row, "loss": now, "learning_rate": 1e-3, **({"depth_shares": shares} if shares else {})})
        losses = {"validation_loss": now, "validation_loss_topk": now - 0.01 * (config.architecture == "mor_expert")}
        losses |= {"validation_loss_full": now - 0.03} if config.architecture == "early_exit" else {}
        rows.append({**row, **losses, "validation_tokens": 640, "validation_depth_shares": shares})
    if finished:
        rows.append({**rows[-1], "validation_look_ahead": look_ahead, "epoch": epoch, "event": "finished"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
