"""Tokenizers: trained ones are deterministic and lossless, given ones are loaded, mistakes are named."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep.config import TokenizerSettings
from data_prep.documents import SPAN
from data_prep.settings import UserError
from data_prep.synthetic import synthetic_documents
from data_prep.tokenizer import end_of_text_id, load_tokenizer, token_dtype, train_tokenizer


def corpus(texts):
    raw = [text.encode() for text in texts]
    spans = np.zeros(len(raw), SPAN)
    spans["length"] = [len(text) for text in raw]
    spans["offset"] = np.cumsum(spans["length"]) - spans["length"]
    return np.frombuffer(b"".join(raw), np.uint8), spans


def trained(texts, **keys) -> Tokenizer:
    return train_tokenizer(*corpus(texts), TokenizerSettings(**keys))


TEXTS = list(synthetic_documents(40, seed=0))


def test_training_is_deterministic_and_loses_nothing():
    one, two = (trained(TEXTS, vocab_size=400) for _ in range(2))
    assert one.to_str() == two.to_str()
    assert one.get_vocab_size() == 400
    text = "Ünïcödé, 語, \t tabs and  blanks\n\n" + TEXTS[0]
    assert one.decode(one.encode(text).ids) == text
    assert end_of_text_id(one, "<|endoftext|>") == 0


def test_training_reads_a_spread_sample_of_the_asked_size():
    texts = ["aa " * 100] * 10 + ["zz " * 100] * 10
    # 20 documents of 300 bytes, 600 allowed: documents 0 and 10, so both halves are seen.
    tokenizer = trained(texts, vocab_size=261, train_bytes=600)
    assert {"aa", "zz"} <= set(tokenizer.get_vocab())


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(UserError, match=r"tokenizer.vocab_size: the corpus yields only \d+ tokens, 1000 were asked"):
        trained(["few words"], vocab_size=1000)


def test_a_given_tokenizer_is_loaded_and_its_end_of_text_found(tmp_path):
    path = tmp_path / "tokenizer.json"
    trained(TEXTS, vocab_size=300, eos_token="</s>").save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert end_of_text_id(tokenizer, "</s>") == 0
    with pytest.raises(UserError, match=r"tokenizer.eos_token: '<eos>' is not in the vocabulary; special tokens: </s>"):
        end_of_text_id(tokenizer, "<eos>")


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(UserError, match=f"tokenizer.load: .*{name}: cannot be loaded"):
            load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either vocab_size .* or load"),
        ({"vocab_size": 300, "load": "x.json"}, "either vocab_size .* or load"),
        ({"load": "x.json", "train_bytes": 5}, "train_bytes: no meaning"),
    ],
)
def test_settings_that_contradict_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        TokenizerSettings(**keys)


def test_tokens_take_two_bytes_where_they_can():
    assert (token_dtype(1 << 16), token_dtype((1 << 16) + 1)) == (np.dtype("<u2"), np.dtype("<u4"))
