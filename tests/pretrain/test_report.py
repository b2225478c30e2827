"""The report, from made-up run directories: what it says, what it refuses, what it survives."""

import base64
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.settings import UserError, read_yaml
from pretrain.report import analysis, blocks, document, figures, summary, write
from pretrain.report.__main__ import main
from pretrain.report.runs import comparable_sets, read_metrics, read_run, read_runs, variants
from tests.helpers.runs import make_run

LOSSES = {"vanilla": 2.90, "recursive_nr3": 2.96, "mor_expert_nr3": 2.88, "mor_token_nr3": 2.99}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A folder of four models with three seeds each, whose losses differ by seed alike for all, and its report."""
    folder = tmp_path_factory.mktemp("four")
    for name, loss in LOSSES.items():
        for seed in range(3):
            make_run(folder / f"{name}-seed{seed}", name, seed=seed, loss=loss + 0.02 * seed + 0.001 * (seed == 1))
    with open(folder / "terminal.txt", "w") as file:
        write.write_report([folder], folder / "report", published=True, console=Console(file=file, width=80))
    return folder


def numbers(folder, **options):
    """What the report of one comparable set says, without writing it."""
    return summary.build_results(read_runs([folder])[0], **options)


def quiet():
    return Console(file=io.StringIO(), width=100)


def test_results_hold_what_scripts_rely_on(four):
    results = json.loads((four / "report" / "results.json").read_text())
    assert results["convention"] == "exact" and results["unigram_loss"] == 4.1
    assert len(results["runs"]) == 12
    for run in results["runs"]:
        assert {"name", "architecture", "seed", "unique_parameters", "flops", "tokens", "steps", "validation_loss",
                "validation_loss_topk", "seconds"} <= run.keys()  # fmt: skip
        assert run["validation_loss"] == pytest.approx(
            LOSSES[run["name"]] + 0.02 * run["seed"] + 0.001 * (run["seed"] == 1)
        )
    topk = {run["name"]: run["validation_loss"] - run["validation_loss_topk"] for run in results["runs"]}
    assert topk["mor_expert_nr3"] == pytest.approx(0.01) and topk["vanilla"] == 0


def test_report_states_what_its_numbers_rest_on(four):
    text = (four / "report" / "report.md").read_text()
    facts = ("`exact`", "causal work", "made-up", "dddddddddddd", "tttttttttttt", "64 tokens", "inside documents")
    for stated in (*facts, "Seeds: 0, 1, 2", "causal routing (no look-ahead); top-k", "unigram model"):
        assert stated in text, stated


def test_models_with_exits_stand_with_both_their_losses(four, tmp_path):
    """That of decoding under the exit rule, which is compared, and the teacher-forced one at full depth beside it."""
    for name, loss in (("vanilla", 2.90), ("calm_nr3", 2.95)):
        make_run(tmp_path / name, name, loss=loss)
    results = write.write_report([tmp_path], tmp_path / "report", console=quiet())
    rows = {row["name"]: row for row in results["variants"]}
    assert rows["calm_nr3"]["validation_loss"] - rows["calm_nr3"]["validation_loss_full"] == pytest.approx(0.03)
    assert rows["vanilla"]["validation_loss_full"] is None
    assert results["differences"][0]["mean"] == pytest.approx(0.05)
    text = (tmp_path / "report" / "report.md").read_text()
    header, row = (next(line for line in text.splitlines() if line.startswith(word)) for word in ("| model", "| calm"))
    cells = dict(zip(header.split("|"), row.split("|"), strict=True))
    assert cells[" validation loss, causal "] == " 2.9500 " and cells[" full depth (nobody exits) "] == " 2.9200 "
    assert "of models with exits the causal loss is that of decoding" in text
    assert rows["calm_nr3"]["mean_recursions"] == 2.5 and rows["vanilla"]["mean_recursions"] == 1.0
    assert "full depth" not in (four / "report" / "report.md").read_text()


ALONE = "CPU packages by RAPL"


@pytest.mark.parametrize(
    ("second", "known"),
    [({"watts": 20, "energy": ALONE}, True), ({}, False), ({"watts": 20, "energy": "GPU boards"}, False)],
)
def test_loss_against_joules_where_all_runs_count_the_same(tmp_path, second, known):
    """A column and a figure, whose caption says what was counted; nothing of either where one run does not know."""
    make_run(tmp_path / "vanilla", "vanilla", watts=30, energy=ALONE)
    make_run(tmp_path / "recursive", "recursive_nr3", **second)
    results = write.write_report([tmp_path], tmp_path / "report", console=quiet())
    text = (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "loss_joules.png").exists() == known
    assert (f"Counted: {ALONE}; not memory" in text) == ("energy per run" in text) == ("joules" in text) == known
    assert results["energy"] == (ALONE if known else None)
    assert results["variants"][0]["joules"] == 8 * 30
    assert ("| 0.24 kJ |" in text) == known and ("| 0.16 kJ |" in text) == known


def test_recursions_are_counted_from_the_gates_before_them(tmp_path):
    """Two gates of exits stand between three recursions; the routed layers of Mixture-of-Depths are none."""
    mod = {"routing": "mixture_of_depths"}
    for name, model in (("mor_expert_nr3", {}), ("mor_token_nr3", {}), ("calm_nr3", {}), ("mod", mod), ("vanilla", {})):
        make_run(tmp_path / name, name, model=model)
    found = {group.name: group for group in variants(read_runs([tmp_path])[0])}
    recursions = {name: group.mean_recursions() for name, group in found.items()}
    assert recursions["mor_expert_nr3"] == recursions["mor_token_nr3"] == pytest.approx(2.0)
    # Of two gates half the tokens passed one, half both.
    assert recursions["calm_nr3"] == pytest.approx(2.5) and recursions["mod"] == recursions["vanilla"] == 1.0
    drawn = figures.depth_shares(list(found.values()))
    titles = [axes.get_title() for axes in drawn.axes if axes.get_visible()]
    assert "calm_nr3, seed 0, in validation" in titles and len(titles) == 4
    assert drawn.legends[0].get_title().get_text() == "gates passed"
    alike = figures.depth_shares([found["mor_expert_nr3"], found["mor_token_nr3"]])
    assert alike.legends[0].get_title().get_text() == "recursions executed"


def test_differences_are_paired_and_judged(four):
    rows = {row["name"]: row for row in numbers(four)["differences"]}
    assert set(rows) == set(LOSSES) - {"vanilla"}
    assert rows["mor_expert_nr3"]["mean"] == pytest.approx(-0.02) and rows["mor_expert_nr3"]["verdict"] == "better"
    assert rows["recursive_nr3"]["verdict"] == "worse" and rows["recursive_nr3"]["baseline"] == "vanilla"
    assert abs(rows["mor_token_nr3"]["flops_over_baseline"]) < 0.005


def test_baseline_can_be_chosen(four):
    rows = {row["name"]: row for row in numbers(four, baseline="recursive_nr3")["differences"]}
    assert rows["vanilla"]["mean"] == pytest.approx(-0.06)
    with pytest.raises(UserError, match=r"--baseline nothing: .*vanilla"):
        numbers(four, baseline="nothing")


def test_html_needs_no_other_file(four):
    page = (four / "report" / "report.html").read_text()
    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) == len(list((four / "report").glob("*.png"))) >= 6
    for source in pictures:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert "http" not in page.replace("http-equiv", "")


def test_terminal_table_fits_eighty_columns(four):
    lines = (four / "terminal.txt").read_text().splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert max(map(len, table)) <= 80
    assert sum("mor_expert_nr3" in line and "±" in line for line in table) == 2  # loss, difference: neither is folded


def test_other_corpora_are_refused_or_shown_apart(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=7, corpus="elsewhere", data_fingerprint="e" * 64)
    with pytest.raises(UserError, match=r"--allow-mixed.*\n  corpus: made-up.*elsewhere"):
        write.write_report([tmp_path], tmp_path / "report", console=quiet())
    results = write.write_report([tmp_path], tmp_path / "report", allow_mixed=True, console=quiet())
    assert [[run["seed"] for run in one["runs"]] for one in results["sets"]] == [[0], [7]]
    assert [run["seed"] for run in results["runs"]] == [0, 7]
    assert (tmp_path / "report" / "set2_loss_flops.png").exists()


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"tokenizer_fingerprint": "x" * 64}, "tokenizer"),
        ({"sequence_length": 128}, "sequence length"),
        ({"document_masking": False}, "evaluation"),
        ({"convention": "paper"}, "FLOP convention"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, facts, named):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1, **facts)
    with pytest.raises(UserError, match=f"\n  {named}"):
        comparable_sets(read_runs([tmp_path])[0])


def test_conventions_stand_side_by_side(tmp_path):
    for convention in ("exact", "paper"):
        for name, loss in (("vanilla", 3.0), ("mor_expert_nr3", 2.9 if convention == "paper" else 3.05)):
            make_run(tmp_path / f"{name}-{convention}", name, loss=loss, convention=convention)
    sets = [summary.build_results(runs) for runs in comparable_sets(read_runs([tmp_path])[0], allow_mixed=True)]
    for one in sets:
        one["title"] = one["convention"]
    heading, table = blocks.side_by_side(sets)
    assert table.header[1:] == ["exact", "paper"] and heading.text == "Side by side"
    (row,) = table.rows
    assert row[0] == "mor_expert_nr3" and row[1].startswith("+0.0500") and row[2].startswith("-0.1000")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda lines: [*lines[:5], lines[5][:20]], r"line 6 is cut short"),
        (lambda lines: [*lines[:6], lines[1], *lines[6:]], r"line 7 goes backwards in 'step'"),
        (lambda lines: [*lines[:6], "{}\n", *lines[6:]], r"line 7 has no number under 'step'"),
    ],
)
def test_damaged_metrics_are_used_up_to_the_last_good_line(tmp_path, damage, fault):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(damage(lines)))
    good, warnings = read_metrics(path)
    assert good == [json.loads(line) for line in lines[: len(good)]] and len(good) in (5, 6)
    assert re.search(f"{re.escape(str(path))}, {fault}", warnings[0])
    runs, warnings = read_runs([tmp_path])
    assert not runs[0].finished and any("not finished" in warning for warning in warnings)


def test_unfinished_runs_are_shown_but_not_compared(tmp_path):
    make_run(tmp_path / "vanilla")
    make_run(tmp_path / "late", "mor_token_nr3", finished=False)
    results = numbers(tmp_path)
    assert [row["finished"] for row in results["variants"]] == [True, False]
    assert results["differences"] == []
    table = blocks.loss_table(results)
    assert [row[0] for row in table.rows] == ["vanilla", "mor_token_nr3 (not finished)", "unigram model"]


def test_isoflop_and_scaling_law_from_runs(tmp_path):
    place = 0
    for name in ("vanilla", "recursive_nr3"):
        for budget in (1e12, 4e12, 1.6e13):
            for hidden in (32, 48, 64):
                run = make_run(tmp_path / str(place), name, hidden_size=hidden, budget=budget, name=f"{name}_{hidden}")
                facts, path = read_run(run), run / "metrics.jsonl"
                size, tokens = hidden * hidden * 80, facts.last["tokens"]
                loss = 1.5 + 30 * size**-0.4 + 60 * tokens**-0.4 + 0.02 * (name != "vanilla")
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                lines[-1]["validation_loss"] = loss
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                place += 1
    results = numbers(tmp_path)
    assert {(row["architecture"], len(set(row["effective_parameters"]))) for row in results["isoflop"]} == {
        ("vanilla", 3),
        ("recursive", 3),
    }
    assert len(results["isoflop"]) == 6
    (law,) = results["scaling_law"]
    assert law["architecture"] == "recursive" and law["fit"]["num_runs"] == 18 and law["fit"]["phi"] < 1
    told = [*blocks.isoflop_blocks(results, ""), *blocks.law_blocks(results)]
    kinds = [type(block).__name__ for block in told]
    assert kinds == ["Heading", "Text", "Table", "Table", "Picture", "Heading", "Text", "Table"]


def test_each_architecture_is_compared_at_its_own_best_size(tmp_path):
    """Not at vanilla's width: by the seeds that all sizes have, with the seeds that the best ones have besides."""
    losses = {"vanilla": {32: 3.2, 48: 3.0, 64: 3.1}, "recursive_nr3": {32: 3.3, 48: 3.15, 64: 3.05}}
    best = {"vanilla": 48, "recursive_nr3": 64}
    for name, by_size in losses.items():
        for size, loss in by_size.items():
            for seed in range(3 if size == best[name] else 1):
                folder = tmp_path / f"{name}-{size}-{seed}"
                make_run(folder, name, hidden_size=size, seed=seed, loss=loss + 0.3 * (seed > 0), name=f"{name}_{size}")
    results = numbers(tmp_path)
    vanilla, recursive = results["best_sizes"]
    assert (vanilla["name"], vanilla["at"], "baseline" in vanilla) == ("vanilla_48", "inside", False)
    assert (recursive["name"], recursive["at"], recursive["baseline"]) == ("recursive_nr3_64", "largest", "vanilla_48")
    assert recursive["num_seeds"] == 3 and recursive["mean"] == pytest.approx(0.05)
    assert "seeds" not in recursive["open"]
    (same_width,) = [row for row in results["differences"] if row["name"] == "recursive_nr3_64"]
    assert same_width["baseline"] == "vanilla_64" and "seeds" in same_width["open"]
    table = blocks.best_size_table(results)
    assert table.rows[1][:2] == ["recursive_nr3_64", "largest"] and table.rows[1][6].startswith("+0.0500 [")


def test_a_cell_of_many_names_counts_those_that_it_leaves_out():
    names = [f"model{n}" for n in range(9)]
    assert blocks.some(names[:6]) == ", ".join(names[:6]) and blocks.some(names).endswith("model5, 3 more")


def test_one_law_takes_the_runs_of_all_methods(tmp_path, monkeypatch):
    """With the mean depth that happened, a phi for each, and a table of them; controls are no models of a method, and
    what leaves out layers of its own has no part in a law of what is applied again."""
    for budget in (1e12, 2e12):
        for name in ("vanilla", "recursive_nr3", "mor_expert_nr3"):
            make_run(tmp_path / f"{name}-{budget}", name, budget=budget)
        for size in (32, 64):
            folder = tmp_path / f"mod-{budget}-{size}"
            make_run(folder, "mod", budget=budget, hidden_size=size, model={"routing": "mixture_of_depths"})
    make_run(tmp_path / "dice", "mor_expert_nr3", model={"router": "random"}, name="dice")
    seen = []

    def fit(*columns):
        seen.append(columns)
        phi = {"recursive": (0.5, 0.4, 0.6), "mor_expert": (0.8, 0.7, 0.9)}
        return analysis.JointLaw(1.7, 0.3, 0.3, phi, 1e-3, 6)

    monkeypatch.setattr(analysis, "fit_joint_law", fit)
    results = numbers(tmp_path)
    once, shared, depths, _, _, methods = seen[0]
    assert sorted(methods) == ["mor_expert"] * 2 + ["recursive"] * 2 + ["vanilla"] * 2
    assert {m: round(d, 2) for m, d in zip(methods, depths)} == {"vanilla": 1.0, "recursive": 3.0, "mor_expert": 2.0}
    assert all((part > 0) == (name != "vanilla") for part, name in zip(shared, methods)) and min(once) > 0
    assert [law["architecture"] for law in results["scaling_law"]] == ["recursive", "mor_expert"]
    *_, text, table = blocks.law_blocks(results)
    assert "0.46" in text.text and table.rows[1] == ["mor_expert", "0.800 [0.700, 0.900]"]


def test_too_few_runs_for_a_law_are_said(four):
    laws = numbers(four)["scaling_law"]
    assert {law["architecture"] for law in laws} == {"recursive", "mor_expert", "mor_token"}
    assert all(law["fit"] is None and "at least" in law["note"] for law in laws)


def test_inference_cost_follows_the_routing_that_happened(tmp_path):
    """A third of the tokens at each depth costs less than full depth; all at full depth costs what recursive does."""
    costs = {}
    for name, shares in (
        ("recursive_nr3", None),
        ("mor_token_nr3", [0.0, 1 / 3, 1 / 3, 1 / 3]),
        ("mor_expert_nr3", [0.0, 0.0, 0.0, 1.0]),
    ):
        path = make_run(tmp_path / name, name) / "metrics.jsonl"
        lines = [json.loads(line) | {"validation_depth_shares": shares} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (variant,) = variants([read_run(tmp_path / name)])
        costs[name] = summary.inference_costs(variant)
    full, token, expert = (
        costs[n]["inference_flops_per_token"] for n in ("recursive_nr3", "mor_token_nr3", "mor_expert_nr3")
    )
    assert token < 0.8 * full
    assert full < expert < 1.01 * full  # the routers come on top
    layer = 2 * 2 * 2 * 8  # keys and values, bf16, two heads of eight
    assert costs["recursive_nr3"]["kv_bytes_per_token"] == 8 * layer
    assert costs["mor_expert_nr3"]["kv_bytes_per_token"] == (2 + 2 * (1 + 2 / 3 + 1 / 3)) * layer


def test_branches_stand_for_their_trunk(tmp_path):
    trunk = make_run(tmp_path / "trunk", finished=False)
    for budget in (1e12, 2e12):
        make_run(trunk / "branches" / f"{budget:g}", budget=budget)
    runs, warnings = read_runs([tmp_path])
    assert len(runs) == 2 and all(run.finished for run in runs) and not warnings
    assert [v.name for v in variants(runs)] == ["vanilla (1e+12 FLOPs)", "vanilla (2e+12 FLOPs)"]


def test_the_same_run_twice_is_refused(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    with pytest.raises(UserError, match="same configuration and seed"):
        variants(read_runs([tmp_path])[0])


def test_nothing_to_report_is_one_clear_message(tmp_path):
    with pytest.raises(UserError, match=r"run\.json: no such file"):
        read_runs([tmp_path])
    folder = make_run(tmp_path / "empty")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no run with a validation loss"):
        read_runs([folder])


def test_published_figures_are_the_papers():
    """Signs and order of Table 3, and that Table 9 repeats its 360M row."""
    published = read_yaml(write.PUBLISHED)
    losses = {row["name"]: row["loss"] for row in published["matched"]["rows"]}
    assert losses["mor_expert_nr2"] < losses["vanilla"] < losses["mor_expert_nr3"] < losses["mor_token_nr3"]
    table = published["isoflop"]["loss"]
    assert {(len(rows), len(row)) for rows in table.values() for row in rows} == {(4, 3)}
    assert table["vanilla"][1][2] == losses["vanilla"] and table["recursive"][1][2] == losses["recursive_nr3"]


def test_command_line_names_a_mistake_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "pretrain.report", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=Path(write.__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and "run.json: no such file" in done.stderr and "Traceback" not in done.stderr


def test_command_line_writes_beside_the_runs(tmp_path):
    make_run(tmp_path / "run")
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report" / "results.json").exists()


def test_wandb_receives_the_panels(four, tmp_path):
    pytest.importorskip("wandb")
    runs, _ = read_runs([four / "vanilla-seed0"])
    results = summary.build_results(runs)
    picture = document.Picture(
        "loss_flops", "a caption", figures.loss_curves(variants(runs), "flops", {"unigram model": 4.1}, "")
    )
    document.write([picture], tmp_path, title="t", results=results)
    write.send_to_wandb([picture, blocks.runs_table(results)], runs, results, tmp_path, "offline")
    (recording,) = (tmp_path / "tracker" / "wandb").glob("offline-run-*/run-*.wandb")
    wanted = (b"validation_loss/vanilla-seed0", b"loss_flops")
    until = time.monotonic() + 30  # its writer is another process, which a busy machine delays
    while time.monotonic() < until and not all(name in recording.read_bytes() for name in wanted):
        time.sleep(0.1)
    assert all(name in recording.read_bytes() for name in wanted)


@pytest.mark.parametrize("kv_strategy", ["shared", "shared_update"])
def test_inference_cost_of_shared_keys_counts_the_first_recursion_of_every_token(tmp_path, kv_strategy):
    """Keys of everyone come from states that passed: a token that entered none costs what one of depth 1 does."""
    costs = []
    for number, shares in enumerate(([0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])):
        run = make_run(tmp_path / str(number), "mor_expert_nr3")
        facts = json.loads((run / "run.json").read_text())
        facts["model"] |= {"kv_strategy": kv_strategy, "capacity_factors": [0.5, 0.5, 0.5]}
        (run / "run.json").write_text(json.dumps(facts))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        changed = [json.dumps(json.loads(line) | {"validation_depth_shares": shares}) + "\n" for line in lines]
        (run / "metrics.jsonl").write_text("".join(changed))
        (variant,) = variants([read_run(run)])
        costs.append(summary.inference_costs(variant)["inference_flops_per_token"])
    assert costs[0] == pytest.approx(costs[1], rel=0.01)  # the deeper routers were offered fewer
