"""The generic model and generation tests that transformers keeps for its own models, run on every architecture.

They are no part of this repository. `MOR_TRANSFORMERS_TESTS` names a folder that holds transformers' `tests/` package
(of the installed version, with `generation/`, `exporters/` and `causal_lm_tester.py`); without it these are skipped.
Their marks are not ours: add `-o addopts=--import-mode=importlib`.

What does not apply to a model of this kind is listed in `NOT_APPLICABLE`, with the reason. Everything else that is
skipped, transformers skips itself: what needs a GPU or a package, what it runs at night, what the model does not claim
(tensor and pipeline parallelism, flash attention, static caches).
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest

from model.cache import MoRCache, RaggedLayer, owned_uses
from model.config import MoRConfig
from model.modeling import MoRForCausalLM, MoRModel

FOLDER = os.environ.get("MOR_TRANSFORMERS_TESTS")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vanilla": {"num_hidden_layers": 2},
    "recursive": {"num_hidden_layers": 4, "num_recursions": 2},
    "mor_expert": {"num_hidden_layers": 4, "num_recursions": 2, "routing": "expert_choice"},
    "mor_token": {"num_hidden_layers": 4, "num_recursions": 2, "routing": "token_choice"},
}
OF_ATTENTION = ("test_eager_*", "test_*sdpa*", "test_left_padding_*")
ROUTED = ("mor_expert", "mor_token")
# pattern of the tests' names, architectures, why they do not apply
NOT_APPLICABLE: list[tuple[str, tuple[str, ...], str]] = [
    (
        "test_num_layers_is_small",
        ("recursive", *ROUTED),
        "two recursions of one shared layer between a first and a last layer of their own make four effective layers",
    ),
    (
        "test_*fsdp2_*",
        tuple(ARCHITECTURES),
        "transformers runs these for its most used models alone; tests/pretrain/test_parallel.py shards this one",
    ),
    (
        "test_hsdp_*",
        tuple(ARCHITECTURES),
        "transformers runs these for its most used models alone; tests/pretrain/test_parallel.py shards this one",
    ),
]


def suite() -> Any:
    """transformers' module of tests for causal language models, in a package named apart from ours."""
    folder = Path(str(FOLDER)) / "tests"
    found = importlib.util.spec_from_file_location(
        "transformers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert found is not None and found.loader is not None
    package = importlib.util.module_from_spec(found)
    found.loader.exec_module(package)
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tests"}
    # Some of their files say `from tests.x import`, most say `from .x import`.
    sys.modules["tests"] = sys.modules["transformers_tests"] = package
    try:
        common = importlib.import_module("transformers_tests.test_modeling_common")
        # They look up by these names which classes take labels; the base model does not.
        common.MODEL_MAPPING_NAMES["mor"] = "MoRModel"
        common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mor"] = "MoRForCausalLM"
        return importlib.import_module("transformers_tests.causal_lm_tester")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(ours)


def skipped(architecture: str, names: list[str]) -> dict[str, Any]:
    """Skips in place of the tests that do not apply. An entry of the table that names no test is out of date."""
    found: dict[str, Any] = {}
    for pattern, architectures, reason in NOT_APPLICABLE:
        matching = fnmatch.filter(names, pattern)
        assert matching, f"NOT_APPLICABLE: no test is named {pattern}"
        if architecture in architectures:
            found |= {name: unittest.skip(reason)(lambda self: None) for name in matching}
    return found


def check_cache(test: Any, batch_size: int, past_key_values: Any, seq_length: int, config: MoRConfig) -> None:
    """In place of theirs: layers that see every token look like transformers', those of a recursion hold its tokens."""
    assert isinstance(past_key_values, MoRCache)
    assert (past_key_values.batch_size, past_key_values.get_seq_length()) == (batch_size, seq_length)
    assert len(past_key_values.layers) == len(owned_uses(config))
    heads = (config.num_key_value_heads, config.head_dim)
    for layer in past_key_values.layers:
        if not isinstance(layer, RaggedLayer):
            assert layer.keys.shape == layer.values.shape == (batch_size, heads[0], seq_length, heads[1])
        elif layer.is_initialized:  # otherwise no token has entered this recursion yet
            index = layer.index
            assert layer.keys.shape == layer.values.shape == (len(index.rows), *heads)
            assert ((index.rows < batch_size) & (index.places < seq_length)).all()
            assert len({*zip(index.rows.tolist(), index.places.tolist(), strict=True)}) == len(index.rows)


def make_test(architecture: str, fields: dict[str, Any], generic: Any) -> type:
    class Tester(generic.CausalLMModelTester):
        config_class = MoRConfig
        base_model_class = MoRModel
        causal_lm_class = MoRForCausalLM

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            super().__init__(parent, **(fields | kwargs))
            if architecture == "mor_expert":  # the embedding, the first layer, each recursion, the last layer, the norm
                self.expected_num_hidden_layers = 4 + self.num_recursions

    def set_up(test: Any) -> None:
        generic.CausalLMModelTest.setUp(test)
        # Attention weights are not returned; some tests of padding and of kernels take the flag for attention as such.
        test.has_attentions = any(fnmatch.fnmatch(test._testMethodName, pattern) for pattern in OF_ATTENTION)

    names = [name for name in dir(generic.CausalLMModelTest) if name.startswith("test_")]
    body = {"model_tester_class": Tester, "setUp": set_up, "_check_past_key_values_for_generate": check_cache}
    return type(
        f"Test_{architecture}", (generic.CausalLMModelTest, unittest.TestCase), body | skipped(architecture, names)
    )


if FOLDER:
    generic = suite()
    for name, fields in ARCHITECTURES.items():
        globals()[f"Test_{name}"] = pytest.mark.slow(make_test(name, fields, generic))
    del generic
else:

    @pytest.mark.slow
    @pytest.mark.skip(reason="MOR_TRANSFORMERS_TESTS names no folder with the tests of transformers")
    def test_generic_model_and_generation_tests() -> None:
        raise AssertionError
