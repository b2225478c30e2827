"""Documents of one part -> one stream of tokens per split, an end-of-text token after each document.

Threads encode batches of documents; the tokens are written in the order of the documents, so that the number of threads
changes nothing. Every call runs the tokenizer on one thread: tasks, or these threads, are the parallelism.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep.files import atomic
from data_prep.settings import UserError
from data_prep.tokenizer import encoding_form

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1 << 14


@dataclass(frozen=True)
class EncoderFiles:
    """What an encoder opens: the tokenizer, the spilled text, and how tokens are written."""

    tokenizer: Path
    texts: Path
    eos_token_id: int
    dtype: str
    unknown_id: int | None = None


class Encoder:
    """Encodes documents of one spilled text file, on the thread that calls it."""

    def __init__(self, files: EncoderFiles, form: Tokenizer | None = None) -> None:
        """form: of the tokenizer, as it encodes, where another encoder has it already."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.files = files
        self.texts = np.memmap(files.texts, np.uint8, "r") if files.texts.stat().st_size else np.zeros(0, np.uint8)
        # The only end-of-text tokens are those written here.
        self.tokenizer = form or encoding_form(Tokenizer.from_file(str(files.tokenizer)), files.eos_token_id)

    def __call__(self, spans: np.ndarray) -> np.ndarray:
        """Tokens of the documents at `spans` ([documents] of SPAN), each ended by end-of-text: [tokens]."""
        texts = [self.texts[offset : offset + length].tobytes().decode() for offset, length in spans.tolist()]
        tokens: list[int] = []
        for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            tokens += encoding.ids
            tokens.append(self.files.eos_token_id)
        result = np.array(tokens, self.files.dtype)
        ends = int((result == self.files.eos_token_id).sum())
        if ends != len(texts):
            raise UserError(
                f"{self.files.tokenizer}: text is encoded as the end-of-text token (id {self.files.eos_token_id}): "
                f"{ends - len(texts)} times among {len(texts)} documents; set tokenizer.eos_token to another token"
            )
        return result


def batches(spans: np.ndarray) -> Iterator[np.ndarray]:
    """Cut [documents] of SPAN into runs of about BATCH_BYTES of text; a longer document is a batch of its own."""
    start = 0
    while start < len(spans):
        window = spans[start : start + BATCH_DOCUMENTS]
        count = max(1, int(np.searchsorted(np.cumsum(window["length"]), BATCH_BYTES, side="right")))
        yield np.array(window[:count])
        start += count


def encoded(spans: np.ndarray, encoder: Encoder, threads: int) -> Generator[np.ndarray]:
    """Yield the tokens of each batch in order. At most three batches for each thread are under way.

    To be closed by who leaves early: closing waits for threads, which a collector of garbage must never do.
    """
    if threads == 1:
        yield from (encoder(batch) for batch in batches(spans))
        return
    pending: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches(spans):
                pending.append(pool.submit(encoder, batch))
                if len(pending) >= 3 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def encode(spans: np.ndarray, encoder: Encoder, output: Path, threads: int = 1) -> dict[str, Any]:
    """Write the tokens of the documents at `spans` to `output`, which appears whole.

    Returns tokens; unknown, how many of them stand for text outside the vocabulary; and lengths, how many documents
    have 1, 2 to 3, 4 to 7, ... tokens, end-of-text included.
    """
    tokens = unknown = 0
    lengths = np.zeros(0, np.int64)
    with atomic(output) as file, closing(encoded(spans, encoder, threads)) as parts:
        for batch in parts:
            file.write(batch.tobytes())
            tokens += len(batch)
            ends = np.flatnonzero(batch == encoder.files.eos_token_id)
            powers = np.frexp(np.diff(ends, prepend=-1))[1] - 1
            lengths = added(lengths, np.bincount(powers))
            if encoder.files.unknown_id is not None:
                unknown += int((batch == encoder.files.unknown_id).sum())
    return {"tokens": tokens, "unknown": unknown, "lengths": lengths.tolist()}


def added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two histograms, of which one may be longer."""
    size = max(len(one), len(other))
    return np.pad(one, (0, size - len(one))) + np.pad(other, (0, size - len(other)))
