"""A report, made: runs read, their sets put into words and figures, its files written, its tables printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from rich.console import Console

from data_prep.settings import UserError, read_yaml
from pretrain.report import document, records
from pretrain.report.blocks import half_width, has_exits, set_blocks, side_by_side, with_spread
from pretrain.report.document import Block, Heading, Picture, Table, Text
from pretrain.report.runs import Run, comparable_sets, counted, read_runs, shown
from pretrain.report.summary import Results, build_results, merge_sets

PUBLISHED = Path(__file__).resolve().parents[2] / "configs" / "report" / "published.yaml"
REPORT_FILES = ("report.html", "report.md", "results.json")
TrackerMode = Literal["online", "offline", "disabled"]


def write_report(
    folders: Sequence[str | Path],
    output: Path,
    *,
    published: bool = False,
    allow_mixed: bool = False,
    baseline: str | None = None,
    evidence: Sequence[str | Path] = (),
    command: str = "",
    track: TrackerMode = "disabled",
    console: Console | None = None,
) -> Results:
    """Read the runs, write the report's files and their records to `output`, print the table, and return what
    `results.json` holds.

    Runs in `sweep/` and `noise/` beside them are read too. evidence: other reports' folders or results.json, which may
    answer for these runs; command: what ran them; track: W&B mode (online, offline, disabled). Raises UserError for
    runs that cannot be read or compared.
    """
    runs, warnings = read_runs(folders)
    sweeps, repeats = beside(runs, "sweep"), beside(runs, "noise")
    known = [one for path in evidence for one in read_evidence(Path(path))]
    sets, blocks = [], []
    paper = read_yaml(PUBLISHED) if published else None
    groups = comparable_sets(runs, allow_mixed)
    for place, members in enumerate(groups):
        results = build_results(members, baseline, sweeps=sweeps, repeats=repeats, evidence=known, command=command)
        results["title"] = members[0].condition_name
        prefix = f"set{place + 1}_" if len(groups) > 1 else ""
        blocks += [Heading(results["title"], 1), *set_blocks(results, members, paper, prefix)]
        sets.append(results)
    blocks = [*side_by_side(sets), *blocks]
    if warnings:
        blocks = [Text("Warnings: " + "; ".join(warnings)), *blocks]
    merged = {**sets[0], "warnings": warnings} if len(sets) == 1 else {**merge_sets(sets), "warnings": warnings}
    document.write(blocks, output, title="Training report", results=merged)
    records.pack([*runs, *sweeps, *repeats], output / records.FILE)
    print_report(sets, output, warnings, console or Console())
    if track != "disabled":
        send_to_wandb(blocks, runs, merged, output, track)
    document.close(blocks)
    return merged


def beside(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs in folders of this name beside runs, or beside the trunks of branches."""
    homes = {
        run.folder.parent.parent.parent if run.folder.parent.name == "branches" else run.folder.parent for run in runs
    }
    found: list[Run] = []
    for folder in sorted(home / name for home in homes):
        if any(folder.glob("*/run.json")):
            with suppress(UserError):  # none of them has a loss yet
                found += read_runs([folder])[0]
    return found


def read_evidence(path: Path) -> list[Results]:
    """The comparable sets of another report. Raises UserError where it cannot be read."""
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no report's results.json, for evidence: {error}") from None
    sets = content.get("sets", [content])
    if not all("checklist" in one for one in sets):
        raise UserError(f"{path}: was written by an older version; make the report anew")
    return list(sets)


def terminal_tables(results: Results) -> list[Table]:
    """The two tables that matter most, narrow enough for a terminal of 80 columns."""
    full = has_exits(results["variants"])
    losses = ["causal", "top-k", "full"] if full else ["loss, causal", "top-k"]
    header = ["model", "params", "FLOPs", "tokens", *losses]
    rows = [
        [
            row["name"] + ("" if row["finished"] else " *"),
            counted(row["unique_parameters"]),
            f"{row['flops']:.4g}",
            f"{row['tokens'] / 1e6:,.1f}M",
            with_spread(row["validation_loss"], row["validation_loss_std"]),
            shown(row["validation_loss_topk"]),
            *([shown(row["validation_loss_full"])] if full else []),
        ]
        for row in results["variants"]
    ]
    for name in ("bigram", "unigram"):
        if results[f"{name}_loss"] is not None:
            rows.append([f"{name} model", "", "", "", f"{results[f'{name}_loss']:.4f}", *[""] * (1 + full)])
    unfinished = "" if all(row["finished"] for row in results["variants"]) else "; * not finished"
    tables = [Table(f"Validation loss, FLOPs by `{results['convention']}`{unfinished}".replace("`", "'"), header, rows)]
    if results["differences"]:
        header = ["model", "minus", "nats, 95% interval", "verdict"]
        rows = [
            [
                row["name"],
                row["baseline"],
                f"{row['mean']:+.4f}{half_width(row)}",
                "open" if row["open"] else row["verdict"],
            ]
            for row in results["differences"]
        ]
        tables.append(Table("Differences at matched FLOPs, paired by seed", header, rows))
    asked = [[check["question"], "yes" if check["passed"] else "no", check["answer"]] for check in results["checklist"]]
    return [Table("A sceptic's checklist", ["question", "passes", "answer"], asked), *tables]


def print_report(sets: Sequence[Results], output: Path, warnings: Sequence[str], console: Console) -> None:
    """The tables that matter most, in the terminal."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    for results in sets:
        console.print(f"\n{results['title']}", style="bold", highlight=False)
        for table in terminal_tables(results):
            console.print(document.rich_table(table))
        for needs in dict.fromkeys(check["needs"] for check in results["checklist"] if check["needs"]):
            console.print(f"missing: {needs}", highlight=False, soft_wrap=True, markup=False)
    for block in side_by_side(sets):
        if isinstance(block, Table):
            console.print(document.rich_table(block))
    console.print("report: " + ", ".join(str(output / name) for name in REPORT_FILES), soft_wrap=True, highlight=False)


def send_to_wandb(
    blocks: Sequence[Block], runs: Sequence[Run], results: Results, output: Path, mode: TrackerMode
) -> None:
    """Log tables, figures and the loss curves (x axis FLOPs) as one W&B run."""
    import wandb

    folder = output / "tracker"
    folder.mkdir(parents=True, exist_ok=True)
    tracker = wandb.init(
        project="mixture-of-recursions",
        job_type="report",
        mode=mode,
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
    )
    tracker.define_metric("flops")
    tracker.define_metric("validation_loss/*", step_metric="flops")
    for run in runs:
        for line in run.validations:
            tracker.log({"flops": line["flops"], f"validation_loss/{run.name}-seed{run.seed}": line["validation_loss"]})
    for block in blocks:
        if isinstance(block, Table):
            tracker.log({block.title: wandb.Table(columns=list(block.header), data=block.rows)})
        elif isinstance(block, Picture):
            tracker.log({block.name: wandb.Image(str(output / f"{block.name}.png"), caption=block.caption)})
    tracker.summary["runs"] = len(results["runs"])
    tracker.finish()
