"""Documents -> one stream of tokens per split, an end-of-text token after each document.

Processes encode batches of documents; results are written in the order of the documents, so that the number of
processes changes nothing. Every process runs the tokenizer on one thread: the processes are the parallelism.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.documents import SPAN
from data_prep.files import sync, write_json
from data_prep.progress import progress_bar
from data_prep.settings import UserError
from data_prep.tokenizer import encoding_form

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1 << 14
POOL_BYTES = 4 << 20  # less text than this is encoded sooner than processes start
SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class EncoderFiles:
    """What an encoder opens: the tokenizer, the spilled text, and how tokens are written."""

    tokenizer: Path
    texts: Path
    eos_token_id: int
    dtype: str
    unknown_id: int | None = None


class Encoder:
    """Encodes documents of one spilled text file, on one thread."""

    def __init__(self, files: EncoderFiles) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.files = files
        self.texts = np.memmap(files.texts, np.uint8, "r")
        # The only end-of-text tokens are those written here.
        self.tokenizer = encoding_form(Tokenizer.from_file(str(files.tokenizer)), files.eos_token_id)

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


_encoder: Encoder | None = None  # of a worker process


def _start_worker(files: EncoderFiles) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    _encoder = Encoder(files)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)  # a killed parent must not leave workers that wait for ever

    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back, for this process and for workers that start meanwhile, so that none is left half started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode_in_worker(spans: np.ndarray) -> np.ndarray:
    assert _encoder is not None
    return _encoder(spans)


def batches(spans: np.ndarray) -> Iterator[np.ndarray]:
    """Cut [documents] of SPAN into runs of about BATCH_BYTES of text; a longer document is a batch of its own."""
    start = 0
    while start < len(spans):
        window = spans[start : start + BATCH_DOCUMENTS]
        count = max(1, int(np.searchsorted(np.cumsum(window["length"]), BATCH_BYTES, side="right")))
        yield np.array(window[:count])
        start += count


def encoded(spans: np.ndarray, files: EncoderFiles, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (spans, tokens) of each batch in order. At most three batches for each worker are under way."""
    if workers == 1 or spans["length"].sum() <= POOL_BYTES:
        encoder = Encoder(files)
        yield from ((batch, encoder(batch)) for batch in batches(spans))
        return
    # spawn: a forked child of a process whose tokenizer has run threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (files,))
    pending: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
    try:
        for batch in batches(spans):
            with _interrupts_wait():  # a submission may start a worker
                pending.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(pending) >= 3 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_split(spans_file: Path, files: EncoderFiles, output: Path, workers: int) -> dict[str, float]:
    """Write the tokens of a split to `output`; continue where an interrupted call was.

    Returns tokens and unknown (tokens that stand for text outside the vocabulary) in the file, and of this call
    new_tokens and seconds.
    """
    spans = np.memmap(spans_file, SPAN, "r")
    mark = output.with_suffix(".json")
    state = json.loads(mark.read_text()) if mark.exists() else {"documents": 0, "tokens": 0, "unknown": 0}
    before = state["tokens"]
    itemsize = np.dtype(files.dtype).itemsize
    started = saved = time.perf_counter()
    rest = spans[state["documents"] :]
    with (
        output.open("r+b" if mark.exists() else "wb") as file,
        progress_bar(f"tokenize {output.stem}", float(spans["length"].sum()), "bytes") as advance,
    ):
        file.truncate(before * itemsize)  # what was written after the mark may be partial
        file.seek(before * itemsize)
        advance(float(spans["length"][: state["documents"]].sum()))
        for batch, tokens in encoded(rest, files, workers):
            file.write(tokens.tobytes())
            unknown = 0 if files.unknown_id is None else int((tokens == files.unknown_id).sum())
            state = {
                "documents": state["documents"] + len(batch),
                "tokens": state["tokens"] + len(tokens),
                "unknown": state["unknown"] + unknown,
            }
            advance(float(batch["length"].sum()))
            if time.perf_counter() - saved > SAVE_SECONDS:
                sync(file)
                write_json(mark, state)
                saved = time.perf_counter()
        sync(file)
    write_json(mark, state)
    return {
        "tokens": state["tokens"],
        "unknown": state["unknown"],
        "new_tokens": state["tokens"] - before,
        "seconds": time.perf_counter() - started,
    }
