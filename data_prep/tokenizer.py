"""Train a byte-level BPE or load a given tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.config import TokenizerSettings
from data_prep.progress import progress_bar
from data_prep.settings import UserError


def train_tokenizer(texts: np.ndarray, spans: np.ndarray, settings: TokenizerSettings) -> Tokenizer:
    """Train on documents spread evenly over the train split, up to `train_bytes` in all.

    texts: [bytes] uint8, may be a map of a file; spans: [documents] of SPAN. Deterministic for given documents.
    Raises UserError when the text is too short for `vocab_size`.
    """
    assert settings.vocab_size is not None
    total = int(spans["length"].sum())
    stride = max(1, -(-total // settings.train_bytes))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[AddedToken(settings.eos_token, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with progress_bar("train tokenizer", total // stride, "bytes") as advance:

        def read() -> Iterator[str]:
            for offset, length in spans[::stride].tolist():
                advance(length)
                yield texts[offset : offset + length].tobytes().decode()

        tokenizer.train_from_iterator(read(), trainer)
    size = tokenizer.get_vocab_size()
    if size != settings.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: the corpus yields only {size} tokens, {settings.vocab_size} were asked for; "
            f"set tokenizer.vocab_size={size} or give more text"
        )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer.json by its path, or a tokenizer by its name on the hub."""
    try:
        return Tokenizer.from_file(name) if name.endswith(".json") else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"tokenizer.load: {name}: cannot be loaded: {reason}") from error


def end_of_text_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of the token that ends documents. Raises UserError when it is not in the vocabulary."""
    identifier = tokenizer.token_to_id(token)
    if identifier is None:
        special = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
        near = difflib.get_close_matches(token, special, cutoff=0.4) or special
        raise UserError(f"tokenizer.eos_token: {token!r} is not in the vocabulary; special tokens: {', '.join(near)}")
    return int(identifier)


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
