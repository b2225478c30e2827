"""What a model card says of a run: read from run.json and from a line of its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.metrics import METRICS, last_line


def run_facts(run: Path, line: dict[str, Any] | None = None) -> dict[str, str]:
    """Name -> text: corpus, FLOPs, tokens, losses. line: of the metrics; None: the run's last. Empty outside a run."""
    described = run / "run.json"
    if not described.is_file():
        return {}
    fixed = json.loads(described.read_text(encoding="utf-8"))
    line = line if line is not None else last_line(run / METRICS) or {}
    convention = fixed.get("convention") or fixed.get("budget", {}).get("convention")
    facts: dict[str, Any] = {"name": fixed.get("name"), "corpus": fixed.get("corpus")}
    if "flops" in line:
        facts["training FLOPs"] = f"{line['flops']:.4g}" + (f", by the convention `{convention}`" if convention else "")
    for name, key in (("training tokens", "tokens"), ("optimizer steps", "step")):
        if key in line:
            facts[name] = f"{line[key]:,}"
    for name, key in (
        ("validation loss, causal (nats per token)", "validation_loss"),
        ("validation loss, top-k (looks ahead)", "validation_loss_topk"),
        ("validation loss, full depth (nobody leaves at an exit)", "validation_loss_full"),
    ):
        if line.get(key) is not None:
            facts[name] = f"{line[key]:.4f}"
    return {name: str(value) for name, value in facts.items() if value is not None}
