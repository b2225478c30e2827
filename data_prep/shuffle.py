"""Global shuffle of fixed-size blocks with bounded memory (legend: N blocks, W = sequence_length + 1 tokens).

Two passes. Each block, read in order, is thrown into one of B buckets drawn at random and appended to the bucket's
file; then each bucket, small enough for memory, is permuted and its blocks follow those of the bucket before. That
is a uniformly random order of all blocks (Rao 1961, Sandelius 1962), by sequential reads and writes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 512  # open files; beyond 32 GiB of tokens the buckets grow instead


def shuffled_blocks(
    tokens: np.ndarray, width: int, seed: int, folder: Path, bucket_bytes: int | None = None
) -> Iterator[np.ndarray]:
    """Yield arrays [blocks, W] that together hold every whole block of `tokens` once, in random order.

    tokens: [tokens], may be a map of a file; a rest shorter than W is left out. seed: any non-negative integer;
    the order depends on it, on N and on bucket_bytes. folder: where bucket files are spilled, and removed again.
    """
    bucket_bytes = bucket_bytes or BUCKET_BYTES
    count = len(tokens) // width
    blocks = tokens[: count * width].reshape(count, width)
    buckets = min(MAX_BUCKETS, max(1, -(-blocks.nbytes // bucket_bytes)))
    if buckets == 1:
        yield blocks[np.random.default_rng([seed, 0]).permutation(count)]
        return
    paths = [folder / f"bucket-{number:06d}.blocks" for number in range(buckets)]
    _throw(blocks, paths, seed, max(1, bucket_bytes // blocks[:1].nbytes))
    for number, path in enumerate(paths):
        bucket = np.fromfile(path, blocks.dtype).reshape(-1, width)
        yield bucket[np.random.default_rng([seed, number]).permutation(len(bucket))]
        path.unlink()


def _throw(blocks: np.ndarray, paths: list[Path], seed: int, rows: int) -> None:
    """Append each block to the file of a bucket drawn at random, `rows` blocks at a time."""
    generator = np.random.default_rng([seed, len(paths), 1])
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for start in range(0, len(blocks), rows):
            part = blocks[start : start + rows]
            drawn = generator.integers(len(paths), size=len(part))
            for number, file in enumerate(files):
                file.write(part[drawn == number].tobytes())
