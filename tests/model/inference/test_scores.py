"""Log-probabilities of prompt and answer: those of the model's own forward pass, whatever the batch and the chunks."""

from __future__ import annotations

import pytest
import torch

from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from tests.helpers.tiny import VOCABULARY, tiny_model

NAMES = ["vanilla", "recursive", "expert-recursion_wise", "expert-aux-shared", "token-shared"]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 23, 60, 7)]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_model(name):
    """Chunks of 16, three requests at once in a pool so small that some are sent back."""
    model = tiny_model(name, 1)
    engine = Engine(model, max_batch=3, prefill_tokens=16, kv_tokens=160, page_size=8)
    params = SamplingParams(max_tokens=12, logprobs=3, prompt_logprobs=True, temperature=0.8, seed=1, stop=[[0]])
    for request in engine.generate(prompts(), params):
        text = torch.tensor([request.text])
        with torch.no_grad():
            values = model(text, use_cache=False).logits[0].float().log_softmax(-1)
        assert sorted(request.scores) == list(range(1, len(request.text)))
        for place, scored in request.scores.items():
            row = values[place - 1]
            assert scored.logprob == pytest.approx(row[request.text[place]].item(), abs=1e-5)
            best = row.topk(3)
            assert [token for token, _ in scored.top] == best.indices.tolist()
            assert [value for _, value in scored.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_only_what_is_asked_for_is_kept():
    engine = Engine(tiny_model("expert-recursion_wise", 1))
    prompt = prompts()[1]
    plain = engine.generate([prompt], SamplingParams(max_tokens=5))[0]
    answer = engine.generate([prompt], SamplingParams(max_tokens=5, logprobs=0))[0]
    alone = engine.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=True))[0]
    assert plain.scores == {} and plain.tokens == answer.tokens
    assert sorted(answer.scores) == list(range(23, 28)) and all(not s.top for s in answer.scores.values())
    assert (alone.tokens, alone.finished, sorted(alone.scores)) == ([], "length", list(range(1, 23)))
    assert engine.idle and engine.everyone.free_pages() == engine.everyone.pages


def test_a_prompt_may_fill_the_context():
    engine = Engine(tiny_model("vanilla", 1))
    full = (prompts()[2] * 5)[:256]
    request = engine.generate([full], SamplingParams(max_tokens=4, prompt_logprobs=True))[0]
    assert (len(request.tokens), request.finished, len(request.scores)) == (1, "length", 255)
    with pytest.raises(ValueError, match="no room in the context of 256"):
        engine.submit([*full, 1])
