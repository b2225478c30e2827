"""The comparison with the authors' code: what it refuses, and what it makes of the seconds of both sides."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from model.modeling import MoRForCausalLM
from tests.benchmarks import bench_model

REFERENCE = ["--reference", "elsewhere", "--reference-python", sys.executable]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference", "elsewhere"], "go together"),
        ([*REFERENCE, "--dtype", "fp32"], "takes no other options"),
        ([*REFERENCE, "--documents"], "takes no other options"),
        ([*REFERENCE, "--only", "vanilla"], "takes no other options"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        bench_model.parse(arguments)
    assert words in capsys.readouterr().err


def test_ratios_are_theirs_over_ours_and_meet_the_bars(monkeypatch, capsys):
    """Their steps take 3 s here; ours 2 s as they are and 1.5 s compiled."""
    described = {name: {"loss": 4.0} for name in bench_model.REFERENCE_BARS}
    described["mor_token nr3"]["load"] = [0.5, 0.25, 0.25]
    theirs = SimpleNamespace(described=described, step=lambda name: 3.0, close=lambda: None)
    monkeypatch.setattr(bench_model, "Reference", lambda options, base: theirs)
    monkeypatch.setattr(bench_model, "CPU_BASE", bench_model.CPU_BASE | {"vocab_size": 61, "hidden_size": 16})
    monkeypatch.setattr(MoRForCausalLM, "compile_layers", lambda self: setattr(self, "compiled", True))
    monkeypatch.setattr(bench_model, "make_step", lambda model, *rest: Step(model, *rest))
    monkeypatch.setattr(bench_model, "timed", lambda step, *_: 1.5 if hasattr(step.model, "compiled") else 2.0)
    options = bench_model.parse([*REFERENCE, "--length", "8", "--rounds", "2"])
    assert options.rows == 1
    results = bench_model.compare(options)
    assert [r.name for r in results] == list(bench_model.REFERENCE_BARS)
    for r in results:
        assert r.seconds == {"theirs": 3.0, "eager": 2.0, "compiled": 1.5}
        assert r.faster == {"eager": 1.5, "compiled": 2.0} and r.losses["ours"] > 0
    assert results[3].loads["theirs"] == [0.5, 0.25, 0.25] and len(results[3].loads["ours"]) == 3
    bench_model.show_compared(results, "title")
    shown = capsys.readouterr().out
    assert shown.count("pass") == 3 and "1.6" in shown


class Step:
    """As `make_step`, with its model at hand."""

    def __init__(self, model, batch, documents, dtype):
        self.model, self.batch = model, batch

    def __call__(self):
        return self.model(input_ids=self.batch, labels=self.batch)
