"""One new way of spending depth is one new file: a toy in `model/depth/` has all that the others have."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import model.depth
from data_prep.settings import UserError
from model import MoRConfig, MoRForCausalLM
from model.convert.export import main as export
from model.depth import METHODS, architectures, find_methods
from model.memory import Placement, activation_bytes, kv_cache_bytes_per_token
from pretrain import main, views
from pretrain.config import read_settings
from pretrain.metrics import MetricsFile
from pretrain.report.__main__ import main as report
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import TINY, figures, read_lines
from tests.helpers.tiny import save_tiny, tiny_model
from tests.helpers.variants import VARIANTS
from tests.model import test_cache, test_causality, test_flops_measured, test_memory
from tests.model.inference import test_engine

TOY = Path(__file__).resolve().parents[1] / "helpers" / "toy_depth.py"
FIELDS: dict[str, Any] = {"routing": "stopping", "stops_from": 3, "num_hidden_layers": 5}


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type]:
    """The toy's file in a second folder of the package `model.depth`, found as the files of the first one are."""
    folder = tmp_path_factory.mktemp("depth")
    text = TOY.read_text(encoding="utf-8").replace("from model.depth.", "from .").replace("from model.", "from ..")
    (folder / "stopping.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.depth, "__path__", [*model.depth.__path__, str(folder)])
        importlib.invalidate_caches()
        find_methods()
        patch.setitem(VARIANTS, "toy", FIELDS)
        yield METHODS["stopping"]
    del METHODS["stopping"], sys.modules["model.depth.stopping"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    return folder


def test_it_is_registered_last_and_its_settings_are_checked(toy: type) -> None:
    assert list(METHODS)[-1] == "stopping" and METHODS["stopping"] is toy
    with pytest.raises(ValueError, match="stops_from: must lie from 1 to 4, got 7; use 4"):
        MoRConfig(**FIELDS | {"stops_from": 7})
    with pytest.raises(ValueError, match=r"stops_from: .* expected int"):
        MoRConfig(**FIELDS | {"stops_from": "two"})
    with pytest.raises(ValueError, match="selection: means nothing for routing 'stopping'"):
        MoRConfig(**FIELDS | {"selection": "none"})
    with pytest.raises(ValueError, match="stops_from: means nothing for routing 'none', only for 'stopping'"):
        MoRConfig(stops_from=3)
    with pytest.raises(ValueError, match=r"routing: 'nowhere' is unknown; use one of .*'stopping'"):
        MoRConfig(routing="nowhere")


def test_another_method_cannot_take_its_name_or_its_settings(toy: Any) -> None:
    with pytest.raises(ValueError, match=r"name: 'stopping' is the method of model\.depth\.stopping"):
        type("Other", (model.depth.DepthMethod,), {"name": "stopping", "__module__": "elsewhere"})
    other = {"stops_from": model.depth.Setting(1.0, float, "something else")}
    with pytest.raises(ValueError, match="settings: stops_from of elsewhere is another one"):
        type("Other", (model.depth.DepthMethod,), {"name": "other", "settings": other, "__module__": "elsewhere"})
    assert "other" not in METHODS


def test_the_laws_of_the_others_hold_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look-ahead, padding, documents; cached as at once; FLOPs and parameters as measured; the engine as alone."""
    test_causality.build.cache_clear()
    test_causality.test_later_tokens_change_nothing("toy")
    test_causality.test_padding_changes_nothing("toy", "causal")
    test_causality.test_documents_in_one_row_do_not_see_each_other("toy")
    test_cache.test_cached_equals_uncached_token_by_token_and_in_any_chunks("toy")
    test_flops_measured.test_counted_flops_and_parameters_equal_the_measured(FIELDS)
    monkeypatch.setitem(test_engine.CROWDED, "kv_tokens", 120)  # a whole request beyond each gate, of half the tokens
    test_engine.test_a_crowded_engine_yields_what_decoding_alone_yields("toy")


def test_its_depths_vary() -> None:
    """What the laws are tried on is routing, not a model that takes all or none."""
    routing = tiny_model("toy")(torch.arange(1, 41)[None]).routing
    assert len(routing.depth.unique()) == 3 and routing.counts[0, 0] > routing.counts[0, 1] > 0


def test_its_memory_is_estimated() -> None:
    config = test_memory.small(**FIELDS | {"num_hidden_layers": 8})
    activations, _, work = test_memory.measured(config, "none", False, False)
    estimate = activation_bytes(config, test_memory.LENGTH, test_memory.BATCH, Placement(precision="fp32"), work).saved
    assert estimate == pytest.approx(activations, rel=0.1)
    vanilla = kv_cache_bytes_per_token(test_memory.small())
    assert kv_cache_bytes_per_token(config) == vanilla * (3 + sum(0.5**n for n in range(1, 6))) / 8


class Killed(BaseException):
    """Stands for the process's sudden end."""


def test_runs_are_trained_resumed_and_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the path of `pretrain/main.py`: a run in a file, one that dies and goes on to the same figures, the report."""
    values = {
        "name": "toy",
        "run_dir": str(tmp_path / "whole"),
        "model": TINY | FIELDS,
        "data": {"folder": str(data)},
        "budget": {"steps": 8},
        "batch": {"size": 4},
        "precision": "fp32",
        "evaluation": {"times": 2, "sequences": 4},
        "tracker": {"mode": "disabled"},
        "checkpoint": {"every_steps": 4, "asynchronous": False},
    }
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="stops_from"):
        read_settings(file, ["model.stops_from=9"])
    assert main.train(read_settings(file)) == 0
    again = read_settings(file, [f"run_dir={tmp_path / 'again'}"])
    write, calls = MetricsFile.write, iter(range(100))

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 6:
            raise Killed
        return write(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", dying)
        with pytest.raises(Killed):
            main.train(again)
    assert main.train(again) == 0
    assert figures(read_lines(tmp_path / "again")) == figures(read_lines(tmp_path / "whole"))
    lines = read_lines(tmp_path / "whole")
    assert any("entered_1" in line and len(line["depth_shares"]) == 3 for line in lines if "loss" in line)
    assert report([str(tmp_path / "whole"), "--output", str(tmp_path / "report")]) == 0
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert "stopping" in json.dumps(found) and "stopping" in architectures()
    assert (tmp_path / "report" / "depth_shares.png").is_file()
    shown = ["--checkpoint", str(tmp_path / "whole"), "--text", "where to stop", "--output", str(tmp_path / "views")]
    assert views.main(shown) == 0
    capsys.readouterr()


def test_it_is_exported_with_its_code(tmp_path: Path) -> None:
    save_tiny(tmp_path / "in", "toy")
    assert export(["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--to", "hub"]) == 0
    assert "from .depth_stopping import Stopping" in (tmp_path / "out" / "depth.py").read_text()
    compile((tmp_path / "out" / "depth_stopping.py").read_text(), "depth_stopping.py", "exec")
    ids = torch.arange(1, 20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert torch.equal(loaded(ids).logits, MoRForCausalLM.from_pretrained(tmp_path / "in")(ids).logits)
