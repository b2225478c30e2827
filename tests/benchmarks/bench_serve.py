"""The server against its engine, under open-loop arrivals, under attack, and over many requests. `make bench-serve`.

    throughput    streams at once, without a break, against the engine alone on the same prompts and lengths, in turn;
                  tokens a second, and seconds of processor time a token: the engine's, the server's, and the clients',
                  which share the machine with the server
    arrivals      a Poisson process of requests, whatever the server has got done: seconds from the arrival to the first
                  token, and between tokens, as percentiles
    transformers  the same two of `transformers serve` on the same vanilla weights, exported
    attacks       the slowest answer of /health while one client does its worst
    soak          resident memory over varied requests, good and bad

Models have random weights; nothing ends an answer but its length. Clients run in this process, the server in another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model.config import MoRConfig
from model.convert.export import to_llama
from model.folder import write_folder
from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from model.inference.text import load_checkpoint
from model.modeling import MoRForCausalLM
from tests.benchmarks.bench_inference import SIZES
from tests.helpers.serving import (
    Server,
    Stream,
    attacks,
    closed_loop,
    free_port,
    get,
    health_under,
    open_loop,
    serving_folder,
    started,
)
from tests.helpers.tiny import tiny_model
from tests.model.inference.test_load import soak

CONTEXT, VOCABULARY = 1024, 290
HEALTH_BAR, THROUGHPUT_BAR = 0.2, 0.95
PERCENTILES = (50, 90, 99)


def letters(file: Path, size: int) -> None:
    """A tokenizer with a token for each letter, so that every token is text at once."""
    written = "abcdefghijklmnopqrstuvwxyz 0123456789.,?"
    characters = [*written, *(chr(0x100 + i) for i in range(size - 1 - len(written)))]
    vocabulary = {"<eos>": 0} | {character: i for i, character in enumerate(characters, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(file))


def write_models(root: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Folders of a vanilla model, of MoR on the same base, of the vanilla one as transformers' Llama, of a tiny one."""
    letters(root / "tokenizer.json", VOCABULARY)
    shape, dtype = SIZES[options.size], getattr(torch, options.dtype)
    folders = {}
    for name, routed in (("vanilla", {}), ("MoR-3", {"num_recursions": 3, "routing": "expert_choice"})):
        torch.manual_seed(0)
        config = MoRConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            num_hidden_layers=options.layers + 2,
            max_position_embeddings=CONTEXT,
            **routed,
        )
        model = MoRForCausalLM(config).to(dtype).eval()
        folders[name] = root / name
        write_folder(model, folders[name], root / "tokenizer.json")
        if not routed:
            folders["llama"] = root / "llama"
            write_folder(to_llama(model), folders["llama"], root / "tokenizer.json")
    # What is sent against a server, and how long memory stays, asks for no large model.
    folders["tiny"] = root / "tiny"
    tiny = tiny_model("expert-recursion_wise", 1, vocab_size=VOCABULARY).float()
    write_folder(tiny, folders["tiny"], root / "tokenizer.json")
    return folders


def bodies(count: int, options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Requests with prompts of 16 to 64 letters, and answers as long as asked."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {
            "prompt": "".join(rng.choices(letters, k=rng.randrange(16, 65))),
            "max_tokens": options.tokens,
            "temperature": 0,
        }
        for _ in range(count)
    ]


def percentiles(values: Sequence[float]) -> list[str]:
    """In milliseconds."""
    return [f"{value * 1000:.0f}" for value in np.percentile(values, PERCENTILES)]


# --- throughput -------------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Tokens a second, and milliseconds of processor time a token: of the engine or server, and of its clients."""

    speed: float
    busy: float
    clients: float = 0.0


def engine_round(engine: Engine, tokenizer: Any, requests: Sequence[dict[str, Any]], streams: int) -> Round:
    """The engine alone, never with more than `streams` requests."""
    left: Iterator[dict[str, Any]] = iter(requests)
    before, busy, began = engine.statistics.generated_tokens, time.process_time(), time.perf_counter()
    running = 0
    while True:
        while running < streams and (body := next(left, None)) is not None:
            ids = tokenizer.encode(body["prompt"]).ids
            engine.submit(ids, SamplingParams(max_tokens=body["max_tokens"]))
            running += 1
        if not running:
            break
        running -= sum(bool(event.finished) for event in engine.step())
    tokens = engine.statistics.generated_tokens - before
    return Round(tokens / (time.perf_counter() - began), 1000 * (time.process_time() - busy) / tokens)


def server_round(
    server: Server, requests: Sequence[dict[str, Any]], streams: int, path: str = "/v1/completions"
) -> Round:
    """The same of a server, and of the clients in this process."""
    busy, clients, began = server.cpu_seconds(), time.process_time(), time.perf_counter()
    done = asyncio.run(closed_loop(server.port, requests, streams, path))
    seconds = time.perf_counter() - began
    tokens = sum(stream.tokens for stream in done)
    spent = server.cpu_seconds() - busy, time.process_time() - clients
    return Round(tokens / seconds, *(1000 * each / tokens for each in spent))


def throughput(name: str, folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Server and engine in turn; the ratio is the median of the rounds' ratios."""
    model, tokenizer = load_checkpoint(folder, options.dtype)
    engine = Engine(model, max_batch=options.streams, kv_tokens=options.streams * 192)
    sizes = ["--max-batch", str(options.streams), "--kv-tokens", str(options.streams * 192), "--dtype", options.dtype]
    rounds = []
    with serving_folder(folder, *sizes) as server:
        warm = bodies(4, options, 99)
        engine_round(engine, tokenizer, warm, 4)
        server_round(server, warm, 4)
        for i in range(options.rounds):
            requests = bodies(options.streams * 2, options, i)
            pair = (
                engine_round(engine, tokenizer, requests, options.streams),
                server_round(server, requests, options.streams),
            )
            rounds.append(pair)
            alone, served = pair
            console.print(
                f"{name}: engine {alone.speed:.1f}, server {served.speed:.1f} tokens/s; processor ms a token: engine "
                f"{alone.busy:.3f}, server {served.busy:.3f}, clients {served.clients:.3f}; "
                f"load {os.getloadavg()[0]:.1f}"
            )
    ratio = statistics.median(served.speed / alone.speed for alone, served in rounds)
    busy = statistics.median(served.busy / alone.busy for alone, served in rounds)
    return {"rounds": rounds, "ratio": ratio, "processor_ratio": busy, "bar": THROUGHPUT_BAR}


# --- arrivals ---------------------------------------------------------------------------------------------------------


def arrivals(server: Server, rate: float, options: argparse.Namespace, path: str = "/v1/completions") -> dict[str, Any]:
    """Percentiles in seconds of the first token and between tokens."""
    asyncio.run(closed_loop(server.port, bodies(2, options, 99), 2, path))
    done: list[Stream] = asyncio.run(open_loop(server.port, bodies(options.requests, options, 5), rate, path=path))
    whole = [stream for stream in done if stream.chunks]
    assert len(whole) == len(done), f"{len(done) - len(whole)} answers without a token"
    return {
        "rate": rate,
        "first": [stream.first for stream in whole],
        "between": [gap for stream in whole for gap in stream.between],
        "chunks": statistics.fmean(len(stream.chunks) for stream in whole),
    }


def show_arrivals(title: str, rows: dict[str, dict[str, Any]], console: Console) -> None:
    heads = [f"{kind} p{p}" for kind in ("first token", "between") for p in PERCENTILES]
    table = Table("server", "requests/s", *heads, title=f"{title}, milliseconds", title_justify="left")
    for name, row in rows.items():
        table.add_row(name, f"{row['rate']:.2f}", *percentiles(row["first"]), *percentiles(row["between"]))
    console.print(table)


def transformers_server(folder: Path, options: argparse.Namespace, batching: bool) -> Any:
    """transformers' own server on an exported folder."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--dtype", options.dtype, "--port", str(port)]
    command += ["--continuous-batching", "--attn-implementation", "sdpa"] if batching else []
    return started(command, port, patience=300)


# --- attacks and soak -------------------------------------------------------------------------------------------------


def under_attack(folder: Path, console: Console) -> dict[str, Any]:
    """The slowest /health under each attack."""
    work = {"nothing": lambda _: time.sleep(5)} | attacks("the state of the union ", 256)
    with serving_folder(folder) as server:
        found = health_under(server.port, work)
        assert get(server.port, "/health")[0] == 200
    table = Table("attack", "answers", "median ms", "slowest ms", title="/health under attack", title_justify="left")
    for name, latencies in found.items():
        figures = (f"{1000 * value:.0f}" for value in (statistics.median(latencies), max(latencies)))
        table.add_row(name, str(len(latencies)), *figures)
    console.print(table)
    slowest = max(max(latencies) for latencies in found.values())
    met = "met" if slowest < HEALTH_BAR else "missed"
    console.print(f"slowest {1000 * slowest:.0f} ms, bar {1000 * HEALTH_BAR:.0f} ms {met}")
    return {name: {"median": statistics.median(values), "slowest": max(values)} for name, values in found.items()}


def long_soak(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Resident bytes over the requests, in ten parts."""
    with serving_folder(folder) as server:
        fresh = server.memory()
        began = time.perf_counter()
        sizes = soak(server, options.soak, 10)
        seconds = time.perf_counter() - began
    mebibytes = [round(size / 2**20, 1) for size in (fresh, *sizes)]
    console.print(
        f"soak: {options.soak} requests in {seconds:.0f} s; MiB at the start and after each tenth {mebibytes}"
    )
    return {"requests": options.soak, "seconds": seconds, "mebibytes": mebibytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    parts = ("throughput", "arrivals", "transformers", "attacks", "soak")
    add("--parts", nargs="+", choices=parts, default=list(parts))
    add("--size", choices=SIZES, default="small")
    add("--layers", type=int, default=12)
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--streams", type=int, default=32)
    add("--tokens", type=int, default=64, help="of each answer")
    add("--rounds", type=int, default=3)
    add("--requests", type=int, default=60, help="of the open loop")
    add("--load", type=float, default=0.5, help="arrivals, as a share of what the slower server's throughput allows")
    add("--soak", type=int, default=5000)
    add("--output", default="runs/bench-serve.json")
    options = parser.parse_args()
    console, results = Console(width=140), dict[str, Any]()
    with tempfile.TemporaryDirectory() as temporary:
        folders = write_models(Path(temporary), options)
        wanted = set(options.parts)
        if "attacks" in wanted:
            results["attacks"] = under_attack(folders["tiny"], console)
        if "soak" in wanted:
            results["soak"] = long_soak(folders["tiny"], options, console)
        if "throughput" in wanted:
            results["throughput"] = {n: throughput(n, folders[n], options, console) for n in ("vanilla", "MoR-3")}
            for name, found in results["throughput"].items():
                met = "met" if found["ratio"] >= THROUGHPUT_BAR else "missed"
                console.print(
                    f"{name}: server {found['ratio']:.3f} of the engine's tokens/s, bar {THROUGHPUT_BAR} {met}; "
                    f"{found['processor_ratio']:.3f} of its processor time a token"
                )
        if wanted & {"arrivals", "transformers"}:
            results["arrivals"] = compare_arrivals(folders, wanted, options, console)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps({"settings": vars(options), **results}, indent=1), encoding="utf-8")
    console.print(f"written to {options.output}")


def compare_arrivals(
    folders: dict[str, Path], wanted: set[str], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Percentiles at one rate of arrivals for every server: half of what our vanilla server can do, unless set."""
    rows: dict[str, dict[str, Any]] = {}
    with serving_folder(folders["vanilla"], "--dtype", options.dtype) as server:
        speed = server_round(server, bodies(options.streams, options, 7), options.streams).speed
        rate = options.load * speed / options.tokens
        rows["ours, vanilla"] = arrivals(server, rate, options)
    if "arrivals" in wanted:
        with serving_folder(folders["MoR-3"], "--dtype", options.dtype) as server:
            rows["ours, MoR-3"] = arrivals(server, rate, options)
    if "transformers" in wanted:
        for batching in (False, True):
            name = "transformers serve" + (" --continuous-batching" if batching else "")
            try:
                with transformers_server(folders["llama"], options, batching) as server:
                    tokens = server_round(server, bodies(options.streams, options, 7), options.streams).speed
                    console.print(f"{name}: {tokens:.1f} tokens/s at {options.streams} streams; ours {speed:.1f}")
                    rows[name] = arrivals(server, rate, options) | {"throughput": tokens}
            except (AssertionError, OSError) as error:
                console.print(f"{name}: does not run here: {str(error)[:300]}")
    show_arrivals(f"{options.requests} requests of {options.tokens} tokens", rows, console)
    return rows


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
