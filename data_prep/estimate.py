"""Disk and memory that a preparation will need at most, told before it starts, and refused where they are not there.

From the bytes of text in the corpus (exact for plain files and parquet, guessed for compressed ones): what the stages
keep at the same time, in the worst moment of each. Held against measured peaks in tests/benchmarks/RESULTS.md.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_prep import documents, shuffle
from data_prep.config import DataSettings
from data_prep.parts import Part, size_of
from data_prep.settings import UserError

GB = 1e9
TOLD = 100e6  # bytes of text; the needs of a smaller corpus are not told
BASE = 200e6  # memory of a process: Python, numpy, Arrow, tokenizers
INDEX = 0.02  # bytes of index for a byte of text, in documents of 2 kB
LARGE_VOCABULARY = 16_384
ROW_MEMORY = 130  # bytes for a document whose digest is being sorted


@dataclass(frozen=True)
class Needs:
    """text and tokens: of the corpus. disk: bytes at the worst moment, finished shards included. memory: of a task."""

    text: float
    tokens: float
    disk: float
    memory: float

    def line(self) -> str:
        return (
            f"about {self.text / GB:,.1f} GB of text, {self.tokens / 1e9:,.2f} billion tokens: at most "
            f"{self.disk / GB:,.1f} GB of disk and {self.memory / GB:,.2f} GB of memory a task"
        )


def needs(settings: DataSettings, text: float, parts: int, vocab_size: int) -> Needs:
    """What a corpus of `text` bytes in `parts` parts needs."""
    large = vocab_size >= LARGE_VOCABULARY
    tokens = text / (4.0 if large else 2.5)
    stored = tokens * (2 if vocab_size <= 1 << 16 else 4)
    spilled = text * (1 + INDEX)
    # Read and encode: the text, part by part replaced by its tokens; shuffle: scattered blocks beside the shards.
    disk = max(spilled + stored / max(parts, 1), 2.1 * stored)
    bucket, shard = min(shuffle.BUCKET_BYTES, stored), min(settings.shard_bytes, stored)
    rows = min(documents.RANGE_ROWS, text / 500)
    trained = 0.0 if settings.tokenizer.load else min(settings.tokenizer.train_bytes, text)
    memory = BASE + max(
        bucket + 2 * max(bucket, shard), rows * ROW_MEMORY, 8 * min(settings.max_document_bytes, text), trained
    )
    return Needs(text, tokens, disk, memory)


def check_room(settings: DataSettings, parts: list[Part], vocab_size: int, workers: int | None) -> str | None:
    """A line that tells the needs of a corpus that is not small. Raises UserError where disk or memory lack.

    workers: tasks on this machine; None where the tasks run elsewhere.
    """
    text = sum(map(size_of, parts))
    if not text:
        return "the size of this corpus is not known beforehand: whether the disk suffices is not checked"
    need, folder = needs(settings, text, len(parts), vocab_size), Path(settings.folder)
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if need.disk > free:
        raise UserError(
            f"{folder}: {need.line()}; {free / GB:,.1f} GB are free on its disk: choose another folder, free some "
            "space or take fewer files (source.paths)"
        )
    if workers is not None:
        available = psutil.virtual_memory().available
        tasks = min(workers, len(parts))
        if need.memory * tasks > available:
            fit = int(available // need.memory)
            change = f"set workers={fit}" if fit else "set smaller shard_bytes or tokenizer.train_bytes"
            raise UserError(
                f"{folder}: {need.line()}, {need.memory * tasks / GB:,.1f} GB for {tasks}; {available / GB:,.1f} GB "
                f"are free: {change}"
            )
    return need.line() if text >= TOLD else None
