"""Experiment settings: what is refused, in which words, and what `--print-config` explains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from data_prep.settings import UserError
from model.depth import METHODS
from pretrain import config
from pretrain.config import differing_keys, print_config, read_settings

EXPERIMENTS = sorted(Path("configs/experiment").glob("*.yaml"))
MINIMAL = {
    "name": "x",
    "run_dir": "runs/x",
    "model": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 5},
    "data": {"folder": "data/x"},
    "budget": {"steps": 3},
    "batch": {"size": 4},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read_settings(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("file", [f for f in EXPERIMENTS if f.name != "base.yaml"], ids=lambda f: f.stem)
def test_every_experiment_of_the_repository_is_valid(file: Path) -> None:
    settings = read_settings(file)
    assert settings.batch.size % (settings.batch.micro_size or 1) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.learning_rate=1", ["unknown key 'optimiser'", "optimizer"]),
        ("optimizer.learning_rte=1", ["unknown key 'optimizer.learning_rte'", "learning_rate"]),
        ("model.hiden_size=8", ["model: unknown key 'hiden_size'", "hidden_size"]),
        ("model.hidden_size=wide", ["hidden_size", "int", "wide"]),
        ("model.sharing=middle", ["sharing", "middle_cycle"]),
        ("budget.tokens=5", ["budget", "exactly one", "tokens, steps"]),
        ("batch.size=0", ["batch.size", "greater than 0"]),
        ("precision=fp8", ["precision", "bf16", "fp32"]),
        ("seed=-1", ["seed"]),
        ("seed=1e30", ["seed", "less than"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate", "finite"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas.1", "less than 1"]),
        ("optimizer.betas=[-0.1, 0.9]", ["optimizer.betas.0", "greater than or equal to 0"]),
        ("checkpoint.every_minutes=.nan", ["checkpoint.every_minutes", "finite"]),
        ("name=", ["name", "string"]),
    ],
)
def test_mistakes_are_named_with_file_key_and_what_would_do(path: Path, override: str, words: list[str]) -> None:
    text = message(path, override)
    for word in [str(path), *words]:
        assert word in text


@pytest.mark.parametrize(
    ("routing", "given"),
    [
        ("token_choice", "selection=aux_loss"),
        ("token_choice", "capacity_factors=[0.1, 0.9, 5.0]"),
        ("token_choice", "capacity_warmup_steps=0"),
        ("expert_choice", "balancing=loss"),
        ("none", "router=linear"),
    ],
)
def test_a_setting_of_another_method_is_refused_even_at_its_default(path: Path, routing: str, given: str) -> None:
    text = message(path, "model.num_recursions=3", f"model.routing={routing}", f"model.{given}")
    assert f"{given.partition('=')[0]}: means nothing for routing '{routing}'" in text and "leave it out" in text


STARTS = re.findall(r"`(start_from[=.][^`]+)`", Path("README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", STARTS)
def test_what_the_readme_types_to_start_from_a_run_is_read_in_any_order(path: Path, command: str) -> None:
    words = [word for word in command.replace("LOWER", "1e-4").split() if "=" in word]
    if "start_from=runs/old" not in words:
        words = ["start_from=runs/old", *(["start_from.take=run"] if "take" not in command else []), *words]
    asked = read_settings(path, words).start_from
    assert asked is not None and asked.path == Path("runs/old")
    assert asked == read_settings(path, words[::-1]).start_from
    path.write_text(yaml.safe_dump(MINIMAL | {"start_from": "runs/old"}))
    assert asked == read_settings(path, [word for word in words if word != "start_from=runs/old"]).start_from
    with pytest.raises(UserError, match="drops 'start_from=null'"):
        read_settings(path, ["start_from=null", "start_from.step=3"])


def test_a_models_fields_are_typed_by_its_configuration(path: Path) -> None:
    routed = ["model.num_recursions=3", "model.routing=expert_choice", "model.capacity_factors=[1,1,1]"]
    model = read_settings(path, [*routed, "model.tie_word_embeddings=no", "model.router_alpha=1"]).model
    assert model["capacity_factors"] == [1.0, 1.0, 1.0] and isinstance(model["capacity_factors"][0], float)
    assert model["tie_word_embeddings"] is False and isinstance(model["router_alpha"], float)


def test_budgets_must_rise_and_share_a_plateau(path: Path) -> None:
    steps = "budget.steps=null"
    assert "rise" in message(path, steps, "budget.flops=[2e9, 1e9]")
    assert "positive" in message(path, steps, "budget.flops=0")
    assert "trapezoid" in message(path, steps, "budget.flops=[1e9, 2e9]", "schedule.kind=cosine")
    assert read_settings(path, [steps, "budget.flops=16.5e18"]).budget.totals == [16_500_000_000_000_000_000]


def test_print_config_explains_every_key(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    print_config(read_settings(path, ["model.num_recursions=3", "model.routing=expert_choice"]))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    table = {row[0]: row[1:] for row in rows if row[0]}
    assert table["model.num_recursions"][0] == "3"
    assert table["model.kv_strategy"][0] == "'recursion_wise' (default)"
    assert table["optimizer.weight_decay"][0] == "0.1"
    assert not [key for key, (_, meaning) in table.items() if not meaning]
    fields = [f"model.{name}" for name in config.MoRConfig.__annotations__ if name in config.MoRConfig.__doc__]
    fields += [f"model.{name}" for name in METHODS["expert_choice"].settings]
    assert len(fields) > 20 and "model.balancing" not in table
    assert set(fields) <= set(table)


def test_only_what_leaves_the_losses_alone_may_change(path: Path) -> None:
    before = read_settings(path).model_dump(mode="json")
    harmless = ["tracker.mode=disabled", "checkpoint.keep=9", "batch.micro_size=2", "data.folder=elsewhere"]
    harmless += ["optimizer.max_skipped_steps=3", "evaluation.times=2", "metrics.every_steps=5"]
    harmless += ["parallel.strategy=ddp"]
    assert differing_keys(before, read_settings(path, harmless).model_dump(mode="json")) == []
    changed = ["seed=2", "model.hidden_size=32", "batch.size=8", "optimizer.learning_rate=1e-3"]
    assert differing_keys(before, read_settings(path, changed).model_dump(mode="json")) == sorted(
        ["seed", "model.hidden_size", "batch.size", "optimizer.learning_rate"]
    )
