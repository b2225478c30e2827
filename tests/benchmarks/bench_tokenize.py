"""Tokens per second of the tokenizing stage against `tokenizers.encode_batch` alone, on the same cores.

    python tests/benchmarks/bench_tokenize.py [--documents 60000] [--rounds 5]

The two alternate, so that a machine that is busy or hot slows both. encode_batch gets what it is fastest with: all
texts in memory and the library's own threads. The stage also reads the spilled documents, adds end-of-text tokens,
and writes the tokens to disk in order; it is one part, done by a thread for each core. Exit code 1 if the median ratio
is below 0.85.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tokenizers import Tokenizer

from data_prep.config import TokenizerSettings
from data_prep.documents import SPAN
from data_prep.encode import Encoder, EncoderFiles, encode
from data_prep.synthetic import synthetic_documents
from data_prep.tokenizer import train_tokenizer

FLOOR = 0.85


def spill(texts: list[str], folder: Path) -> tuple[EncoderFiles, np.ndarray]:
    """Write what the stage reads: documents and a tokenizer of 4,096 tokens; return with it the documents' places."""
    raw = [text.encode() for text in texts]
    spans = np.zeros(len(raw), SPAN)
    spans["length"] = [len(text) for text in raw]
    spans["offset"] = np.cumsum(spans["length"]) - spans["length"]
    (folder / "documents.bin").write_bytes(b"".join(raw))
    train_tokenizer(texts, TokenizerSettings(vocab_size=4096)).save(str(folder / "tokenizer.json"))
    return EncoderFiles(folder / "tokenizer.json", folder / "documents.bin", eos_token_id=0, dtype="<u2"), spans


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    texts = [f"{n} {text}" for n, text in enumerate(synthetic_documents(options.documents, seed=0))]
    print(f"{cores} cores, {sum(map(len, texts)) / 1e6:.1f} MB of text; tokens/s")
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, spans = spill(texts, folder)
        for number in range(options.rounds):
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            tokenizer = Tokenizer.from_file(str(files.tokenizer))
            started = time.perf_counter()
            count = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
            alone = count / (time.perf_counter() - started)
            started = time.perf_counter()
            result = encode(spans, Encoder(files), folder / "train.tokens", cores)
            stage = result["tokens"] / (time.perf_counter() - started)
            ratios.append(stage / alone)
            print(f"round {number + 1}: encode_batch {alone:,.0f}, stage {stage:,.0f}, ratio {ratios[-1]:.2f}")
    median = statistics.median(ratios)
    print(f"median ratio {median:.2f} (floor {FLOOR})")
    return 0 if median >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
