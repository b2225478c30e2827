"""Tokens to text as they come: the same as decoding at once, each part once, in linear time; stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.inference.text import Decoder, StopFinder, TextStream, pieces, token_text
from tests.helpers.tiny import tiny_tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """As Llama's: words that begin with a mark for the space, bytes for the rest, the first space left out."""
    words = ["▁the", "▁sea", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


TOKENIZERS = {"bytes": byte_tokenizer(), "fallback": fallback_tokenizer()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_parts_add_up_to_the_whole(name, data):
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(max_size=40)).encode()
    if name == "bytes":
        ids = [*text, *data.draw(st.lists(st.integers(0, 255), max_size=60))]
    else:  # a run of bytes that is no text spoils what came before it in the run: of whole characters only
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text]
        ids += data.draw(st.lists(st.integers(0, 3), max_size=20))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=20)))
    decoder, parts = Decoder(tokenizer), []
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        parts.append(decoder.feed(ids[begin:end]))
    parts.append(decoder.feed([], last=True))
    assert "".join(parts) == tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("token", [0, 200], ids=["letters", "never a character"])
def test_time_is_linear_in_the_length(token):
    """Counted in tokens that are decoded."""

    class Counting:
        def __init__(self):
            self.decoded, self.inner = 0, byte_tokenizer()

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return self.inner.decode(ids, **options)

    counts = []
    for length in (500, 2000):
        tokenizer = Counting()
        stream = TextStream(tokenizer)  # type: ignore[arg-type]
        for _ in range(length):
            stream.feed([token], last=False)
        counts.append(tokenizer.decoded)
    assert counts[1] < 5 * counts[0]


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_the_stop_that_ends_first_counts_however_the_text_comes(text, stops, cuts):
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text[: sum(min(ends))] if ends else text
    ids = tiny_tokenizer().encode(text).ids
    stream, shown = TextStream(tiny_tokenizer(), stops), ""
    cuts = sorted(min(cut, len(ids)) for cut in cuts)
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        shown += stream.feed(ids[begin:end], end == len(ids))
    assert shown == stream.shown == expected and stream.stopped == bool(ends)


def test_a_stop_of_a_million_characters_costs_a_pass_over_it():
    finder = StopFinder("ab" * 500_000)
    assert [finder.feed(letter) for letter in "aababx"] == [False] * 6 and finder.held == 0


def test_texts_of_single_tokens_are_told_apart():
    tokenizer = byte_tokenizer()
    texts = [token_text(tokenizer, i) for i in range(tokenizer.get_vocab_size())]
    assert len(set(texts)) == len(texts) == 256
    assert texts[tokenizer.token_to_id("a")] == "a" and "bytes:\\xe2" in texts
    assert token_text(tokenizer, 999) == "token_id:999"
