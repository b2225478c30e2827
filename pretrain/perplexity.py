"""Perplexity of any text: `python -m pretrain.evaluate --checkpoint RUN --perplexity FILE [--depths] [--stride N]`.

A text file is one document, a line of .jsonl one document each, under `text`. Documents do not see each other; each is
scored whole, its first token given the token that ends a text, as the model was trained and as lm-evaluation-harness
does it. A document longer than the context passes in windows: each but the first scores its last `stride` tokens, and
those before them are context alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.table
import torch
from rich.console import Console

from data_prep.settings import UserError
from model.depth import method_of
from model.hardware import Precision, device_here
from model.inference.text import end_of_text
from pretrain.opened import has_causal_decision, open_checkpoint
from pretrain.precision import for_evaluation

if TYPE_CHECKING:
    from model.modeling import MoRForCausalLM


@dataclass
class Score:
    """Sums over texts. nats: of all tokens."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0

    def figures(self) -> dict[str, float | int]:
        """Loss in nats per token, perplexity per token and per word, bits per byte, and what they are means over."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "word_perplexity": math.exp(min(self.nats / max(1, self.words), 700.0)),
            "bits_per_byte": self.nats / self.bytes / math.log(2),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
        }


@dataclass(frozen=True)
class Window:
    """Tokens that pass together; the last `scored` of `ids` are predicted, each from those before it."""

    ids: Sequence[int]
    scored: int


@dataclass
class Documents:
    """Texts of a file, and their tokens."""

    texts: list[str]
    ids: list[list[int]] = field(default_factory=list)


def read_documents(path: Path) -> list[str]:
    """The documents of a file that are not empty. Raises UserError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--perplexity: {path} cannot be read as text: {error}") from None
    if path.suffix != ".jsonl":
        documents = [text]
    else:
        documents = [_text_of(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    documents = [document for document in documents if document]
    if not documents:
        raise UserError(f"--perplexity: {path} holds no text")
    return documents


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"--perplexity: {where}: no JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"--perplexity: {where}: expected an object with a text under `text`")
    return record["text"]


def windows(ids: Sequence[int], size: int, stride: int) -> Iterator[Window]:
    """Windows of at most `size` inputs over a document, ids[0] being given, that score every other token once."""
    done = min(size, len(ids) - 1)
    yield Window(ids[: done + 1], done)
    while done < len(ids) - 1:
        end = min(done + stride, len(ids) - 1)
        yield Window(ids[end - size : end + 1], end - done)
        done = end


@torch.no_grad()
def nats(model: MoRForCausalLM, batch: Sequence[Window], max_recursions: int | None, mode: str) -> list[float]:
    """Summed loss of each window's scored tokens. mode: of routing."""
    longest = max(len(window.ids) for window in batch) - 1
    rows = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, window in zip(rows, batch, strict=True):
        row[: len(window.ids) - 1] = torch.tensor(window.ids[:-1])
    # Padding stands behind, where nothing looks at it.
    output = model.model(
        rows.to(model.device), use_cache=False, max_recursions=max_recursions, routing_mode=mode, return_dict=True
    )
    sums = []
    for states, window in zip(output.last_hidden_state, batch, strict=True):
        end = len(window.ids) - 1
        targets = torch.tensor(window.ids[-window.scored :], device=model.device)
        sums.append(float(model.lm_head(states[end - window.scored : end], targets)))
    return sums


def score_texts(
    model: MoRForCausalLM,
    documents: Documents,
    *,
    stride: int,
    batch_size: int,
    mode: str,
    precision: Precision = "fp32",
    max_recursions: int | None = None,
) -> list[Score]:
    """The score of each document. batch_size: windows of one forward pass, 1 where routing looks ahead."""
    size, batch_size = model.config.max_position_embeddings, batch_size if mode == "causal" else 1
    listed = [(i, window) for i, ids in enumerate(documents.ids) for window in windows(ids, size, stride)]
    listed.sort(key=lambda item: len(item[1].ids))
    scores = [Score(0.0, 0, len(text.encode()), len(text.split())) for text in documents.texts]
    for begin in range(0, len(listed), batch_size):
        batch = listed[begin : begin + batch_size]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = nats(model, [window for _, window in batch], max_recursions, mode)
        for (i, window), value in zip(batch, found, strict=True):
            scores[i].nats += value
            scores[i].tokens += window.scored
    return scores


def total(scores: Sequence[Score]) -> Score:
    """Sums over documents."""
    parts = [(score.nats, score.tokens, score.bytes, score.words) for score in scores]
    return Score(*(sum(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


def tokenize(model: MoRForCausalLM, tokenizer: Any, texts: list[str]) -> Documents:
    """Each text's tokens behind the token that ends a text. Raises UserError where the model has none."""
    ends = end_of_text(model)
    if not ends:
        raise UserError(
            "--perplexity: this model has no token that ends a text, which a document's first token follows"
        )
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return Documents(texts, [[ends[0][0], *one.ids] for one in encoded])


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What `--perplexity` asks for: prints it, and writes it to --output, by default `perplexity.json` of the run."""
    texts = read_documents(given.perplexity)
    checkpoint = open_checkpoint(given.checkpoint.resolve())
    torch.nn.Module.to(checkpoint.model, device_here())
    model, config = checkpoint.model, checkpoint.model.config
    stride = given.stride or max(1, config.max_position_embeddings // 2)
    if stride > config.max_position_embeddings:
        raise UserError(f"--stride: {stride} is more than the context of {config.max_position_embeddings}")
    precision, sentence = for_evaluation(given.precision, checkpoint.trained_in, device_here())
    print(f"precision: {sentence}", flush=True)
    documents = tokenize(model, checkpoint.tokenizer.backend_tokenizer, texts[: given.limit])
    options: dict[str, Any] = {"stride": stride, "batch_size": given.batch_size, "precision": precision}
    options["mode"] = "causal" if has_causal_decision(config) else "topk"
    scores = score_texts(model, documents, **options)
    results: dict[str, Any] = {"checkpoint": str(given.checkpoint), "file": str(given.perplexity)}
    results |= {"window": config.max_position_embeddings, "stride": stride, "precision": precision}
    results |= {"routing_mode": options["mode"], "total": total(scores).figures()}
    results["documents"] = [score.figures() for score in scores]
    if given.depths:
        caps = range(1, method_of(config).levels(config) + 1)
        capped = [total(score_texts(model, documents, max_recursions=cap, **options)) for cap in caps]
        results["depths"] = [{"max_recursions": cap} | score.figures() for cap, score in zip(caps, capped, strict=True)]
    folder = checkpoint.run or checkpoint.folder
    output = given.output or folder / "perplexity.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results, Console())
    print(f"results: {output}")
    return results


def show(results: dict[str, Any], console: Console) -> None:
    """Losses as a table."""
    count = len(results["documents"])
    title = f"{results['file']}: {count} document{'s' * (count != 1)}"
    if results["routing_mode"] != "causal":
        title += "; top-k routing, which looks ahead"
    table = rich.table.Table("recursions", "loss", "perplexity", "bits per byte", "tokens", title=title)
    rows = [("as trained", results["total"])]
    rows += [(f"at most {depth['max_recursions']}", depth) for depth in results.get("depths", [])]
    for name, line in rows:
        figures = (f"{line[key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte"))
        table.add_row(name, *figures, str(line["tokens"]))
    console.print(table)
