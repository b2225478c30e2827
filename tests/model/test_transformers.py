"""The generic model and generation tests that transformers keeps for its own models, run on every architecture.

They are no part of this repository. `MOR_TRANSFORMERS_TESTS` names a folder that holds transformers' `tests/` package
(of the installed version, with `generation/`, `exporters/` and `causal_lm_tester.py`); without it these are skipped.
Their marks are not ours: add `-o addopts=--import-mode=importlib`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest

from model.config import MoRConfig
from model.modeling import MoRForCausalLM, MoRModel

FOLDER = os.environ.get("MOR_TRANSFORMERS_TESTS")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vanilla": {"num_hidden_layers": 2},
    "recursive": {"num_hidden_layers": 4, "num_recursions": 2},
    "mor_expert": {"num_hidden_layers": 4, "num_recursions": 2, "routing": "expert_choice"},
    "mor_token": {"num_hidden_layers": 4, "num_recursions": 2, "routing": "token_choice"},
}


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


def make_test(architecture: str, fields: dict[str, Any], generic: Any) -> type:
    class Tester(generic.CausalLMModelTester):
        config_class = MoRConfig
        base_model_class = MoRModel
        causal_lm_class = MoRForCausalLM

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            super().__init__(parent, **(fields | kwargs))

    # Attention weights are not returned, as in every model of transformers under SDPA.
    body = {"model_tester_class": Tester, "has_attentions": False}
    return type(f"Test_{architecture}", (generic.CausalLMModelTest, unittest.TestCase), body)


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
