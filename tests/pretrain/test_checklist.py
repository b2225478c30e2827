"""A sceptic's checklist, on made-up runs: sound ones pass whole, and each planted artefact is caught."""

import io
import itertools
import json

import pytest
from rich.console import Console

from data_prep.settings import UserError
from model.config import MoRConfig
from model.flops import flops_per_token
from pretrain.report import blocks, summary, write
from pretrain.report.controls import CONTROLS, buildable, control_fields
from pretrain.report.runs import read_run, read_runs
from pretrain.report.sweep import halving, points_of, sweep_rows
from tests.helpers.runs import MODELS, SEQUENCE_LENGTH, make_run

BUDGET, RATES, SEEDS = 4e12, (1e-3, 2e-3, 4e-3), (0, 1, 2)
LOSSES = {"vanilla": 3.0, "mor_expert_nr3": 2.9, "recursive": 3.05, "gate_only": 2.97, "random_router": 2.93}
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
NOISE = {0: 0.0, 1: 0.004, 2: -0.003}


def loss_at(loss, rate, best=2e-3):
    return loss + 0.1 * abs(rate / best - 1)


def sound(folder, name, loss, **changes):
    """Runs of one model on three seeds, and a sweep of its rate, whose best is 2e-3."""
    model, family, budget = changes.pop("model", {}), changes.pop("family", name), changes.pop("budget", BUDGET)
    for seed in SEEDS:
        own = {"rate": 2e-3, "budget": budget, "model": model, "name": name} | changes
        odd = 0.001 * (seed == 1 and name != "vanilla")
        make_run(folder / f"{name}-seed{seed}", family, seed=seed, loss=loss + NOISE[seed] + odd, **own)
    for rate in RATES:
        make_run(
            folder / "sweep" / f"{name}-{rate}", family, seed=9, rate=rate, loss=loss_at(loss, rate), name=name,
            budget=budget / 2, model=model,
        )  # fmt: skip


def comparison(folder, **changes):
    """Vanilla between a smaller and a larger one, MoR with every control; changes: model -> what is planted in it."""
    mor = SHAPE | MODELS["mor_expert_nr3"]
    for name in ("vanilla", "mor_expert_nr3"):
        sound(folder, name, LOSSES[name], **changes.get(name, {}))
    sound(folder, "larger", 3.2, family="vanilla", model={"num_hidden_layers": 16})
    for kind in CONTROLS:
        fields = control_fields(kind, mor, SHAPE, SEQUENCE_LENGTH)
        costs = [flops_per_token(MoRConfig(**model), SEQUENCE_LENGTH) for model in (SHAPE, mor)]
        budget = BUDGET * costs[0] / costs[1] if kind == "equal_tokens" else BUDGET
        sound(folder, f"mor_{kind}", LOSSES.get(kind, 3.1), family="vanilla", model=fields, budget=budget)
    return folder


def answers(folder):
    """(results, question -> check)."""
    runs = read_runs([folder])[0]
    sweeps, repeats = write.beside(runs, "sweep"), write.beside(runs, "noise")
    results = summary.build_results(runs, sweeps=sweeps, repeats=repeats, command="COMPARE")
    return results, {check["question"]: check for check in results["checklist"]}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return answers(comparison(tmp_path_factory.mktemp("clean")))


def of(results, name="mor_expert_nr3"):
    return next(row for row in results["differences"] if row["name"] == name)


def test_a_sound_comparison_passes_whole_and_has_a_verdict(clean):
    results, checks = clean
    assert {question: check["holds_up"] for question, check in checks.items() if not check["passed"]} == {}
    row = of(results)
    assert row["open"] == [] and row["verdict"] == "better" and blocks.verdict(row) == "better"
    assert row["baseline"] == "vanilla" and set(results["controls"]["mor_expert_nr3"]["present"]) == set(CONTROLS)


@pytest.mark.parametrize(
    ("question", "planted", "said"),
    [
        ("learning rate", {"vanilla": {"rate": 4e-3}}, "learning_rate 0.004, 0.002 won"),
        ("causal evaluation", {"mor_expert_nr3": {"look_ahead": 0.2}}, "looks ahead"),
        ("fresh data", {"mor_expert_nr3": {"epoch": 1.7}}, "saw its data 1.70 times"),
        ("one version of the code", {"mor_expert_nr3": {"code": ["d" * 12]}}, "was trained by dddddddddddd"),
        ("one version of the code", {"vanilla": {"code": ["c" * 12, "d" * 12]}}, "most by cccccccccccc"),
    ],
)
def test_a_planted_artefact_is_caught(tmp_path, question, planted, said):
    results, checks = answers(comparison(tmp_path, **planted))
    assert [name for name, check in checks.items() if not check["passed"]] == [question]
    assert list(checks[question]["holds_up"]) == list(planted) and said in str(checks[question]["holds_up"])
    assert of(results)["open"] == [question] and blocks.verdict(of(results)) == f"open: {question}"
    assert checks[question]["needs"].startswith("COMPARE")


def test_a_gate_on_one_model_alone_is_caught(tmp_path):
    """MoR beside plain models only: its gate is not told from its routing, and the missing rows are named."""
    for name in ("vanilla", "mor_expert_nr3"):
        sound(tmp_path, name, LOSSES[name])
    for name, layers in (("smaller", 4), ("larger", 16)):
        sound(tmp_path, name, 3.2, family="vanilla", model={"num_hidden_layers": layers})
    results, checks = answers(tmp_path)
    assert of(results)["open"] == ["controls"] and "gate_only" in checks["controls"]["needs"]
    assert "'controls=[shallower, recursive" in checks["controls"]["needs"] and results["decompositions"] == []


def test_a_short_training_is_caught(tmp_path):
    sound(tmp_path, "vanilla", 3.0, budget=1e11)
    sound(tmp_path, "mor_expert_nr3", 2.9, budget=1e11)
    check = answers(tmp_path)[1]["tokens per parameter"]
    assert set(check["holds_up"]) == {"vanilla", "mor_expert_nr3"} and "budgets=" in check["needs"]


@pytest.mark.parametrize(("loss", "said"), [(2.8, "a smaller vanilla is better"), (None, "no smaller")])
def test_a_wrong_size_is_caught(tmp_path, loss, said):
    sound(tmp_path, "vanilla", 3.0)
    sound(tmp_path, "mor_expert_nr3", 2.9)
    sound(tmp_path, "larger", 3.1, family="vanilla", model={"num_hidden_layers": 16})
    if loss:
        sound(tmp_path, "smaller", loss, family="vanilla", model={"num_hidden_layers": 4})
    check = answers(tmp_path)[1]["size"]
    assert said in check["holds_up"]["vanilla"] and "models.smaller=" in check["needs"]


def test_one_seed_is_open(tmp_path):
    for name in ("vanilla", "mor_expert_nr3"):
        make_run(tmp_path / name, name)
    results, checks = answers(tmp_path)
    assert "seeds" in of(results)["open"] and checks["seeds"]["needs"] == "COMPARE --until 0.02"


def test_flops_are_held_to_the_exact_count(tmp_path):
    """Equal by the paper's count, MoR has spent more than vanilla."""
    make_run(tmp_path / "vanilla", convention="paper")
    path = make_run(tmp_path / "mor", "mor_expert_nr3", convention="paper", budget=1.05e12) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"flops": line["flops"] / 1.05}) + "\n" for line in lines))
    results, checks = answers(tmp_path)
    assert not checks["equal FLOPs"]["passed"] and abs(of(results)["flops_over_baseline"]) < 0.01


def test_the_difference_is_taken_apart(clean):
    (found,) = clean[0]["decompositions"]
    assert [step["step"] for step in found["steps"]] == ["sharing", "gate", "more tokens", "choice of tokens"]
    means = [step["mean"] for step in found["steps"]]
    assert means == pytest.approx([0.05, -0.08, -0.04, -0.03], abs=1e-3)
    assert sum(means) == pytest.approx(of(clean[0])["mean"]) and all(step["low"] is not None for step in found["steps"])
    assert found["equal_tokens"]["baseline"] == "mor_equal_tokens"


def test_the_vanilla_model_nearest_in_tokens_is_the_control_and_one_too_far_is_none(tmp_path):
    """Learned depths move a model's tokens by a few percent from those that its control was planned with."""
    sound(tmp_path, "vanilla", 3.0)
    sound(tmp_path, "mor_expert_nr3", 2.9)
    costs = [
        flops_per_token(MoRConfig(**model), SEQUENCE_LENGTH) for model in (SHAPE, SHAPE | MODELS["mor_expert_nr3"])
    ]
    expected = {"far": (0.95, None), "off": (0.98, "off"), "near": (1.005, "near")}
    for name, (share, control) in expected.items():
        sound(tmp_path, name, 2.9, family="vanilla", model=SHAPE, budget=share * BUDGET * costs[0] / costs[1])
        found = answers(tmp_path)[0]["decompositions"]
        assert [row["equal_tokens"]["baseline"] for row in found] == ([control] if control else [])


def test_a_missing_control_joins_its_step_to_the_next(tmp_path):
    sound(tmp_path, "vanilla", 3.0)
    sound(tmp_path, "mor_expert_nr3", 2.9)
    sound(tmp_path, "dice", 2.93, family="mor_expert_nr3", model={"router": "random"})
    (found,) = answers(tmp_path)[0]["decompositions"]
    assert [step["step"] for step in found["steps"]] == ["sharing + gate + more tokens", "choice of tokens"]


def test_another_report_may_answer_and_only_for_the_same_data(tmp_path, clean):
    for name in ("vanilla", "mor_expert_nr3"):
        make_run(tmp_path / name, name, rate=2e-3, budget=BUDGET)
    runs = read_runs([tmp_path])[0]
    for evidence, expected in ((clean[0], True), ({**clean[0], "vocab_size": 65}, False)):
        results = summary.build_results(runs, evidence=[evidence])
        checks = {check["question"]: check["passed"] for check in results["checklist"]}
        assert [checks["size"], checks["learning rate"], checks["controls"]] == [expected] * 3
        assert not checks["seeds"]


def test_evidence_of_another_precision_is_named(tmp_path, clean):
    make_run(tmp_path / "vanilla", "vanilla", rate=2e-3, budget=BUDGET)
    runs = read_runs([tmp_path])[0]
    for precision, told in (
        ("fp32", "fp32 for all"),
        ("bf16", "fp32 for all; other reports that answer here are of bf16"),
    ):
        results = summary.build_results(runs, evidence=[clean[0] | {"precision": precision}])
        assert [row["answer"] for row in results["checklist"] if row["question"] == "precision"] == [told]


@pytest.mark.parametrize(("edge_of", "passed"), [("mor_equal_tokens", True), ("vanilla", False)])
def test_a_sweep_at_another_budget_says_nothing_of_this_one(tmp_path, clean, edge_of, passed):
    """Vanilla at equal tokens is the same model, swept in longer runs, for a rate of its own."""
    make_run(tmp_path / "vanilla", "vanilla", rate=2e-3, budget=BUDGET)
    flops = {sweep["name"]: sweep["flops"] for sweep in clean[0]["sweep"]}
    assert flops["vanilla"] < flops["mor_equal_tokens"] <= BUDGET
    sweeps = [
        sweep | ({"edge": ["optimizer.learning_rate"]} if sweep["name"] == edge_of else {})
        for sweep in clean[0]["sweep"]
    ]
    results = summary.build_results(read_runs([tmp_path])[0], evidence=[clean[0] | {"sweep": sweeps}])
    assert {check["question"]: check["passed"] for check in results["checklist"]}["learning rate"] == passed


def test_the_report_shows_checklist_sweep_decomposition_and_noise(tmp_path, clean):
    comparison(tmp_path)
    make_run(tmp_path / "noise" / "bf16", "vanilla", seed=0, loss=3.01, precision="bf16", budget=BUDGET, rate=2e-3)
    make_run(tmp_path / "noise" / "order", "vanilla", seed=0, loss=3.02, budget=BUDGET, rate=2e-3)
    text = io.StringIO()
    results = write.write_report([tmp_path], tmp_path / "report", console=Console(file=text, width=100))
    noise = {row["kind"]: row["deviation"] for row in results["noise"]}
    assert noise["precision"] == pytest.approx(0.01 / 2**0.5) and noise["order"] == pytest.approx(0.02 / 2**0.5)
    assert 0.002 < noise["seed"] < 0.006
    written = (tmp_path / "report" / "report.md").read_text()
    order = [
        written.index(title) for title in ("sceptic's checklist", "Validation loss", "Noise floor", "Decomposition")
    ]
    assert order == sorted(order) and "Sweeps" in written
    for name in ("sweep_learning_rate", "decomposition", "differences", "loss_seconds"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 10_000
    assert "A sceptic's checklist" in text.getvalue()
    assert write.read_evidence(tmp_path / "report")[0]["checklist"] == results["checklist"]


def test_evidence_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"variants": []}))
    for path, said in ((tmp_path, "older version"), (tmp_path / "none", "no report's")):
        with pytest.raises(UserError, match=said):
            write.read_evidence(path)


# --- sweeps and controls ------------------------------------------------------------------------------------------


def test_a_winner_at_the_edge_is_unsettled_and_ties_are_told(tmp_path):
    for rate, loss in ((1e-3, 3.0), (2e-3, 3.001), (4e-3, 3.2)):
        for seed in (8, 9):
            make_run(tmp_path / f"{rate}-{seed}", seed=seed, rate=rate, loss=loss + 0.01 * seed)
    make_run(tmp_path / "short", seed=8, rate=8e-3, loss=2.0, budget=5e11)  # of an earlier round: it cannot win
    (row,) = sweep_rows(read_runs([tmp_path])[0])
    assert row["winner"] == {"optimizer.learning_rate": 1e-3} and row["edge"] == ["optimizer.learning_rate"]
    assert row["ties"] == [{"optimizer.learning_rate": 2e-3}] and row["keys"]["optimizer.learning_rate"][-1] == 8e-3
    assert {point["seeds"] for point in row["points"]} == {1, 2}


@pytest.mark.parametrize("points", range(2, 20))
@pytest.mark.parametrize("allowance", [0.5, 1, 3, 5, 40])
def test_a_sweep_costs_at_most_its_allowance_and_grows(points, allowance):
    rounds = halving(points, allowance)
    assert sum(count * share for count, share in rounds) <= allowance * (1 + 1e-9)
    assert rounds[0][0] == points and all(0 < share <= 1 for _, share in rounds)
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in itertools.pairwise(rounds))


def test_points_are_the_product_of_the_keys():
    points = points_of({"a": [1, 2], "b": [3, 4, 5]})
    assert len(points) == 6 and points[0] == {"a": 1, "b": 3} and points[-1] == {"a": 2, "b": 5}


@pytest.mark.parametrize("name", ["mor_expert_nr3", "mor_token_nr3"])
def test_controls_are_built_from_any_model(name):
    model = SHAPE | MODELS[name]
    kinds = buildable(model, True, SEQUENCE_LENGTH)
    without = {"gate_only", "gate_on_vanilla"} if name == "mor_token_nr3" else set()
    assert set(kinds) == set(CONTROLS) - without
    built = {kind: control_fields(kind, model, SHAPE, SEQUENCE_LENGTH) for kind in kinds}
    assert built["shallower"] == SHAPE | {"num_hidden_layers": 6} and built["equal_tokens"] == SHAPE
    assert built["mean_depth"] == SHAPE | {"num_recursions": 2, "num_hidden_layers": 6}
    assert built["recursive"] == SHAPE | {"num_recursions": 3} and built["random_router"]["router"] == "random"


@pytest.mark.parametrize(
    ("kind", "model", "said"),
    [
        ("gate_only", {}, "none for vanilla"),
        ("mean_depth", {"num_recursions": 2}, "the model itself"),
        ("recursive", {}, "shares no block"),
        ("mean_depth", {"num_recursions": 2, "routing": "expert_choice"}, "1.50 times"),
        ("nothing", {}, "unknown control"),
    ],
)
def test_a_control_that_cannot_be_built_says_why(kind, model, said):
    with pytest.raises(ValueError, match=said):
        control_fields(kind, SHAPE | model, SHAPE, SEQUENCE_LENGTH)


def test_made_up_runs_are_read_as_the_trainer_writes_them(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert {"code", "settings"} <= run.facts.keys() and "validation_look_ahead" in run.last
