"""Text on either side of the engine: loading a checkpoint with its tokenizer, and tokens back to text as they come."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from model import hardware
from model.config import MoRConfig

if TYPE_CHECKING:
    from model.modeling import MoRForCausalLM


def load_checkpoint(
    folder: str | Path, dtype: str = "auto", device: str | None = None, tokenizer: str | Path | None = None
) -> tuple[MoRForCausalLM, Tokenizer]:
    """Model and tokenizer of a `from_pretrained` folder that holds `tokenizer.json` too.

    dtype: `auto` (as saved, but fp32 for 16 bits that the device does not multiply in hardware), `float32`, `bfloat16`
    or `float16`. device: None takes an accelerator if there is one.
    tokenizer: a tokenizer.json, or a folder with one, in place of the folder's.
    Raises ValueError that names what is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        inside = folder / "final"
        hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise ValueError(f"checkpoint: {folder} holds no config.json{hint}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {folder / 'config.json'} is no model configuration: {error}") from None
    if kind != "mor":
        raise ValueError(f"checkpoint: {folder} holds a model of type {kind!r}, not one of this project")
    file = Path(tokenizer) if tokenizer is not None else folder
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        name, advice = ("tokenizer", "name one") if tokenizer is not None else ("checkpoint", "give --tokenizer")
        raise ValueError(
            f"{name}: {file.parent} holds no {file.name}; {advice}, or copy it from the prepared data of its training"
        )
    try:
        read = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"tokenizer: {file} cannot be read: {error}") from None
    place = hardware.device_here() if device is None else torch.device(device)
    from model.modeling import MoRForCausalLM  # with all that a model brings: not before one is wanted

    model = MoRForCausalLM.from_pretrained(folder, dtype=_dtype(folder, dtype, place)).to(place)
    if read.get_vocab_size() > model.config.vocab_size:
        raise ValueError(f"tokenizer: {file} has {read.get_vocab_size()} tokens, the model {model.config.vocab_size}")
    return model, read


def _dtype(folder: Path, asked: str, device: torch.device) -> str | torch.dtype:
    """In what to load weights; says so where that is not as they were saved, or where what was asked for is slow."""
    if asked == "bfloat16":
        hardware.require_bf16(device)
        if not hardware.multiplies_bf16(device):
            print(f"warning: {hardware.describe(device)} multiplies no bf16: slow; --dtype float32", file=sys.stderr)
    if asked != "auto":
        return asked
    saved = MoRConfig.from_pretrained(folder).dtype
    if not isinstance(saved, torch.dtype):
        return "auto"
    loaded = hardware.loading_dtype(saved, device)
    if loaded != saved:
        where = hardware.describe(device)
        print(f"{folder}: saved in {saved}, loaded in {loaded}: {where} does not multiply it", file=sys.stderr)
    return loaded


def end_of_text(model: MoRForCausalLM) -> list[list[int]]:
    """The tokens that end a text, as stop sequences."""
    eos = model.config.eos_token_id
    return [] if eos is None else [[token] for token in ([eos] if isinstance(eos, int) else eos)]


class Decoder:
    """Text of a growing token sequence, in time linear in its length: only the last tokens are decoded anew.

    special: whether special tokens show.
    """

    KEPT = 6  # characters' ends kept before the undecided tokens: what a decoder does at a text's start stays away
    LONGEST = 32  # undecided tokens after which a cut is looked for; no character takes as many

    def __init__(self, tokenizer: Tokenizer, special: bool = False):
        self.tokenizer, self.special = tokenizer, special
        self.ids: list[int] = []
        self.ends: deque[int] = deque([0], maxlen=self.KEPT)  # places between tokens where a character ends
        self.cut_at = self.LONGEST

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not self.special)

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Take in tokens; returns the whole characters that they complete, and everything if they are the `last`."""
        parts = [self._feed(token) for token in ids]
        if last and self.ends[-1] < len(self.ids):
            first, end = self.ends[0], self.ends[-1]
            parts.append(self._decode(self.ids[first:])[len(self._decode(self.ids[first:end])) :])
            self._end(len(self.ids))
        return "".join(parts)

    def _feed(self, token: int) -> str:
        self.ids.append(token)
        first, end = self.ends[0], self.ends[-1]
        before, text = self._decode(self.ids[first:end]), self._decode(self.ids[first:])
        if text.endswith("\ufffd"):
            return self._cut(before) if len(self.ids) - end > self.cut_at else ""
        self._end(len(self.ids))
        return text[len(before) :]

    def _end(self, place: int) -> None:
        if place > self.ends[-1]:
            self.ends.append(place)
        self.cut_at = self.LONGEST

    def _cut(self, before: str) -> str:
        """What is decided of a long run of bytes that are no text, where a place between tokens splits it."""
        first, length = self.ends[0], len(self.ids)
        whole = self._decode(self.ids[first:])
        for place in range(length - 4, length - 12, -1):
            head = self._decode(self.ids[first:place])
            if head + self._decode(self.ids[place:]) == whole:
                self._end(place)
                return head[len(before) :]
        self.cut_at *= 2
        return ""


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; one that ends within a character adds nothing, the one that completes it all."""
    decoder = Decoder(tokenizer, special=True)
    return [decoder.feed([token], last=i == len(ids)) for i, token in enumerate(ids, 1)]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token alone, as a text that no other token has: `bytes:\\xe2` for a part of a character, as OpenAI has it."""
    text, name = tokenizer.decode([token], skip_special_tokens=False), tokenizer.id_to_token(token)
    if name is None:
        return f"token_id:{token}"
    if "\ufffd" not in text:
        return text
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if all(letter in alphabet for letter in name):
        return "bytes:" + "".join(f"\\x{alphabet[letter]:02x}" for letter in name)
    return name


def bytes_of(text: str) -> bytes:
    """UTF-8 of what `token_text` gives."""
    return bytes.fromhex(text[6:].replace("\\x", "")) if text.startswith("bytes:\\x") else text.encode()


class StopFinder:
    """Looks for one string in a text that comes in parts, each character once (Knuth, Morris, Pratt 1977).

    held: how many of the last characters may be the string's beginning.
    """

    def __init__(self, wanted: str):
        self.wanted, self.held = wanted, 0
        self.fallback = [0] * len(wanted)
        state = 0
        for i in range(1, len(wanted)):
            state = self._next(state, wanted[i])
            self.fallback[i] = state

    def _next(self, state: int, letter: str) -> int:
        while state and self.wanted[state] != letter:
            state = self.fallback[state - 1]
        return state + (self.wanted[state] == letter)

    def feed(self, letter: str) -> bool:
        """Whether the string ends with this character; to be asked no more once it has."""
        self.held = self._next(self.held, letter)
        return self.held == len(self.wanted)


class TextStream:
    """Text of a growing token sequence: whole characters alone, and nothing of a stop string.

    The stop string that ends first counts, and of two that end together the longer, however tokens come in.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.decoder, self.finders = Decoder(tokenizer), [StopFinder(text) for text in stop]
        self.parts: list[str] = []
        self.pending = ""
        self.stopped = False

    @property
    def ids(self) -> list[int]:
        """The tokens taken in."""
        return self.decoder.ids

    @property
    def shown(self) -> str:
        """The text that was safe to show so far."""
        return "".join(self.parts)

    def feed(self, ids: Sequence[int], last: bool) -> str:
        """Take in tokens; returns the text that they make safe to show. `stopped` tells that a stop string came."""
        if self.stopped:
            return ""
        text = self.decoder.feed(ids, last)
        for i, letter in enumerate(text if self.finders else "", 1):
            found = [len(finder.wanted) for finder in self.finders if finder.feed(letter)]
            if found:
                self.stopped = True
                text = self.pending + text[:i]
                return self._show(text[: len(text) - max(found)], "")
        text = self.pending + text
        held = 0 if last else max((finder.held for finder in self.finders), default=0)
        return self._show(text[: len(text) - held], text[len(text) - held :])

    def _show(self, text: str, pending: str) -> str:
        self.pending = pending
        self.parts.append(text)
        return text
