"""A small document: headings, paragraphs, tables and pictures, written as Markdown, HTML, JSON and PNG."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 stands under the document's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between backticks is set as code."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are numbers, set as given."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is its file's, without the ending. on_page: whether the HTML shows it; Markup may do in its
    place."""

    name: str
    caption: str
    figure: Figure
    on_page: bool = True


@dataclass(frozen=True)
class Markup:
    """HTML set as it is, which the Markdown leaves out."""

    html: str


Block = Heading | Text | Table | Picture | Markup

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0 2rem; } img { max-width: 100%; } figcaption { font-size: 13px; color: #555; }
code { background: #f2f2f2; padding: 0 .2em; }
"""


def write(blocks: Sequence[Block], folder: Path, title: str, results: dict[str, Any]) -> None:
    """Write report.md, report.html, a PNG per picture and, last, results.json, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {block.name: _png(block.figure) for block in blocks if isinstance(block, Picture)}
    for name, data in pictures.items():
        _replace(folder / f"{name}.png", data)
    _replace(folder / "report.md", to_markdown(blocks, title).encode())
    _replace(folder / "report.html", to_html(blocks, title, pictures).encode())
    _replace(folder / "results.json", (json.dumps(_finite(results), indent=1) + "\n").encode())


def close(blocks: Sequence[Block]) -> None:
    """Release the figures' memory."""
    import matplotlib.pyplot as plt

    for block in blocks:
        if isinstance(block, Picture):
            plt.close(block.figure)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(blocks: Sequence[Block], title: str) -> str:
    """The document as Markdown; pictures are files beside it."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Markup):
            continue
        if isinstance(block, Heading):
            parts.append(f"{'#' * (block.level + 1)} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}]({block.name}.png)\n\n{block.caption}")
        else:
            rule = ["---", *["---:"] * (len(block.header) - 1)]
            rows = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, rule, *block.rows)]
            parts.append(f"**{block.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block], title: str, pictures: dict[str, bytes]) -> str:
    """The document as one HTML file that holds its pictures (PNG bytes by name)."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        if isinstance(block, Markup):
            parts.append(block.html)
        elif isinstance(block, Heading):
            parts.append(f"<h{block.level + 1}>{_inline(block.text)}</h{block.level + 1}>")
        elif isinstance(block, Text):
            parts.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Picture):
            if not block.on_page:
                continue
            data = base64.b64encode(pictures[block.name]).decode()
            caption = html.escape(block.caption)
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        else:
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
            body = "\n".join(
                "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows
            )
            parts.append(
                f"<table><caption>{_inline(block.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            )
    content = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def rich_table(table: Table) -> rich.table.Table:
    """The table for the terminal."""
    result = rich.table.Table(title=table.title, title_justify="left", title_style="bold")
    for place, name in enumerate(table.header):
        result.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in table.rows:
        result.add_row(*row)
    return result
