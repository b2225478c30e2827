"""Generation speed, end to end: from the first request handed in to the last token counted, everything included.

`make bench-inference`. Protocol of the paper's section 4.2, with its gaps closed (updates of keys and values and the
first layer count): answers of lengths drawn from N(256, sigma), no prompt (one token starts a text); then the same with
prompts. The queue never runs dry: each variant starts empty and works until it has generated `--waves` times its batch
times the mean length.

    static      transformers' Llama with the vanilla weights: whole batches, each until its longest answer ends
    vanilla     the engine, continuous batching
    MoR-2/3/4   the engine, continuous depth-wise batching; same base, exits drawn by the random router so that
                recursion r takes (Nr - r + 1) / Nr of the tokens; `fixed`: as many requests at once as vanilla;
                `memory`: as many as the same bytes of keys and values hold (the paper's 42 / 48 / 51 for 32)

All variants run in turn, `--repeats` times, each round on lengths of its own; a ratio is the median of the ratios in a
round. Beside the wall clock stands the ratio of processor time, which other work on the machine disturbs less.
`--trained DIR ..` (from_pretrained folders, the first one vanilla; by default those of a finished `make compare`)
measures the same on trained models, whose routers decide.

The sizes are those where the block dominates: deep enough that the first and last layer are a small part of it, and so
wide that a step's time is that of reading the weights and the keys and values, as on the paper's GPU. Then a step of
MoR, which reads the shared block once for all recursions, costs less by its unique layers, and more rows cost little.
It holds less at `--layers 36`, and not for small or shallow models (the trained ones; `--size small --layers 12`),
where the work between the products and per request outweighs the block. Nor does it hold for the memory-matched batch
in fp32, where a row more costs time. `RESULTS.md` beside this file has the figures.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
from model.convert.export import to_llama
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


@dataclass(frozen=True)
class Load:
    """An endless stream of requests. mean, sigma: of the answers' lengths; prompt_length: mean, 1 for no prompt."""

    vocabulary: int
    mean: float
    sigma: float
    prompt_length: int = 1

    @property
    def context(self) -> int:
        return round(self.mean + 4 * self.sigma) + self.prompt_length * 3 // 2 + 8

    def requests(self, seed: int) -> Iterator[tuple[list[int], int]]:
        """Prompts, and how many tokens each wants."""
        rng = random.Random(seed)
        while True:
            length = min(max(8, round(rng.gauss(self.mean, self.sigma))), round(self.mean + 4 * self.sigma))
            size = rng.randrange(self.prompt_length // 2, self.prompt_length * 3 // 2) if self.prompt_length > 1 else 1
            yield [rng.randrange(1, self.vocabulary) for _ in range(max(1, size))], length


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


def run_static(llama: LlamaForCausalLM, load: Load, seed: int, batch: int, waves: int) -> dict[str, float]:
    """generate of transformers on whole batches; prompts padded on the left; each until its longest answer ends."""
    stream, tokens = load.requests(seed), 0
    began, busy = time.perf_counter(), time.process_time()
    for _ in range(waves):
        prompts, lengths = zip(*itertools.islice(stream, batch))
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=llama.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(ids)
        new = max(lengths)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out = llama.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **options)
        assert out.shape == (batch, width + new)
        tokens += sum(lengths)
    return {"tokens": tokens, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}


def run_engine(model: MoRForCausalLM, load: Load, seed: int, batch: int, waves: int) -> dict[str, float]:
    """The engine under a queue that never runs dry."""
    engine = Engine(model, max_batch=batch, kv_tokens=batch * (load.context + 32))
    stream, requests = load.requests(seed), []
    began, busy = time.perf_counter(), time.process_time()
    while engine.statistics.generated_tokens < waves * batch * load.mean:
        while len(engine.scheduler.waiting) < batch:
            prompt, length = next(stream)
            requests.append(engine.submit(prompt, SamplingParams(max_tokens=length)))
        engine.step()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    for request in requests:
        engine.cancel(request)
    assert engine.everyone.free_pages() == engine.everyone.pages
    spent, depths = engine.statistics, [depth for request in requests for depth in request.depths]
    return {
        "tokens": spent.generated_tokens,
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


def measure(
    runs: dict[str, Callable[[int], dict[str, float]]], seeds: Iterable[int], console: Console
) -> dict[str, list[dict]]:
    """Every variant in turn, once for each seed of the lengths."""
    results: dict[str, list[dict]] = {name: [] for name in runs}
    for seed in seeds:
        for name, run in runs.items():
            gc.collect()
            results[name].append(run(seed))
            last = results[name][-1]
            console.print(f"  lengths {seed}, {name}: {last['tokens']} tokens, {last['seconds']:.1f} s", style="dim")
    return results


def ratio(results: dict[str, list[dict]], name: str, base: str, clock: str) -> float:
    """Median over the rounds of how many times faster than `base`. clock: `seconds` or `cpu_seconds`."""
    pairs = zip(results[name], results[base], strict=True)
    return statistics.median(a["tokens"] / a[clock] / (b["tokens"] / b[clock]) for a, b in pairs)


def report(title: str, results: dict[str, list[dict]], rows: list[dict], console: Console) -> None:
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
        row["tokens_per_second"] = statistics.median(run["tokens"] / run["seconds"] for run in runs)
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
    models: dict[str, MoRForCausalLM],
    load: Load,
    rounds: int,
    options: argparse.Namespace,
    title: str,
    console: Console,
) -> list[dict]:
    """Static, vanilla and the others, fixed and memory-matched. models: the first one is vanilla."""
    base, vanilla = next(iter(models.items()))
    span, batch, waves = round(load.mean + load.prompt_length), options.batch, options.waves
    llama = to_llama(vanilla).to(vanilla.device, vanilla.dtype).eval()
    runs: dict[str, Callable[[int], dict[str, float]]] = {
        "static": lambda seed: run_static(llama, load, seed, batch, waves)
    }
    rows: list[dict] = [{"name": "static", "base": None, "bar": None, "batch": batch, "flop_ratio": None}]
    cost = flops_per_token(vanilla.config, span, part="forward")
    for name, model in models.items():
        recursions = model.config.num_recursions
        kinds = {"fixed": batch, "memory": memory_batch(model.config, vanilla.config, batch)}
        for kind, size in kinds.items() if model is not vanilla else [("", batch)]:
            label = f"{name} {kind}".strip()
            runs[label] = lambda seed, model=model, size=size: run_engine(model, load, seed, size, waves)  # type: ignore[misc]
            rows.append(
                {
                    "name": label,
                    "base": base if model is not vanilla else "static",
                    "bar": BARS[kind].get(recursions) if kind else BARS["vanilla"],  # type: ignore[union-attr,attr-defined]
                    "batch": size,
                    "flop_ratio": cost / flops_per_token(model.config, span, part="forward"),
                }
            )
    run_engine(vanilla, Load(load.vocabulary, 8, 0), 0, 4, 1)  # what the first call alone costs
    results = measure(runs, range(options.seed, options.seed + rounds), console)
    report(title, results, rows, console)
    return rows


def controlled(options: argparse.Namespace, console: Console) -> dict[str, list[dict]]:
    """Models of random weights whose exits are drawn, without and with prompts."""
    dtype, parts = getattr(torch, options.dtype), {}
    sizes = f"{options.size}, {options.layers} + 2 layers, {options.dtype}, {torch.get_num_threads()} threads"
    for prompt_length, rounds in ((1, options.repeats), (options.prompt_length, options.prompt_repeats)):
        if not rounds:
            continue
        load = Load(options.vocabulary, options.mean, options.sigma, prompt_length)
        models = {}
        for recursions in (1, 2, 3, 4):
            config = make_config(options.size, options.layers, options.vocabulary, recursions, load.context)
            name = "vanilla" if recursions == 1 else f"MoR-{recursions}"
            models[name] = MoRForCausalLM(config).to(options.device, dtype).eval()
        each = kv_bytes_per_token(models["vanilla"].config, dtype.itemsize) * (options.layers + 2)
        title = f"controlled exits, prompts of {prompt_length} tokens ({sizes}; {each} KV bytes a vanilla token)"
        parts[title] = bench(models, load, rounds, options, title, console)
    return parts


def trained(options: argparse.Namespace, console: Console) -> dict[str, list[dict]]:
    """Models of finished runs; lengths within their context."""
    dtype = getattr(torch, options.dtype)
    models = {
        Path(f).parent.name: MoRForCausalLM.from_pretrained(f).to(options.device, dtype).eval() for f in options.trained
    }
    shortest = min(model.config.max_position_embeddings for model in models.values())
    mean, sigma = min(options.mean, shortest / 2), min(options.sigma, shortest / 10)
    load = Load(min(model.config.vocab_size for model in models.values()), mean, sigma)
    title = f"trained models, lengths N({mean:.0f}, {sigma:.0f}), {options.dtype}"
    return {title: bench(models, load, options.repeats, options, title, console)}


def finished_runs() -> list[str]:
    """Checkpoints that `make compare` left, vanilla first; none if it has not run."""
    found = sorted(Path("runs/compare-cpu").glob("*-seed0/final"))
    routed = [str(folder) for folder in found if folder.parent.name.startswith("mor_")]
    return [str(folder) for folder in found if folder.parent.name.startswith("vanilla")] + routed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="medium")
    add("--layers", type=int, default=60, help="shared layers; 60 divides by 2, 3 and 4 (default %(default)s)")
    add("--vocabulary", type=int, default=4096)
    add("--batch", type=int, default=32)
    add("--waves", type=int, default=1, help="tokens of a run, in batches of answers of mean length")
    add("--mean", type=float, default=256.0)
    add("--sigma", type=float, default=64.0)
    add("--repeats", type=int, default=3, help="rounds without prompts; 0 leaves the part out")
    add("--prompt-length", type=int, default=128, help="mean of the prompts in the second part")
    add("--prompt-repeats", type=int, default=1, help="rounds with prompts; 0 leaves the part out")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--trained", nargs="*", metavar="DIR", default=finished_runs(), help="checkpoints, the vanilla one first")
    add("--output", default="runs/bench-inference.json")
    options = parser.parse_args()
    console = Console(width=140)
    torch.manual_seed(options.seed)
    parts = controlled(options, console)
    if options.trained and options.repeats:
        parts |= trained(options, console)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps({"settings": vars(options), "parts": parts}, indent=1), encoding="utf-8")
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
