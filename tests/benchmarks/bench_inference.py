"""Generation speed, end to end: from the moment all requests are handed in to the last token, everything counted.

`make bench-inference`. Protocol of the paper's section 4.2, with its gaps closed (updates of keys and values and the
first layer count): answers of lengths drawn from N(256, sigma), no prompt (one token starts a text); a second part
gives prompts.

    static      transformers' Llama with the vanilla weights: static batches by arrival, each until its longest ends
    vanilla     the engine, continuous batching
    MoR-2/3/4   the engine, continuous depth-wise batching; same base, exits drawn by the random router so that
                recursion r takes (Nr - r + 1) / Nr of the tokens; `fixed`: as many requests at once as vanilla;
                `memory`: as many as the same bytes of keys and values hold (the paper's 42 / 48 / 51 for 32)

All variants run in turn, `--repeats` times; a ratio is the median of the ratios within a round. Beside the wall clock
stands the ratio of processor time, which other work on the machine disturbs less. With `--trained DIR ..`
(from_pretrained folders, the first one vanilla) the same is measured on trained models, whose routers decide.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model.cache import kv_bytes_per_token
from model.config import MoRConfig
from model.export import to_llama
from model.flops import flops_per_token
from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from model.memory import kv_cache_bytes_per_token
from model.modeling import MoRForCausalLM

BARS = {"vanilla": 1.5, "fixed": {2: 1.23, 3: 1.33, 4: 1.42}, "memory": {2: 1.60, 3: 1.95, 4: 2.06}}
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "heads": 4, "kv_heads": 2},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "heads": 8, "kv_heads": 4},
    "medium": {"hidden_size": 960, "intermediate_size": 2560, "heads": 15, "kv_heads": 5},
}


@dataclass
class Load:
    """Requests: prompts and how many tokens each wants."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def make_load(options: argparse.Namespace, vocabulary: int, prompt_length: int) -> Load:
    rng = random.Random(options.seed)
    lengths = [max(8, round(rng.gauss(options.mean, options.sigma))) for _ in range(options.requests)]
    longest = prompt_length or 1
    sizes = [max(1, rng.randrange(longest // 2, longest * 3 // 2)) if longest > 1 else 1 for _ in lengths]
    prompts = [[rng.randrange(1, vocabulary) for _ in range(size)] for size in sizes]
    return Load(prompts, lengths)


def make_config(size: str, layers: int, vocabulary: int, recursions: int, context: int) -> MoRConfig:
    """recursions 1 is vanilla. `layers` shared layers beside the first and the last."""
    shape = SIZES[size]
    routed: dict[str, Any] = {"routing": "expert_choice", "router": "random"} if recursions > 1 else {}
    return MoRConfig(
        vocab_size=vocabulary,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_hidden_layers=layers + 2,
        max_position_embeddings=context,
        num_recursions=recursions,
        **routed,
    )


def run_static(llama: LlamaForCausalLM, load: Load, batch: int) -> dict[str, float]:
    """generate of transformers on batches by arrival; prompts padded on the left; each until its longest ends."""
    began, busy = time.perf_counter(), time.process_time()
    for start in range(0, len(load.lengths), batch):
        prompts, lengths = load.prompts[start : start + batch], load.lengths[start : start + batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        new = max(lengths)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out = llama.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **options)
        assert out.shape == (len(prompts), width + new)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}


def run_engine(model: MoRForCausalLM, load: Load, batch: int, kv_tokens: int) -> dict[str, float]:
    """The engine on all requests at once."""
    engine = Engine(model, max_batch=batch, kv_tokens=kv_tokens)
    began, busy = time.perf_counter(), time.process_time()
    requests = [engine.submit(p, SamplingParams(max_tokens=n)) for p, n in zip(load.prompts, load.lengths)]
    for _ in engine.stream():
        pass
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    assert [len(request.tokens) for request in requests] == load.lengths
    assert engine.everyone.free_pages() == engine.everyone.pages
    spent, depths = engine.statistics, [depth for request in requests for depth in request.depths]
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "overhead": 1 - spent.model_seconds / seconds,
        "kv_bytes": engine.kv_bytes(),
        "mean_depth": statistics.mean(depths),
        "preemptions": spent.preemptions,
        "tokens_per_step": spent.generated_tokens / spent.steps,
    }


def memory_batch(config: MoRConfig, vanilla: MoRConfig, batch: int) -> int:
    """Requests whose keys and values take as much as `batch` of the vanilla model's, at the expected depth."""
    return int(batch * kv_cache_bytes_per_token(vanilla) / kv_cache_bytes_per_token(config))


def measure(runs: dict[str, Callable[[], dict[str, float]]], repeats: int, console: Console) -> dict[str, list[dict]]:
    """Every variant in turn, `repeats` times."""
    results: dict[str, list[dict]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            gc.collect()
            results[name].append(run())
            console.print(f"  round {turn + 1}, {name}: {results[name][-1]['seconds']:.1f} s", style="dim")
    return results


def ratio(results: dict[str, list[dict]], name: str, base: str, clock: str) -> float:
    """Median over the rounds of how many times faster than `base`. clock: `seconds` or `cpu_seconds`."""
    return statistics.median(b[clock] / a[clock] for a, b in zip(results[name], results[base]))


def report(title: str, results: dict[str, list[dict]], rows: list[dict], load: Load, console: Console) -> None:
    table = Table(title=title, box=box.SIMPLE)
    columns = (
        "variant",
        "batch",
        "tokens/s",
        "against",
        "ratio",
        "CPU time",
        "bar",
        "FLOPs",
        "depth",
        "overhead",
        "KV MB",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        runs = results[row["name"]]
        row["tokens_per_second"] = statistics.median(load.tokens / run["seconds"] for run in runs)
        row["ratio"] = ratio(results, row["name"], row["base"], "seconds") if row["base"] else None
        row["cpu_ratio"] = ratio(results, row["name"], row["base"], "cpu_seconds") if row["base"] else None
        for key in ("overhead", "mean_depth", "kv_bytes", "preemptions", "tokens_per_step"):
            row[key] = statistics.median(run[key] for run in runs) if key in runs[0] else None
        row["met"] = row["ratio"] >= row["bar"] if row["bar"] and row["ratio"] else None
        table.add_row(
            row["name"],
            str(row["batch"]),
            f"{row['tokens_per_second']:.0f}",
            row["base"] or "",
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            f"{row['cpu_ratio']:.2f}" if row["cpu_ratio"] else "",
            f"{row['bar']:.2f} {'met' if row['met'] else 'missed'}" if row["bar"] else "",
            f"{row['flop_ratio']:.2f}" if row["flop_ratio"] else "",
            f"{row['mean_depth']:.2f}" if row["mean_depth"] else "",
            f"{row['overhead']:.1%}" if row["overhead"] is not None else "",
            f"{row['kv_bytes'] / 1e6:.1f}" if row["kv_bytes"] else "",
        )
    console.print(table)


def bench(
    models: dict[str, MoRForCausalLM], load: Load, options: argparse.Namespace, title: str, console
) -> list[dict]:
    """Static, vanilla and the others, fixed and memory-matched. models: the first one is vanilla."""
    base, vanilla = next(iter(models.items()))
    context = max(len(p) + n for p, n in zip(load.prompts, load.lengths))
    span = round(statistics.mean(len(p) + n for p, n in zip(load.prompts, load.lengths)))
    batch, llama = options.batch, to_llama(vanilla).to(vanilla.dtype).eval()
    runs: dict[str, Callable[[], dict[str, float]]] = {"static": lambda: run_static(llama, load, batch)}
    rows: list[dict] = [
        {"name": "static", "base": None, "bar": None, "batch": batch, "flop_ratio": None},
    ]
    cost = flops_per_token(vanilla.config, span, part="forward")
    for name, model in models.items():
        recursions = model.config.num_recursions
        kinds = {"fixed": batch, "memory": memory_batch(model.config, vanilla.config, batch)}
        for kind, size in kinds.items() if model is not vanilla else [("", batch)]:
            label = f"{name} {kind}".strip()
            pool = size * (context + 32)
            runs[label] = lambda model=model, size=size, pool=pool: run_engine(model, load, size, pool)
            rows.append(
                {
                    "name": label,
                    "base": base if model is not vanilla else "static",
                    "bar": BARS[kind].get(recursions) if kind else BARS["vanilla"],  # type: ignore[union-attr,attr-defined]
                    "batch": size,
                    "flop_ratio": cost / flops_per_token(model.config, span, part="forward"),
                }
            )
    if options.warm_up:
        run_engine(vanilla, Load(load.prompts[:4], [4] * 4), 4, 4 * (context + 32))
    results = measure(runs, options.repeats, console)
    report(title, results, rows, load, console)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small")
    add("--layers", type=int, default=12, help="shared layers; 12 divides by 2, 3 and 4 (default %(default)s)")
    add("--vocabulary", type=int, default=4096)
    add("--batch", type=int, default=32)
    add("--requests", type=int, default=96)
    add("--mean", type=float, default=256.0)
    add("--sigma", type=float, default=64.0)
    add("--prompt-length", type=int, default=0, help="mean of the prompts in the second part; 0 leaves it out")
    add("--repeats", type=int, default=3)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    add("--trained", nargs="+", metavar="DIR", help="checkpoints of finished runs, the vanilla one first")
    add("--output", default="runs/bench-inference.json")
    options = parser.parse_args()
    console, dtype = Console(), getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    parts: dict[str, list[dict]] = {}
    sizes = f"{options.size}, {options.layers} + 2 layers, {options.dtype}, {torch.get_num_threads()} threads"
    for prompt_length in [0] + ([options.prompt_length] if options.prompt_length else []):
        load = make_load(options, options.vocabulary, prompt_length)
        context = max(len(p) + n for p, n in zip(load.prompts, load.lengths)) + 8
        models = {}
        for recursions in (1, 2, 3, 4):
            config = make_config(options.size, options.layers, options.vocabulary, recursions, context)
            models["vanilla" if recursions == 1 else f"MoR-{recursions}"] = (
                MoRForCausalLM(config).to(options.device, dtype).eval()
            )
        each = kv_bytes_per_token(models["vanilla"].config, dtype.itemsize) * (options.layers + 2)
        title = f"controlled exits, prompts of {prompt_length or 1} tokens ({sizes}; {each} KV bytes a vanilla token)"
        parts[title] = bench(models, load, options, title, console)
    if options.trained:
        trained = {Path(f).parent.name: MoRForCausalLM.from_pretrained(f).to(dtype).eval() for f in options.trained}
        vocabulary = min(model.config.vocab_size for model in trained.values())
        shortest = min(model.config.max_position_embeddings for model in trained.values())
        options.mean, options.sigma = min(options.mean, shortest / 2), min(options.sigma, shortest / 8)
        load = make_load(options, vocabulary, options.prompt_length)
        title = f"trained models, lengths N({options.mean:.0f}, {options.sigma:.0f})"
        parts[title] = bench(trained, load, options, title, console)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps({"settings": vars(options), "parts": parts}, indent=1), encoding="utf-8")
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
