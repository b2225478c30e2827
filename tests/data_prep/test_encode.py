"""Encoding: the order of documents survives any number of threads, and text that looks special."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import encode
from data_prep.config import TokenizerSettings
from data_prep.documents import SPAN
from data_prep.encode import Encoder, EncoderFiles, batches
from data_prep.synthetic import synthetic_documents
from data_prep.tokenizer import train_tokenizer

TEXTS = [*synthetic_documents(60, seed=1), "a text with <|endoftext|> in it", "x" * 5000]


@pytest.fixture
def spilled(tmp_path, monkeypatch):
    """Documents and a tokenizer on disk; small batches, so that there are many."""
    monkeypatch.setattr(encode, "BATCH_BYTES", 2000)
    raw = [text.encode() for text in TEXTS]
    spans = np.zeros(len(raw), SPAN)
    spans["length"] = [len(text) for text in raw]
    spans["offset"] = np.cumsum(spans["length"]) - spans["length"]
    (tmp_path / "documents.bin").write_bytes(b"".join(raw))
    (tmp_path / "train.spans").write_bytes(spans.tobytes())
    tokenizer = train_tokenizer(TEXTS, TokenizerSettings(vocab_size=400))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def run(folder, name, threads=1):
    files = EncoderFiles(folder / "tokenizer.json", folder / "documents.bin", eos_token_id=0, dtype="<u2")
    spans = np.fromfile(folder / "train.spans", SPAN)
    result = encode.encode(spans, Encoder(files), folder / name, threads)
    return result, np.fromfile(folder / name, "<u2")


def test_batches_hold_all_documents_in_order_and_keep_to_the_limit(spilled):
    spans = np.fromfile(spilled / "train.spans", SPAN)
    found = list(batches(spans))
    assert np.array_equal(np.concatenate(found), spans)
    assert len(found) > 10
    assert all(len(batch) == 1 or batch["length"].sum() <= 2000 for batch in found)


def test_each_document_is_followed_by_the_only_end_of_text_there_is(spilled):
    result, tokens = run(spilled, "train.tokens")
    tokenizer = Tokenizer.from_file(str(spilled / "tokenizer.json"))
    ends = np.flatnonzero(tokens == 0)
    documents = np.split(tokens, ends + 1)
    assert len(documents.pop()) == 0
    assert [tokenizer.decode(document[:-1].tolist()) for document in documents] == TEXTS
    assert (result["tokens"], result["unknown"]) == (len(tokens), 0)
    lengths = [len(document).bit_length() - 1 for document in documents]
    assert result["lengths"] == np.bincount(lengths).tolist()


def test_two_threads_write_what_one_writes(spilled):
    assert np.array_equal(run(spilled, "one.tokens")[1], run(spilled, "two.tokens", threads=2)[1])
