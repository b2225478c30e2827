"""Decoding steps of the engine on the null device, bf16: a JSON line for each model.

    python -m tests.gpu.null.device OUT tests.gpu.null.decode [--batch 32] [--steps 10] [MODEL ...]

launches, to_host, to_device: of a step as it is made without graphs; replayed: the same once it is recorded; graphs:
how many are launched. waits: operations of a replayed step at which the host waits for the device. MODEL: of
configs/model; a MoR model gets a random router. Nothing that is computed is real, so no token ever ends its text.
"""

from __future__ import annotations

import argparse
import json

import torch

from model.config import MoRConfig
from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from model.modeling import MoRForCausalLM
from tests.gpu.check import model_fields
from tests.gpu.null.device import counters

MODELS = ["360m_vanilla", "360m_mor_expert_nr3"]


def spent(engine: Engine, steps: int) -> dict[str, float]:
    """What a step asks of the device."""
    before = counters()
    for _ in range(steps):
        engine.step()
    return {name: (value - before[name]) / steps for name, value in counters().items()}


def measure(name: str, batch: int, steps: int) -> dict:
    fields = model_fields(name)
    if fields.get("routing", "none") != "none":
        fields["router"] = "random"
    with torch.device("cuda"):
        model = MoRForCausalLM(MoRConfig(**fields, max_position_embeddings=2048)).to(torch.bfloat16)
    engine = Engine(model, max_batch=batch, kv_tokens=batch * 512)
    assert engine.slots is not None
    for _ in range(batch):
        engine.submit([1], SamplingParams(max_tokens=512))
    slots, run = engine.slots, engine.slots._run

    def run_and_say_nothing(count: int) -> None:
        run(count)
        slots.told.zero_()  # memory that no kernel wrote would say that tokens are done

    slots._run = run_and_say_nothing  # type: ignore[method-assign]
    recorded = engine.slots.record
    engine.slots.record = False
    for _ in range(3):
        engine.step()
    plain = spent(engine, steps)
    engine.slots.record = recorded
    for _ in range(2):
        engine.step()
    replayed = spent(engine, steps)
    assert engine.slots.flying.all()
    return {
        "model": name,
        "batch": batch,
        **plain,
        "graphs": replayed.pop("graphs"),
        "replayed": replayed,
        "kv_bytes": engine.kv_bytes(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    for model_name in options.models:
        print(json.dumps(measure(model_name, options.batch, options.steps)), flush=True)
