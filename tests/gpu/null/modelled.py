"""A modelled time of a training micro-batch on the null device, 16 x 2,048 tokens in bf16: a JSON line for each model.

    python -m tests.gpu.null.device OUT tests.gpu.null.modelled [--eager] [--documents] [MODEL ...]

MODEL: of configs/model. --documents: masked, though a row is still one of them, the most that attention can have to do.

No time is measured. What the host launched is asked for its bytes and FLOPs, and each launch takes the longer of these
at the rates below, which are assumptions about an H100, or `SMALLEST`: torch's operations by the profiler's shapes,
inductor's kernels by the tensors that they are given, each read or written once; flex attention by the pairs of
selected queries and all keys, at the rates of the other kernels. Of a routed model, kernels that pick rows of a tensor
count the whole of it; token-choice, whose choice hangs on values, is in perfect balance. milliseconds: by kind of
launch; launches: those that are modelled, and those that the device counted.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import profile

from model.config import MoRConfig
from model.flops import training_flops
from model.modeling import MoRForCausalLM
from tests.gpu.check import model_fields
from tests.gpu.null.device import counters
from tests.gpu.null.steps import in_balance

MODELS = ["360m_vanilla", "360m_mor_expert_nr3"]
ROWS, LENGTH = 16, 2048
PEAK = 989e12  # FLOP/s of an H100's data sheet, dense bf16
PRODUCTS = 620e12  # attained FLOP/s
ATTENTION = {False: 420e12, True: 330e12}  # forward, backward
STREAM = 2.8e12  # attained bytes/s
SMALLEST = 1.5e-6  # seconds of any launch
SIZES = {"float": 4, "c10::BFloat16": 2, "long": 8, "int": 4, "bool": 1, "double": 8, "unsigned char": 1}
# Operations that launch nothing of their own: views, allocations, and what only calls others.
# fmt: off
FREE = {
    "empty", "empty_strided", "empty_like", "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand",
    "as_strided", "slice", "select", "unbind", "split", "chunk", "narrow", "detach", "alias", "unsqueeze", "squeeze",
    "flatten", "unflatten", "resize_", "result_type", "set_", "lift_fresh", "record_stream",
}
# fmt: on

PRODUCTS_OF = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1}  # which operand is the left one

Launched = list[tuple[str, float, float]]  # kind, bytes, seconds of computing


class Kernels:
    """What inductor's kernels are given, while it stands."""

    def __init__(self) -> None:
        from torch._inductor.runtime import triton_heuristics

        self.owner, self.found = triton_heuristics.CachingAutotuner, Launched()

    def __enter__(self) -> Kernels:
        self.real = real = self.owner.run
        found = self.found

        def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
            tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
            moved = float(sum(one.numel() * one.element_size() for one in tensors))
            name = kernel.inductor_meta.get("kernel_name", "")
            if name.startswith("triton_tem") and "flex_attention" in name:
                found.append(("attention", moved, flex_seconds(tensors[0], "backward" in name)))
            else:
                found.append(("compiled", moved, 0.0))
            return real(kernel, *arguments, **options)

        self.owner.run = run
        return self

    def __exit__(self, *_: object) -> None:
        self.owner.run = self.real


def operations(events: list[dict[str, Any]]) -> Launched:
    """torch's own operations of a trace that call no other."""
    events = [e for e in events if e.get("ph") == "X" and str(e.get("name")).startswith("aten::") and "args" in e]
    events.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    found: Launched = []
    for event, following in zip(events, [*events[1:], None], strict=True):
        name, dims = event["name"][6:], event["args"].get("Input Dims", [])
        calls_another = (
            following is not None
            and following["tid"] == event["tid"]
            and following["ts"] < event["ts"] + event["dur"]
            and following["name"][6:] not in FREE
        )
        if "flash_attention" in name and name.startswith("_flash"):
            found.append(("attention", 0.0, attention_seconds(name, dims)))
        elif not calls_another and name not in FREE and "flash" not in name:
            found.append(cost(name, dims, event["args"].get("Input type", [])))
    return found


def attention_seconds(name: str, dims: list[list[int]]) -> float:
    """Causal attention of rows as long as each other. Queries: [N, H, D] of a list, or [B, K, H, D]."""
    backward = "backward" in name
    query = dims[1] if backward else dims[0]
    tokens, heads, width = (query[0], *query[1:]) if len(query) == 3 else (query[0] * query[1], *query[2:])
    pairs = tokens * (tokens / ROWS) / 2
    return (10 if backward else 4) * pairs * heads * width / ATTENTION[backward]


def flex_seconds(query: torch.Tensor, backward: bool) -> float:
    """Queries [1, H, N, D] of anywhere, over the keys of every position up to their own."""
    _, heads, tokens, width = query.shape
    return (10 if backward else 4) * tokens * (LENGTH + 1) / 2 * heads * width / ATTENTION[backward]


def cost(name: str, dims: list[list[int]], types: list[str]) -> tuple[str, float, float]:
    shapes = [(shape, SIZES.get(kind, 0)) for shape, kind in zip(dims, types, strict=False) if shape and kind in SIZES]
    moved = float(sum(prod(shape) * size for shape, size in shapes))
    if name in PRODUCTS_OF:  # their result, where it is given too, comes last
        (left, size), (right, _) = shapes[PRODUCTS_OF[name] :][:2]
        result = prod(left[:-1]) * right[-1]
        inner = left[-1]
        return "products", (prod(left) + prod(right) + result) * size, 2 * result * inner / PRODUCTS
    largest = max((prod(shape) * size for shape, size in shapes), default=0)
    return "operations", moved + (largest if len(shapes) < 2 else 0), 0.0


def modelled(name: str, eager: bool, documents: bool) -> dict[str, Any]:
    config = MoRConfig(**(model_fields(name) | {"max_position_embeddings": LENGTH}))
    in_balance(config, ROWS * LENGTH)
    with torch.device("cuda"):
        model = MoRForCausalLM(config).train()
    if not eager:
        model.compile_layers()
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="cuda")
    of = {"document_ids": torch.zeros_like(ids), "num_documents": ROWS} if documents else {}

    def one() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, targets=ids, num_items_in_batch=ids.numel(), step=0, **of).loss
        loss.backward()

    one()
    one()
    with TemporaryDirectory() as folder, Kernels() as kernels:
        before = counters()["launches"]
        with profile(record_shapes=True) as profiled:
            one()
        counted = counters()["launches"] - before
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    seconds: dict[str, float] = defaultdict(float)
    launches = operations(events) + kernels.found
    for kind, moved, computing in launches:
        seconds[kind] += max(moved / STREAM, computing, SMALLEST)
    whole, flops = sum(seconds.values()), float(training_flops(config, LENGTH, ROWS))
    return {
        "model": name,
        "compiled": not eager,
        "documents": documents,
        "launches": [len(launches), counted],
        "milliseconds": {kind: round(1e3 * value, 1) for kind, value in seconds.items()},
        "modelled_ms": round(1e3 * whole, 1),
        "tflop": round(flops / 1e12, 1),
        "modelled_mfu": round(flops / whole / PEAK, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--eager", action="store_true", help="layers are not compiled")
    parser.add_argument("--documents", action="store_true")
    options = parser.parse_args()
    for model_name in options.models:
        print(json.dumps(modelled(model_name, options.eager, options.documents)), flush=True)
