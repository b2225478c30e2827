"""Loader throughput: tokens per second that one thread of `BlockLoader` hands out, against what a trainer consumes.

    python tests/benchmarks/bench_loader.py [--folder FOLDER] [--consumed TOKENS_PER_SECOND]

Without a folder it writes shards of random tokens first. `cached` reads shards that are in the page cache, `evicted`
after the system was asked to drop them. The default of --consumed is the fastest training seen on two CPU cores:
1M parameters outside the embeddings, bf16, compiled, sequences of 256 tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.manifest import write_manifest
from data_prep.shards import write_split
from pretrain.data import BlockLoader
from pretrain.manifest import Manifest

CONSUMED = 25_000.0
GOAL = 10  # times what the trainer consumes
VOCAB_SIZE = 4096


def write_random_folder(folder: Path, sequence_length: int, tokens: int) -> Path:
    """A prepared folder of about `tokens` random tokens in shards of 16 MiB, documents of 500 tokens on average."""
    draw = np.random.default_rng(0)
    splits = {}
    for split, size in (("train", tokens), ("validation", tokens // 100)):
        shape = (size // (sequence_length + 1) + 1, sequence_length + 1)
        blocks = draw.integers(1, VOCAB_SIZE, shape, dtype=np.uint16)
        blocks[draw.random(shape) < 1 / 500] = 0
        splits[split] = write_split([blocks], folder, split, 16 << 20, VOCAB_SIZE)
        del splits[split]["counts"]
    fields = {
        "sequence_length": sequence_length,
        "token_dtype": "uint16",
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 0,
        "tokenizer_fingerprint": "none",
        "corpus": "random tokens",
        "licence": "none",
        "seed": 0,
        "documents": {},
        "unigram_loss": float(np.log(VOCAB_SIZE)),
        "splits": splits,
    }
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, fields)
    return folder


def evict(manifest: Manifest) -> None:
    """Ask the system to drop the shards of `manifest` from its page cache."""
    for path in manifest.folder.glob("*/shard-*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(manifest: Manifest, seconds: float = 2.0, batch_size: int = 64, micro_batch_size: int = 8) -> float:
    """Tokens per second over at least `seconds`, documents numbered, nothing but the loader running."""
    loader = BlockLoader(manifest, "train", batch_size, micro_batch_size)
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        next(loader)
    loader.close()
    return loader.position * manifest.sequence_length / passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="prepared folder; written with random tokens if not given")
    parser.add_argument("--consumed", type=float, default=CONSUMED, help="tokens per second of the trainer")
    arguments = parser.parse_args()
    table = Table(title=f"loader, one thread; the trainer consumes {arguments.consumed:,.0f} tokens/s")
    for column in ("sequence", "page cache", "tokens/s", "samples/s", "times the trainer"):
        table.add_column(column, justify="right")
    slowest = float("inf")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.folder is not None:
            folders = [arguments.folder]
        else:
            lengths = (256, 2048)
            folders = [write_random_folder(Path(scratch) / str(length), length, 20_000_000) for length in lengths]
        for folder in folders:
            manifest = Manifest.read(folder)
            for state in ("evicted", "cached"):
                if state == "evicted":
                    evict(manifest)
                rate = measure(manifest)
                slowest = min(slowest, rate / arguments.consumed)
                length = manifest.sequence_length
                table.add_row(
                    str(length), state, f"{rate:,.0f}", f"{rate / length:,.0f}", f"{rate / arguments.consumed:,.0f}"
                )
    Console().print(table)
    return 0 if slowest > GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
