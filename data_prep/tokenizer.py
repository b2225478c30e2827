"""Train a byte-level BPE or load a given tokenizer; the form of it that encodes text."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.config import TokenizerSettings
from data_prep.progress import say
from data_prep.settings import UserError

# The trainer's time is quadratic in the length of what its pre-tokenizer leaves whole: letters, digits, other signs or
# white space in a row. Of longer runs (proteins, rulers of dashes) it is given pieces.
LONGEST_RUN = 256
PIECE = 32
_UNBROKEN = re.compile(rf"\S{{{LONGEST_RUN + 1},}}|\s{{{LONGEST_RUN + 1},}}")
_CLASSES = (r"[^\W\d_]", r"\d", r"[^\w\s]|_", r"\s")
_LONG_RUNS = re.compile("|".join(rf"(?:{part}){{{LONGEST_RUN + 1},}}" for part in _CLASSES))
# Stands for the end-of-text token in the vocabulary that encodes; a normalised text does not spell it.
_UNSPELLABLE = "\ufdd0end of text\ufdd0"


def shortened(text: str) -> list[str]:
    """`text` for the trainer, its runs of more than LONGEST_RUN characters in pieces; one part if there are none."""
    parts, start = [], 0
    for unbroken in _UNBROKEN.finditer(text):
        for run in _LONG_RUNS.finditer(text, *unbroken.span()):
            parts.append(text[start : run.start()])
            parts += (text[n : min(n + PIECE, run.end())] for n in range(*run.span(), PIECE))
            start = run.end()
    parts.append(text[start:])
    return parts


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Train on the given texts; the same for the same texts in the same order.

    Runs of more than LONGEST_RUN characters are given in pieces. Raises UserError when the text is too short
    for `vocab_size`.
    """
    assert settings.vocab_size is not None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[AddedToken(settings.eos_token, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    cut = 0

    def read() -> Iterator[str]:
        nonlocal cut
        for text in texts:
            parts = shortened(text)
            cut += len(parts) > 1
            yield from parts

    tokenizer.train_from_iterator(read(), trainer)
    if cut:
        say(
            f"train tokenizer: words of more than {LONGEST_RUN} characters, in {cut} documents, were learned from in "
            f"pieces of {PIECE}, for the trainer's time is quadratic in their length; they are encoded whole"
        )
    size = tokenizer.get_vocab_size()
    if size != settings.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: the corpus yields only {size} tokens, {settings.vocab_size} were asked for; "
            f"set tokenizer.vocab_size={size} or give more text"
        )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by the path of its tokenizer.json or of a folder that holds one, or by its name on the hub.

    Dropout, by which a model spells a text differently each time, is taken out.
    """
    path = Path(name)
    try:
        if path.is_dir() or name.endswith(".json") or path.is_file():
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        reason = str(error).strip().split("\n")[0]
        if path.is_dir() and not (path / "tokenizer.json").exists():
            reason = "no tokenizer.json in this folder; save the tokenizer there with save_pretrained"
        raise UserError(f"tokenizer.load: {name}: cannot be loaded: {reason}") from error
    content = json.loads(tokenizer.to_str())
    if not content["model"].get("dropout"):
        return tokenizer
    content["model"]["dropout"] = None
    return Tokenizer.from_str(json.dumps(content))


def eos_token_of(settings: TokenizerSettings) -> str:
    """The token that ends documents: as set, or what the folder of a loaded tokenizer says, or the default."""
    config = Path(settings.load or "", "tokenizer_config.json")
    if settings.load is None or "eos_token" in settings.model_fields_set or not config.is_file():
        return settings.eos_token
    try:
        stated = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{config}: cannot be read: {error}") from None
    stated = stated.get("content") if isinstance(stated, dict) else stated
    return stated if isinstance(stated, str) and stated else settings.eos_token


def given_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer that the settings load. Raises UserError where it cannot end documents unmistakably."""
    assert settings.load is not None
    tokenizer = load_tokenizer(settings.load)
    encoding_form(tokenizer, end_of_text_id(tokenizer, eos_token_of(settings)), f"tokenizer.load: {settings.load}")
    return tokenizer


def encoding_form(tokenizer: Tokenizer, eos_token_id: int, where: str = "tokenizer") -> Tokenizer:
    """The tokenizer with which text is encoded: equal to `tokenizer`, but no text spells its end-of-text token.

    A text may hold the token's name. Special added tokens are not looked for in text; an added token that is not
    special, or a vocabulary that holds the name, would still yield the id. Both are taken out here.
    Raises UserError where unknown text becomes end-of-text.
    """
    content = json.loads(tokenizer.to_str())
    name = str(tokenizer.id_to_token(eos_token_id))
    for added in content["added_tokens"]:
        if added["id"] == eos_token_id:
            added |= {"content": _UNSPELLABLE, "special": True}
    if unknown_id(tokenizer) == eos_token_id:
        raise UserError(
            f"{where}: {name!r} ends documents and stands for unknown text too, so that a document would seem to end "
            "at each unknown character; set tokenizer.eos_token to another token"
        )
    model = content["model"]
    if isinstance(model["vocab"], dict):
        _rename(model, name)
    else:
        model["vocab"] = [[_UNSPELLABLE if piece == name else piece, score] for piece, score in model["vocab"]]
    content["post_processor"] = None  # it may name the token, and what it adds is not asked for
    form = Tokenizer.from_str(json.dumps(content))
    # Text that spells a special token stays text.
    form.encode_special_tokens = True
    form.no_truncation()
    form.no_padding()
    return form


def _rename(model: dict[str, Any], name: str) -> None:
    """Take `name` out of a vocabulary by name, and with it the merges that lead to it or on from it."""
    identifier = model["vocab"].pop(name, None)
    if identifier is None:
        return
    model["vocab"][_UNSPELLABLE] = identifier
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        suffix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            pair for pair in pairs if name not in (*pair, pair[0] + pair[1], pair[0] + pair[1].removeprefix(suffix))
        ]


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id that stands for text outside the vocabulary; None where the tokenizer can spell everything."""
    model = json.loads(tokenizer.to_str())["model"]
    if "unk_id" in model:
        return model["unk_id"]
    return None if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])


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
