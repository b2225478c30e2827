"""Training micro-batches of every variant on the null device: a JSON line each.

    python -m tests.gpu.null.device OUT tests.gpu.null.steps [--compiled] [--model 360m_vanilla ...] [VARIANT ...]

waits: operations at which the host would wait for the device, which torch's own debug mode names. launches, copies:
of a forward and backward pass. largest: bytes of the largest tensor that says who sees whom, made once a stage (form),
and that a call of attention makes beyond its result, forward (attend; not compiled, where it can be told). With
--model, a model of configs/model at 16 x 2,048 in place of small variants, its gates let in as many tokens as are
expected, where that hangs on values, and peak: GiB of torch's allocator.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from model import decoder
from model.attention import BACKENDS
from model.config import MoRConfig
from model.flops import capacities
from model.memory import Placement, training_memory
from model.modeling import MoRForCausalLM
from tests.gpu.check import model_fields
from tests.gpu.null.device import counters
from tests.helpers.variants import VARIANTS

SMALL = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def in_balance(config: MoRConfig, tokens: int) -> None:
    """From now on gates whose choice hangs on values, of which there are none, let in what is expected of a batch."""
    expected = [int(share * tokens) for share in capacities(config)]
    decoder.Counts.__getitem__ = lambda _, gate: expected[gate]  # type: ignore[method-assign]


class Given:
    """Bytes of the largest tensor that methods of attention's backends make, while it stands."""

    def __init__(self, methods: list[str]) -> None:
        self.methods, self.bytes = methods, dict.fromkeys(methods, 0)

    def __enter__(self) -> Given:
        torch.cuda.memory._record_memory_history(context=None, max_entries=10**6)
        self.real = {(of, method): getattr(of, method) for of in BACKENDS.values() for method in self.methods}
        for (backend, method), real in self.real.items():
            setattr(backend, method, functools.partial(self.watched, method, real))
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)
        for backend, method in self.real:
            delattr(backend, method)

    def watched(self, method: str, real: Callable[..., Any], *arguments: Any) -> Any:
        before = len(allocator_trace())
        result = real(*arguments)
        sizes = [event["size"] for event in allocator_trace()[before:] if event["action"] == "alloc"]
        if method == "attend":
            sizes.remove(-(-result.nbytes // 512) * 512)  # as the allocator rounds it
        self.bytes[method] = max(self.bytes[method], *sizes, 0)
        return result


def allocator_trace() -> list[dict[str, Any]]:
    """What torch's allocator has done since its history is recorded."""
    trace: list[dict[str, Any]] = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    return trace


def waits_of(seen: list[warnings.WarningMessage]) -> list[str]:
    """`file:line` of what waited."""
    found = (w for w in seen if "synchronizing CUDA operation" in str(w.message))
    return sorted({f"{os.path.relpath(w.filename)}:{w.lineno}" for w in found})


def measure(model: MoRForCausalLM, rows: int, length: int, documents: bool, dtype: torch.dtype, compiled: bool) -> dict:
    """One micro-batch, after one of which only attention's bytes are asked."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="cuda")
    each = length // 3
    belongs = torch.arange(length).div(each, rounding_mode="floor").expand(rows, -1).contiguous().to("cuda")

    def one() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(
                ids,
                targets=ids,
                document_ids=belongs if documents else None,
                num_documents=4 * rows,
                num_items_in_batch=ids.numel(),
                step=0,
            ).loss
        loss.backward()

    with Given(["form"] if compiled else ["form", "attend"]) as attention:
        one()
    torch.cuda.reset_peak_memory_stats()
    before = counters()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            one()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    after = counters()
    facts: dict[str, Any] = {name: after[name] - before[name] for name in before}
    facts["largest"] = attention.bytes
    peak = torch.cuda.max_memory_allocated()
    return facts | {"operations_that_wait": waits_of(seen), "peak_gib": round(peak / 2**30, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--model", action="store_true", help="names are of configs/model, at full size")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--policy", default="none")
    options = parser.parse_args()
    dtype, failed = (torch.float32 if options.fp32 else torch.bfloat16), False
    for name in options.variants or VARIANTS:
        for documents in (False, True):
            line = {"variant": name, "documents": documents, "compiled": options.compiled, "policy": options.policy}
            rows, length = (16, 2048) if options.model else (4, 256)
            fields = model_fields(name) if options.model else SMALL | {"num_hidden_layers": 8} | VARIANTS[name]
            try:
                config = MoRConfig(**(fields | {"max_position_embeddings": length}))
                torch._dynamo.reset()  # what is compiled keeps the layers that it was made of
                gc.collect()
                with torch.device("cuda"):
                    model = MoRForCausalLM(config).train()
                model.set_recompute(options.policy)
                if options.model:
                    in_balance(config, rows * length)
                if options.compiled:
                    model.compile_layers()
                    line["graph_breaks"] = 0
                line |= measure(model, rows, length, documents, dtype, options.compiled)
                if options.compiled:
                    line["graph_breaks"] = dict(torch._dynamo.utils.counters["graph_break"])
                if options.model:
                    placement = Placement(micro_batches=2, on_gpu=True, compiled=options.compiled)  # gradients stay
                    states = training_memory(config, length, rows, placement)
                    line["estimate_gib"] = round((states.total - states.optimizer) / 2**30, 3)
                del model
            except Exception as error:
                failed = True
                frames = traceback.extract_tb(error.__traceback__)[-5:]
                places = [f"{os.path.relpath(frame.filename)}:{frame.lineno}" for frame in frames]
                line |= {"error": f"{type(error).__name__}: {str(error)[:300]}", "at": places}
            print(json.dumps(line), flush=True)
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
