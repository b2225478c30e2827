"""Mixtures: exact proportions at every length, every sample of every source once an epoch, any position at once."""

import json
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prepare import prepare
from data_prep.settings import UserError, build, merge
from pretrain.config import DataSettings
from pretrain.data import BlockLoader, Blocks
from pretrain.manifest import Manifest, Mixture
from pretrain.mixture import Phase, Proportions, pattern, starts_of, whole_weights
from tests.helpers.corpus import prepare_tiny, tiny_settings
from tests.helpers.experiments import figures, read_lines, settings_for, train, trainer_for

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(1, 4))
def test_no_source_is_ever_a_sample_from_its_share(weights, periods):
    whole = whole_weights(weights)
    share = np.array(whole) / sum(whole)
    order = np.tile(pattern(whole), periods)
    counts = (order[:, None] == np.arange(len(whole))).cumsum(axis=0)
    deviation = counts - np.arange(1, len(order) + 1)[:, None] * share
    assert np.abs(deviation).max() < 1
    assert np.bincount(pattern(whole), minlength=len(whole)).tolist() == list(whole)


@settings(deadline=None, max_examples=30)
@given(st.lists(WEIGHTS, min_size=1, max_size=3), st.data())
def test_ranks_count_the_samples_of_a_source_over_all_phases(phases, data):
    sources = max(map(len, phases))
    whole = [whole_weights([*part, *([0] * (sources - len(part)))]) for part in phases]
    starts = [0, *sorted(data.draw(st.lists(st.integers(0, 300), min_size=len(phases) - 1, max_size=len(phases) - 1)))]
    order = Proportions([Phase(start, part) for start, part in zip(starts, whole, strict=True)])
    chosen, ranks = order.locate(np.arange(500))
    for source in range(sources):
        here = chosen == source
        assert ranks[here].tolist() == list(range(here.sum()))
    for position in (0, 1, 77, 300, 500):
        assert order.counts(position).tolist() == np.bincount(chosen[:position], minlength=sources).tolist()
    asked = np.array(data.draw(st.lists(st.integers(0, 499), min_size=1, max_size=20)))
    assert np.array_equal(order.locate(asked)[0], chosen[asked])
    assert np.array_equal(order.locate(asked)[1], ranks[asked])


def test_weights_are_taken_as_they_are_written():
    assert whole_weights([0.7, 0.3]) == (7, 3)
    assert whole_weights([1, 1, 1]) == (1, 1, 1)
    assert whole_weights([0.1, 0.2, 0.0]) == (1, 2, 0)
    with pytest.raises(ValueError, match="give them with fewer digits"):
        whole_weights([0.1234567, 0.5])


def test_a_phase_that_has_begun_stays_where_it_began():
    assert starts_of([0, 0.8], 1000) == [0, 800]
    assert starts_of([0, 0.8], 1000, 900, [0, 800]) == [0, 800]
    assert starts_of([0, 0.8], 500, 420, [0, 800]) == [0, 420]  # a branch with half the budget
    assert starts_of([0, 0.8], 500, 400, [0, 800]) == [0, 400]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of one tokenizer and one of another."""
    root = tmp_path_factory.mktemp("sources")
    prepare_tiny(root / "edu", samples=40)
    load = {"load": str(root / "edu" / "tokenizer.json")}
    for name, seed in (("code", 3), ("web", 4)):
        settings_of = {"seed": seed, "source": {"kind": "synthetic", "documents": 80}, "tokenizer": load}
        prepare(tiny_settings(root / name, **settings_of))
    prepare_tiny(root / "other", samples=24, vocab_size=320)
    return root


def mixture(folders, **weights) -> Mixture:
    return Mixture.of(
        {
            name: (Manifest.read(folders / name), weight if isinstance(weight, list) else [(0.0, weight)])
            for name, weight in weights.items()
        }
    )


def batches(loader, count):
    return [[micro.input_ids.tolist() for micro in next(loader)] for _ in range(count)]


def test_a_mixture_hands_out_every_sample_of_every_source_once_an_epoch(folders):
    mixed = mixture(folders, edu=0.5, code=0.25, web=0.25)
    total = {name: source.split("train").samples for name, source in mixed.sources.items()}
    loader = BlockLoader(mixed, "train", 8, 4)
    rows = [tuple(row) for batch in batches(loader, 60) for micro in batch for row in micro]
    sources = loader._order.locate(np.arange(480))[0]
    for number, name in enumerate(["code", "edu", "web"]):
        own = [row for row, source in zip(rows, sources, strict=True) if source == number]
        assert len(own) == {"edu": 240, "code": 120, "web": 120}[name]
        blocks = Blocks(mixed.sources[name], "train")
        everything = Counter(tuple(blocks[index][:-1].tolist()) for index in range(len(blocks)))
        epochs, rest = divmod(len(own), total[name])
        seen = Counter(own)
        assert all(0 <= seen[row] - epochs * count <= count for row, count in everything.items())
        assert sum(seen[row] - epochs * count for row, count in everything.items()) == rest
    expected = {"edu": 240 / total["edu"], "code": 120 / total["code"], "web": 120 / total["web"]}
    assert loader.source_epochs == pytest.approx(expected)
    loader.close()


@pytest.mark.parametrize("position", [0, 8, 104, 1_000_000])
def test_a_mixture_is_resumed_at_any_position_at_once(folders, position):
    mixed = mixture(folders, edu=[(0.0, 0.6), (0.5, 0.1)], code=[(0.0, 0.1), (0.5, 0.6)], web=0.3)
    whole = BlockLoader(mixed, "train", 8, 2, position=position)
    whole.spread_over(2_000_000 if position > 1000 else 240)
    batches(whole, 3)
    state = whole.state()
    assert state["sources"] == {name: source.fingerprint for name, source in mixed.sources.items()}
    started = time.perf_counter()
    resumed = [BlockLoader(mixed, "train", 8, 2, rank, 2) for rank in range(2)]
    for loader in resumed:
        loader.load_state(state)
    found = [batches(loader, 4) for loader in resumed]
    assert time.perf_counter() - started < 60  # well below a second on an idle machine
    expected = batches(whole, 4)
    for step, batch in enumerate(expected):
        assert [micro for pair in zip(found[0][step], found[1][step], strict=True) for micro in pair] == batch
    for loader in (whole, *resumed):
        loader.close()


def test_the_proportions_change_at_a_share_of_the_budget(folders):
    loader = BlockLoader(mixture(folders, edu=[(0, 1), (0.8, 0)], code=[(0, 0), (0.8, 1)]), "train", 10, 10)
    loader.spread_over(100)
    assert [loader._order.locate(np.arange(100))[0].tolist()] == [[1] * 80 + [0] * 20]
    assert loader.epochs_at(100)["code"] == 20 / len(loader._blocks["code"])


def test_sources_of_another_tokenizer_are_refused_and_the_fingerprint_covers_weights(folders):
    with pytest.raises(UserError, match=r"other: prepared with tokenizer .*source 'edu'"):
        mixture(folders, edu=0.5, other=0.5)
    assert mixture(folders, edu=0.5, code=0.5).fingerprint != mixture(folders, edu=0.6, code=0.4).fingerprint
    assert mixture(folders, edu=1, code=1).fingerprint == mixture(folders, code=1, edu=1).fingerprint
    with pytest.raises(UserError, match="every weight is 0"):
        mixture(folders, edu=0, code=0)
    mixed = mixture(folders, edu=0.75, code=0.25)
    losses = {name: source.unigram_loss for name, source in mixed.sources.items()}
    assert mixed.unigram_loss == pytest.approx(0.75 * losses["edu"] + 0.25 * losses["code"])
    state = BlockLoader(mixed, "train", 4, 4).state()
    with pytest.raises(UserError, match="not the data that the checkpoint was trained on"):
        BlockLoader(mixture(folders, edu=0.7, code=0.3), "train", 4, 4).load_state(state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give either folder or mixture"),
        ({"folder": "x", "mixture": {"a": {"folder": "x", "weight": 1}}}, "give either folder or mixture"),
        ({"mixture": {"a": {"folder": "x", "weight": -1}}}, "a weight must be 0 or more"),
        ({"mixture": {"a": {"folder": "x", "weight": [[0.1, 1]]}}}, "shares rise from 0"),
        ({"mixture": {"a.b": {"folder": "x", "weight": 1}}}, "no name of a source"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        DataSettings.model_validate(data)


def mixed_settings(run_dir, folders, steps=8):
    sources = {
        "edu": {"folder": str(folders / "edu"), "weight": [[0, 0.7], [0.5, 0.2]]},
        "code": {"folder": str(folders / "code"), "weight": [[0, 0.3], [0.5, 0.8]]},
    }
    changes = {
        "data": {"mixture": sources},
        "budget": {"steps": steps},
        "evaluation": {"times": 2, "sequences": 4},
        "checkpoint": {"every_steps": 1},
    }
    template = settings_for(run_dir, folders / "edu", "vanilla")
    values = merge(template.model_dump(mode="json"), changes) | {"data": {"mixture": sources}}
    return build(type(template), values, "test")


def test_a_run_on_a_mixture_goes_on_where_it_was_and_tells_each_source(folders, tmp_path, monkeypatch):
    whole = train(mixed_settings(tmp_path / "whole", folders))
    stopped = trainer_for(mixed_settings(tmp_path / "stopped", folders))
    original = type(stopped).after_step

    def after_step(self, before, line):
        original(self, before, line)
        if self.state.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(stopped), "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    lines = train(mixed_settings(tmp_path / "stopped", folders))
    assert [line for line in figures(lines) if "loss" in line] == [line for line in figures(whole) if "loss" in line]
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert set(facts["mixture"]) == {"code", "edu"}
    assert facts["data_fingerprint"] not in {source["data_fingerprint"] for source in facts["mixture"].values()}
    validation = [line for line in whole if "validation_loss" in line][-1]
    losses = validation["validation_loss_sources"]
    assert validation["validation_loss"] == pytest.approx(0.45 * losses["edu"] + 0.55 * losses["code"])
    last = [line for line in whole if "source_epochs" in line][-1]
    samples = {name: source["samples"] for name, source in facts["mixture"].items()}
    counts = {name: round(last["source_epochs"][name] * samples[name]) for name in samples}
    # 8 steps of 4: 16 samples at 7 to 3, then 16 at 2 to 8
    assert counts["edu"] + counts["code"] == 32
    assert abs(counts["edu"] - (11.2 + 3.2)) < 2


@pytest.mark.slow
def test_a_mixture_killed_at_drawn_moments_equals_one_that_was_left_alone(folders, tmp_path):
    """Before and after its weights change, in and between saves."""
    whole = train(mixed_settings(tmp_path / "whole", folders, steps=40))
    config = tmp_path / "killed.yaml"
    settings = mixed_settings(tmp_path / "killed", folders, steps=40)
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "tests.helpers.killing", str(config), "3", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["killed"] >= 3
    assert figures(read_lines(tmp_path / "killed")) == figures(whole)
