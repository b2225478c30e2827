"""Encoding: the order of documents survives any number of processes, interruptions, and text that looks special."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import encode
from data_prep.config import TokenizerSettings
from data_prep.documents import SPAN
from data_prep.encode import EncoderFiles, batches, encode_split
from data_prep.synthetic import synthetic_documents
from data_prep.tokenizer import train_tokenizer

TEXTS = [*synthetic_documents(60, seed=1), "a text with <|endoftext|> in it", "x" * 5000]


@pytest.fixture
def spilled(tmp_path, monkeypatch):
    """Documents and a tokenizer on disk; small batches, so that there are many, and a pool for any amount of text."""
    monkeypatch.setattr(encode, "BATCH_BYTES", 2000)
    monkeypatch.setattr(encode, "POOL_BYTES", 0)
    raw = [text.encode() for text in TEXTS]
    spans = np.zeros(len(raw), SPAN)
    spans["length"] = [len(text) for text in raw]
    spans["offset"] = np.cumsum(spans["length"]) - spans["length"]
    (tmp_path / "documents.bin").write_bytes(b"".join(raw))
    (tmp_path / "train.spans").write_bytes(spans.tobytes())
    texts = np.frombuffer(b"".join(raw), np.uint8)
    tokenizer = train_tokenizer(texts, spans, TokenizerSettings(vocab_size=400))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def run(folder, name, workers=1):
    files = EncoderFiles(folder / "tokenizer.json", folder / "documents.bin", eos_token_id=0, dtype="<u2")
    result = encode_split(folder / "train.spans", files, folder / name, workers)
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
    assert result["tokens"] == result["new_tokens"] == len(tokens)


def test_two_processes_write_what_one_writes(spilled):
    assert np.array_equal(run(spilled, "one.tokens")[1], run(spilled, "two.tokens", workers=2)[1])


def test_an_interrupted_encoding_continues_where_it_was(spilled, monkeypatch):
    _, whole = run(spilled, "whole.tokens")
    monkeypatch.setattr(encode, "SAVE_SECONDS", 0.0)
    original, calls = encode.Encoder.__call__, []

    def dies(self, spans):
        calls.append(len(spans))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, spans)

    with monkeypatch.context() as patch:
        patch.setattr(encode.Encoder, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            run(spilled, "train.tokens")
    mark = json.loads((spilled / "train.json").read_text())
    assert mark["documents"] == sum(calls[:7])
    with (spilled / "train.tokens").open("ab") as file:
        file.write(b"half")  # written after the mark
    result, tokens = run(spilled, "train.tokens")
    assert result["new_tokens"] == len(whole) - mark["tokens"] > 0
    assert np.array_equal(tokens, whole)
