"""Statistics of a comparison: paired differences, isoFLOP parabolas, the joint scaling law. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # imported where something is fitted: it is slow to import
    from scipy import optimize

Array = NDArray[np.float64]
MATCHED_SHARE = 0.01  # FLOPs of two variants that differ by less are called matched


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (loss - baseline loss) over the seeds that both have, nats per token.

    low, high: confidence interval of the mean; None where one seed gives no interval.
    within_noise: whether the interval holds 0; None where there is no interval.
    p_value: of Student's paired test against no difference; None where there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int
    within_noise: bool | None
    p_value: float | None = None

    @property
    def verdict(self) -> str:
        if self.within_noise is None:
            return "one seed"
        if self.within_noise:
            return "within noise"
        return "worse" if self.mean > 0 else "better"


def paired_difference(
    losses: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference:
    """Paired t interval of `losses - baseline`, both seed -> loss, over the seeds that both have.

    The seed fixes the order of the data for both, so the difference of a pair is less noisy than either loss.
    Raises ValueError if no seed is in both.
    """
    seeds = sorted(set(losses) & set(baseline))
    if not seeds:
        raise ValueError(f"losses: no seed in common with the baseline ({sorted(losses)} and {sorted(baseline)})")
    differences = np.array([losses[seed] - baseline[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1:
        return PairedDifference(mean, None, None, 1, None)
    from scipy import stats

    error = float(differences.std(ddof=1) / np.sqrt(len(seeds)))
    half = float(stats.t.ppf((1 + confidence) / 2, len(seeds) - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1)) if error > 0 else float(mean == 0)
    return PairedDifference(mean, mean - half, mean + half, len(seeds), mean - half <= 0 <= mean + half, p_value)


def plain(difference: PairedDifference) -> dict[str, Any]:
    """A difference and its verdict, ready for JSON."""
    return asdict(difference) | {"verdict": difference.verdict}


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979): below 0.05, a claim stands beside the others.

    The smallest is multiplied by n, the next by n - 1 and so on, none below the one before it, none above 1.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[int(index)] = largest
    return corrected


def noise_of_pairs(pairs: Sequence[tuple[float, float]]) -> float:
    """Standard deviation of one loss, from pairs of losses that differ in the noise alone: sqrt(mean d^2 / 2)."""
    return float(np.sqrt(np.mean([(one - other) ** 2 / 2 for one, other in pairs])))


def seeds_needed(differences: Sequence[float], half_width: float, confidence: float = 0.95, most: int = 1000) -> int:
    """Seeds after which the t interval of the mean is expected to be +- half_width, by the spread seen so far.

    differences: at least two, one per seed.
    """
    from scipy import stats

    spread = float(np.std(differences, ddof=1))
    for count in range(2, most):
        if float(stats.t.ppf((1 + confidence) / 2, count - 1)) * spread / np.sqrt(count) <= half_width:
            return count
    return most


@dataclass(frozen=True)
class Isoflop:
    """Parabola loss = c0 + c1 x + c2 x^2 in x = ln(parameters) at one FLOP budget.

    coefficients: (c0, c1, c2).
    optimal_parameters, optimal_loss: the vertex; None where the parabola has no minimum.
    low, high: interval of the optimal size; None where it cannot be had (see `note`).
    note: what a reader must know, empty if nothing.
    """

    coefficients: tuple[float, float, float]
    optimal_parameters: float | None
    optimal_loss: float | None
    low: float | None
    high: float | None
    note: str

    def loss(self, parameters: Array) -> Array:
        """The fitted loss at `parameters` [n]."""
        return np.asarray(np.polynomial.polynomial.polyval(np.log(parameters), self.coefficients), dtype=np.float64)


def fit_isoflop(
    parameters: Sequence[float],
    losses: Sequence[float],
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Isoflop:
    """Fit the parabola and bootstrap its vertex over residuals.

    A residual is scaled by sqrt(n / (n - 3)): three constants were fitted.

    parameters, losses: [n], a point per run; several seeds at one size are several points.
    Raises ValueError below three different sizes.
    """
    if len(set(parameters)) < 3:
        raise ValueError(f"parameters: a parabola needs three sizes, got {len(set(parameters))}")
    x, y = np.log(np.asarray(parameters, float)), np.asarray(losses, float)
    center = float(x.mean())  # fitted about the mean, where the three terms are nearly orthogonal
    basis = np.stack([np.ones_like(x), x - center, (x - center) ** 2], axis=1)
    solve = np.linalg.pinv(basis)
    c0, c1, c2 = (float(c) for c in solve @ y)
    coefficients = (c0 - c1 * center + c2 * center**2, c1 - 2 * c2 * center, c2)
    if c2 <= 0:
        return Isoflop(coefficients, None, None, None, None, "no minimum: the parabola opens downwards")
    vertex = center - c1 / (2 * c2)
    notes = [] if x.min() <= vertex <= x.max() else ["the optimum lies outside the sizes tried: an extrapolation"]
    low = high = None
    if len(x) > 3:
        fitted = basis @ np.array([c0, c1, c2])
        residuals = (y - fitted) * np.sqrt(len(x) / (len(x) - 3))
        drawn = np.random.default_rng(seed).choice(residuals, (samples, len(x)))
        refits = (fitted + drawn) @ solve.T  # [samples, 3]
        minima = refits[:, 2] > 0
        if minima.mean() < confidence:
            notes.append(f"{(~minima).mean():.0%} of the bootstrap fits have no minimum: no interval")
        else:
            vertices = center - refits[minima, 1] / (2 * refits[minima, 2])
            low, high = (float(np.exp(v)) for v in np.quantile(vertices, _tails(confidence)))
    else:
        notes.append("three points fit a parabola exactly: no interval")
    return Isoflop(coefficients, float(np.exp(vertex)), c0 - c1**2 / (4 * c2), low, high, "; ".join(notes))


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


@dataclass(frozen=True)
class ScalingLaw:
    """L = E + A (N_once + r^phi N_rec)^-a + B D^-b, with N and D as counts.

    phi: what a recurrence is worth: 1, as much as fresh layers; 0, nothing (arXiv 2604.21106).
    phi_low, phi_high: bootstrap interval.
    residual: root mean square of the residuals of ln(loss).
    """

    irreducible: float
    parameter_scale: float
    parameter_exponent: float
    data_scale: float
    data_exponent: float
    phi: float
    phi_low: float
    phi_high: float
    residual: float
    num_runs: int

    def loss(self, once: Array, recurrent: Array, recursions: Array, tokens: Array) -> Array:
        """Predicted loss, nats per token; every argument [n]."""
        effective = once + recursions**self.phi * recurrent
        return (
            self.irreducible
            + self.parameter_scale * effective**-self.parameter_exponent
            + self.data_scale * tokens**-self.data_exponent
        )


# ln E, ln A', a, ln B', b, phi; A' and B' belong to sizes and tokens in units of their geometric means, which keeps
# the six unknowns of one order and the search well conditioned.
_LOWER = np.array([-6.0, -12.0, 0.01, -12.0, 0.01, -1.0])
_UPPER = np.array([3.0, 5.0, 2.0, 5.0, 2.0, 2.0])
_STARTS = [
    np.array([np.log(e), np.log(c), a, np.log(c), b, phi])
    for e in (0.5, 1.5, 2.5)
    for c in (0.1, 0.6)
    for a, b in ((0.2, 0.2), (0.4, 0.6), (0.6, 0.3))
    for phi in (0.2, 0.8)
]


def fit_scaling_law(
    once: Sequence[float],
    recurrent: Sequence[float],
    recursions: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    confidence: float = 0.95,
    samples: int = 100,
    seed: int = 0,
) -> ScalingLaw:
    """Fit the joint law (arXiv 2604.21106) with a Huber loss (delta 1e-3) on ln(loss), from many starts.

    once, recurrent: [n] parameters applied once, and those of the shared block; recursions: [n] mean applications of
    the block; tokens: [n] training tokens; losses: [n] nats per token. The interval of phi is the bootstrap over runs.
    Raises ValueError where the runs cannot tell the six constants apart.
    """
    columns = [np.asarray(column, float) for column in (once, recurrent, recursions, tokens, losses)]
    n = len(columns[0])
    _check_identifiable(columns)
    size_unit = float(np.exp(np.log(columns[0] + columns[1]).mean()))
    token_unit = float(np.exp(np.log(columns[3]).mean()))
    scaled = [columns[0] / size_unit, columns[1] / size_unit, columns[2], columns[3] / token_unit, columns[4]]
    tried = sorted((_fit_from(scaled, start, 30) for start in _STARTS), key=lambda fit: fit.cost)
    best = min((_fit_from(scaled, fit.x) for fit in tried[:4]), key=lambda fit: fit.cost)
    ln_e, ln_a, a, ln_b, b, phi = (float(value) for value in best.x)
    random = np.random.default_rng(seed)
    phis = []
    for _ in range(samples):
        rows = random.integers(0, n, n)
        phis.append(_fit_from([column[rows] for column in scaled], best.x).x[5])
    low, high = (float(value) for value in np.quantile(phis, _tails(confidence)))
    residual = float(np.sqrt(np.mean(_residuals(best.x, scaled) ** 2)))
    return ScalingLaw(
        float(np.exp(ln_e)),
        float(np.exp(ln_a)) * size_unit**a,
        a,
        float(np.exp(ln_b)) * token_unit**b,
        b,
        phi,
        low,
        high,
        residual,
        n,
    )


@dataclass(frozen=True)
class JointLaw:
    """The scaling law with its five constants shared by all methods, and what a recurrence is worth in each.

    phi: method -> (phi, low, high), the interval a bootstrap over runs. residual: as for `ScalingLaw`.
    """

    irreducible: float
    parameter_exponent: float
    data_exponent: float
    phi: dict[str, tuple[float, float, float]]
    residual: float
    num_runs: int


def fit_joint_law(
    once: Sequence[float],
    recurrent: Sequence[float],
    recursions: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    methods: Sequence[str],
    confidence: float = 0.95,
    samples: int = 100,
    seed: int = 0,
) -> JointLaw:
    """Fit one law to the runs of several methods, a phi for each; arguments as for `fit_scaling_law`.

    methods: [n] the method of each run; those without a recurrence, as vanilla's, tell the shared constants alone.
    Raises ValueError where the runs cannot tell the constants apart, or a method has fewer than two looped runs.
    """
    columns = [np.asarray(column, float) for column in (once, recurrent, recursions, tokens, losses)]
    _check_identifiable(columns)
    looped = (columns[2] > 1) & (columns[1] > 0)
    names = [str(name) for name in dict.fromkeys(np.asarray(methods)[looped])]
    which = np.array([names.index(name) if name in names else 0 for name in methods])
    few = [name for index, name in enumerate(names) if (which[looped] == index).sum() < 2]
    if few:
        raise ValueError(f"methods: {', '.join(few)} with fewer than 2 looped runs")
    units = [float(np.exp(np.log(columns[0] + columns[1]).mean())), float(np.exp(np.log(columns[3]).mean()))]
    scaled = [columns[0] / units[0], columns[1] / units[0], columns[2], columns[3] / units[1], columns[4]]
    scaled.append(which)
    starts = [np.append(start, np.full(len(names) - 1, start[5])) for start in _STARTS]
    tried = sorted((_fit_from(scaled, start, 30) for start in starts), key=lambda fit: fit.cost)
    best = min((_fit_from(scaled, fit.x) for fit in tried[:4]), key=lambda fit: fit.cost)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        rows = random.integers(0, len(which), len(which))
        drawn.append(_fit_from([column[rows] for column in scaled], best.x).x[5:])
    lows, highs = np.quantile(drawn, _tails(confidence), axis=0)
    phis = {name: (float(best.x[5 + i]), float(lows[i]), float(highs[i])) for i, name in enumerate(names)}
    residual = float(np.sqrt(np.mean(_residuals(best.x, scaled) ** 2)))
    return JointLaw(float(np.exp(best.x[0])), float(best.x[2]), float(best.x[4]), phis, residual, len(which))


def _check_identifiable(columns: Sequence[Array]) -> None:
    once, recurrent, recursions, tokens, _ = columns
    looped = (recursions > 1) & (recurrent > 0)
    needs = {
        "runs": (len(once), 8),
        "model sizes": (len(np.unique(np.round(np.log(once + recurrent), 3))), 3),
        "token counts": (len(np.unique(np.round(np.log(tokens), 3))), 3),
        "runs with recursion": (int(looped.sum()), 2),
        "runs without recursion": (int((~looped).sum()), 2),
    }
    short = [f"{have} {what} (at least {least})" for what, (have, least) in needs.items() if have < least]
    if short:
        raise ValueError(f"losses: too few to tell six constants apart: {', '.join(short)}")


def _residuals(x: Array, columns: Sequence[Array]) -> Array:
    once, recurrent, recursions, tokens, losses, *which = columns
    ln_e, ln_a, a, ln_b, b = x[:5]
    phi = x[5:][which[0]] if which else x[5]  # of each run's method, where there are several
    effective = once + recursions**phi * recurrent
    return np.log(np.exp(ln_e) + np.exp(ln_a) * effective**-a + np.exp(ln_b) * tokens**-b) - np.log(losses)


def _fit_from(columns: Sequence[Array], start: Array, evaluations: int = 2000) -> optimize.OptimizeResult:
    from scipy import optimize

    more = len(start) - len(_LOWER)  # a phi for each further method
    lower, upper = (np.append(bound, np.full(more, bound[5])) for bound in (_LOWER, _UPPER))
    inside = np.clip(start, lower + 1e-6, upper - 1e-6)
    return optimize.least_squares(
        _residuals, inside, bounds=(lower, upper), loss="huber", f_scale=1e-3, args=(columns,), max_nfev=evaluations
    )
