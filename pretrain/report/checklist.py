"""What a sceptic asks of a comparison, answered from its figures: what passes, what holds up which claim, what to run.

Every answer is computed from `results.json`'s content, none is written. A claim, which is a difference to a baseline,
stands where every answer that concerns its model or its baseline passes; else the report says what is missing.
Evidence is the content of other reports' `results.json`: it may stand for sweeps, sizes and controls where its corpus,
tokenizer, sequence length and budget are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.report.analysis import MATCHED_SHARE
from pretrain.report.controls import EQUAL_TOKENS_SHARE, control_fields, same_model

LOOK_AHEAD = 0.01  # what rounding may do: nats, or the share of tokens that take another depth
TOKENS_PER_PARAMETER = 15  # below it a model is far from its compute optimum (about 20: arXiv 2203.15556)
FEWEST_SEEDS = 3
FEWEST_SHARE = 0.1  # a sweep whose last runs are shorter, relative to the runs it settles, settles nothing
SEEDS = "seeds"
SAME = ("corpus", "tokenizer_fingerprint", "vocab_size", "sequence_length", "document_masking", "convention")
COMMAND = "python launchers/compare.py --config configs/compare/NAME.yaml"
Results = dict[str, Any]
Row = Mapping[str, Any]


@dataclass
class Check:
    """An answer. holds_up: variants whose claims wait for it, with why; needs: the command of what is missing."""

    question: str
    answer: str
    holds_up: dict[str, str] = field(default_factory=dict)
    needs: str = ""

    @property
    def passed(self) -> bool:
        return not self.holds_up

    def plain(self) -> Results:
        return asdict(self) | {"passed": self.passed}


def checks_of(results: Results, evidence: Sequence[Results] = (), command: str = "") -> list[Check]:
    """Every question with its answer. command: what ran the comparison, for the commands of what is missing."""
    fitting = [other for other in evidence if all(other.get(key) == results[key] for key in SAME)]
    asked: list[Callable[[Results, Sequence[Results], str], Check]] = [
        _causal, _flops, _tokens, _size, _rate, _seeds, _controls, _precision, _fresh, _data, _code,
    ]  # fmt: skip
    return [ask(results, fitting, command or COMMAND) for ask in asked]


def open_questions(row: Row, checks: Sequence[Check]) -> list[str]:
    """The questions whose answers hold up a difference."""
    concerned = {row["name"], row["baseline"]}
    return [check.question for check in checks if concerned & set(check.holds_up)]


# --- the questions ------------------------------------------------------------------------------------------------


def _causal(results: Results, evidence: Sequence[Results], command: str) -> Check:
    check = Check("causal evaluation", "")
    measured = [row["look_ahead"] for row in results["variants"] if row["look_ahead"] is not None]
    for row in results["variants"]:
        if row["validation_loss"] is None:
            check.holds_up[row["name"]] = "has no causal loss"
        elif row["look_ahead"] is None:
            check.holds_up[row["name"]] = "was not measured: it was trained by an older version"
        elif row["look_ahead"] > LOOK_AHEAD:
            check.holds_up[row["name"]] = f"looks ahead: later tokens move earlier ones by {row['look_ahead']:.4f}"
    check.answer = (
        f"later tokens move losses and depths of earlier ones by {max(measured):.1e} at most"
        if measured
        else "not known"
    )
    check.needs = f"{command} output=runs/again" if check.holds_up else ""
    return check


def _flops(results: Results, evidence: Sequence[Results], command: str) -> Check:
    rows = results["differences"]
    gaps = {row["name"]: abs(row["exact_over_baseline"]) for row in rows}
    widest = max(gaps.values(), default=0.0)
    check = Check("equal FLOPs", f"exact FLOPs equal within {widest:.2%}" if rows else "nothing is compared")
    for name, gap in gaps.items():
        if gap > MATCHED_SHARE:
            check.holds_up[name] = f"{gap:.1%} apart by exact count"
    check.needs = f"{command} with budgets of convention exact" if check.holds_up else ""
    return check


def _tokens(results: Results, evidence: Sequence[Results], command: str) -> Check:
    ratios = {row["name"]: row["tokens"] / row["unique_parameters"] for row in results["variants"]}
    told = f"{min(ratios.values()):.3g} to {max(ratios.values()):.3g}; at least {TOKENS_PER_PARAMETER} are asked for"
    check = Check("tokens per parameter", told)
    for name, ratio in ratios.items():
        if ratio < TOKENS_PER_PARAMETER:
            check.holds_up[name] = f"{ratio:.3g} tokens per parameter"
    if check.holds_up:
        most = max(row["flops"] for row in results["variants"])
        check.needs = f"{command} 'budgets=[{{flops: {most * TOKENS_PER_PARAMETER / min(ratios.values()):.1e}}}]'"
    return check


def _size(results: Results, evidence: Sequence[Results], command: str) -> Check:
    check, told = Check("size", "nothing is compared"), []
    variants = {row["name"]: row for row in results["variants"]}
    for name in dict.fromkeys(row["baseline"] for row in results["differences"]):
        row = variants[name]
        found = [_bracket(row, source["variants"]) for source in (results, *evidence)]
        if any(better is None for better in found):
            told.append(f"{name}: a smaller and a larger vanilla are both worse")
        else:
            check.holds_up[name] = str(found[0])
            layers = row["model"]["num_hidden_layers"]
            shape = {key: row["model"][key] for key in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                        "num_key_value_heads")}  # fmt: skip
            sizes = [("smaller", max(1, layers // 2)), ("larger", 2 * layers)]
            models = [f"'models.{word}={json.dumps(shape | {'num_hidden_layers': n})}'" for word, n in sizes]
            check.needs = f"{command} {' '.join(models)}"
    if check.holds_up:
        told.append(f"{len(check.holds_up)} vanilla models are not bracketed")
    check.answer = "; ".join(told) or check.answer
    return check


def _bracket(row: Row, variants: Iterable[Row]) -> str | None:
    """Why a baseline's size is not bracketed by these variants; None where it is."""
    same = [
        (other["effective_parameters"], other["validation_loss"])
        for other in variants
        if other["architecture"] == "vanilla" and other["validation_loss"] is not None and _matched(other, row)
    ]
    size = row["effective_parameters"]
    own = [loss for found, loss in same if abs(found / size - 1) < MATCHED_SHARE]
    if not own:
        return "its size is not bracketed"
    sides = {
        "smaller": [loss for found, loss in same if found < size * (1 - MATCHED_SHARE)],
        "larger": [loss for found, loss in same if found > size * (1 + MATCHED_SHARE)],
    }
    missing = [side for side, losses in sides.items() if not losses]
    better = [side for side, losses in sides.items() if losses and min(losses) < min(own)]
    if missing:
        return f"no {' and no '.join(missing)} vanilla was tried"
    return f"a {' and a '.join(better)} vanilla is better" if better else None


def _matched(one: Row, other: Row) -> bool:
    """Whether two variants spent the same FLOPs."""
    return abs(one["flops"] / other["flops"] - 1) < MATCHED_SHARE


def _rate(results: Results, evidence: Sequence[Results], command: str) -> Check:
    check, settled = Check("learning rate", ""), 0
    for row in results["variants"]:
        found = [found for found in results["sweep"] if _swept(found, row)] or _swept_elsewhere(evidence, row)
        if why := _unsettled(row, found):
            check.holds_up[row["name"]] = why
        else:
            settled += 1
    check.answer = f"{settled} of {len(results['variants'])} models run at the best of their own sweep, inside its grid"
    if check.holds_up:
        row = next(row for row in results["variants"] if row["name"] in check.holds_up)
        rate = row["settings"].get("optimizer.learning_rate", 3e-3)
        check.needs = f"{command} 'sweep.optimizer.learning_rate=[{rate / 2:g}, {rate:g}, {rate * 2:g}, {rate * 4:g}]'"
    return check


def _swept(found: Row, row: Row) -> bool:
    """Whether a sweep is one of this variant, by name and budget."""
    name = str(row["run_name"])
    return (found["name"] == name or found["name"].startswith(f"{name}-")) and found["flops"] <= 1.01 * row["flops"]


def _swept_elsewhere(evidence: Sequence[Results], row: Row) -> list[Row]:
    """Sweeps of this model in other comparisons: of its own budget where there are any, else of others below it.

    The same model may stand there at a larger budget too (vanilla at equal tokens), whose sweep is about its own rate.
    """
    sweeps = [
        (found, other)
        for other in evidence
        for found in other.get("sweep", [])
        if same_model(found["model"], row["model"]) and found["flops"] <= 1.01 * row["flops"]
    ]
    of_its_budget = [
        found
        for found, other in sweeps
        if any(_swept(found, variant) and _matched(variant, row) for variant in other["variants"])
    ]
    return of_its_budget or [found for found, _ in sweeps]


def _unsettled(row: Row, sweeps: Sequence[Row]) -> str:
    if not sweeps:
        return "its rate was not swept"
    found = max(sweeps, key=lambda sweep: sweep["flops"])
    if "optimizer.learning_rate" not in found["keys"]:
        return "its rate was not swept"
    if found["flops"] < FEWEST_SHARE * row["flops"]:
        return f"its sweep's longest runs are {found['flops'] / row['flops']:.0%} of its own"
    if found["edge"]:
        values = ", ".join(f"{key} {found['winner'][key]}" for key in found["edge"])
        return f"the winner of its sweep is at the edge of the grid ({values})"
    used = {key: row["settings"].get(key) for key in found["winner"]}
    if used not in (found["winner"], *found["ties"]):
        told = [f"{key} {used[key]}, {value} won" for key, value in found["winner"].items() if used[key] != value]
        return f"runs at {', '.join(told)}"
    return ""


def _seeds(results: Results, evidence: Sequence[Results], command: str) -> Check:
    rows = results["differences"]
    fewest = min((row["num_seeds"] for row in rows), default=0)
    widths = [row["high"] - row["mean"] for row in rows if row["high"] is not None]
    width = f"; widest 95% interval ±{max(widths):.4f} nats" if widths else ""
    check = Check(SEEDS, f"{fewest} or more, paired{width}; at least {FEWEST_SEEDS} are asked for")
    for row in rows:
        if row["num_seeds"] < FEWEST_SEEDS:
            check.holds_up[row["name"]] = f"{row['num_seeds']} seeds"
    check.needs = f"{command} --until 0.02" if check.holds_up else ""
    return check


def _controls(results: Results, evidence: Sequence[Results], command: str) -> Check:
    check, present = Check("controls", ""), set()
    controls = {name for found in results["controls"].values() for name in found["present"].values()}
    missing_kinds: dict[str, None] = {}
    for name, found in results["controls"].items():
        if name in controls:
            continue
        row = next(row for row in results["variants"] if row["name"] == name)
        elsewhere = {kind for kind in found["missing"] if any(_has_control(kind, row, other) for other in evidence)}
        present |= {*found["present"], *elsewhere}
        if missing := [kind for kind in found["missing"] if kind not in elsewhere]:
            check.holds_up[name] = f"lacks {', '.join(missing)}"
            missing_kinds |= dict.fromkeys(missing)
    check.answer = f"present: {', '.join(sorted(present)) or 'none'}"
    check.needs = f"{command} 'controls=[{', '.join(missing_kinds)}]'" if missing_kinds else ""
    return check


def _has_control(kind: str, row: Row, other: Results) -> bool:
    """Whether another report holds a control of this variant at its budget."""
    for variant in other["variants"]:
        if kind == "equal_tokens":
            share = abs(variant["tokens"] / row["tokens"] - 1)
            if variant["architecture"] == "vanilla" and share < EQUAL_TOKENS_SHARE:
                return True
        elif _matched(variant, row):
            wanted = control_fields(kind, row["model"], None, int(other["sequence_length"]))
            if same_model(variant["model"], wanted):
                return True
    return False


def _precision(results: Results, evidence: Sequence[Results], command: str) -> Check:
    noise = {row["kind"]: row["deviation"] for row in results["noise"]}
    told = f"; the other precision moves a loss by {noise['precision']:.4f}" if "precision" in noise else ""
    if others := sorted({other["precision"] for other in evidence} - {results["precision"]}):
        told += f"; other reports that answer here are of {', '.join(others)}"
    return Check("precision", f"{results['precision']} for all{told}")


def _fresh(results: Results, evidence: Sequence[Results], command: str) -> Check:
    epochs = {row["name"]: row["epoch"] for row in results["variants"]}
    known = [value for value in epochs.values() if value is not None]
    check = Check("fresh data", f"at most {max(known):.2f} of the corpus was seen" if known else "not known")
    for name, value in epochs.items():
        if value is None:
            check.holds_up[name] = "does not say how much of its data it saw"
        elif value > 1:
            check.holds_up[name] = f"saw its data {value:.2f} times"
    if check.holds_up:
        needed = max(row["tokens"] for row in results["variants"])
        check.needs = f"{command} with a corpus of {needed:.2g} training tokens or more (overrides.data.folder=FOLDER)"
    return check


def _data(results: Results, evidence: Sequence[Results], command: str) -> Check:
    fingerprint = str(results["data_fingerprint"])[:12]
    check = Check("one corpus, one tokenizer", f"{results['corpus']} ({fingerprint}), {results['vocab_size']} tokens")
    first = results["runs"][0]["data_fingerprint"]
    for row in results["runs"]:
        if row["data_fingerprint"] != first:
            check.holds_up[row["variant"]] = "was trained on other data"
    check.needs = f"{command} output=runs/again" if check.holds_up else ""
    return check


def _code(results: Results, evidence: Sequence[Results], command: str) -> Check:
    versions = {row["name"]: row["code"] for row in results["variants"]}
    every = sorted({version for found in versions.values() for version in found})
    check = Check("one version of the code", ", ".join(every) or "not known")
    usual = max(every, key=lambda version: sum(found == [version] for found in versions.values()), default="")
    for name, found in versions.items():
        if not found:
            check.holds_up[name] = "does not say by which version it was trained"
        elif found != [usual]:
            check.holds_up[name] = f"was trained by {', '.join(found)}, most by {usual}"
    check.needs = f"{command} output=runs/again" if check.holds_up else ""
    return check
