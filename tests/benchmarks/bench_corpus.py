"""What a preparation takes: memory of a task and disk at two sizes of corpus, and two local tasks against one.

    python tests/benchmarks/bench_corpus.py [--documents 60000 240000] [--shuffle 16 128] [--rounds 2] [--parts ...]

`memory`: largest private memory of one process (mapped files are not private) that prepares each corpus, and the
largest size of its folder, beside what data_prep/estimate.py says; both are carried on to the paper's corpus, 220
billion tokens. `shuffle`: the same for the last two stages alone, over random tokens (MB). `tasks`: seconds of the read
and encode stages of the larger corpus with one and two tasks in turn, by the clock and on the CPU, medians over rounds;
on a busy machine only the latter say something.
`mixture`: seconds to position 1,000,000 of a mixture of three sources.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep import documents, shuffle
from data_prep.config import DataSettings
from data_prep.estimate import needs
from data_prep.settings import load
from data_prep.synthetic import synthetic_documents

# Runs in a process of its own; the last line that it prints is JSON.
MEASURED = """
import json, resource, sys, threading, time
from pathlib import Path
import psutil
sys.path.insert(0, ".")
peak, disk, over = 0, 0, threading.Event()
folder = Path(sys.argv[2])
def watch():
    global peak, disk
    process = psutil.Process()
    while not over.wait(0.02):
        info = process.memory_info()
        peak = max(peak, info.rss - info.shared)
        size = 0
        for path in folder.rglob("*"):
            try:
                size += path.stat().st_size
            except OSError:
                pass
        disk = max(disk, size)
watcher = threading.Thread(target=watch)
"""
PREPARE = """
from data_prep import documents, prepare as module, shuffle
shuffle.BUCKET_BYTES, documents.RANGE_ROWS = 8 << 20, 1 << 15
seconds, original = {}, module.run_stage
def cpu():
    waited = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return waited + sum(sum(task.cpu_times()[:4]) for task in psutil.Process().children())  # the server of the tasks
def run_stage(settings, name):
    started = time.perf_counter(), cpu()
    original(settings, name)
    seconds[name] = time.perf_counter() - started[0], cpu() - started[1]
module.run_stage = run_stage
if __name__ == "__main__":
    watcher.start()
    try:
        assert module.main(["--config", sys.argv[1], *sys.argv[3:], f"folder={folder}"]) == 0
    finally:
        over.set()
    watcher.join()
    final = sum(path.stat().st_size for path in folder.rglob("*"))
    print(json.dumps({"peak": peak, "disk": disk, "final": final, "seconds": seconds}))
"""
SHUFFLE = """
import numpy as np
from data_prep import shuffle
from data_prep.shards import write_split
from data_prep.shuffle import Scattered, cut_blocks, scatter
shuffle.BUCKET_BYTES = 4 << 20
width, dtype = 257, np.dtype("<u2")
count = int(sys.argv[1]) * 1_000_000 // (width * 2)
def run():
    buckets, rows = cut_blocks(count, width * 2)
    draw, chunks = np.random.default_rng(0), []
    for number in range(-(-count // rows)):
        blocks = draw.integers(1, 4096, (min(rows, count - number * rows), width), dtype=np.uint16)
        chunks.append(folder / f"{number}.blocks")
        scatter(blocks, number, buckets, 0, chunks[-1])
    mixed = Scattered(chunks, width, dtype, 0)
    begins = mixed.first_rows()
    arrays = (mixed.rows(number, 0, int(begins[number + 1] - begins[number])) for number in range(buckets))
    write_split(arrays, folder, "train", 4 << 20, 4096)
watcher.start()
try:
    run()
finally:
    over.set()
watcher.join()
print(json.dumps({"peak": peak, "disk": disk}))
"""
MIXTURE = """
import json, sys, time
sys.path.insert(0, ".")
from pathlib import Path
from pretrain.data import BlockLoader
from pretrain.manifest import Manifest, Mixture
from tests.helpers.corpus import prepare_tiny
folder = Path(sys.argv[1])
for seed, name in enumerate("abc"):
    prepare_tiny(folder / name, samples=200, seed=seed)
tokenizer = Manifest.read(folder / "a").tokenizer_fingerprint
sources = {n: (Manifest.read(folder / n).model_copy(update={"tokenizer_fingerprint": tokenizer}), [(0.0, w)])
           for n, w in (("a", 0.55), ("b", 0.3), ("c", 0.15))}
started = time.perf_counter()
loader = BlockLoader(Mixture.of(sources), "train", 8, 8, position=1_000_000)
next(loader)
print(json.dumps({"seconds": time.perf_counter() - started}))
loader.close()
"""
PAPER_TEXT, PAPER_TOKENS, PAPER_VOCABULARY = 1.0e12, 220e9, 49_152


def run(script: str, *arguments: object) -> dict:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "measured.py"  # spawned tasks read the main script anew
        file.write_text(script)
        command = [sys.executable, str(file), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_corpus(folder: Path, count: int) -> Path:
    """A corpus of distinct documents and its configuration: parts of 8 MB, shards of 4 MB."""
    texts = list(synthetic_documents(2000, seed=0))
    corpus = folder / f"{count}.jsonl"
    with corpus.open("w") as file:
        file.writelines(f'{{"text": "{n}: {texts[n % len(texts)]}"}}\n' for n in range(count))
    config = folder / f"{count}.yaml"
    config.write_text(
        f"{{corpus: x, sequence_length: 256, shard_bytes: 4000000, part_bytes: 8000000, source: {{kind: jsonl, "
        f"paths: ['{corpus}']}}, tokenizer: {{vocab_size: 4096, train_bytes: 4000000}}}}"
    )
    return config


def memory(folder: Path, counts: list[int]) -> None:
    for count in counts:
        config = write_corpus(folder, count)
        text = (folder / f"{count}.jsonl").stat().st_size
        found = run(MEASURED + PREPARE, config, folder / "out", "workers=1")
        shuffle.BUCKET_BYTES, documents.RANGE_ROWS = 8 << 20, 1 << 15  # small as these corpora
        need = needs(load(DataSettings, config, ["folder=x"]), text, text // 8_000_000, 4096)
        print(
            f"{count:,} documents, {text / 1e6:.0f} MB: memory {found['peak'] / 1e6:.0f} MB (estimate "
            f"{need.memory / 1e6:.0f}), disk {found['disk'] / 1e6:.0f} MB (estimate {need.disk / 1e6:.0f}), "
            f"{found['disk'] / text:.2f} times the text, {found['final'] / 1e6:.0f} MB in the end",
            flush=True,
        )
        shutil.rmtree(folder / "out")
    shuffle.BUCKET_BYTES, documents.RANGE_ROWS = 128 << 20, 1 << 20
    paper = needs(load(DataSettings, "configs/data/fineweb_edu_dedup.yaml"), PAPER_TEXT, 14_901, PAPER_VOCABULARY)
    print(
        f"220 billion tokens, {PAPER_TEXT / 1e12:.1f} TB of text: disk at most {paper.disk / 1e12:.2f} TB, of it "
        f"{2 * PAPER_TOKENS / 1e12:.2f} TB of tokens in the end; memory {paper.memory / 1e9:.2f} GB a task"
    )


def shuffled(folder: Path, sizes: list[int]) -> None:
    for size in sizes:
        (folder / "shuffled").mkdir()
        found = run(MEASURED + SHUFFLE, size, folder / "shuffled")
        print(f"shuffle of {size} MB: memory {found['peak'] / 1e6:.0f} MB, disk {found['disk'] / 1e6:.0f} MB")
        shutil.rmtree(folder / "shuffled")


def tasks(folder: Path, count: int, rounds: int) -> None:
    config = write_corpus(folder, count)
    clocks: list[float] = []
    cpus: list[float] = []
    for number in range(rounds):
        times = {}
        for workers in (1, 2):
            found = run(MEASURED + PREPARE, config, folder / "tasks", f"workers={workers}")
            times[workers] = [sum(found["seconds"][stage][clock] for stage in ("read", "encode")) for clock in (0, 1)]
            shutil.rmtree(folder / "tasks")
        clocks.append(times[1][0] / times[2][0])
        cpus.append(2 * times[1][1] / times[2][1])
        told = (f"{workers} tasks {clock:.1f} s, {cpu:.1f} s of CPU" for workers, (clock, cpu) in times.items())
        print(f"read and encode, round {number + 1}: {'; '.join(told)}", flush=True)
    print(
        f"two tasks: {statistics.median(clocks):.2f} times one by the clock; {statistics.median(cpus):.2f} times where "
        "two cores are free, by CPU seconds"
    )


PARTS = ("memory", "shuffle", "tasks", "mixture")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, nargs=2, default=[60_000, 240_000])
    parser.add_argument("--shuffle", type=int, nargs=2, default=[16, 128], metavar="MB")
    parser.add_argument("--rounds", type=int, default=2, help="of one task and two, in turn")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "memory" in options.parts:
            memory(folder, options.documents)
        if "shuffle" in options.parts:
            shuffled(folder, options.shuffle)
        if "tasks" in options.parts:
            tasks(folder, options.documents[1], options.rounds)
        if "mixture" in options.parts:
            print(f"mixture of three, position 1,000,000: {run(MIXTURE, folder / 'mixture')['seconds']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
