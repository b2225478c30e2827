"""Does a model save the time that it saves in FLOPs? Steps (forward and backward) of every architecture and vanilla.

    python tests/benchmarks/bench_model.py [--dtype fp32] [--compile] [--documents] [--only NAME ...] [--json FILE]

Rounds are interleaved: each runs one step of every model, so that what else the machine does hits all alike, and a
model's time ratio is the median over rounds of its step divided by the vanilla step of the same round. `excess` is that
ratio minus the ratio of exact FLOPs of the routing that happened; the bars are +0.03 for expert-choice and +0.05 for
token-choice. `peak` is all that a step holds (weights, gradients, activations; no optimizer) against vanilla; its bar
is the ratio of saved activations that `model.memory` estimates.

On a CPU the base is hidden 512, 14 layers, sequence 1024; on CUDA the 360M configurations at sequence 2048, bf16,
compiled, with the share of a measured matrix product's peak that exact FLOPs reach (MFU).

    python tests/benchmarks/bench_model.py --reference FOLDER --reference-python PYTHON [--clock cpu]

Against the authors' code instead, on a CPU in bf16, weights too, as theirs always are: FOLDER is a checkout of
raymin0223/mixture_of_recursions, PYTHON an interpreter with torch, transformers 4.52 and omegaconf, where
`reference_worker.py` runs their models as they are. Each round runs a step of theirs and of ours, eager and compiled
layer by layer; the bars are 1.3 times faster for expert-choice, 1.6 times with KV sharing and for token-choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.config import MoRConfig
from model.flops import training_flops, work_of
from model.memory import Placement, activation_bytes
from model.modeling import MoRForCausalLM

CPU_BASE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
CUDA_BASE = {"max_position_embeddings": 2048}  # the defaults of MoRConfig are the 360M base
BARS = {"expert_choice": 0.03, "token_choice": 0.05}
REFERENCE_BARS = {"vanilla": None, "mor_expert nr3": 1.3, "mor_expert nr3 shared KV": 1.6, "mor_token nr3": 1.6}


@dataclass
class Result:
    """One model. flops, bytes and seconds are of one step; ratios are to the vanilla model of the same run."""

    name: str
    flops: int
    peak_bytes: int
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    time_ratio: float = 1.0
    flops_ratio: float = 1.0
    excess: float = 0.0
    excess_bar: float | None = None
    peak_ratio: float = 1.0
    peak_bar: float | None = None
    rounds: list[float] = field(default_factory=list)


def variants(base: dict[str, Any], cuda: bool) -> dict[str, MoRConfig]:
    """The compared architectures by name, vanilla first."""
    depths = (2, 3, 4) if cuda else (3,)
    chosen: dict[str, dict[str, Any]] = {"vanilla": {}, "recursive nr3": {"num_recursions": 3}}
    for nr in depths:
        chosen[f"mor_expert nr{nr}"] = {"num_recursions": nr, "routing": "expert_choice"}
    chosen["mor_expert nr3 shared KV"] = chosen["mor_expert nr3"] | {"kv_strategy": "shared"}
    chosen["mor_token nr3"] = {"num_recursions": 3, "routing": "token_choice"}
    chosen["mor_token nr3 shared KV"] = chosen["mor_token nr3"] | {"kv_strategy": "shared"}
    return {name: MoRConfig(**base | _fitting_depth(base, fields)) for name, fields in chosen.items()}


def _fitting_depth(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Layers that the recursions divide: the next number above, as the paper adjusts them."""
    layers, nr = base.get("num_hidden_layers", 32), fields.get("num_recursions", 1)
    return fields | {"num_hidden_layers": layers if nr == 1 else 2 + -(-(layers - 2) // nr) * nr}


def autocast(device: str, dtype: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")


def make_step(model: Any, batch: Tensor, documents: Tensor | None, dtype: str) -> Callable[[], Any]:
    """A function that runs forward and backward and returns the model's output."""

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        with autocast(batch.device.type, dtype):
            output = model(input_ids=batch, labels=batch, document_ids=documents)
        output.loss.backward()
        return output

    return step


def timed(step: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one step."""
    _wait(device)
    started = clock()
    step()
    _wait(device)
    return clock() - started


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], object], model: torch.nn.Module, device: str) -> int:
    """Weights, and the most that one step allocates on top of them: gradients and activations."""
    model.zero_grad(set_to_none=True)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if device == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return weights + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return weights + peak


def matmul_peak(device: str, dtype: str) -> float:
    """FLOPs per second of a large matrix product, the best of several."""
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    for _ in range(3):
        a @ a
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(10))


def measure(
    steps: dict[str, Callable[[], object]], rounds: int, device: str, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every model's step in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, clock))
    return seconds


def routed(config: MoRConfig, output: Any, options: argparse.Namespace) -> tuple[int, int]:
    """Exact FLOPs of a step and the bytes it saves for its gradients, of the routing that its output records."""
    shape, counts, pairs = (options.length, options.rows), [], []
    if output.routing is not None:
        counts, pairs = output.routing.counts.sum(0).tolist(), output.routing.pairs.sum(0).tolist()
    work = work_of(config, *shape, counts, pairs)
    placement = Placement(precision=options.dtype, document_masking=options.documents)
    saved = activation_bytes(config, *shape, placement, work).saved
    return training_flops(config, *shape, counts, pairs), saved


def run(options: argparse.Namespace) -> list[Result]:
    """Build, warm up and time every model."""
    device = options.device
    base = CUDA_BASE if device == "cuda" else CPU_BASE
    torch.manual_seed(0)
    vocabulary = base.get("vocab_size", 49152)
    batch = torch.randint(1, vocabulary, (options.rows, options.length), device=device)
    lines = torch.randint(0, 500, batch.shape, device=device) == 0  # documents of 500 tokens on average
    documents = lines.long().cumsum(1) if options.documents else None
    steps: dict[str, Callable[[], Any]] = {}
    results: dict[str, Result] = {}
    configs = variants(base, device == "cuda")
    saved: dict[str, int] = {}
    for name, config in configs.items():
        if options.only and not any(part in name for part in ["vanilla", *options.only]):
            continue
        torch.manual_seed(0)
        model = MoRForCausalLM(config).to(device).train()
        if options.compile:
            model.compile_layers()
        steps[name] = make_step(model, batch, documents, options.dtype)
        flops, saved[name] = routed(config, steps[name](), options)
        results[name] = Result(name, flops, peak_bytes(steps[name], model, device))
        results[name].excess_bar = BARS.get(config.routing)
        if config.routing != "none":
            results[name].peak_bar = saved[name] / saved["vanilla"]
    peak = matmul_peak(device, options.dtype)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    return summarize(results, measure(steps, options.rounds, device, clock), batch.numel(), peak)


def summarize(results: dict[str, Result], seconds: dict[str, list[float]], tokens: int, peak: float) -> list[Result]:
    """Fill in medians and ratios."""
    vanilla = results["vanilla"]
    for name, result in results.items():
        result.rounds = seconds[name]
        result.seconds = statistics.median(seconds[name])
        result.tokens_per_second = tokens / result.seconds
        result.mfu = result.flops / result.seconds / peak
        result.time_ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["vanilla"], strict=True))
        result.flops_ratio = result.flops / vanilla.flops
        result.excess = result.time_ratio - result.flops_ratio
        result.peak_ratio = result.peak_bytes / vanilla.peak_bytes
    return list(results.values())


def show(results: list[Result], title: str) -> None:
    """The table, bars shown with pass or miss."""
    table = Table(title=title)
    for column in ("model", "ms", "tokens/s", "MFU", "time", "FLOPs", "excess", "bar", "peak MiB", "peak", "bar"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in results:
        table.add_row(
            r.name,
            f"{r.seconds * 1e3:.1f}",
            f"{r.tokens_per_second:,.0f}",
            f"{r.mfu:.1%}",
            f"{r.time_ratio:.3f}",
            f"{r.flops_ratio:.3f}",
            f"{r.excess:+.3f}",
            _judged(r.excess, r.excess_bar, "+.2f"),
            f"{r.peak_bytes / 2**20:,.0f}",
            f"{r.peak_ratio:.3f}",
            _judged(r.peak_ratio, r.peak_bar, ".3f"),
        )
    Console(width=140).print(table)


def _judged(value: float, bar: float | None, style: str) -> str:
    if bar is None:
        return ""
    return f"{bar:{style}} " + ("[green]pass[/]" if value <= bar else "[red]miss[/]")


class Stepped:
    """Models that a process of their own takes through steps: a name in, its seconds out.

    described: what the process says of its models before the first step.
    """

    def __init__(self, command: list[str], **options: Any):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
        self.described: dict[str, Any] = json.loads(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}; its message is above")
        return line

    def step(self, name: str) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Reference(Stepped):
    """The authors' models, in their own Python environment."""

    def __init__(self, options: argparse.Namespace, base: dict[str, Any]):
        settings = {
            "folder": str(options.reference.resolve()),
            "base": base,
            "rows": options.rows,
            "length": options.length,
            "clock": options.clock,
            "models": list(REFERENCE_BARS),
        }
        worker = Path(__file__).with_name("reference_worker.py")
        super().__init__([options.reference_python, str(worker), json.dumps(settings)])


@dataclass
class Compared:
    """One model of the authors' and ours. seconds: medians; faster: median over rounds of theirs / ours."""

    name: str
    seconds: dict[str, float]
    faster: dict[str, float]
    bar: float | None
    losses: dict[str, float]
    loads: dict[str, list[float]]


def compare(options: argparse.Namespace) -> list[Compared]:
    """Interleaved steps of the authors' models and ours."""
    torch.manual_seed(0)
    batch = torch.randint(1, CPU_BASE["vocab_size"], (options.rows, options.length))
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    reference = Reference(options, CPU_BASE)
    ours: dict[tuple[str, str], Callable[[], Any]] = {}
    outputs: dict[str, Any] = {}
    for name, config in variants(CPU_BASE, False).items():
        for way in ("eager", "compiled") if name in REFERENCE_BARS else ():
            torch.manual_seed(0)
            model = MoRForCausalLM(config).train().to(torch.bfloat16)  # as theirs are built
            if way == "compiled":
                model.compile_layers()
            ours[name, way] = make_step(model, batch, None, options.dtype)
            outputs[name] = [ours[name, way]() for _ in range(3)][-1]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in REFERENCE_BARS}
    for _ in range(options.rounds):
        for name, done in rounds.items():
            seconds = {way: timed(ours[name, way], "cpu", clock) for way in ("eager", "compiled")}
            done.append({"theirs": reference.step(name)} | seconds)
    reference.close()
    compared = []
    for name, done in rounds.items():
        theirs, record = reference.described[name], outputs[name].routing
        medians = {way: statistics.median(r[way] for r in done) for way in done[0]}
        faster = {way: statistics.median(r["theirs"] / r[way] for r in done) for way in ("eager", "compiled")}
        losses = {"theirs": theirs["loss"], "ours": outputs[name].losses["lm"].item()}
        loads = {"theirs": theirs["load"], "ours": record.load.tolist()} if "load" in theirs else {}
        compared.append(Compared(name, medians, faster, REFERENCE_BARS[name], losses, loads))
    return compared


def show_compared(results: list[Compared], title: str) -> None:
    """The table, and what each side's token-choice routed, since its time goes with it."""
    table = Table(title=title)
    table.add_column("model")
    for column in (
        "theirs ms",
        "eager ms",
        "compiled ms",
        "eager faster",
        "compiled faster",
        "bar",
        "loss theirs",
        "ours",
    ):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.name,
            *(f"{r.seconds[way] * 1e3:.0f}" for way in ("theirs", "eager", "compiled")),
            f"{r.faster['eager']:.2f}",
            f"{r.faster['compiled']:.2f}",
            _judged(-r.faster["compiled"], None if r.bar is None else -r.bar, ".1f").lstrip("-"),
            *(f"{r.losses[side]:.3f}" for side in ("theirs", "ours")),
        )
    console = Console(width=140)
    console.print(table)
    for r in results:
        for side, load in r.loads.items():
            console.print(f"{r.name}, {side}: share of tokens per depth {', '.join(f'{share:.2f}' for share in load)}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="precision of autocast")
    parser.add_argument("--rows", type=int, help="sequences of a batch (8 on CUDA, 2 on a CPU, 1 with --reference)")
    parser.add_argument("--length", type=int, default=2048 if cuda else 1024, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="compile each layer")
    parser.add_argument("--documents", action="store_true", help="mask documents of 500 tokens on average")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of the names to run beside vanilla")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="what a step's time is; `cpu`, with one thread, is steadier on a CPU that others use too",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument(
        "--reference", type=Path, metavar="FOLDER", help="compare with the authors' code in this folder"
    )
    parser.add_argument("--reference-python", metavar="PYTHON", help="the interpreter of its environment")
    options = parser.parse_args(arguments)
    if bool(options.reference) != bool(options.reference_python):
        parser.error("--reference and --reference-python go together")
    if options.reference and (cuda or options.compile or options.documents or options.only or options.dtype != "bf16"):
        parser.error("--reference compares all models in bf16 on a CPU, eager and compiled; it takes no other options")
    options.device = "cuda" if cuda else "cpu"
    options.rows = options.rows or (8 if cuda else 1 if options.reference else 2)
    return options


def main() -> int:
    options = parse()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if options.device == "cuda":
        settings["gpu"] = torch.cuda.get_device_name()
    shape = f"{options.rows} x {options.length} tokens, {options.dtype}"
    results: list[Any]
    if options.reference:
        results = compare(options)
        threads = f"{settings['threads']} threads, {options.clock} clock"
        show_compared(results, f"the authors' code and ours, {shape}, {threads}, {options.rounds} rounds")
    else:
        results = run(options)
        extras = "".join(f", {name}" for name in ("compile", "documents") if settings[name])
        show(results, f"forward and backward, {shape}{extras}, {options.device}, {options.rounds} rounds")
    if options.json is not None:
        options.json.write_text(json.dumps({"settings": settings, "results": [asdict(r) for r in results]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
