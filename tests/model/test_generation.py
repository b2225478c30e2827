"""`generate()` of transformers: with a cache it yields what passes over the whole text yield."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, set_seed

from model.cache import MoRCache
from tests.helpers.tiny import VOCABULARY, tiny_model
from tests.helpers.variants import GENERATING

variants = pytest.mark.parametrize("variant", GENERATING)
NEW = 8


def prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Rows of 3, 4, 5 .. tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (1, 3 + i), generator=generator) for i in range(count)]


def padded_left(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    pads = [width - row.shape[1] for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads)])
    mask = torch.cat([(torch.arange(width) >= pad).long()[None] for pad in pads])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def by_hand(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding that runs the whole text for every token."""
    prompt = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, prompt_length=prompt).logits[:, -1:].argmax(-1)], 1)
    return ids


@variants
def test_greedy_alone_and_in_a_padded_batch_equals_decoding_without_a_cache(variant):
    model, rows = tiny_model(variant, 1), prompts(3)
    expected = [by_hand(model, row, NEW) for row in rows]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for row, tokens in zip(rows, expected):
        assert torch.equal(model.generate(row, **options), tokens)
    batch = padded_left(rows)
    generated = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, tokens, new in zip(rows, expected, generated):
        assert torch.equal(new, tokens[0, row.shape[1] :])


@variants
def test_beam_search_and_sampling_agree_with_and_without_a_cache(variant):
    model, batch = tiny_model(variant, 2), padded_left(prompts(2))
    beams = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    sampling = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_return_sequences": 2}
    for options in (beams, sampling):
        outputs = []
        for use_cache in (True, False):
            set_seed(5)
            outputs.append(model.generate(**batch, **options, use_cache=use_cache))
        assert torch.equal(*outputs)
        assert outputs[0].shape[0] == 4


def test_generation_can_be_continued_from_its_cache():
    model, row = tiny_model("expert-shared", 3), prompts(1)[0]
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(row, max_new_tokens=4, **options)
    assert isinstance(first.past_key_values, MoRCache)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **options)
    assert torch.equal(rest.sequences, by_hand(model, row, 8))


def test_a_saved_model_generates_the_same_through_the_auto_classes(tmp_path):
    model, row = tiny_model("token-recursion_wise", 1), prompts(1)[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert AutoConfig.from_pretrained(tmp_path).architecture == "mor_token"
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(row, **options), model.generate(row, **options))


def test_generation_refuses_what_cannot_work():
    model, row = tiny_model("expert-recursion_wise", 1), prompts(1)[0]
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(row, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="MoRCache"):
        model.generate(row, max_new_tokens=2, past_key_values=DynamicCache())
    model.config.routing_mode = "topk"
    with pytest.raises(ValueError, match=r"routing_mode.*'causal'"):
        model.generate(row, max_new_tokens=2)
