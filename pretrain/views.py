"""Where a model spends its recursions: `python -m pretrain.views --checkpoint RUN --text FILE_OR_TEXT --output DIR`.

Writes `report.html` (self-contained; the text with a colour per depth, depth and scores on hover), `report.md`, a PNG
per picture and `results.json`: a heat map of the text, executed depth by token class and by position, and the routers'
scores per recursion. With `--data`, the histograms are over validation sequences in place of the text.

Shapes: B rows, T tokens of a row, Nr recursions.
"""

from __future__ import annotations

import argparse
import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from data_prep.settings import UserError, run_command
from model.config import MoRConfig
from model.depth import method_of
from model.flops import gates_of
from model.inference.text import pieces
from model.modeling import MoRForCausalLM
from model.record import RoutingRecord
from pretrain.config import read_data
from pretrain.data import fixed_batches, number_documents
from pretrain.manifest import Mixture
from pretrain.opened import Checkpoint, has_causal_decision, open_checkpoint
from pretrain.report import document
from pretrain.report.document import Block, Heading, Markup, Picture, Table, Text
from pretrain.report.fonts import NO_GLYPH, families_for, note_on
from pretrain.token_depths import CLASSES, classes_of

POSITION_BINS = 32
HEAT_MAP_COLUMNS, HEAT_MAP_LINES = 100, 60  # characters of a line, lines of the picture; the HTML holds the whole text
PANELS = 3  # in a line
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Routed:
    """Rows of text and how they were routed.

    ids, depth: [B, T] token and recursions that it executed. scores: [B, T, Nr] in 0..1, the gate's sigmoid at each
    recursion that a token was offered to (expert-choice) or the probability of each depth (token-choice); NaN where
    there is none. passed: [B, T, Nr] which gates it passed.
    """

    ids: Ints
    depth: Ints
    scores: Floats
    passed: npt.NDArray[np.bool_]


# --- what was routed ----------------------------------------------------------------------------------------------


@torch.no_grad()
def route(model: MoRForCausalLM, ids: torch.Tensor, documents: torch.Tensor | None, mode: str) -> Routed:
    """Run the model on ids [B, T]. documents: [B, T] ids of the documents, or None. mode: causal or topk."""
    inputs = ids.to(model.device)
    documents = None if documents is None else documents.to(model.device)
    output = model(inputs, document_ids=documents, routing_mode=mode, use_cache=False, logits_to_keep=1)
    routing = output.routing
    assert routing is not None and routing.passed is not None
    scores = token_scores(routing, model.config, mode)
    return Routed(ids.numpy(), routing.depth.cpu().numpy(), scores, routing.passed.cpu().numpy())


def token_scores(record: RoutingRecord, config: MoRConfig, mode: str) -> Floats:
    """The record's scores at their tokens, [B, T, Nr] in 0..1, NaN where a recursion did not see a token."""
    method = method_of(config)
    shown = method.shown(config, record)
    if shown is not None:
        return shown.double().cpu().numpy()
    gates = torch.arange(gates_of(config), device=record.depth.device)
    offered = record.depth[..., None] >= gates * method.nested
    result = torch.full(offered.shape, torch.nan, dtype=torch.float64, device=record.depth.device)
    for r, logits in enumerate(record.scores):
        values = torch.sigmoid(logits).double()
        if mode == "causal" or not method.fixed:  # packed, in order, the tokens that executed the recursion before
            places = offered[..., r].flatten().nonzero().squeeze(1)
            result[..., r].view(-1)[places] = values[: len(places)]  # one token too many where none is left
        else:
            every = torch.arange(values.shape[1], device=values.device).expand_as(values)
            index = record.selected[r - 1] if r and method.nested else every
            result[..., r] = result[..., r].scatter(1, index, values)
    return result.masked_fill(~offered, torch.nan).cpu().numpy()


# --- pictures -----------------------------------------------------------------------------------------------------


def colours(num_recursions: int) -> list[str]:
    """A colour for each depth 0 .. Nr, light to dark."""
    shades = matplotlib.colormaps["YlOrRd"](np.linspace(0.0, 0.72, num_recursions + 1))
    return [matplotlib.colors.to_hex(shade) for shade in shades]


def visible(piece: str) -> str:
    """A token's text on one line: line breaks and partial characters shown as signs."""
    return piece.replace("\n", "↵").replace("\t", "→") or "·"


def token_html(parts: Sequence[str], routed: Routed) -> str:
    """The first row's tokens with a colour per depth; depth and scores on hover."""
    depth, scores, palette = routed.depth[0], routed.scores[0], colours(routed.scores.shape[-1])
    spans = []
    for place, part in enumerate(parts):
        listed = ", ".join(f"{score:.3f}" for score in scores[place] if not np.isnan(score))
        hover = f"position {place}, token {routed.ids[0, place]}: depth {depth[place]}, scores {listed}"
        text = html.escape(visible(part)) + ("<br>" if "\n" in part else "")
        spans.append(f'<span title="{hover}" style="background:{palette[depth[place]]}">{text}</span>')
    legend = " ".join(f'<span style="background:{c}">&nbsp;{d}&nbsp;</span>' for d, c in enumerate(palette))
    style = "font:14px/1.9 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere"
    return f'<p>recursions executed: {legend}</p>\n<div style="{style}">{"".join(spans)}</div>'


def heat_map(parts: Sequence[str], routed: Routed) -> Figure:
    """The first row's tokens on a grid of characters, a colour per depth; what exceeds the lines is left out."""
    palette = colours(routed.scores.shape[-1])
    boxes, line, column = [], 0, 0
    for part, depth in zip(parts, routed.depth[0], strict=True):
        text = visible(part)[:HEAT_MAP_COLUMNS]
        if column + len(text) > HEAT_MAP_COLUMNS:
            line, column = line + 1, 0
        if line == HEAT_MAP_LINES:
            break
        boxes.append((line, column, text, palette[depth]))
        column += len(text)
        if "\n" in part:
            line, column = line + 1, 0
    lines = boxes[-1][0] + 1
    family, missing = families_for(text for _, _, text, _ in boxes)
    figure = Figure(figsize=(0.088 * HEAT_MAP_COLUMNS + 0.3, 0.2 * lines + 0.5), layout="constrained")
    axes = figure.subplots()
    for line, column, text, colour in boxes:
        axes.add_patch(matplotlib.patches.Rectangle((column, line), len(text), 0.92, color=colour, lw=0))
        for offset, character in enumerate(text):  # one by one: the grid holds whatever the font's width
            character = NO_GLYPH if character in missing else character
            axes.text(column + offset + 0.5, line + 0.48, character, family=family, fontsize=9, ha="center",
                      va="center_baseline", parse_math=False)  # fmt: skip
    axes.set(xlim=(0, HEAT_MAP_COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    handles = [matplotlib.patches.Patch(color=colour, label=str(depth)) for depth, colour in enumerate(palette)]
    figure.legend(handles=handles, title="recursions executed", loc="outside upper right", ncols=len(palette),
                  frameon=False, fontsize=8, title_fontsize=8)  # fmt: skip
    return figure


def shares(depth: Ints, num_recursions: int) -> Floats:
    """Share of tokens at each depth 0 .. Nr. depth: any shape, not empty."""
    return np.bincount(depth.ravel(), minlength=num_recursions + 1) / depth.size


def stacked(names: Sequence[str], rows: Floats, label: str) -> Figure:
    """Depth shares as stacked bars, a bar per name. rows: [len(names), Nr + 1]."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    base = np.zeros(len(names))
    for depth, colour in enumerate(colours(rows.shape[1] - 1)):
        axes.bar(
            range(len(names)), rows[:, depth], 0.9, base, color=colour, label=str(depth), edgecolor="white", lw=0.4
        )
        base += rows[:, depth]
    many = len(names) > len(CLASSES)
    axes.set_xticks(range(0, len(names), 4 if many else 1), list(names)[:: 4 if many else 1], fontsize=8)
    axes.set(xlabel=label, ylabel="share of tokens", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), title="recursions executed", loc="outside upper center",
                  ncols=rows.shape[1], frameon=False)  # fmt: skip
    return figure


def score_histograms(routed: Routed, config: MoRConfig) -> Figure:
    """A panel per recursion: scores of the tokens that executed it and of those that were offered to it and did not."""
    depth, count = routed.depth, gates_of(config)
    token = method_of(config).chooses_depth
    # A page is 1,100 pixels wide: of more panels in a line the labels could not be read.
    wide = min(count, PANELS)
    high = -(-count // wide)
    figure = Figure(figsize=(3.6 * wide, 3.4 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    for r, axes in enumerate(panels[:count]):
        scores = routed.scores[..., r]
        taken = depth == r + 1 if token else routed.passed[..., r]
        groups = [scores[~taken & ~np.isnan(scores)], scores[taken & ~np.isnan(scores)]]
        labels = [f"other depth ({len(groups[0]):,})", f"this depth ({len(groups[1]):,})"]
        if not token:
            labels = [f"left out ({len(groups[0]):,})", f"entered ({len(groups[1]):,})"]
        axes.hist(groups, bins=np.linspace(0, 1, 41), stacked=True, color=["#bbbbbb", "#d55e00"], label=labels)
        axes.set_title(f"depth {r + 1}" if token else f"recursion {r + 1}", fontsize=10)
        axes.set_xlabel("probability of this depth" if token else "sigmoid of the score")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.3)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.axes[0].set_ylabel("tokens")
    return figure


# --- the report ---------------------------------------------------------------------------------------------------


def statistics(routed: Routed, classes: Sequence[str], config: MoRConfig) -> dict[str, Any]:
    """Depth shares by class and by position, and mean scores. classes: of every token, row after row [B * T]."""
    count, length = gates_of(config), routed.depth.shape[1]
    flat, named = routed.depth.ravel(), np.array(classes)
    edges = np.unique(np.linspace(0, length, min(POSITION_BINS, length) + 1).astype(int))
    offered = ~np.isnan(routed.scores)
    return {
        "tokens": flat.size,
        "depth_shares": shares(flat, count).tolist(),
        "by_class": {
            name: {"tokens": int((named == name).sum()), "depth_shares": shares(flat[named == name], count).tolist()}
            for name in CLASSES
            if name in classes
        },
        "by_position": [
            {"from": int(a), "to": int(b), "depth_shares": shares(routed.depth[:, a:b], count).tolist()}
            for a, b in itertools.pairwise(edges)
        ],
        "mean_scores": [routed.scores[..., r][offered[..., r]].mean() if offered[..., r].any() else None
                        for r in range(count)],
    }  # fmt: skip


def statistics_blocks(found: dict[str, Any], routed: Routed, config: MoRConfig) -> list[Block]:
    """The histograms of `statistics`, with a table of the classes."""
    depths = range(gates_of(config) + 1)
    rows = [
        [name, f"{row['tokens']:,}", f"{np.dot(depths, row['depth_shares']):.2f}"]
        + [f"{share:.1%}" for share in row["depth_shares"]]
        for name, row in [("all tokens", found), *found["by_class"].items()]
    ]
    classes = {f"{name}\n{row['tokens']:,}": row["depth_shares"] for name, row in found["by_class"].items()}
    positions = {str(row["from"]): row["depth_shares"] for row in found["by_position"]}
    caption = "The routers' scores of the tokens that each recursion was offered."
    return [
        Heading("Depth by token class"),
        Table("Recursions executed", ["class", "tokens", "mean", *(f"depth {d}" for d in depths)], rows),
        Picture("depth_by_class", "Depth by token class.", stacked(list(classes), np.array(list(classes.values())),
                                                                   "token class, and how many tokens")),
        Heading("Depth by position"),
        Picture("depth_by_position", "Depth by position in the sequence.",
                stacked(list(positions), np.array(list(positions.values())), "position of the token")),
        Heading("Scores"),
        Picture("scores", caption, score_histograms(routed, config)),
    ]  # fmt: skip


def text_of(given: str) -> str:
    """The text of a file, or what was given itself. Raises UserError for a file that is not text."""
    try:
        is_file = Path(given).is_file()
    except OSError:  # too long for a name
        is_file = False
    try:
        text = Path(given).read_text(encoding="utf-8") if is_file else given
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: {given} cannot be read as text: {error}") from None
    if not text:
        raise UserError("--text: empty; give a file or a text")
    return text


def sequences(checkpoint: Checkpoint, data: Sequence[str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first validation sequences of a prepared folder, or of each source of a mixture: ids and documents [B, T]."""
    manifest = read_data(data)
    config = checkpoint.model.config
    manifest.check_model(config.vocab_size, min(manifest.sequence_length, config.max_position_embeddings))
    sources = manifest.sources.values() if isinstance(manifest, Mixture) else [manifest]
    read = (batch for source in sources for batch in fixed_batches(source, "validation", 1, samples=count))
    rows = torch.cat([batch.input_ids for batch in read])
    return rows, number_documents(rows, manifest.eos_token_id)


def view(checkpoint: Checkpoint, text: str, output: Path, data: Sequence[str] | None, count: int) -> dict[str, Any]:
    """Write the views to `output`; returns what `results.json` holds."""
    model, config = checkpoint.model, checkpoint.model.config
    if not gates_of(config):
        raise UserError(
            f"{checkpoint.folder}: a {config.architecture} model routes nothing; give one whose depth adapts"
        )
    mode = "causal" if has_causal_decision(config) else "topk"
    tokenizer, ends = checkpoint.tokenizer.backend_tokenizer, np.ravel([config.eos_token_id])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    shown = ids[: config.max_position_embeddings]
    parts = pieces(tokenizer, shown)
    routed = route(model, torch.tensor([shown]), None, mode)
    results: dict[str, Any] = {"architecture": config.architecture, "routing_mode": mode, "tokens": parts, "ids": shown}
    results |= {"depth": routed.depth[0].tolist(), "scores": routed.scores[0].tolist()}
    cut = f" The text has {len(ids):,} tokens; the first {len(shown):,} fit the model." if len(ids) > len(shown) else ""
    name = f"{checkpoint.run.name}/{checkpoint.folder.name}" if checkpoint.run else checkpoint.folder.name
    about = f"`{name}`, {config.architecture}, {mode} routing.{cut}"
    blocks: list[Block] = [Text(about), Heading("The text"), Markup(token_html(parts, routed))]
    caption = "Recursions executed by each token." + note_on(families_for(map(visible, parts))[1])
    blocks.append(Picture("heat_map", caption, heat_map(parts, routed), on_page=False))  # the page has the text itself
    source = "the text above"
    if data is not None:
        rows, documents = sequences(checkpoint, data, count)
        batches = [route(model, rows[i : i + 1], documents[i : i + 1], mode) for i in range(len(rows))]
        routed = Routed(*(np.concatenate([getattr(b, key) for b in batches]) for key in Routed.__annotations__))
        source = f"{len(rows)} validation sequences of {', '.join(data)}"
    classes = [name for row in routed.ids.tolist() for name in classes_of(row, tokenizer, ends)]
    results["statistics"] = statistics(routed, classes, config)
    blocks += [
        Text(f"The histograms below are over {source}."),
        *statistics_blocks(results["statistics"], routed, config),
    ]
    document.write(blocks, output, "Where recursions are spent", results)
    document.close(blocks)
    print(f"views: {output / 'report.html'}, and {', '.join(sorted(path.name for path in output.glob('*.png')))}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.views", description="Show where recursions are spent.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="run directory, one of its checkpoints, or an exported model")
    add("--text", required=True, help="a text file, or the text itself")
    add("--output", type=Path, required=True, metavar="DIR", help="where the pictures and the page go")
    add(
        "--data",
        nargs="+",
        metavar="DIR",
        help="prepared folder, or several, or an experiment's YAML file; validation splits fill the histograms",
    )
    add("--sequences", type=int, default=16, metavar="N", help="of the validation split (default %(default)s)")
    given = parser.parse_args(arguments)
    if given.sequences < 1:
        raise UserError(f"--sequences: {given.sequences} is below 1")
    view(open_checkpoint(given.checkpoint.resolve()), text_of(given.text), given.output, given.data, given.sequences)
    return 0


if __name__ == "__main__":
    run_command(main)
