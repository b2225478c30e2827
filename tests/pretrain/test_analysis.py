"""The statistics of a comparison, held against data whose constants are known."""

import math

import numpy as np
import pytest
from scipy import stats

from pretrain.report.analysis import (
    fit_isoflop,
    fit_joint_law,
    fit_scaling_law,
    holm,
    noise_of_pairs,
    paired_difference,
    seeds_needed,
)

CONSTANTS = {"irreducible": 1.7, "parameter_scale": 400.0, "parameter_exponent": 0.34, "data_scale": 410.0,
             "data_exponent": 0.28, "phi": 0.46}  # fmt: skip


def test_paired_interval_is_students():
    losses, baseline = {1: 3.0, 2: 3.1, 3: 3.05}, {1: 2.9, 2: 3.01, 3: 2.93}
    result = paired_difference(losses, baseline)
    differences = np.array([0.1, 0.09, 0.12])
    half = 4.302653 * differences.std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom, from a table
    assert result.mean == pytest.approx(differences.mean())
    assert (result.low, result.high) == pytest.approx((differences.mean() - half, differences.mean() + half), rel=1e-5)
    assert result.verdict == "worse" and result.num_seeds == 3


def test_pairing_removes_what_seeds_share():
    noise = dict(enumerate((0.3, -0.2, 0.5, -0.4)))
    losses = {seed: 2.9 + value for seed, value in noise.items()}
    baseline = {seed: 3.0 + value + 0.001 * (-1) ** seed for seed, value in noise.items()}
    result = paired_difference(losses, baseline)
    assert result.verdict == "better" and result.high - result.low < 0.01


def test_noise_is_called_noise():
    result = paired_difference({0: 3.0, 1: 3.2, 2: 3.1}, {0: 3.1, 1: 3.1, 2: 3.1})
    assert result.within_noise and result.verdict == "within noise"


def test_one_seed_has_no_interval():
    result = paired_difference({4: 3.0, 5: 1.0}, {4: 3.1})
    assert (result.low, result.high, result.within_noise, result.verdict) == (None, None, None, "one seed")
    assert result.mean == pytest.approx(-0.1)


def test_holm_corrects_for_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, no less than that
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_the_noise_of_pairs_is_that_of_one_loss():
    random = np.random.default_rng(0)
    pairs = random.normal(3.0, 0.02, (4000, 2)).tolist()
    assert noise_of_pairs(pairs) == pytest.approx(0.02, rel=0.05)


def test_seeds_needed_are_those_of_students_interval():
    differences = [0.01, -0.01, 0.02, 0.0]
    spread = np.std(differences, ddof=1)
    count = seeds_needed(differences, 0.01)
    for seeds, wide in ((count - 1, True), (count, False)):
        half = stats.t.ppf(0.975, seeds - 1) * spread / math.sqrt(seeds)
        assert (half > 0.01) == wide
    assert seeds_needed([0.1, 0.1], 1e-9) == 2


def test_no_common_seed_is_refused():
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 3.0}, {1: 3.0})


def test_parabola_finds_its_vertex():
    sizes = np.geomspace(1e6, 1e8, 5)
    fit = fit_isoflop(sizes, 2.5 + 0.1 * np.log(sizes / 8e6) ** 2)
    assert fit.optimal_parameters == pytest.approx(8e6, rel=1e-6) and fit.optimal_loss == pytest.approx(2.5)
    assert (fit.low, fit.high) == pytest.approx((8e6, 8e6), rel=1e-4) and fit.note == ""
    assert fit.loss(np.array([8e6])) == pytest.approx([2.5])


def test_bootstrap_interval_covers_the_truth_and_shrinks_with_seeds():
    random = np.random.default_rng(3)
    sizes = np.geomspace(1e6, 1e8, 4)

    def widths(seeds):
        found = []
        for _ in range(40):
            many = np.repeat(sizes, seeds)
            fit = fit_isoflop(
                many, 2.5 + 0.05 * np.log(many / 1e7) ** 2 + random.normal(0, 0.01, len(many)), samples=200
            )
            found.append((math.log(fit.high / fit.low), fit.low <= 1e7 <= fit.high))
        return np.mean([f[0] for f in found]), np.mean([f[1] for f in found])

    wide, _ = widths(2)
    narrow, covered = widths(8)
    assert covered > 0.8
    assert narrow < 0.75 * wide


def test_parabola_says_what_it_cannot_know():
    assert "outside" in fit_isoflop([1e6, 2e6, 4e6], [3.0, 2.8, 2.7]).note
    three = fit_isoflop([1e6, 2e6, 4e6], [3.0, 2.8, 2.9])
    assert three.low is None and "no interval" in three.note
    hill = fit_isoflop([1e6, 2e6, 4e6], [2.8, 3.0, 2.8])
    assert hill.optimal_parameters is None and "no minimum" in hill.note
    with pytest.raises(ValueError, match="three sizes"):
        fit_isoflop([1e6, 2e6, 2e6], [3.0, 2.8, 2.7])


def synthetic_runs(noise=0.0):
    """(once, recurrent, recursions, tokens, losses) of vanilla and looped runs that follow `CONSTANTS`."""
    grid = [(n, d) for n in (1e6, 3e6, 1e7, 3e7) for d in (2e7, 1e8, 5e8)]
    once = np.array([n for n, _ in grid] + [0.1 * n for n, _ in grid])
    recurrent = np.array([0.0] * len(grid) + [0.3 * n for n, _ in grid])
    recursions = np.array([1.0] * len(grid) + [3.0] * len(grid))
    tokens = np.array([d for _, d in grid] * 2)
    c = CONSTANTS
    losses = (
        c["irreducible"]
        + c["parameter_scale"] * (once + recursions ** c["phi"] * recurrent) ** -c["parameter_exponent"]
        + c["data_scale"] * tokens ** -c["data_exponent"]
    )
    return once, recurrent, recursions, tokens, losses * np.exp(np.random.default_rng(1).normal(0, noise, len(losses)))


def test_scaling_law_recovers_its_constants():
    runs = synthetic_runs()
    fit = fit_scaling_law(*runs, samples=5)
    for name, value in CONSTANTS.items():
        assert getattr(fit, name) == pytest.approx(value, rel=1e-3), name
    assert fit.loss(*runs[:4]) == pytest.approx(runs[4])


def test_one_law_for_all_methods_recovers_the_phi_of_each():
    """Vanilla, and two methods that loop at another mean depth with another phi, under noise."""
    c, planted = CONSTANTS, {"recursive": 0.46, "mor_expert": 0.8}
    rows = [
        (n if name == "vanilla" else 0.1 * n, 0.0 if name == "vanilla" else 0.3 * n, depth, d, name)
        for name, depth in (("vanilla", 1.0), ("recursive", 3.0), ("mor_expert", 2.0))
        for n in (1e6, 3e6, 1e7, 3e7)
        for d in (2e7, 1e8, 5e8)
    ]
    once, recurrent, depths, tokens = (np.array([row[i] for row in rows]) for i in range(4))
    names = [row[4] for row in rows]
    phi = np.array([planted.get(name, 0.0) for name in names])
    losses = (
        c["irreducible"]
        + c["parameter_scale"] * (once + depths**phi * recurrent) ** -c["parameter_exponent"]
        + c["data_scale"] * tokens ** -c["data_exponent"]
    )
    noisy = losses * np.exp(np.random.default_rng(2).normal(0, 0.001, len(losses)))
    law = fit_joint_law(once, recurrent, depths, tokens, noisy, names, samples=12)
    for name, value in planted.items():
        found, low, high = law.phi[name]
        assert found == pytest.approx(value, abs=0.08) and low < high < low + 0.5, name
    assert law.phi["mor_expert"][1] > law.phi["recursive"][2], "the two are told apart"
    assert law.irreducible == pytest.approx(c["irreducible"], rel=0.1) and law.num_runs == 36
    with pytest.raises(ValueError, match="mor_expert with fewer than 2 looped runs"):
        fit_joint_law(once[:25], recurrent[:25], depths[:25], tokens[:25], noisy[:25], names[:25])


def test_scaling_law_interval_covers_phi_under_noise():
    fit = fit_scaling_law(*synthetic_runs(noise=0.003), samples=40)
    assert fit.phi_low < CONSTANTS["phi"] < fit.phi_high
    assert 0.001 < fit.phi_high - fit.phi_low < 0.3
    assert 0.001 < fit.residual < 0.004


def test_scaling_law_withstands_an_outlier():
    once, recurrent, recursions, tokens, losses = synthetic_runs()
    losses[5] *= 1.2  # a run that diverged
    assert fit_scaling_law(once, recurrent, recursions, tokens, losses, samples=2).phi == pytest.approx(0.46, abs=0.02)


def test_scaling_law_refuses_what_cannot_be_told_apart():
    once, recurrent, recursions, tokens, losses = synthetic_runs()
    with pytest.raises(ValueError, match=r"1 token counts \(at least 3\)"):
        fit_scaling_law(once, recurrent, recursions, tokens * 0 + 1e8, losses)
    with pytest.raises(ValueError, match="runs with recursion"):
        fit_scaling_law(once[:12], recurrent[:12], recursions[:12], tokens[:12], losses[:12])
