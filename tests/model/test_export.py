"""Exports to plain Llama: the same logits, and named refusals of what Llama cannot express."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from model.config import PROJECTIONS
from model.convert.export import main
from model.convert.gguf import read_gguf
from model.folder import model_card, write_folder
from model.modeling import MoRForCausalLM
from tests.helpers.tiny import VOCABULARY, save_tiny, tiny_model

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

    from model.convert.export import _LLAMA_FIELDS

    model = tiny_model("vanilla")
    own = {name for name in LlamaConfig.__annotations__ if hasattr(model.config, name)}
    assert own - set(_LLAMA_FIELDS) <= {"model_type", "use_cache", "pretraining_tp", "default_theta"}


def byte_bpe(file: Path, size: int = 290, digits: bool = False) -> Tokenizer:
    """A byte-level BPE of its own, with an end of text as token 0."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]) if digits else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the state of the union and the sea of state"] * 8, trainer)
    tokenizer.save(str(file))
    return tokenizer


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("vanilla", {}),
        ("vanilla", {"tie_word_embeddings": False, "attention_bias": True}),
        ("recursive", {"relaxation": "lora", "lora_rank": 3}),
    ],
    ids=["vanilla", "biases", "recursive"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gguf_gives_the_same_greedy_tokens(tmp_path: Path, variant: str, fields: dict, dtype: torch.dtype) -> None:
    """Read by transformers, which undoes the order of rows of llama.cpp; the vocabulary by its tokenizer."""
    pytest.importorskip("gguf")
    (tmp_path / "in").mkdir()
    tokenizer = byte_bpe(tmp_path / "in" / "tokenizer.json")
    model = tiny_model(variant, vocab_size=290, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **fields)
    model.to(dtype).save_pretrained(tmp_path / "in")
    assert run(tmp_path, "gguf") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    read = read_gguf(tmp_path / "out" / "model.gguf")
    expected = MoRForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("the state of").ids])
    with torch.no_grad():
        # Deltas are merged in the weights' own precision.
        tolerance = 5e-2 if dtype is torch.bfloat16 and "lora_rank" in fields else 1e-4
        torch.testing.assert_close(read(ids).logits, expected(ids).logits, rtol=tolerance, atol=tolerance)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if dtype is torch.float32:
            assert torch.equal(read.generate(ids, **options), expected.generate(ids, **options))
    if transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 reads no vocabulary that has no token for the beginning of a text")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert theirs("the state of 1 sea").input_ids == tokenizer.encode("the state of 1 sea").ids


def test_gguf_names_what_it_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    save_tiny(tmp_path / "in", "vanilla")
    assert run(tmp_path, "gguf") == 2 and "no byte-level BPE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    tiny_model("token-shared").save_pretrained(tmp_path / "in")
    assert run(tmp_path, "gguf") == 2 and "routing: Llama cannot express" in capsys.readouterr().err


def test_folders_are_what_other_programs_read(tmp_path: Path) -> None:
    """Class of the tokenizer, its tokens and length, the generation configuration, a card, modes by the umask."""
    byte_bpe(tmp_path / "tokenizer.json")
    model = tiny_model("expert-recursion_wise", vocab_size=290, pad_token_id=None)
    before = os.umask(0o027)
    try:
        card = model_card(model, {"training FLOPs": "5e12, by the convention `exact`"})
        write_folder(model, tmp_path / "in", tmp_path / "tokenizer.json", card)
        assert main(["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "hub"), "--to", "hub"]) == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "in", tmp_path / "hub"):
        described = json.loads((folder / "tokenizer_config.json").read_text())
        assert described["tokenizer_class"] == "PreTrainedTokenizerFast" and described["model_max_length"] == 256
        assert described["eos_token"] == described["pad_token"] == "<|endoftext|>"
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == generation["pad_token_id"] == 0
        text = (folder / "README.md").read_text()
        assert "| run: training FLOPs | 5e12, by the convention `exact` |" in text and "| causal | yes" in text
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*")}
        assert folder.stat().st_mode & 0o777 == 0o750 and set(modes.values()) == {0o640}, modes
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == 256 and tokenizer.pad_token_id == tokenizer.eos_token_id == 0
