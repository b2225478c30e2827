"""Text on either side of the engine: loading a checkpoint with its tokenizer, and tokens back to text as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.modeling import MoRForCausalLM


def load_checkpoint(
    folder: str | Path, dtype: str = "auto", device: str | None = None
) -> tuple[MoRForCausalLM, Tokenizer]:
    """Model and tokenizer of a `from_pretrained` folder that holds `tokenizer.json` too.

    dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`. device: None takes an accelerator if there is one.
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
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"checkpoint: {folder} holds no tokenizer.json; copy it from the prepared data of its training"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoRForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return model, tokenizer


def end_of_text(model: MoRForCausalLM) -> list[list[int]]:
    """The tokens that end a text, as stop sequences."""
    eos = model.config.eos_token_id
    return [] if eos is None else [[token] for token in ([eos] if isinstance(eos, int) else eos)]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; one that ends within a character adds nothing, the one that completes it all."""
    parts, shown = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
        complete = end == len(ids) or not text.endswith("\ufffd")
        parts.append(text[shown:] if complete else "")
        shown = len(text) if complete else shown
    return parts


class TextStream:
    """Text of a growing token sequence: whole characters alone, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.ids: list[int] = []
        self.shown = ""
        self.stopped = False

    def feed(self, ids: Sequence[int], last: bool) -> str:
        """Take in tokens; returns the text that they make safe to show. `stopped` tells that a stop string came."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            text = text.rstrip("\ufffd")
            starts = (text.endswith(stop[:n]) * n for stop in self.stop for n in range(1, len(stop)))
            text = text[: len(text) - max(starts, default=0)]
        fresh, self.shown = text[len(self.shown) :], max(text, self.shown, key=len)
        return fresh
