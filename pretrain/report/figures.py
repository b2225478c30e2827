"""The report's figures: variants and fits in, matplotlib figures out. Colour stands for the architecture throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from model.config import MoRConfig
from model.depth import architectures, method_of
from pretrain.report.analysis import Isoflop, PairedDifference
from pretrain.report.runs import Run, Variant

MARKERS = "osD^vP*X"
DEPTH_COLOURS = "viridis"
MANY = 12  # variants, beyond which a legend names architectures
MAX_PANELS = 9
COUNTED = {"unigram model": ":", "bigram model": "-."}  # models of counts, and their lines
LOSS_LABEL = "validation loss (nats per token, causal routing)"
IsoflopCurve = tuple[float, Sequence[float], Sequence[float], Isoflop]  # budget, parameters [n], losses [n], fit
AXIS_LABEL = {
    "flops": "training FLOPs",
    "tokens": "training tokens",
    "seconds": "seconds in training steps",
    "joules": "joules in training steps",
}


def looks_ahead(variant: Variant) -> bool:
    """Whether it is evaluated by top-k too, which sees the whole sequence."""
    config = MoRConfig.from_dict(variant.model)
    return "topk" in method_of(config).modes(config)


def has_exits(variant: Variant) -> bool:
    """Whether tokens leave it at exits, which they do outside training alone."""
    config = MoRConfig.from_dict(variant.model)
    return "full" in method_of(config).modes(config)


def styles(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Plot style per variant: colour by architecture, lightness and marker apart within one architecture."""
    result = {}
    for architecture, colour in architectures().items():
        same = [variant for variant in variants if variant.architecture == architecture]
        for place, variant in enumerate(same):
            lighter = 0.55 * place / max(1, len(same) - 1)
            mixed = tuple(channel + (1 - channel) * lighter for channel in matplotlib.colors.to_rgb(colour))
            result[variant.name] = {"color": mixed, "marker": MARKERS[place % len(MARKERS)]}
    return result


def _curve(run: Run, x: str, y: str) -> tuple[list[float], list[float]]:
    points = [(line[x], line[y]) for line in run.validations if line.get(y) is not None and line[x] > 0]
    return [point[0] for point in points], [point[1] for point in points]


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, variants: Sequence[Variant]) -> None:
    """Name the variants, or, where they are too many to tell apart, their architectures."""
    style = styles(variants)
    if len(variants) > MANY:
        names: dict[str, dict[str, Any]] = {
            v.architecture: {"color": architectures()[v.architecture], "marker": "o"} for v in variants
        }
    else:
        names = {v.name: style[v.name] for v in variants}
    handles = [axes.plot([], [], ls="-", label=name, **look)[0] for name, look in names.items()]
    if any(looks_ahead(v) for v in variants):
        handles += axes.plot([], [], color="#555555", ls="--", lw=1, label="top-k routing (sees the whole sequence)")
    handles += [line for line in axes.get_lines() if line.get_label() in COUNTED]
    axes.legend(handles=handles, fontsize=8, frameon=False)


def loss_curves(variants: Sequence[Variant], x: str, counted: Mapping[str, float], note: str) -> Figure:
    """Validation loss against `x` (of AXIS_LABEL), a line per seed; beside it, the last losses enlarged.

    counted: losses of models of counts, names as in COUNTED, drawn across.
    Dashed lines and hollow markers: top-k routing that sees the whole sequence, where it changes the loss.
    """
    figure, (axes, finals) = plt.subplots(
        1, 2, figsize=(12, max(5.0, 0.25 * len(variants))), width_ratios=(3, 2), layout="constrained"
    )
    style = styles(variants)
    for variant in variants:
        colour = style[variant.name]["color"]
        alpha = 0.9 / len(variant.runs) ** 0.5
        for run in variant.runs:
            axes.plot(*_curve(run, x, "validation_loss"), color=colour, lw=1.6, alpha=alpha)
            if looks_ahead(variant):
                axes.plot(*_curve(run, x, "validation_loss_topk"), color=colour, lw=1, ls="--", alpha=alpha)
        at = float(np.mean([run.last[x] for run in variant.runs]))
        axes.plot(at, np.mean(list(variant.losses().values())), ms=7, markeredgecolor="white", **style[variant.name])
    for name, loss in counted.items():
        axes.axhline(loss, color="#777777", ls=COUNTED[name], lw=1.2, label=name)
    worst = max(loss for variant in variants for loss in variant.losses().values())
    axes.set_ylim(top=max(*counted.values(), worst) + 0.15)  # the first, steep part of the curves is cut
    axes.set(xlabel=f"{AXIS_LABEL[x]}{note}", ylabel=LOSS_LABEL, xscale="log")
    _finish(axes)
    _legend(axes, variants)
    _final_losses(finals, variants)
    return figure


def _final_losses(axes: Axes, variants: Sequence[Variant]) -> None:
    """The last loss of every run, a row per variant, with the mean in words; hollow, that by top-k or at full depth."""
    style = styles(variants)
    for place, variant in enumerate(variants):
        look = style[variant.name]
        losses = list(variant.losses().values())
        if looks_ahead(variant) or has_exits(variant):
            beside = variant.losses("validation_loss_full" if has_exits(variant) else "validation_loss_topk")
            axes.plot(list(beside.values()), [place] * len(beside), ls="", ms=5, mfc="white", **look)
        axes.plot(losses, [place] * len(losses), ls="", ms=6, **look)
        spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        axes.annotate(f"{np.mean(losses):.4f}{spread}", (float(np.mean(losses)), place), xytext=(0, 6),
                      textcoords="offset points", fontsize=8, ha="center")  # fmt: skip
    axes.set(yticks=range(len(variants)), yticklabels=[v.name for v in variants], ylim=(len(variants) - 0.4, -0.7))
    full = ", of exits: full depth" if any(has_exits(variant) for variant in variants) else ""
    axes.set_xlabel(f"last validation loss; filled: causal, hollow: top-k{full}")
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.2)
    _finish(axes)


def depth_shares(variants: Sequence[Variant]) -> Figure | None:
    """Share of tokens by the gates that they passed, over training: a panel per routed variant, its first seed.

    In training; of models with exits, which nobody takes there, in validation. Of many variants, the last `MAX_PANELS`
    (those of the largest budgets) are drawn.
    """
    routed = [v for v in variants if _depths(v)][-MAX_PANELS:]
    if not routed:
        return None
    columns = min(3, len(routed))
    rows = -(-len(routed) // columns)
    size = (4.2 * columns, 0.6 + 2.9 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes in grid.flat[len(routed) :]:
        axes.set_visible(False)
    most = max(len(_depths(variant)[0][1]) for variant in routed)
    colours = matplotlib.colormaps[DEPTH_COLOURS](np.linspace(0.1, 0.95, most))
    for variant, axes in zip(routed, grid.flat):
        run = variant.runs[0]
        tokens, rows_of = zip(*_depths(variant))
        shares = np.array(rows_of).T  # [G + 1, lines]
        axes.stackplot(tokens, shares, colors=colours, labels=[f"{depth}" for depth in range(len(shares))])
        axes.set(ylim=(0, 1), xlim=(tokens[0], max(tokens[-1], tokens[0] + 1)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        where = ", in validation" if has_exits(variant) else ""
        axes.set_title(f"{variant.name}, seed {run.seed}{where}", fontsize=9)
    figure.supxlabel("training tokens", fontsize=9)
    grid.flat[0].set_ylabel("share of tokens")
    handles, names = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda pair: len(pair[1]))
    recurs = all(variant.model.get("num_recursions", 1) == len(_depths(variant)[0][1]) - 1 for variant in routed)
    title = "recursions executed" if recurs else "gates passed"
    figure.legend(handles, names, title=title, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _depths(variant: Variant) -> list[tuple[float, list[float]]]:
    """(tokens so far, share of tokens by the number of gates that they passed) of the first seed's lines."""
    run = variant.runs[0]
    if not run.depth_lines:
        return []
    if has_exits(variant):
        return [(line["tokens"], line["validation_depth_shares"]) for line in run.validations]
    return [(line["tokens"], line["depth_shares"]) for line in run.depth_lines]


def differences(
    rows: Sequence[tuple[str, str, PairedDifference]],
    baseline: str,
    verdicts: Sequence[str],
    noise: Mapping[str, float],
) -> Figure:
    """Loss differences to the baseline with their intervals; rows are (name, architecture, difference).

    noise: kind -> standard deviation of one loss; shaded is what it does to the difference of two.
    """
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.45 * len(rows)), layout="constrained")
    for shade, (kind, deviation) in zip((0.28, 0.18, 0.1), sorted(noise.items(), key=lambda item: item[1])):
        wide = 2**0.5 * deviation
        axes.axvspan(-wide, wide, color="#777777", alpha=shade, lw=0, label=f"noise: {kind}")
    for place, (_, architecture, difference) in enumerate(rows):
        colour = architectures()[architecture]
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [place, place], color=colour, lw=2)
        axes.plot(difference.mean, place, "o", color=colour)
        axes.annotate(
            f"{difference.mean:+.4f}  {verdicts[place]}",
            (difference.mean, place),
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )
    axes.axvline(0, color="#777777", lw=1, ls=":")
    axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], ylim=(len(rows) - 0.4, -0.7))
    axes.set_xlabel(f"validation loss minus {baseline}'s, at matched FLOPs (nats per token, causal routing)")
    if noise:
        axes.legend(fontsize=7, frameon=False)
    axes.margins(x=0.3)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def decomposition(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Steps from the baseline to each model: a panel per model, a bar per step from where the one before ended."""
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(8, 0.8 + 1.6 * len(rows)), squeeze=False, sharex=True, layout="constrained"
    )
    for found, axes in zip(rows, grid[:, 0]):
        start, steps = 0.0, found["steps"]
        for place, step in enumerate(steps):
            axes.barh(place, step["mean"], left=start, height=0.6, color="#0072b2" if step["mean"] < 0 else "#d55e00")
            if step["low"] is not None:
                axes.plot([start + step["low"], start + step["high"]], [place, place], color="black", lw=1.2)
            axes.annotate(f"{step['mean']:+.4f}", (start + step["mean"], place), xytext=(0, 9),
                          textcoords="offset points", fontsize=7, ha="center")  # fmt: skip
            start += step["mean"]
        axes.axvline(0, color="#777777", lw=1, ls=":")
        axes.set(yticks=range(len(steps)), yticklabels=[step["step"] for step in steps], title=found["name"])
        axes.set_ylim(len(steps) - 0.4, -0.8)
        axes.use_sticky_edges = False  # of bars, which leave no margin
        axes.margins(x=0.2)
        _finish(axes)
    grid[-1, 0].set_xlabel(f"validation loss minus {rows[0]['baseline']}'s (nats per token)")
    return figure


def sweeps(rows: Sequence[Mapping[str, Any]], key: str) -> Figure:
    """Loss against one swept key: a colour per model, a curve per round and setting of the other keys."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    colours = [matplotlib.colormaps[name](i) for name, size in (("tab10", 10), ("tab20b", 20)) for i in range(size)]
    chosen = [row for row in rows if key in row["keys"]]
    for number, row in enumerate(chosen):
        colour = colours[number % len(colours)]
        curves: dict[str, list[tuple[float, float]]] = {}
        for point in row["points"]:
            rest = {name: value for name, value in point["values"].items() if name != key}
            if point["loss"] is not None:
                label = f"{point['flops']:020d} {rest}"
                curves.setdefault(label, []).append((point["values"][key], point["loss"]))
        for label, points in curves.items():
            last = int(label.split()[0]) == row["flops"]
            x, y = zip(*sorted(points))
            axes.plot(
                x, y, "o-", color=colour, lw=1.8 if last else 0.7, ms=4 if last else 2.5, alpha=1 if last else 0.6
            )
        if row["loss"] is not None:
            edge = key in row["edge"]
            axes.plot(row["winner"][key], row["loss"], "*", color=colour, ms=13, mfc="white" if edge else colour)
        axes.plot([], [], color=colour, label=row["name"] + (" (unsettled)" if key in row["edge"] else ""))
    positive = all(value > 0 for row in chosen for value in row["keys"][key])
    axes.set(xlabel=key, ylabel=LOSS_LABEL, xscale="log" if positive else "linear")
    axes.legend(fontsize=8, frameon=False)
    _finish(axes)
    return figure


def isoflop(panels: Mapping[str, Sequence[IsoflopCurve]], size_label: str) -> Figure:
    """IsoFLOP parabolas: a panel per architecture, a curve per budget."""
    figure, grid = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for (architecture, curves), axes in zip(panels.items(), grid.flat):
        shades = np.linspace(0.35, 1.0, len(curves))
        for (budget, parameters, losses, fit), shade in zip(curves, shades):
            colour = matplotlib.colors.to_rgba(architectures().get(architecture, "#333333"), shade)
            axes.plot(parameters, losses, "o", color=colour, label=f"{budget:.3g} FLOPs")
            dense = np.geomspace(min(parameters), max(parameters), 100)
            axes.plot(dense, fit.loss(dense), color=colour, lw=1.2)
            if fit.optimal_parameters is not None and min(parameters) <= fit.optimal_parameters <= max(parameters):
                axes.plot(fit.optimal_parameters, fit.optimal_loss, "*", color=colour, ms=12, markeredgecolor="black")
        axes.set(title=architecture, xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8, frameon=False)
        _finish(axes)
    figure.supxlabel(size_label, fontsize=10)
    grid.flat[0].set_ylabel("validation loss (nats per token)")
    return figure


def loss_against_cost(
    variants: Sequence[Variant], costs: Mapping[str, Sequence[float]], labels: Mapping[str, str]
) -> Figure:
    """Final loss against each inference cost; costs maps a kind to a value per variant."""
    figure, grid = plt.subplots(
        1, len(costs), figsize=(5 * len(costs), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    style = styles(variants)
    for (kind, values), axes in zip(costs.items(), grid.flat):
        for variant, value in zip(variants, values):
            finals = np.array(list(variant.losses().values()))
            error = finals.std(ddof=1) if len(finals) > 1 else None
            axes.errorbar(value, finals.mean(), yerr=error, ls="", capsize=3, **style[variant.name])
        axes.set_xlabel(labels[kind])
        _finish(axes)
    grid.flat[0].set_ylabel(LOSS_LABEL)
    _legend(grid.flat[-1], variants)
    return figure


def published_differences(own: Mapping[str, float], published: Mapping[str, float], note: str) -> Figure:
    """Differences to vanilla at matched FLOPs, one's own beside the paper's; both map a variant's name to nats."""
    names = list(dict.fromkeys([*own, *published]))
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.42 * len(names)), layout="constrained")
    for offset, values, label, colour in (
        (-0.19, own, "these runs, causal routing", "#0072b2"),
        (0.19, published, note, "#bbbbbb"),
    ):
        places = [place for place, name in enumerate(names) if name in values]
        bars = axes.barh(
            [p + offset for p in places], [values[names[p]] for p in places], 0.36, label=label, color=colour
        )
        axes.bar_label(bars, fmt="%+.4f", fontsize=8, padding=3)
    axes.axvline(0, color="#555555", lw=1)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="validation loss minus vanilla's (nats per token)")
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.legend(fontsize=8, frameon=False)
    _finish(axes)
    return figure
