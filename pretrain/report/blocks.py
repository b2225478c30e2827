"""What the report of a comparable set says: its words, tables and figures, from the numbers of `results.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.flops import CONVENTIONS
from pretrain.report import analysis
from pretrain.report.document import Block, Heading, Picture, Table, Text
from pretrain.report.runs import Run, Variant, counted, shown
from pretrain.report.summary import Results, ordered_variants
from pretrain.report.sweep import TIE

FEW = 6  # names in a cell of a table, before the others are counted
MOST = 24  # variants in a figure that can be told apart

if TYPE_CHECKING:  # where a figure is drawn: matplotlib is slow to import
    from pretrain.report import figures

SIZE_LABEL = "parameters without embeddings, counted once per application"
PAPER_SIZE_LABEL = "parameters of the vanilla model of this size"


def set_blocks(results: Results, runs: Sequence[Run], published: Results | None, prefix: str) -> list[Block]:
    """The report of one comparable set. prefix: of the figures' file names."""
    groups = [group for group in ordered_variants(runs) if group.has_losses]  # what can be drawn
    blocks: list[Block] = [*checklist_blocks(results), Text(statement(results)), loss_table(results)]
    blocks += parent_blocks(results)
    if not groups:
        return [*blocks, conventions_table(results), runs_table(results)]
    chosen = names_drawn(results)
    drawn = [group for group in groups if group.name in chosen]
    blocks += curve_blocks(results, drawn, prefix)
    blocks += difference_blocks(results, prefix)
    blocks += decomposition_blocks(results, prefix)
    blocks += sweep_blocks(results, prefix)
    blocks += cost_blocks(results, groups, drawn, prefix)
    blocks += isoflop_blocks(results, prefix)
    blocks += law_blocks(results)
    if published is not None:
        blocks += published_blocks(results, published, prefix)
    blocks.append(conventions_table(results))
    return [*blocks, runs_table(results)]


def few_are_drawn(results: Results) -> bool:
    """Whether there are more variants than can be told apart in a figure, of sizes of which one is the best."""
    return len(results["variants"]) > MOST and bool(results["best_sizes"])


def names_drawn(results: Results) -> set[str]:
    """The variants that figures show: all; of too many, each architecture's best size at each budget."""
    return {row["name"] for row in results["best_sizes" if few_are_drawn(results) else "variants"]}


def curve_blocks(results: Results, groups: Sequence[Variant], prefix: str) -> list[Block]:
    """Losses along FLOPs, tokens, seconds and joules, and the depths that tokens took."""
    from pretrain.report import figures

    note = f" ({results['convention']} convention)"
    lines = {"unigram model": results["unigram_loss"], "bigram model": results["bigram_loss"]}
    counted = {name: loss for name, loss in lines.items() if loss is not None}
    blocks: list[Block] = [
        Picture(
            f"{prefix}loss_flops",
            "Validation loss against training FLOPs. A thin line per seed, the "
            "marker is the mean of the last validations."
            + (" Of each architecture the best of its sizes at each budget." if few_are_drawn(results) else ""),
            figures.loss_curves(groups, "flops", counted, note),
        ),
        Picture(
            f"{prefix}loss_tokens",
            "The same against training tokens: what a model saw, not what it cost.",
            figures.loss_curves(groups, "tokens", counted, ""),
        ),
    ]
    if all(run.last.get("seconds") for group in groups for run in group.runs):
        blocks.append(
            Picture(
                f"{prefix}loss_seconds",
                "The same against seconds of training steps, as measured on these runs' machines with whatever else "
                "they did: a FLOP that takes longer is no saving.",
                figures.loss_curves(groups, "seconds", counted, ""),
            )
        )
    if results["energy"] is not None:
        blocks.append(
            Picture(
                f"{prefix}loss_joules",
                f"The same against joules of training steps. Counted: {results['energy']}; not memory, fans or losses "
                "of power supplies. What other programs used meanwhile is in it: fair where each run had its machine "
                "alone.",
                figures.loss_curves(groups, "joules", counted, ""),
            )
        )
    shares = figures.depth_shares(groups)
    if shares is not None:
        blocks.append(
            Picture(
                f"{prefix}depth_shares",
                "Share of tokens by the number of gates that they passed: of recursions or steps, of routed layers in "
                "Mixture-of-Depths, in training; of exits that they did not take, in validation.",
                shares,
            )
        )
    return blocks


def statement(results: Results) -> str:
    """What every number of the set rests on, in one paragraph."""
    masking = "attention kept inside documents" if results["document_masking"] else "attention across documents"
    seeds = ", ".join(map(str, results["seeds"]))
    spread = "± is the standard deviation over seeds" if len(results["seeds"]) > 1 else "one seed: the noise is unknown"
    attention = f" ({results['attention']})" if results["attention"] else ""
    return (
        f"Corpus: {results['corpus']} (data {short(results['data_fingerprint'])}{mixed(results)}). "
        f"Tokenizer: {results['vocab_size']} tokens ({short(results['tokenizer_fingerprint'])}). "
        f"Sequences of {results['sequence_length']} tokens, {masking}. Precision: {results['precision']}. "
        f"FLOPs: `{results['convention']}` convention{attention}. Seeds: {seeds}; {spread}. "
        f"Losses are nats per token on the validation split. Evaluation: {results['evaluation']}."
    )


def mixed(results: Results) -> str:
    """The sources of a mixture with their fingerprints; nothing where there is none."""
    sources = results.get("mixture") or {}
    return "".join(f"; {name} {short(source['data_fingerprint'])}" for name, source in sources.items())


def short(fingerprint: str) -> str:
    return str(fingerprint)[:12]


def with_spread(mean: float | None, spread: float | None) -> str:
    return shown(mean) if spread is None else f"{shown(mean)} ± {shown(spread)}"


def has_exits(rows: Sequence[Results]) -> bool:
    """Whether some model lets tokens leave, so that its loss at full depth is another one."""
    return any(row["validation_loss_full"] is not None for row in rows)


def loss_table(results: Results) -> Table:
    """One row per variant, and the unigram model's."""
    better, full = {row["name"]: row for row in results["differences"]}, has_exits(results["variants"])
    energy = results["energy"] is not None
    rows = []
    for row in results["variants"]:
        difference = better.get(row["name"])
        rows.append(
            [
                row["name"] + ("" if row["finished"] else " (not finished)"),
                counted(row["unique_parameters"]),
                f"{row['flops']:.4g}",
                f"{row['tokens'] / 1e6:,.2f}M",
                f"{row['steps']:,.0f}",
                str(len(row["seeds"])),
                with_spread(row["validation_loss"], row["validation_loss_std"]),
                "" if difference is None else interval(difference),
                shown(row["validation_loss_topk"]),
                *([shown(row["validation_loss_full"])] if full else []),
                f"{row['mean_recursions']:.2f}",
                "–" if row["seconds"] is None else f"{row['seconds']:,.0f} s",
                *([f"{row['joules'] / 1e3:,.2f} kJ"] if energy else []),
            ]
        )
    for name in ("bigram", "unigram"):
        if results[f"{name}_loss"] is not None:
            rows.append([f"{name} model", *[""] * 5, f"{results[f'{name}_loss']:.4f}", *[""] * (4 + full + energy)])
    header = [
        "model",
        "unique parameters",
        f"FLOPs ({results['convention']})",
        "tokens",
        "steps",
        "seeds",
        "validation loss, causal",
        "minus baseline",
        "top-k (sees ahead)",
        *(["full depth (nobody exits)"] if full else []),
        "mean recursions",
        "time per run",
        *(["energy per run"] if energy else []),
    ]
    return Table("Validation loss", header, rows)


def parent_blocks(results: Results) -> list[Block]:
    """Where runs started from others: what was spent before them, apart from their own FLOPs."""
    rows = [
        [
            f"{row['variant']}, seed {row['seed']}",
            f"{parent['path']}" + ("" if parent["step"] is None else f", step {parent['step']:,}"),
            f"{parent['take']}, data {parent['data']}",
            shown(row["parent_flops"], ".4g"),
            shown(row["own_flops"], ".4g"),
            shown(None if row["parent_flops"] is None else row["parent_flops"] + row["own_flops"], ".4g"),
        ]
        for row in results["runs"]
        if (parent := row["parent"])
    ]
    header = ["run", "started from", "took", "FLOPs of the parent", "of the run alone", "together"]
    return [Heading("Runs that started from others"), Table("Parents", header, rows)] if rows else []


def checklist_blocks(results: Results) -> list[Block]:
    """What a sceptic asks, at the top: the answers, and what to run for those that do not pass."""
    rows = []
    for check in results["checklist"]:
        why: dict[str, list[str]] = {}
        for name, reason in check["holds_up"].items():
            why.setdefault(reason, []).append(name)
        told = some([f"{some(names)}: {reason}" for reason, names in why.items()], "; ")
        rows.append(
            [
                check["question"],
                "yes" if check["passed"] else "no",
                check["answer"] + (f" ({told})" if told else ""),
                f"`{check['needs']}`" if check["needs"] else "",
            ]
        )
    claims = results["differences"]
    standing = [row["name"] for row in claims if not row["open"]]
    text = f"Of {len(claims)} differences {len(standing)} are supported by every answer" + (
        f": {', '.join(standing)}." if standing else "; the others have no verdict yet."
    )
    if not claims:
        text = "No difference is drawn here: no two of these models are compared."
    header = ["question", "passes", "answer", "what is missing"]
    return [Heading("A sceptic's checklist"), Text(text), Table("Checklist, computed from the runs", header, rows)]


def some(names: Sequence[str], between: str = ", ") -> str:
    """The first few of a list, and how many more there are."""
    told = list(names[:FEW]) + ([f"{len(names) - FEW} more"] if len(names) > FEW else [])
    return between.join(told)


def verdict(row: Results) -> str:
    """The verdict of a difference, where every answer of the checklist supports it; else what is open."""
    return f"open: {', '.join(row['open'])}" if row["open"] else str(row["verdict"])


def decomposition_blocks(results: Results, prefix: str) -> list[Block]:
    """What differences are made of."""
    rows = []
    for found in results["decompositions"]:
        for step in found["steps"]:
            rows.append(
                [found["name"], step["step"], f"{step['to']} - {step['from']}", interval(step), step["verdict"]]
            )
        if (same := found["equal_tokens"]) is not None:
            way = f"{found['name']} - {same['baseline']}"
            rows.append([found["name"], "all, at equal tokens", way, interval(same), same["verdict"]])
    if not rows:
        return []
    text = (
        "Each step is a paired difference between two runs; the steps of a model add up to its difference to the "
        "baseline. Brackets are 95% t intervals, not corrected for their number; at equal tokens the baseline has "
        "spent more FLOPs."
    )
    header = ["model", "part", "runs", "difference (nats)", "verdict, one step alone"]
    blocks: list[Block] = [
        Heading("What the differences are made of"),
        Text(text),
        Table("Decomposition", header, rows),
    ]
    chosen = names_drawn(results)
    drawn = [row for row in results["decompositions"] if len(row["steps"]) > 1 and row["name"] in chosen]
    if drawn:
        from pretrain.report import figures

        caption = "Steps from the baseline to each model, with 95% intervals."
        blocks.append(Picture(f"{prefix}decomposition", caption, figures.decomposition(drawn)))
    return blocks


def sweep_blocks(results: Results, prefix: str) -> list[Block]:
    """Loss against what was swept, and what won."""
    sweeps = results["sweep"]
    if not sweeps:
        return []
    rows = []
    for found in sweeps:
        tried = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in found["keys"].items())
        won = ", ".join(f"{key} {value}" for key, value in found["winner"].items())
        ties = "; ".join(", ".join(map(str, values.values())) for values in found["ties"])
        state = f"unsettled: {', '.join(found['edge'])} at the edge of its grid" if found["edge"] else "settled"
        rows.append([found["name"], tried, won, shown(found["loss"]), ties or "none", state])
    text = (
        "Each sweep is a halving search on seeds that the report does not use: all points for a short run, the better "
        f"half for one twice as long, and so on. Points within {TIE} nats of the winner are told as ties."
    )
    header = ["model", "tried", "won", "loss, last round", "ties", "state"]
    from pretrain.report import figures

    blocks: list[Block] = [Heading("Sweeps"), Text(text), Table("Sweeps", header, rows)]
    for key in dict.fromkeys(key for found in sweeps for key in found["keys"]):
        if all(isinstance(value, int | float) for found in sweeps for value in found["keys"].get(key, [])):
            name = f"{prefix}sweep_{key.rpartition('.')[2]}"
            caption = f"Loss against {key}; a curve per model and round, thin for the short ones; a star won."
            blocks.append(Picture(name, caption, figures.sweeps(sweeps, key)))
    return blocks


def interval(difference: Results) -> str:
    if difference["low"] is None:
        return f"{difference['mean']:+.4f}"
    return f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"


def half_width(difference: Results) -> str:
    return "" if difference["high"] is None else f" ± {difference['high'] - difference['mean']:.4f}"


def difference_blocks(results: Results, prefix: str) -> list[Block]:
    """Matched-FLOP differences as a table and, for one budget, a figure."""
    rows = results["differences"]
    if not rows:
        return []
    gap = max(abs(row["flops_over_baseline"]) for row in rows)
    seeds = {row["num_seeds"] for row in rows}
    text = (
        f"FLOPs agree within {gap:.3%}. Differences are paired by seed; brackets are 95% t intervals of the mean, "
        "which take the differences of the seeds as independent draws of one normal distribution. Verdicts are by p "
        f"values corrected for the {len(rows)} comparisons of the table (Holm), at 5%, and given where the "
        "checklist supports them."
    )
    if 1 in seeds:
        text += " One seed gives no interval: such a difference may be noise."
    table = Table(
        "Matched-FLOP differences",
        ["model", "baseline", "FLOPs", "tokens / baseline's", "difference (nats)", "p, corrected", "seeds", "verdict"],
        [
            [
                row["name"],
                row["baseline"],
                f"{row['flops']:.4g}",
                f"{row['tokens_over_baseline']:.3f}",
                interval(row),
                shown(row["p_holm"], ".2g"),
                str(row["num_seeds"]),
                verdict(row),
            ]
            for row in rows
        ],
    )
    blocks: list[Block] = [Heading("At matched FLOPs"), Text(text), table]
    if noise := results["noise"]:
        told = [[row["kind"], f"{row['deviation']:.4f}", str(row["runs"])] for row in noise]
        header = ["what changes", "standard deviation of one loss (nats)", "runs or pairs"]
        blocks.append(Table("Noise floor", header, told))
    baselines = {row["baseline"] for row in rows}
    if len(baselines) == 1:
        from pretrain.report import figures

        fields = analysis.PairedDifference.__dataclass_fields__
        drawn = [
            (row["name"], row["architecture"], analysis.PairedDifference(**{k: row[k] for k in fields})) for row in rows
        ]
        floor = {row["kind"]: row["deviation"] for row in noise}
        verdicts = ["open" if row["open"] else row["verdict"] for row in rows]
        figure = figures.differences(drawn, next(iter(baselines)), verdicts, floor)
        caption = (
            "Differences to the baseline with 95% intervals; shaded: what noise does to the difference of two runs."
        )
        blocks.append(Picture(f"{prefix}differences", caption, figure))
    return blocks


def cost_blocks(results: Results, groups: Sequence[Variant], drawn: Sequence[Variant], prefix: str) -> list[Block]:
    """Loss against what inference costs: a table of all, a picture of those that are drawn."""
    from pretrain.report import figures

    by_name = {row["name"]: row for row in results["variants"]}
    labels = {
        "inference_flops_per_token": "forward FLOPs per token (exact)",
        "kv_bytes_per_token": "KV cache, bytes per token (bf16)",
    }
    costs = {kind: [by_name[group.name][kind] for group in drawn] for kind in labels}
    rows = [
        [
            group.name,
            f"{by_name[group.name]['inference_flops_per_token']:.4g}",
            f"{by_name[group.name]['kv_bytes_per_token']:,.0f}",
            shown(by_name[group.name]["validation_loss"]),
        ]
        for group in groups
    ]
    text = (
        f"For a context of {results['sequence_length']} tokens; FLOPs under the routing that validation saw, KV cache "
        "under the configured capacities."
    )
    return [
        Heading("What inference costs"),
        Text(text),
        Table(
            "Inference cost",
            ["model", labels["inference_flops_per_token"], labels["kv_bytes_per_token"], "validation loss, causal"],
            rows,
        ),
        Picture(f"{prefix}inference", "Loss against inference cost.", figures.loss_against_cost(drawn, costs, labels)),
    ]


def isoflop_blocks(results: Results, prefix: str) -> list[Block]:
    """IsoFLOP parabolas, where there are runs enough for them."""
    if not results["isoflop"]:
        return []
    from pretrain.report import figures

    rows = []
    panels: dict[str, list[figures.IsoflopCurve]] = {}
    for row in results["isoflop"]:
        fit = analysis.Isoflop(**row["fit"])
        panels.setdefault(row["architecture"], []).append(
            (row["flops"], row["effective_parameters"], row["losses"], fit)
        )
        size = "–" if fit.optimal_parameters is None else counted(fit.optimal_parameters)
        if fit.low is not None and fit.high is not None:
            size += f" [{counted(fit.low)}, {counted(fit.high)}]"
        loss = "–" if fit.optimal_loss is None else f"{fit.optimal_loss:.4f}"
        rows.append([row["architecture"], f"{row['flops']:.4g}", size, loss, fit.note])
    header = ["architecture", "FLOPs", "compute-optimal effective parameters (95% bootstrap)", "loss there", "note"]
    return [
        Heading("IsoFLOP"),
        Text(
            "Each architecture at the best of the sizes tried, by the seeds that all of them have, against vanilla at "
            "the best of its own. Differences are paired by seed, brackets 95% t intervals, p values corrected for the "
            f"{sum('baseline' in row for row in results['best_sizes'])} comparisons of the table (Holm); a size at the "
            "end of those tried may not be the best there is. Verdicts as above, where the checklist supports them."
        ),
        best_size_table(results),
        Table("Compute-optimal sizes", header, rows),
        Picture(
            f"{prefix}isoflop",
            "Loss against size at equal FLOPs; stars are the parabolas' minima.",
            figures.isoflop(panels, SIZE_LABEL),
        ),
    ]


def best_size_table(results: Results) -> Table:
    """Every architecture at the best of its sizes, a row per budget."""
    by_name = {row["name"]: row for row in results["variants"]}
    rows = []
    for row in results["best_sizes"]:
        variant = by_name[row["name"]]
        compared = "baseline" in row
        rows.append(
            [
                row["name"],
                row["at"],
                counted(variant["unique_parameters"]),
                f"{variant['tokens'] / variant['unique_parameters']:.0f}",
                str(len(variant["seeds"])),
                with_spread(variant["validation_loss"], variant["validation_loss_std"]),
                interval(row) if compared else "",
                shown(row["p_holm"], ".2g") if compared else "",
                verdict(row) if compared else "",
            ]
        )
    header = ["model", "among the sizes tried", "unique parameters", "tokens per parameter", "seeds", "loss, causal",
              "minus vanilla's best", "p, corrected", "verdict"]  # fmt: skip
    return Table("Each at its best size", header, rows)


def law_blocks(results: Results) -> list[Block]:
    """The scaling laws that could be fitted: of each architecture, and one for all."""
    blocks: list[Block] = []
    fitted = [row for row in results["scaling_law"] if row["fit"] is not None]
    if fitted:
        header = ["architecture", "phi (95% bootstrap)", "E", "A", "a", "B", "b", "rms of ln loss", "runs"]
        rows = [
            [
                row["architecture"],
                f"{fit['phi']:.3f} [{fit['phi_low']:.3f}, {fit['phi_high']:.3f}]",
                f"{fit['irreducible']:.3f}",
                f"{fit['parameter_scale']:.4g}",
                f"{fit['parameter_exponent']:.3f}",
                f"{fit['data_scale']:.4g}",
                f"{fit['data_exponent']:.3f}",
                f"{fit['residual']:.2e}",
                str(fit["num_runs"]),
            ]
            for row in fitted
            for fit in [row["fit"]]
        ]
        text = (
            "L = E + A (N_once + r^phi N_rec)^-a + B D^-b, r the mean recursions of a token, N without embeddings: "
            "phi is what a recurrence is worth (1: as much as fresh layers; 0: nothing)."
        )
        blocks += [Heading("Joint scaling law"), Text(text), Table("Scaling law", header, rows)]
    if (law := results["joint_law"]) is not None:
        rows = [[name, f"{phi:.3f} [{low:.3f}, {high:.3f}]"] for name, (phi, low, high) in law["phi"].items()]
        text = (
            f"One law for all methods, E {law['irreducible']:.3f}, a {law['parameter_exponent']:.3f}, b "
            f"{law['data_exponent']:.3f} shared, over {law['num_runs']} runs (rms of ln loss {law['residual']:.1e}): "
            "phi of each method, comparable with the others'. Plain loops are at 0.46 in arXiv 2604.21106."
        )
        blocks += [Text(text), Table("Phi of each method", ["method", "phi (95% bootstrap)"], rows)]
    return blocks


def published_blocks(results: Results, published: Results, prefix: str) -> list[Block]:
    """The paper's figures beside these runs': differences to vanilla, and its isoFLOP curves."""
    from pretrain.report import figures

    matched = published["matched"]
    reference = next(row["loss"] for row in matched["rows"] if row["architecture"] == "vanilla")
    theirs = {row["name"]: row["loss"] - reference for row in matched["rows"] if row["loss"] != reference}
    ours = {row["name"]: row["mean"] for row in results["differences"]}
    note = f"paper, {matched['size']}, {matched['budget']:.3g} FLOPs (forward only), top-k routing"
    panels = {}
    for architecture, table in published["isoflop"]["loss"].items():
        sizes = published["isoflop"]["vanilla_parameters"]
        panels[architecture] = [
            (budget, sizes, [row[place] for row in table], analysis.fit_isoflop(sizes, [row[place] for row in table]))
            for place, budget in enumerate(published["isoflop"]["budgets"])
        ]
    text = (
        "The paper trained on another corpus at another scale, counted forward FLOPs only and evaluated with routing "
        "that sees the whole sequence: compare signs and order, not sizes."
    )
    return [
        Heading("Beside the paper's figures"),
        Text(text),
        Picture(
            f"{prefix}published_differences",
            "Differences to vanilla, these runs' and the paper's.",
            figures.published_differences(ours, theirs, note),
        ),
        Picture(
            f"{prefix}published_isoflop",
            "The paper's isoFLOP figures (its Table 9).",
            figures.isoflop(panels, PAPER_SIZE_LABEL),
        ),
    ]


def conventions_table(results: Results) -> Table:
    """The same tokens counted under each convention, relative to the first vanilla variant (or the first of all)."""
    first = next((row for row in results["runs"] if row["architecture"] == "vanilla"), results["runs"][0])
    rows = []
    for name in dict.fromkeys(row["variant"] for row in results["runs"]):
        run = next(row for row in results["runs"] if row["variant"] == name)
        cells = [
            f"{run['expected_flops'][c]:.4g} ({run['expected_flops'][c] / first['expected_flops'][c]:.3f})"
            for c in CONVENTIONS
        ]
        rows.append([name, *cells])
    title = (
        f"The tokens of each model, counted under every convention at the expected routing (over {first['variant']}'s)"
    )
    return Table(title, ["model", *CONVENTIONS], rows)


def runs_table(results: Results) -> Table:
    """One row per run."""
    full, energy = has_exits(results["runs"]), results["energy"] is not None
    header = [
        "model",
        "seed",
        "precision",
        "FLOPs",
        "tokens",
        "steps",
        "validation loss, causal",
        "top-k",
        *(["full depth"] if full else []),
        "seconds",
        *(["joules"] if energy else []),
        "finished",
    ]
    rows = [
        [
            row["variant"],
            str(row["seed"]),
            row["precision"],
            f"{row['flops']:.6g}",
            f"{row['tokens']:,}",
            f"{row['steps']:,}",
            shown(row["validation_loss"]),
            shown(row["validation_loss_topk"]),
            *([shown(row["validation_loss_full"])] if full else []),
            "–" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            *([f"{row['joules']:,.1f}"] if energy else []),
            "yes" if row["finished"] else "no",
        ]
        for row in results["runs"]
    ]
    return Table("Runs", header, rows)


def side_by_side(sets: Sequence[Results]) -> list[Block]:
    """Sets shown apart, in one table: each variant's difference to its own set's baseline."""
    names = list(dict.fromkeys(row["name"] for one in sets for row in one["differences"]))
    if len(sets) < 2 or not names:
        return []
    rows = []
    for name in names:
        found = [next((row for row in one["differences"] if row["name"] == name), None) for one in sets]
        rows.append(
            [name, *("–" if f is None else f"{interval(f)}, {f['tokens_over_baseline']:.3f}x tokens" for f in found)]
        )
    header = ["model minus its baseline", *(one["title"] for one in sets)]
    return [Heading("Side by side"), Table("Difference to the baseline in each set", header, rows)]
