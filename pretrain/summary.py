"""What a report says about a set of comparable runs, as numbers: the content of `results.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_prep.settings import UserError
from model import flops
from model.config import MoRConfig
from model.depth import architectures
from model.memory import kv_cache_bytes_per_token
from pretrain import analysis
from pretrain.runs import Run, Variant, variants

MATCHED_SHARE = 0.01  # FLOPs of two variants that differ by less are called matched
Results = dict[str, Any]


def build_results(runs: Sequence[Run], baseline: str | None = None) -> Results:
    """Everything that the report says about one comparable set of runs, ready for JSON.

    baseline: name of the variant to compare with; without it each budget takes its vanilla variant of the same width.
    Raises UserError for a baseline that is not among the runs.
    """
    groups = ordered_variants(runs)
    if baseline is not None and baseline not in {group.name for group in groups}:
        raise UserError(f"--baseline {baseline}: no such name; there are {', '.join(sorted(g.name for g in groups))}")
    facts = runs[0].facts
    matched = [[g for g in groups if g in members] for members in budget_classes([g for g in groups if g.finished])]
    return {
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
        "evaluation": "causal routing (no look-ahead); top-k routing, which sees the whole sequence, beside it",
        "unigram_loss": facts["unigram_loss"],
        "seeds": sorted({run.seed for run in runs}),
        "runs": [run_row(group.name, run) for group in groups for run in group.runs],
        "variants": [variant_row(group) for group in groups],
        "differences": [row for members in matched for row in difference_rows(members, baseline)],
        "isoflop": isoflop_rows(matched),
        "scaling_law": scaling_law_rows([group for group in groups if group.finished]),
    }


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
        "validation_step": validation["step"],
        "validation_tokens": validation.get("validation_tokens"),
        "validation_depth_shares": validation.get("validation_depth_shares"),
        "seconds": last.get("seconds"),
        "finished": run.finished,
        "expected_flops": {
            name: flops.flops_per_token(config, length, name) * last["tokens"] for name in flops.CONVENTIONS
        },
        **{key: training.get(key) for key in ("selection_accuracy", "dead_token_share", "max_violation")},
        "folder": str(run.folder),
    }


def variant_row(variant: Variant) -> Results:
    """Mean and spread over the seeds of one variant, and what a generated token costs."""
    losses = list(variant.losses().values()) if variant.has_losses else []
    topk = [loss for loss in variant.losses("validation_loss_topk").values() if not math.isnan(loss)]
    count = len(variant.runs)
    mean = sum(losses) / count if losses else None
    spread = (sum((x - mean) ** 2 for x in losses) / (count - 1)) ** 0.5 if mean is not None and count > 1 else None
    seconds = [run.last["seconds"] for run in variant.runs if run.last.get("seconds") is not None]
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
        "validation_loss": mean,
        "validation_loss_std": spread,
        "validation_loss_topk": sum(topk) / len(topk) if topk else None,
        "mean_recursions": variant.mean_recursions(),
        **inference_costs(variant),
    }


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
        if classes and group.flops <= classes[-1][0].flops * (1 + MATCHED_SHARE):
            classes[-1].append(group)
        else:
            classes.append([group])
    return classes


def find_baseline(variant: Variant, members: Sequence[Variant], baseline: str | None) -> Variant:
    """The variant that `variant` is compared with: the named one, or vanilla of its width, or the first vanilla."""
    named = [member for member in members if member.name == baseline]
    vanilla = [member for member in members if member.architecture == "vanilla"]
    same_width = [v for v in vanilla if v.model.get("hidden_size") == variant.model.get("hidden_size")]
    return (named or same_width or vanilla or list(members))[0]


def difference_rows(members: Sequence[Variant], baseline: str | None) -> list[Results]:
    """Paired differences to the baseline within one class of matched FLOPs."""
    rows = []
    for member in members:
        against = find_baseline(member, members, baseline)
        if member is against or not set(member.losses()) & set(against.losses()):
            continue
        difference = analysis.paired_difference(member.losses(), against.losses())
        rows.append(
            {
                "name": member.name,
                "architecture": member.architecture,
                "baseline": against.name,
                "flops": member.flops,
                "flops_over_baseline": member.flops / against.flops - 1,
                "tokens_over_baseline": member.tokens / against.tokens,
                **asdict(difference),
                "verdict": difference.verdict,
            }
        )
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


def scaling_law_rows(groups: Sequence[Variant]) -> list[Results]:
    """The joint law for each looped architecture together with the vanilla runs; a note where they cannot tell it."""
    rows: list[Results] = []
    vanilla = [group for group in groups if group.architecture == "vanilla"]
    for architecture in dict.fromkeys(g.architecture for g in groups if g.architecture != "vanilla"):
        points = []
        for group in [*vanilla, *(g for g in groups if g.architecture == architecture)]:
            config = MoRConfig.from_dict(group.model)
            layer = flops.layer_parameters(config)
            once = layer * flops.unshared_layers(config)
            shared = layer * flops.recursion_layers(config) if config.num_recursions > 1 else 0
            for run in group.runs:
                loss = run.last_validation["validation_loss"]
                if loss is None:
                    continue
                points.append((once, shared, group.mean_recursions(), run.last["tokens"], loss))
        try:
            n_once, n_recurrent, recursions, tokens, losses = (list(column) for column in zip(*points))
            fit = analysis.fit_scaling_law(n_once, n_recurrent, recursions, tokens, losses)
        except ValueError as error:
            rows.append({"architecture": architecture, "fit": None, "note": str(error)})
        else:
            rows.append({"architecture": architecture, "fit": asdict(fit), "note": ""})
    return rows


def merge_sets(sets: Sequence[Results]) -> Results:
    """`results.json` of sets that are shown apart: all runs in `runs`, each with its convention, and the sets whole."""
    return {
        "convention": "mixed" if len({one["convention"] for one in sets}) > 1 else sets[0]["convention"],
        "unigram_loss": sets[0]["unigram_loss"] if len({one["unigram_loss"] for one in sets}) == 1 else None,
        "runs": [row for one in sets for row in one["runs"]],
        "sets": list(sets),
    }
