"""The one writer of folders for others: `final/` of a run, and every export.

Weights and configuration, and beside them what other programs look for: a tokenizer under a class name that older
transformers and vLLM know, with its end, padding and length; the generation configuration; a model card. Modes of files
follow the umask, whatever wrote them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from model.config import MoRConfig
from model.depth import method_of
from model.flops import gates_of

CARD = "README.md"
_HEADER = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [mixture-of-recursions]\n---\n"
TABLE = "| fact | value |\n|---|---|\n"


def write_folder(
    model: PreTrainedModel, output: Path, tokenizer: Path | None = None, card: str = "", **options: Any
) -> None:
    """Write `model` into `output`. tokenizer: a tokenizer.json; card: text of the model card; options: of
    `save_pretrained`."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=_padding(model.config),
        bos_token_id=model.config.bos_token_id,
    )
    model.save_pretrained(output, **options)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, output, model.config)
    (output / CARD).write_text(card or model_card(model), encoding="utf-8")
    set_modes(output)


def _padding(config: Any) -> int | None:
    """The padding token; without one of its own the token that ends a text, which is masked wherever it pads."""
    if config.pad_token_id is not None or config.eos_token_id is None:
        return config.pad_token_id
    return config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]


def _write_tokenizer(file: Path, output: Path, config: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), model_max_length=config.max_position_embeddings, clean_up_tokenization_spaces=False
    )
    eos = config.eos_token_id if isinstance(config.eos_token_id, int) or config.eos_token_id is None else None
    special = {"eos_token": eos, "pad_token": _padding(config), "bos_token": config.bos_token_id}
    described = file.with_name("tokenizer_config.json")
    before = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    for name, token in special.items():
        text = tokenizer.convert_ids_to_tokens(token) if token is not None else before.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None:
            setattr(tokenizer, name, text)
    if before.get("chat_template"):
        tokenizer.chat_template = before["chat_template"]
    tokenizer.save_pretrained(output)
    # transformers 5 writes a class name of its own, which earlier ones and vLLM do not know.
    written = output / "tokenizer_config.json"
    values = json.loads(written.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "local_files_only"):
        values.pop(name, None)
    written.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def set_modes(folder: Path) -> None:
    """Modes of a folder and all in it as this process would give them to new files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def model_card(model: PreTrainedModel, facts: Mapping[str, Any] | None = None, before: str = "") -> str:
    """Text of a model card. facts: of the run; before: the card of what this was made from, whose facts stay."""
    config = model.config
    kind = getattr(config, "architecture", None) or f"{config.model_type} with {config.num_hidden_layers} layers"
    own = {"architecture": kind, "parameters": f"{model.num_parameters():,}", **_how_it_decides(config)}
    own |= {"context": f"{config.max_position_embeddings} tokens", "precision of the weights": str(model.dtype)[6:]}
    shown = "".join(f"| {name} | {value} |\n" for name, value in own.items())
    kept = "".join(line + "\n" for line in before.splitlines() if line.startswith("| run: "))
    run = "".join(f"| run: {name} | {value} |\n" for name, value in (facts or {}).items()) or kept
    needs = "" if config.model_type == "llama" else "Needs the code that trained it, or a folder exported with it. "
    text = f"{needs}Pretrained on text alone: it continues texts and follows no instructions."
    return f"{_HEADER}\n# {kind}\n\n{text}\n\n{TABLE}{shown}{run}"


def _how_it_decides(config: Any) -> dict[str, str]:
    """Whether the model generates as it was measured: without looking at tokens to come."""
    if not isinstance(config, MoRConfig) or not gates_of(config):
        return {"causal": "yes: every token passes the same layers"}
    looks_ahead = method_of(config).refuses(config, "causal") is not None
    return {
        "causal": "no: which tokens recurse is decided with tokens to come in sight"
        if looks_ahead
        else "yes: each token's depth is decided from what came before it"
    }
