"""The trainer: what a run writes, when it ends, that accumulation changes no loss, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.settings import UserError
from model.flops import training_flops
from model.modeling import MoRForCausalLM
from pretrain import checkpoint
from pretrain.data import Blocks, bigram_loss
from pretrain.manifest import Manifest
from pretrain.plan import RunState, make_plans
from pretrain.report.checklist import LOOK_AHEAD
from pretrain.trainer import Trainer, make_optimizer
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import ROUTED, figures, read_lines, settings_for, train, trainer_for

ARCHITECTURES = sorted(ROUTED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    return folder


def losses(lines: list[dict[str, Any]], key: str = "loss") -> list[float]:
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_leaves_its_whole_record(tmp_path: Path, data: Path, architecture: str) -> None:
    settings = settings_for(tmp_path / "run", data, architecture, evaluation={"times": 2, "at_start": True})
    lines = train(settings)
    manifest = Manifest.read(data)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["tokens"] for line in steps] == [128 * n for n in range(1, 9)]
    assert losses(steps)[-1] < losses(steps)[0]
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [0, 4, 8]
    last = lines[-1]
    assert last["event"] == "finished"
    assert last["validation_tokens"] == 4 * 32
    routed = architecture not in ("vanilla", "recursive")
    assert (last["validation_loss"] == last["validation_loss_topk"]) == (architecture not in ("mor_expert", "mod"))
    for line in steps:
        assert ("depth_shares" in line) == routed
        assert not routed or math.isclose(sum(line["depth_shares"]), 1)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["architecture"] == architecture
    assert facts["unigram_loss"] == manifest.unigram_loss
    assert facts["data_fingerprint"] == manifest.fingerprint
    model = MoRForCausalLM.from_pretrained(tmp_path / "run/final")
    assert sum(p.numel() for p in model.parameters()) == facts["unique_parameters"]


def test_the_bigram_line_is_that_of_counted_pairs(data: Path) -> None:
    manifest = Manifest.read(data)
    rows = {split: Blocks(manifest, split) for split in ("train", "validation")}
    pairs = {
        split: [pair for i in range(len(blocks)) for pair in itertools.pairwise(blocks[i].tolist())]
        for split, blocks in rows.items()
    }
    counts, firsts = Counter(pairs["train"]), Counter(first for first, _ in pairs["train"])
    targets, total = Counter(second for _, second in pairs["train"]), len(pairs["train"]) + manifest.vocab_size
    losses = []
    for k in (4.0**power for power in range(-1, 7)):
        chances = [
            (counts[pair] + k * (targets[pair[1]] + 1) / total) / (firsts[pair[0]] + k) for pair in pairs["validation"]
        ]
        losses.append(-sum(map(math.log, chances)) / len(chances))
    assert bigram_loss(manifest) == pytest.approx(min(losses)) and min(losses) < manifest.unigram_loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_looking_ahead_is_measured(
    tmp_path: Path, data: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but rounding in the causal evaluation of any model; a leak that is planted in it shows."""
    trainer = trainer_for(settings_for(tmp_path / "run", data, architecture, budget={"steps": 2}))
    assert trainer.run() == 0
    written = read_lines(tmp_path / "run")[-1]["validation_look_ahead"]
    assert 0 <= written < 1e-5
    forward = trainer.parallel.forward
    if "topk" in trainer.validation._modes():
        monkeypatch.setattr(trainer.parallel, "forward", lambda **given: forward(**given | {"routing_mode": "topk"}))
        assert trainer.validation.look_ahead(trainer.parallel) > LOOK_AHEAD


def test_the_order_of_the_data_has_a_seed_of_its_own(tmp_path: Path, data: Path) -> None:
    """The same initial weights, other batches; the same order as its seed gives when it is that seed."""
    seen = {}
    for name, order_seed in (("own", None), ("other", 5), ("same", 0)):
        settings = settings_for(tmp_path / name, data, budget={"steps": 3})
        ordered = settings.data.model_copy(update={"order_seed": order_seed})
        seen[name] = losses(train(settings.model_copy(update={"data": ordered})))
    assert seen["own"] == seen["same"] and seen["own"] != seen["other"]


def test_the_exported_model_has_the_validation_loss(tmp_path: Path, data: Path) -> None:
    lines = train(settings_for(tmp_path, data))
    model = MoRForCausalLM.from_pretrained(tmp_path / "final").eval()
    trainer = trainer_for(settings_for(tmp_path / "other", data))
    trainer.parallel.module.load_state_dict(model.state_dict())
    assert trainer.validation(trainer.parallel)["validation_loss"] == pytest.approx(
        lines[-1]["validation_loss"], rel=1e-6
    )


@pytest.mark.parametrize("architecture", ["vanilla", "mor_expert", "mor_token"])
def test_accumulation_changes_no_loss(tmp_path: Path, data: Path, architecture: str) -> None:
    model = {"z_loss_coefficient": 0.01} if architecture != "vanilla" else {}
    runs = [
        train(settings_for(tmp_path / str(size), data, architecture, batch={"micro_size": size}, model=model))
        for size in (4, 2, 1)
    ]
    for key in ("loss", "total_loss", "selection_loss", "balancing_loss", "z_loss", "gradient_norm", "flops"):
        whole = losses(runs[0], key)
        for accumulated in runs[1:]:
            assert losses(accumulated, key) == pytest.approx(whole, rel=2e-4)


@pytest.mark.parametrize("architecture", ["mor_expert", "mor_token"])
def test_flops_are_those_of_the_routing_that_happened(tmp_path: Path, data: Path, architecture: str) -> None:
    trainer = trainer_for(settings_for(tmp_path, data, architecture, batch={"micro_size": 2}))
    seen: list[Any] = []
    forward = trainer.parallel.forward

    def watch(*arguments: Any, **inputs: Any) -> Any:
        output = forward(*arguments, **inputs)
        if "targets" in inputs and trainer.model.training:
            seen.append(output.routing)
        return output

    trainer.parallel.forward = watch  # type: ignore[method-assign]
    assert trainer.run() == 0
    counts, pairs = (torch.stack([getattr(r, name).sum(0) for r in seen]).sum(0) for name in ("counts", "pairs"))
    expected = training_flops(trainer.config, 32, 8 * 4, counts.tolist(), pairs.tolist())
    assert trainer.state.flops == expected
    assert read_lines(tmp_path)[-1]["flops"] == expected


@pytest.mark.parametrize("architecture", ["recursive", "mor_expert", "mor_token"])
def test_a_flop_budget_is_met_within_a_step(tmp_path: Path, data: Path, architecture: str) -> None:
    budget = 200_000_000
    settings = settings_for(tmp_path, data, architecture, budget={"steps": None, "flops": budget})
    trainer = trainer_for(settings)
    cost = trainer.plans[0].step_cost
    assert trainer.run() == 0
    limit = 0.5 if architecture != "mor_token" else 1.0
    assert abs(trainer.state.flops - budget) <= limit * cost


def test_rates_follow_the_budget_and_reach_the_end(tmp_path: Path, data: Path) -> None:
    lines = train(settings_for(tmp_path, data, budget={"steps": 10}, schedule={"warmup_steps": 2, "decay_share": 0.5}))
    assert losses(lines, "learning_rate") == pytest.approx([3e-3 * r for r in (0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)])


def test_matrices_decay_vectors_do_not_and_auxiliary_routers_learn_faster(tmp_path: Path, data: Path) -> None:
    settings = settings_for(tmp_path, data, model={"selection": "aux_router"})
    model = trainer_for(settings).model
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, settings).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1), name
            assert group["learning_rate_scale"] == (10.0 if "aux_router" in name else 1.0), name


def test_loss_free_bias_moves_once_a_step_by_the_global_load(tmp_path: Path, data: Path) -> None:
    model = {"balancing": "loss_free", "bias_update_rate": 0.25}
    trainer = trainer_for(settings_for(tmp_path, data, "mor_token", model=model, batch={"micro_size": 1}))
    assert trainer.run() == 0
    bias = torch.zeros(3)
    for line in read_lines(tmp_path):
        if "load" in line:
            load = torch.tensor(line["load"])
            bias += 0.25 * torch.sign(load.mean() - load)
    assert torch.equal(trainer.model.model.router_bias, bias)


@pytest.mark.slow
def test_branches_equal_runs_planned_for_their_budget_alone(tmp_path: Path, data: Path) -> None:
    budgets = [150_000_000, 250_000_000]
    several = settings_for(tmp_path / "trunk", data, budget={"steps": None, "flops": budgets})
    assert train(several)[-1]["event"] == "branched"
    assert trainer_for(several).run() == 0  # again: nothing is left to do
    for budget, folder in zip(budgets, sorted((tmp_path / "trunk/branches").iterdir()), strict=True):
        facts = json.loads((folder / "run.json").read_text())
        schedule = {"warmup_steps": facts["budget"]["warmup_steps"]}
        alone = settings_for(tmp_path / str(budget), data, budget={"steps": None, "flops": budget}, schedule=schedule)
        assert figures(read_lines(folder)) == figures(train(alone))
        one, other = (
            checkpoint.read_tensors(sorted((root / "checkpoints").iterdir())[-1])
            for root in (folder, tmp_path / str(budget))
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_branch_that_leaves_during_the_warm_up_is_refused(tmp_path: Path, data: Path) -> None:
    settings = settings_for(
        tmp_path, data, budget={"steps": None, "flops": [10**8, 10**9]}, schedule={"warmup_steps": 99}
    )
    with pytest.raises(UserError, match="warmup_steps"):
        trainer_for(settings)


# What is refused, or survived


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": {"size": 6, "micro_size": 4}}, ["6", "4", "8"]),
        ({"budget": {"steps": None, "flops": 1000}}, ["1000", "less than one step", "FLOPs"]),
        ({"budget": {"steps": None, "tokens": 20}}, ["20", "less than one step", "128 tokens"]),
        ({"model": {"vocab_size": 999}}, ["model.vocab_size", "999", "300"]),
        ({"batch": {"sequence_length": 64}}, ["64", "32"]),
        ({"model": {"max_position_embeddings": 8}}, ["max_position_embeddings", "8", "32"]),
        ({"folder": "nowhere"}, ["nowhere", "prepare"]),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    tmp_path: Path, data: Path, changes: dict[str, Any], words: list[str]
) -> None:
    folder = Path(changes.pop("folder", data))
    with pytest.raises(UserError) as caught:
        trainer_for(settings_for(tmp_path / "run", folder, **changes)).run()
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_configuration_is_refused_by_key(tmp_path: Path, data: Path) -> None:
    train(settings_for(tmp_path, data))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"differ: optimizer\.learning_rate, seed"):
        trainer_for(settings_for(tmp_path, data, seed=5, optimizer={"learning_rate": 1e-4})).run()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        trainer_for(settings_for(tmp_path, data)).run()


def test_other_data_is_refused_on_resume(tmp_path: Path, data: Path) -> None:
    stop_after(trainer_for(settings_for(tmp_path / "run", data)), 3)
    prepare_tiny(tmp_path / "data", seed=1)
    with pytest.raises(UserError, match="fingerprint"):
        trainer_for(settings_for(tmp_path / "run", tmp_path / "data")).run()


def poison(trainer: Trainer, steps: list[int]) -> None:
    """Make the gradient not finite in the given steps (from 1)."""
    micro_step = trainer.parallel.micro_step

    def poisoned(loss: torch.Tensor, last: bool) -> None:
        micro_step(loss * math.nan if trainer.state.step + 1 in steps else loss, last)

    trainer.parallel.micro_step = poisoned  # type: ignore[method-assign]


def test_a_step_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(settings_for(tmp_path, data, checkpoint={"every_steps": 2}))
    poison(trainer, [6])
    with pytest.raises(UserError, match=r"step 6: .* not finite.*step-00000004"):
        trainer.run()
    whole = trainer_for(settings_for(tmp_path, data, checkpoint={"every_steps": 2}))
    assert whole.run() == 0  # without the poison it goes on from step 4
    assert losses(read_lines(tmp_path)) == losses(train(settings_for(tmp_path.with_name("other"), data)))


def test_steps_within_the_limit_are_skipped_and_counted(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(settings_for(tmp_path, data, optimizer={"max_skipped_steps": 1}))
    poison(trainer, [3])
    assert trainer.run() == 0
    lines = read_lines(tmp_path)
    assert lines[2]["gradient_norm"] is None
    assert [line["skipped_steps"] for line in lines][:4] == [0, 0, 1, 1]
    assert all(math.isfinite(p.sum()) for p in trainer.model.parameters())


def stop_after(trainer: Trainer, steps: int, number: signal.Signals = signal.SIGTERM) -> int:
    """Run until a signal comes in the given step; returns the exit code."""
    micro_step = trainer.parallel.micro_step

    def signalled(loss: torch.Tensor, last: bool) -> None:
        micro_step(loss, last)
        if trainer.state.step + 1 == steps:
            signal.raise_signal(number)

    trainer.parallel.micro_step = signalled  # type: ignore[method-assign]
    return trainer.run()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda x: str(x)
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    tmp_path: Path, data: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path / "run", data, "mor_token")
    assert stop_after(trainer_for(settings), 5, number) == code
    assert read_lines(tmp_path / "run")[-1]["step"] == 5
    assert "run the same command again" in capsys.readouterr().out
    assert (tmp_path / "run/requeue").exists() == (code == 75)
    resumed = train(settings)
    assert not (tmp_path / "run/requeue").exists()
    assert resumed[-1]["event"] == "finished"


def test_the_stop_file_ends_the_run(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(settings_for(tmp_path, data))
    after_step = trainer.after_step

    def asked(before: RunState, line: dict[str, Any]) -> None:
        after_step(before, line)
        (tmp_path / "stop").touch()

    trainer.after_step = asked  # type: ignore[method-assign]
    assert trainer.run() == 75
    assert trainer.state.step == 2


@pytest.mark.parametrize("recompute", ["block", "recursion", "selective"])
def test_recomputation_changes_no_figure(tmp_path: Path, data: Path, recompute: str) -> None:
    plain, saving = (
        train(settings_for(tmp_path / policy, data, budget={"steps": 3}, recompute=policy))
        for policy in ("none", recompute)
    )
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)
    assert losses(saving, "total_loss") == pytest.approx(losses(plain, "total_loss"), rel=1e-6)


def test_bf16_keeps_fp32_weights_and_learns(tmp_path: Path, data: Path) -> None:
    trainer = trainer_for(settings_for(tmp_path, data, precision="bf16"))
    assert trainer.run() == 0
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    lines = losses(read_lines(tmp_path))
    assert lines[-1] < lines[0]


def test_a_run_starts_from_a_trained_vanilla_model(tmp_path: Path, data: Path) -> None:
    train(settings_for(tmp_path / "vanilla", data, "vanilla"))
    start = {"folder": tmp_path / "vanilla/final", "method": "stepwise"}
    trainer = trainer_for(settings_for(tmp_path / "run", data, initialize_from=start))
    source = MoRForCausalLM.from_pretrained(tmp_path / "vanilla/final")
    assert torch.equal(trainer.model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert trainer.run() == 0


@pytest.mark.parametrize(
    ("folder", "model", "words"),
    [("nowhere", {}, "holds no model"), ("final", {"hidden_size": 32}, "hidden_size: the source has 16")],
)
def test_a_start_that_does_not_fit_is_refused(
    tmp_path: Path, data: Path, folder: str, model: dict[str, Any], words: str
) -> None:
    MoRForCausalLM(trainer_for(settings_for(tmp_path / "x", data, "vanilla")).config).save_pretrained(
        tmp_path / "final"
    )
    settings = settings_for(tmp_path / "run", data, initialize_from={"folder": tmp_path / folder}, model=model)
    with pytest.raises(UserError, match=words):
        trainer_for(settings)


def test_plans_of_authors_run(data: Path) -> None:
    settings = settings_for(Path("unused"), data, budget={"steps": None, "flops": int(16.5e18)})
    (plan,) = make_plans(settings, step_flops=round(16.5e18 / 14160.01), tokens_per_step=2**21)
    assert (plan.planned_steps, plan.schedule.warmup_steps) == (14160, 708)
