"""What a prepared folder holds, for a person to look at before a long run: tables in the terminal and one HTML page.

Documents as text from a position on; lengths of documents; shares of unknown and of repeated tokens; the documents that
occurred most often before duplicates were dropped. Of a mixture give all folders: a column for each.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer

from data_prep.documents import SPLITS
from data_prep.files import atomic
from data_prep.manifest import read_manifest
from data_prep.settings import UserError
from data_prep.stages import EXCERPT

MOST_FREQUENT = "most frequent documents, before duplicates were dropped"
SHOWN = 5  # blocks as text
SAMPLE = 1000  # blocks, spread over the split, from which repeated tokens are counted
# Control characters as pictures of them: a corpus has escape codes too, which a terminal would obey.
PICTURES = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Source:
    """One prepared folder. texts: (number of the block, its documents) of the blocks that are shown."""

    folder: Path
    manifest: dict[str, Any]
    texts: list[tuple[int, list[str]]]
    repeated: float  # share of tokens that equal the one before

    @property
    def unknown(self) -> float:
        tokens = sum(self.manifest["splits"][split]["tokens"] for split in SPLITS)
        return sum(self.manifest.get("unknown_tokens", {}).values()) / max(tokens, 1)

    @property
    def lengths(self) -> list[int]:
        return self.manifest.get("document_lengths", {}).get("train", [])


def read_blocks(folder: Path, manifest: dict[str, Any], numbers: np.ndarray) -> np.ndarray:
    """Train blocks by their numbers, ascending: [blocks, W]."""
    width, dtype = manifest["sequence_length"] + 1, np.dtype(manifest["token_dtype"]).newbyteorder("<")
    found, first = [np.zeros((0, width), dtype)], 0
    for shard in manifest["splits"]["train"]["shards"]:
        here = numbers[(numbers >= first) & (numbers < first + shard["samples"])] - first
        if len(here):
            path = folder / shard["name"]
            offsets = np.load(path.with_suffix(".idx.npy"))[here]
            rows = [np.fromfile(path, dtype, width, offset=int(offset)) for offset in offsets]
            found.append(np.stack(rows))
        first += shard["samples"]
    return np.concatenate(found)


def look(folder: Path, position: int) -> Source:
    """Read what is shown of a folder. Raises UserError where it is not prepared or holds no such position."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no manifest.json: not a prepared folder, or its preparation was not finished")
    samples = manifest["splits"]["train"]["samples"]
    if not 0 <= position < samples:
        raise UserError(f"--position={position}: {folder} has train blocks 0 to {samples - 1}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    numbers = np.arange(position, min(position + SHOWN, samples))
    texts = []
    for number, block in zip(numbers.tolist(), read_blocks(folder, manifest, numbers), strict=True):
        pieces = np.split(block, np.flatnonzero(block == manifest["eos_token_id"]) + 1)
        texts.append((number, [tokenizer.decode(piece.tolist()).translate(PICTURES) for piece in pieces if len(piece)]))
    sample = read_blocks(folder, manifest, np.unique(np.linspace(0, samples - 1, SAMPLE).astype(int)))
    return Source(folder, manifest, texts, float((sample[:, 1:] == sample[:, :-1]).mean()))


def facts(source: Source) -> dict[str, str]:
    """The rows of the first table."""
    manifest, documents = source.manifest, source.manifest["documents"]
    train, validation = (manifest["splits"][split] for split in SPLITS)
    read = sum(documents.get(key, 0) for key in (*SPLITS, "dropped_duplicate", "dropped_empty"))
    return {
        "corpus": f"{manifest['corpus']} ({manifest['licence']})",
        "documents": f"{documents.get('train', 0):,} train, {documents.get('validation', 0):,} validation",
        "tokens": f"{train['tokens']:,} train, {validation['tokens']:,} validation",
        "vocabulary": f"{manifest['vocab_size']:,}",
        "unknown tokens": f"{source.unknown:.4%}",
        "tokens equal to the one before": f"{source.repeated:.3%}",
        "exact duplicates, dropped": f"{documents.get('dropped_duplicate', 0) / max(read, 1):.2%} of the documents",
        "unigram loss": f"{manifest['unigram_loss']:.4f} nats per token",
    }


def histogram(source: Source) -> list[tuple[str, int, float]]:
    """Tokens of a document, number of documents, share of the largest number: a row for each power of two."""
    most = max(source.lengths, default=1)
    rows = [(f"{2**n:,} to {2 ** (n + 1) - 1:,}", count, count / most) for n, count in enumerate(source.lengths)]
    while rows and not rows[0][1]:
        rows.pop(0)
    return rows


def _numbers(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def most_frequent(source: Source) -> list[tuple[int, str]]:
    """How often the documents that occur most often do, and how they begin."""
    found = []
    for item in source.manifest.get("repeated_documents", []):
        cut = "…" if len(item["text"].encode()) > EXCERPT - 4 else ""  # in the middle of a character, perhaps
        found.append((item["times"], " ".join(item["text"].split()).translate(PICTURES) + cut))
    return found


def inspect(folders: list[Path], position: int, page: Path) -> None:
    """Print tables of the folders and write the page. Raises UserError as `look`."""
    sources = [look(folder, position) for folder in folders]
    console = Console(soft_wrap=False, highlight=False, markup=False)
    table = Table("", *(str(source.folder) for source in sources), title="Prepared data", title_justify="left")
    values = [facts(source) for source in sources]
    for name in values[0]:
        table.add_row(name, *(column[name] for column in values))
    console.print(table)
    for source in sources:
        lengths = Table(
            *map(_numbers, ("tokens", "documents")), "", title=f"{source.folder}: lengths", title_justify="left"
        )
        for name, count, share in histogram(source):
            lengths.add_row(name, f"{count:,}", "█" * max(1, round(40 * share)) if count else "")
        if source.lengths:  # an earlier version's manifest does not state them
            console.print(lengths)
        columns = _numbers("times"), Column("begins", no_wrap=True)
        most = Table(*columns, title=f"{source.folder}: {MOST_FREQUENT}", title_justify="left")
        for times, text in most_frequent(source):
            most.add_row(f"{times:,}", text)
        if most.rows:
            console.print(most)
        for number, texts in source.texts:
            console.print(f"\n── {source.folder}, train block {number}", soft_wrap=True)
            console.print("\n⏎ end of document\n".join(texts), soft_wrap=True)
    with atomic(page) as file:
        file.write(_page(sources).encode(errors="replace"))
    console.print(f"written: {page}")


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.25rem .6rem;border-bottom:1px solid #dde2ea}
.n{text-align:right;white-space:nowrap}td.b{width:55%}
td.b div{background:#3b6ea5;height:.9rem;min-width:1px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f7fa;padding:.8rem;border-radius:4px}
hr{border:0;border-top:2px dashed #3b6ea5}
"""


def _page(sources: list[Source]) -> str:
    """One HTML page that needs nothing else."""
    columns = [facts(source) for source in sources]
    head = "".join(f"<th>{html.escape(str(source.folder))}</th>" for source in sources)
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{html.escape(column[name])}</td>' for column in columns)}</tr>"
        for name in columns[0]
    )
    body = [f"<h1>Prepared data</h1><table><tr><th></th>{head}</tr>{rows}</table>"]
    for source in sources:
        name = html.escape(str(source.folder))
        body.append(f"<h2>{name}: lengths</h2><table>")
        body.append('<tr><th class="n">tokens</th><th class="n">documents</th><th></th></tr>')
        for label, count, share in histogram(source):
            bar = f'<div style="width:{100 * share:.1f}%"></div>' if count else ""
            body.append(f'<tr><td class="n">{label}</td><td class="n">{count:,}</td><td class="b">{bar}</td></tr>')
        body.append(f"</table><h2>{name}: {MOST_FREQUENT}</h2><table>")
        for times, text in most_frequent(source):
            body.append(f'<tr><td class="n">{times:,} times</td><td dir="auto">{html.escape(text)}</td></tr>')
        body.append("</table>" if source.manifest.get("repeated_documents") else "</table><p>none occurs twice</p>")
        for number, texts in source.texts:
            shown = '</pre><hr><pre dir="auto">'.join(map(html.escape, texts))
            body.append(f'<h2>{name}: train block {number}</h2><pre dir="auto">{shown}</pre>')
    title = html.escape(", ".join(str(source.folder) for source in sources))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
