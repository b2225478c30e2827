"""Global shuffle of fixed-size blocks over any number of tasks (legend: N blocks, W = sequence_length + 1 tokens).

Two rounds. `scatter` reads a chunk of the blocks in their order, draws one of B buckets for each, and writes the chunk
sorted by bucket. `Scattered.rows` puts a bucket together from all chunks and permutes it; its blocks follow those of
the bucket before. That is a uniformly random order of all blocks (Rao 1961, Sandelius 1962). Chunks and buckets are of
about BUCKET_BYTES, however large the corpus, and so is the memory of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.files import atomic

BUCKET_BYTES = 128 << 20
_PIECE = 8 << 20  # bytes that are copied at once


def cut_blocks(count: int, block_bytes: int) -> tuple[int, int]:
    """Number of buckets, and blocks of a chunk, for `count` blocks of `block_bytes`."""
    return max(1, -(-count * block_bytes // BUCKET_BYTES)), max(1, BUCKET_BYTES // block_bytes)


def scatter(blocks: np.ndarray, chunk: int, buckets: int, seed: int, target: Path) -> None:
    """Write one chunk, [blocks, W], sorted by buckets drawn at random, and beside it where each bucket begins.

    chunk: its number; the draw depends on it, on the seed and on the number of buckets.
    """
    drawn = np.random.default_rng([seed, buckets, chunk, 1]).integers(buckets, size=len(blocks))
    order = np.argsort(drawn, kind="stable")
    with atomic(_bounds(target)) as file:
        np.save(file, np.searchsorted(drawn[order], np.arange(buckets + 1)))
    rows = max(1, _PIECE // max(1, blocks[:1].nbytes))
    with atomic(target) as file:
        for start in range(0, len(blocks), rows):
            file.write(blocks[order[start : start + rows]].tobytes())


def _bounds(target: Path) -> Path:
    return target.with_suffix(".bounds.npy")


class Scattered:
    """The scattered chunks of one split."""

    def __init__(self, chunks: Sequence[Path], width: int, dtype: np.dtype, seed: int) -> None:
        self.chunks, self.width, self.dtype, self.seed = chunks, width, dtype, seed
        self._bounds = np.stack([np.load(_bounds(path)) for path in chunks])  # [chunks, buckets + 1]

    def first_rows(self) -> np.ndarray:
        """Place of each bucket's first block in the order of all, and the number of all: [buckets + 1]."""
        return np.concatenate([[0], np.diff(self._bounds, axis=1).sum(axis=0).cumsum()])

    def rows(self, bucket: int, first: int, last: int) -> np.ndarray:
        """Blocks `first` to `last` of a bucket in its random order: [last - first, W]."""
        counts = np.diff(self._bounds, axis=1)[:, bucket]
        place = np.empty(counts.sum(), np.int64)  # of each block, as the chunks hold them, in the random order
        place[np.random.default_rng([self.seed, bucket]).permutation(len(place))] = np.arange(len(place))
        found = np.empty((last - first, self.width), self.dtype)
        start = 0
        for path, count, bounds in zip(self.chunks, counts, self._bounds, strict=True):
            offset = int(bounds[bucket]) * self.width * self.dtype.itemsize
            blocks = np.fromfile(path, self.dtype, int(count) * self.width, offset=offset).reshape(-1, self.width)
            here = place[start : start + count]
            wanted = (here >= first) & (here < last)
            found[here[wanted] - first] = blocks[wanted]
            start += count
        return found
