"""What a report says about a set of comparable runs, as numbers: the content of `results.json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data_prep.settings import UserError
from model import flops
from model.config import MoRConfig
from model.depth import architectures
from model.memory import kv_cache_bytes_per_token
from pretrain.report import analysis
from pretrain.report.checklist import FEWEST_SEEDS, SEEDS, checks_of, open_questions
from pretrain.report.controls import buildable, decomposition, described, find_controls
from pretrain.report.runs import Run, Variant, variants
from pretrain.report.sweep import settings_of, sweep_rows

SIGNIFICANT = 0.05
ISOLATING = ("gate_only", "random_router", "gate_on_vanilla")
Results = dict[str, Any]


def build_results(
    runs: Sequence[Run],
    baseline: str | None = None,
    *,
    sweeps: Sequence[Run] = (),
    repeats: Sequence[Run] = (),
    evidence: Sequence[Results] = (),
    command: str = "",
) -> Results:
    """Everything that the report says about one comparable set of runs, ready for JSON.

    baseline: name of the variant to compare with; without it each budget takes its vanilla variant of the same width.
    sweeps, repeats: runs beside these that tried other settings, and that repeat some of these under noise. evidence:
    content of other reports' results.json; command: what ran the comparison (pretrain/report/checklist.py).
    Raises UserError for a baseline that is not among the runs.
    """
    groups = ordered_variants(runs)
    if baseline is not None and baseline not in {name for group in groups for name in (group.name, group.runs[0].name)}:
        raise UserError(f"--baseline {baseline}: no such name; there are {', '.join(sorted(g.name for g in groups))}")
    facts = runs[0].facts
    swept = [
        row
        for row in sweep_rows([run for run in sweeps if run.condition == runs[0].condition])
        if any(row["name"] == run.name or row["name"].startswith(f"{run.name}-") for run in runs)
    ]
    matched = [[g for g in groups if g in members] for members in budget_classes([g for g in groups if g.finished])]
    differences = [row for members in matched for row in difference_rows(members, baseline)]
    correct(differences)
    controls = controls_of(matched, groups)
    # A control of a method is no model of that method, to the laws of its sizes
    isolating = {found.name for present, _ in controls.values() for kind, found in present.items() if kind in ISOLATING}
    own = [[group for group in members if group.name not in isolating] for members in matched]
    results = {
        "convention": facts["convention"],
        "precision": facts["precision"],
        "attention": facts.get("attention", ""),
        "corpus": facts["corpus"],
        "data_fingerprint": facts["data_fingerprint"],
        "mixture": facts.get("mixture"),
        "tokenizer_fingerprint": facts["tokenizer_fingerprint"],
        "vocab_size": facts["vocab_size"],
        "sequence_length": facts["sequence_length"],
        "document_masking": facts["document_masking"],
        "evaluation": _evaluation(groups),
        "unigram_loss": facts["unigram_loss"],
        "bigram_loss": facts.get("bigram_loss"),
        "energy": energy_counted(runs),
        "seeds": sorted({run.seed for run in runs}),
        "runs": [run_row(group.name, run) for group in groups for run in group.runs],
        "variants": [variant_row(group) for group in groups],
        "differences": differences,
        "controls": {
            name: {"present": {kind: control.name for kind, control in found.items()}, "missing": missing}
            for name, (found, missing) in controls.items()
        },
        "decompositions": [
            row
            for members in matched
            for row in decomposition_rows(members, controls, baseline)
            if row["name"] not in isolating
        ],
        "sweep": swept,
        "noise": noise_rows(groups, repeats),
        "isoflop": isoflop_rows(own),
        "best_sizes": best_size_rows(own),
        "scaling_law": scaling_law_rows(own),
        "joint_law": joint_law(own),
    }
    checks = checks_of(results, evidence, command)
    for row in differences:
        row["open"] = open_questions(row, checks)
    for row in results["best_sizes"]:
        if "baseline" in row:  # its seeds are its own: the models of its width may have fewer
            row["open"] = [question for question in open_questions(row, checks) if question != SEEDS]
            row["open"] += [SEEDS] if row["num_seeds"] < FEWEST_SEEDS else []
    return results | {"checklist": [check.plain() for check in checks]}


def _evaluation(groups: Sequence[Variant]) -> str:
    told = "causal routing (no look-ahead); top-k routing, which sees the whole sequence, beside it"
    if any(group.losses("validation_loss_full") for group in groups):
        told += (
            "; of models with exits the causal loss is that of decoding, where tokens leave at the threshold and keys "
            "above come from the states they left with; beside it the teacher-forced one at full depth"
        )
    return told


def energy_counted(runs: Sequence[Run]) -> str | None:
    """Whose joules the runs count, all the same; None where one of them does not know its own."""
    lines = [line for run in runs for line in (*run.validations, run.last)]
    told = {run.facts.get("energy") for run in runs}
    return told.pop() if len(told) == 1 and all(line.get("joules") is not None for line in lines) else None


def ordered_variants(runs: Sequence[Run]) -> list[Variant]:
    """The variants by FLOP budget, then in the order of `architectures`, then by size."""
    order = list(architectures())

    def rank(group: Variant) -> tuple[int, float]:
        return order.index(group.architecture), group.runs[0].facts["unique_parameters"]

    return [group for members in budget_classes(variants(runs)) for group in sorted(members, key=rank)]


def run_row(variant: str, run: Run) -> Results:
    """One run as `results.json` lists it. FLOPs are the run's own count; `expected_flops` counts its tokens anew."""
    last, validation = run.last, run.last_validation
    parent_flops = (run.parent or {}).get("flops")
    counted = (run.parent or {}).get("counted", False)
    config = MoRConfig.from_dict(run.facts["model"])
    length = int(run.facts["sequence_length"])
    training: Results = next((line for line in reversed(run.lines) if "loss" in line), {})
    return {
        "name": run.name,
        "variant": variant,
        "architecture": run.architecture,
        "seed": run.seed,
        "precision": run.facts["precision"],
        "unique_parameters": run.facts["unique_parameters"],
        "effective_parameters": flops.effective_parameters(config, embeddings=False),
        "flops": last["flops"],
        "convention": run.facts["convention"],
        "tokens": last["tokens"],
        "steps": last["step"],
        "parent": run.parent,
        "own_flops": last["flops"] - (parent_flops or 0) if counted else last["flops"],
        "parent_flops": parent_flops,
        "epoch": last.get("epoch"),
        "validation_loss": validation["validation_loss"],
        "validation_loss_topk": validation.get("validation_loss_topk"),
        "validation_loss_full": validation.get("validation_loss_full"),
        "validation_step": validation["step"],
        "validation_tokens": validation.get("validation_tokens"),
        "validation_depth_shares": validation.get("validation_depth_shares"),
        "seconds": last.get("seconds"),
        "joules": last.get("joules"),
        "finished": run.finished,
        "expected_flops": {
            name: flops.flops_per_token(config, length, name) * last["tokens"] for name in flops.CONVENTIONS
        },
        **{key: training.get(key) for key in ("selection_accuracy", "dead_token_share", "max_violation")},
        "data_fingerprint": run.facts["data_fingerprint"],
        "folder": str(run.folder),
    }


def variant_row(variant: Variant) -> Results:
    """Mean and spread over the seeds of one variant, and what a generated token costs."""
    losses = list(variant.losses().values()) if variant.has_losses else []
    others = {mode: _mean_loss(variant, f"validation_loss_{mode}") for mode in ("topk", "full")}
    count = len(variant.runs)
    mean = sum(losses) / count if losses else None
    spread = (sum((x - mean) ** 2 for x in losses) / (count - 1)) ** 0.5 if mean is not None and count > 1 else None
    seconds = [run.last["seconds"] for run in variant.runs if run.last.get("seconds") is not None]
    joules = [run.last["joules"] for run in variant.runs if run.last.get("joules") is not None]
    return {
        "name": variant.name,
        "architecture": variant.architecture,
        "num_recursions": variant.model.get("num_recursions", 1),
        "seeds": [run.seed for run in variant.runs],
        "finished": variant.finished,
        "unique_parameters": variant.runs[0].facts["unique_parameters"],
        "flops": variant.flops,
        "tokens": variant.tokens,
        "steps": sum(run.last["step"] for run in variant.runs) / count,
        "seconds": sum(seconds) / len(seconds) if seconds else None,
        "joules": sum(joules) / count if len(joules) == count else None,
        "validation_loss": mean,
        "validation_loss_std": spread,
        **{f"validation_loss_{mode}": loss for mode, loss in others.items()},
        "mean_recursions": variant.mean_recursions(),
        "run_name": variant.runs[0].name,
        "effective_parameters": flops.effective_parameters(MoRConfig.from_dict(variant.model), embeddings=False),
        "epoch": _largest(run.last.get("epoch") for run in variant.runs),
        "look_ahead": _largest(run.last_validation.get("validation_look_ahead") for run in variant.runs),
        "code": list(dict.fromkeys(version for run in variant.runs for version in run.facts.get("code", []))),
        "settings": {key: value for key, value in settings_of(variant.runs[0]).items() if key[:6] != "model."},
        "model": described(MoRConfig.from_dict(variant.model)),
        **inference_costs(variant),
    }


def _mean_loss(variant: Variant, key: str) -> float | None:
    """Over the seeds whose loss of this evaluation is finite."""
    found = [loss for loss in variant.losses(key).values() if not math.isnan(loss)]
    return sum(found) / len(found) if found else None


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest; None where one is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return max(known) if known and len(known) == len(found) else None


def inference_costs(variant: Variant) -> dict[str, float]:
    """FLOPs of a forward pass and bytes of bf16 KV cache, both per token at the runs' sequence length.

    Routing is the one that validation saw, where it is known; else the expected one.
    """
    config = MoRConfig.from_dict(variant.model)
    length = int(variant.runs[0].facts["sequence_length"])
    shares = [run.last_validation.get("validation_depth_shares") for run in variant.runs]
    work = flops.expected_work(config, length, 1)
    if flops.gates_of(config) and all(shares):
        mean = [sum(column) / len(shares) for column in zip(*shares)]
        work = flops.routed_work(config, length, 1, flops.entered_of(config, mean, length))
    return {
        "inference_flops_per_token": float(sum(flops.forward_flops(config, work).values())) / length,
        "kv_bytes_per_token": kv_cache_bytes_per_token(config),
    }


def budget_classes(groups: Sequence[Variant]) -> list[list[Variant]]:
    """Split variants into classes of matched FLOPs (within 1% of the class's smallest), in order of FLOPs."""
    classes: list[list[Variant]] = []
    for group in sorted(groups, key=lambda g: g.flops):
        if classes and group.flops <= classes[-1][0].flops * (1 + analysis.MATCHED_SHARE):
            classes[-1].append(group)
        else:
            classes.append([group])
    return classes


def find_baseline(variant: Variant, members: Sequence[Variant], baseline: str | None) -> Variant:
    """The variant that `variant` is compared with: the named one, or the vanilla one of its width.

    Of several of that width, the one as deep as the deepest model that is no vanilla; then the first vanilla of all.
    """
    width = variant.model.get("hidden_size")
    named = [member for member in members if baseline in (member.name, member.runs[0].name)]
    vanilla = [member for member in members if member.architecture == "vanilla"]
    same_width = [v for v in vanilla if v.model.get("hidden_size") == width]
    others = [m for m in members if m.architecture != "vanilla" and m.model.get("hidden_size") == width]
    depth = max((_depth(other) for other in others), default=None)
    as_deep = [member for member in same_width if _depth(member) == depth]
    return (named or as_deep or same_width or vanilla or list(members))[0]


def _depth(variant: Variant) -> int:
    return int(variant.model.get("num_hidden_layers", 0))


def difference_rows(members: Sequence[Variant], baseline: str | None) -> list[Results]:
    """Paired differences to the baseline within one class of matched FLOPs."""
    rows = []
    for member in members:
        against = find_baseline(member, members, baseline)
        if member is against or not set(member.losses()) & set(against.losses()):
            continue
        losses, theirs = member.losses(), against.losses()
        difference = analysis.paired_difference(losses, theirs)
        rows.append(
            {
                "name": member.name,
                "architecture": member.architecture,
                "baseline": against.name,
                "flops": member.flops,
                "flops_over_baseline": member.flops / against.flops - 1,
                "exact_over_baseline": exact_flops(member) / exact_flops(against) - 1,
                "tokens_over_baseline": member.tokens / against.tokens,
                **analysis.plain(difference),
                "by_seed": [losses[seed] - theirs[seed] for seed in sorted(set(losses) & set(theirs))],
            }
        )
    return rows


def exact_flops(variant: Variant) -> float:
    """FLOPs of a variant by the exact count: the run's own, or its tokens counted anew at the expected routing."""
    if variant.runs[0].facts["convention"] == "exact":
        return variant.flops
    config, length = MoRConfig.from_dict(variant.model), int(variant.runs[0].facts["sequence_length"])
    return flops.flops_per_token(config, length) * variant.tokens


def correct(rows: Sequence[Results]) -> None:
    """Add to every difference its p value corrected for their number, and judge it by that."""
    tested = [row for row in rows if row["p_value"] is not None]
    for row in rows:
        row["p_holm"] = None
    for row, p_value in zip(tested, analysis.holm([row["p_value"] for row in tested])):
        row["p_holm"] = p_value
        row["verdict"] = "within noise" if p_value >= SIGNIFICANT else "worse" if row["mean"] > 0 else "better"


def controls_of(
    matched: Sequence[Sequence[Variant]], groups: Sequence[Variant]
) -> dict[str, tuple[dict[str, Variant], list[str]]]:
    """For every variant that routes: the controls that are there, kind -> variant, and the kinds that are missing."""
    rows: dict[str, tuple[dict[str, Variant], list[str]]] = {}
    for members in matched:
        vanilla = any(member.architecture == "vanilla" for member in members)
        for member in members:
            length = int(member.runs[0].facts["sequence_length"])
            if kinds := buildable(member.model, vanilla, length):
                found = find_controls(member, kinds, members, groups)
                rows[member.name] = found, [kind for kind in kinds if kind not in found]
    return rows


def decomposition_rows(
    members: Sequence[Variant], controls: Mapping[str, tuple[dict[str, Variant], list[str]]], baseline: str | None
) -> list[Results]:
    """What the difference of each routed variant is made of, where a control lies on the way to it."""
    rows = []
    for member in members:
        against = find_baseline(member, members, baseline)
        found = controls.get(member.name, ({}, []))[0]
        if member is against or not found:
            continue
        steps, tokens = decomposition(member, against, found), None
        same = found.get("equal_tokens")
        if same is not None and set(same.losses()) & set(member.losses()):
            difference = analysis.paired_difference(member.losses(), same.losses())
            tokens = {"baseline": same.name, "baseline_flops": same.flops, **analysis.plain(difference)}
        if len(steps) > 1 or tokens:
            told = {"name": member.name, "baseline": against.name, "flops": member.flops}
            rows.append(told | {"steps": steps, "equal_tokens": tokens})
    return rows


def noise_rows(groups: Sequence[Variant], repeats: Sequence[Run]) -> list[Results]:
    """Standard deviation of one loss under each kind of noise: the seed (of all variants together), and what
    `repeats` change of runs that are here: the order of the data, the precision."""
    rows: list[Results] = []
    several = [list(group.losses().values()) for group in groups if group.has_losses and len(group.runs) > 1]
    if several:
        freedom = sum(len(losses) - 1 for losses in several)
        squares = sum((loss - sum(losses) / len(losses)) ** 2 for losses in several for loss in losses)
        rows.append({"kind": "seed", "deviation": (squares / freedom) ** 0.5, "runs": freedom + len(several)})
    pairs: dict[str, list[tuple[float, float]]] = {}
    for repeat in repeats:
        loss = repeat.last_validation.get("validation_loss")
        twins = [
            run
            for group in groups
            for run in group.runs
            if run.seed == repeat.seed
            and run.facts["model"] == repeat.facts["model"]
            and abs(run.last["flops"] / repeat.last["flops"] - 1) < analysis.MATCHED_SHARE
        ]
        for run in twins[:1]:
            own = run.last_validation.get("validation_loss")
            if own is not None and loss is not None and repeat.finished:
                kind = "precision" if run.facts["precision"] != repeat.facts["precision"] else "order"
                pairs.setdefault(kind, []).append((own, loss))
    rows += [
        {"kind": kind, "deviation": analysis.noise_of_pairs(found), "runs": len(found)} for kind, found in pairs.items()
    ]
    return rows


def isoflop_rows(matched: Sequence[Sequence[Variant]]) -> list[Results]:
    """A parabola per architecture and class of matched FLOPs, where there are at least three sizes."""
    rows = []
    for members in matched:
        for architecture in dict.fromkeys(member.architecture for member in members):
            same = [member for member in members if member.architecture == architecture and member.has_losses]
            sizes, losses = [], []
            for member in same:
                size = flops.effective_parameters(MoRConfig.from_dict(member.model), embeddings=False)
                sizes += [float(size)] * len(member.runs)
                losses += list(member.losses().values())
            if len(set(sizes)) >= 3:
                fit = analysis.fit_isoflop(sizes, losses)
                budget = sum(member.flops for member in same) / len(same)
                rows.append(
                    {
                        "architecture": architecture,
                        "flops": budget,
                        "effective_parameters": sizes,
                        "losses": losses,
                        "fit": asdict(fit),
                    }
                )
    return rows


def best_size_rows(matched: Sequence[Sequence[Variant]]) -> list[Results]:
    """Each architecture at the best of its sizes, with its paired difference to vanilla at the best of vanilla's.

    Per class of matched FLOPs, of architectures with at least three sizes. The best is that of the lowest mean loss
    over the seeds that all of its sizes have. at: whether it is `inside` the sizes tried, or the `smallest` or
    `largest` of them.
    """
    rows: list[Results] = []
    for members in matched:
        best: dict[str, tuple[Variant, str]] = {}
        for architecture in dict.fromkeys(member.architecture for member in members):
            same = [member for member in members if member.architecture == architecture and member.has_losses]
            shared = set.intersection(*(set(member.losses()) for member in same)) if same else set()
            size = {group.name: flops.effective_parameters(MoRConfig.from_dict(group.model)) for group in same}
            if len(set(size.values())) < 3 or not shared:
                continue
            found = min(same, key=lambda group: sum(group.losses()[seed] for seed in shared))
            ends = {min(size.values()): "smallest", max(size.values()): "largest"}
            best[architecture] = found, ends.get(size[found.name], "inside")
        against = best.get("vanilla", (None, ""))[0]
        for architecture, (found, place) in best.items():
            row: Results = {"name": found.name, "architecture": architecture, "flops": found.flops, "at": place}
            compared = against is not None and found is not against
            if compared and against is not None and set(found.losses()) & set(against.losses()):
                difference = analysis.paired_difference(found.losses(), against.losses())
                row |= {"baseline": against.name, **analysis.plain(difference)}
            rows.append(row)
    correct([row for row in rows if "baseline" in row])
    return rows


def recurs(group: Variant) -> bool:
    """Whether the variant's model applies a block several times; methods that skip layers do not."""
    return int(group.model.get("num_recursions", 1)) > 1


def law_points(groups: Sequence[Variant]) -> list[tuple[float, float, float, float, float]]:
    """(parameters applied once, of the shared block, mean recursions, tokens, loss) of every run that has a loss."""
    points: list[tuple[float, float, float, float, float]] = []
    for group in groups:
        config = MoRConfig.from_dict(group.model)
        layer = flops.layer_parameters(config)
        once = layer * flops.unshared_layers(config)
        shared = layer * flops.recursion_layers(config) if config.num_recursions > 1 else 0
        for run in group.runs:
            loss = run.last_validation["validation_loss"]
            if loss is not None:
                points.append((once, shared, group.mean_recursions(), run.last["tokens"], loss))
    return points


def scaling_law_rows(matched: Sequence[Sequence[Variant]]) -> list[Results]:
    """The joint law for each looped architecture together with the vanilla runs; a note where they cannot tell it."""
    groups = [group for members in matched for group in members]
    looped = dict.fromkeys(group.architecture for group in groups if recurs(group))
    if (note := _too_few_budgets(matched)) is not None:
        return [{"architecture": architecture, "fit": None, "note": note} for architecture in looped]
    rows: list[Results] = []
    for architecture in looped:
        points = law_points([group for group in groups if group.architecture in ("vanilla", architecture)])
        try:
            once, recurrent, recursions, tokens, losses = (list(column) for column in zip(*points))
            fit = analysis.fit_scaling_law(once, recurrent, recursions, tokens, losses)
        except ValueError as error:
            rows.append({"architecture": architecture, "fit": None, "note": str(error)})
        else:
            rows.append({"architecture": architecture, "fit": asdict(fit), "note": ""})
    return rows


def joint_law(matched: Sequence[Sequence[Variant]]) -> Results | None:
    """One law for vanilla and all that recur, with phi of each; None where the runs cannot tell it, or of one alone.

    A method that leaves out layers of its own, as Mixture-of-Depths does, applies fewer parameters than it has: its
    runs would bend the constants that all share.
    """
    groups = [group for members in matched for group in members if group.architecture == "vanilla" or recurs(group)]
    if _too_few_budgets(matched) or len({group.architecture for group in groups if recurs(group)}) < 2:
        return None
    points = [(*point, group.architecture) for group in groups for point in law_points([group])]
    try:
        once, recurrent, recursions, tokens, losses, methods = (list(column) for column in zip(*points))
        return asdict(analysis.fit_joint_law(once, recurrent, recursions, tokens, losses, methods))
    except ValueError:
        return None


def _too_few_budgets(matched: Sequence[Sequence[Variant]]) -> str | None:
    """Why no law is fitted to runs of one budget: size and tokens would be one variable."""
    budgets = sum(any(map(recurs, members)) for members in matched)
    return None if budgets > 1 else f"losses: {budgets} FLOP budget of looped models (at least 2) tells no law"


def merge_sets(sets: Sequence[Results]) -> Results:
    """`results.json` of sets that are shown apart: all runs in `runs`, each with its convention, and the sets whole."""
    return {
        "convention": "mixed" if len({one["convention"] for one in sets}) > 1 else sets[0]["convention"],
        "unigram_loss": sets[0]["unigram_loss"] if len({one["unigram_loss"] for one in sets}) == 1 else None,
        "checklist": [check for one in sets for check in one["checklist"]],
        "runs": [row for one in sets for row in one["runs"]],
        "sets": list(sets),
    }
