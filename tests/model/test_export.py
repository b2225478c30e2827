"""Exports to plain Llama: the same logits, and named refusals of what Llama cannot express."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from model.config import PROJECTIONS
from model.export import main
from model.modeling import MoRForCausalLM
from tests.helpers.tiny import VOCABULARY, tiny_model

IDS = torch.randint(1, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, variant: str, **fields) -> MoRForCausalLM:
    """A model that was saved and read again, so that both sides of a comparison have the same precision."""
    tiny_model(variant, **fields).save_pretrained(folder)
    return MoRForCausalLM.from_pretrained(folder).eval()


def run(folder: Path, to: str) -> int:
    return main(["--checkpoint", str(folder / "in"), "--output", str(folder / "out"), "--to", to])


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_vanilla_is_llama_bit_for_bit(tmp_path: Path, fields: dict) -> None:
    model = saved(tmp_path / "in", "vanilla", rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **fields)
    assert run(tmp_path, "llama") == 0
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(llama) is LlamaForCausalLM
    assert torch.equal(llama(IDS).logits, model(IDS).logits)
    theirs = llama.state_dict()
    assert all(torch.equal(theirs.pop(name), value) for name, value in model.state_dict().items()) and not theirs


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"share_norms": False, "attention_bias": True, "mlp_bias": True},
        {"relaxation": "lora", "lora_rank": 3, "lora_targets": PROJECTIONS, "attention_bias": True},
        {"relaxation": "dora", "lora_rank": 3, "lora_targets": PROJECTIONS, "share_norms": False},
    ],
    ids=["plain", "norms", "lora", "dora"],
)
def test_recursive_models_unroll(tmp_path: Path, sharing: str, fields: dict) -> None:
    depth = 8 if sharing.startswith("middle") else 6
    model = saved(tmp_path / "in", "recursive", sharing=sharing, num_hidden_layers=depth, **fields)
    assert run(tmp_path, "unrolled") == 0
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert llama.config.num_hidden_layers == depth
    torch.testing.assert_close(llama(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "fields", "to", "message"),
    [
        ("recursive", {}, "llama", "num_recursions: a recursive model is no Llama as it stands"),
        ("expert-recursion_wise", {}, "unrolled", "routing: Llama cannot express 'expert_choice'"),
        ("token-shared", {}, "unrolled", "routing: Llama cannot express 'token_choice'"),
        ("recursive-shared", {}, "unrolled", "kv_strategy: Llama cannot express 'shared'"),
        ("recursive", {"relaxation": "recursion_encoding"}, "unrolled", "relaxation: Llama cannot express"),
    ],
)
def test_what_llama_cannot_express_is_refused(tmp_path, capsys, variant, fields, to, message) -> None:
    tiny_model(variant, **fields).save_pretrained(tmp_path / "in")
    assert run(tmp_path, to) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "hub") == 2 and "holds no config.json" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text('{"model_type": "llama"}')
    assert run(tmp_path, "hub") == 2 and "a model of type 'llama'" in capsys.readouterr().err
    (tmp_path / "in/config.json").write_text('{"model_type": "mor"}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    assert run(tmp_path, "hub") == 2 and "is not empty" in capsys.readouterr().err


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    saved(tmp_path / "in", "vanilla")
    words = Tokenizer(models.WordLevel({"<end>": 0, "one": 1, "two": 2}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "in/tokenizer.json"))
    assert run(tmp_path, "llama") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("two one").input_ids == [2, 1] and tokenizer.eos_token == "<end>"


def test_every_exported_field_matters() -> None:
    """A field that Llama shares and the export forgets would fall back to Llama's default."""
    from transformers import LlamaConfig

    from model.export import _LLAMA_FIELDS

    model = tiny_model("vanilla")
    own = {name for name in LlamaConfig.__annotations__ if hasattr(model.config, name)}
    assert own - set(_LLAMA_FIELDS) <= {"model_type", "use_cache", "pretraining_tp", "default_theta"}
