"""Text on either side of the engine: loading a checkpoint with its tokenizer, and tokens back to text as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import hardware
from model.config import MoRConfig
from model.modeling import MoRForCausalLM


def load_checkpoint(
    folder: str | Path, dtype: str = "auto", device: str | None = None
) -> tuple[MoRForCausalLM, Tokenizer]:
    """Model and tokenizer of a `from_pretrained` folder that holds `tokenizer.json` too.

    dtype: `auto` (as saved, but fp32 for 16 bits that the device does not multiply in hardware), `float32`, `bfloat16`
    or `float16`. device: None takes an accelerator if there is one.
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
    place = hardware.device_here() if device is None else torch.device(device)
    model = MoRForCausalLM.from_pretrained(folder, dtype=_dtype(folder, dtype, place)).to(place)
    return model, tokenizer


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
