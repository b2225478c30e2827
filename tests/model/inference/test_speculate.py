"""Self-speculation: what greedy decoding at full depth yields, token for token; acceptance and FLOPs as they were."""

from __future__ import annotations

import pytest
import torch

from model.flops import measured_flops
from model.inference.generate import main
from model.inference.speculate import Speculator
from tests.helpers.tiny import VOCABULARY, save_tiny, tiny_model

DRAFTING = [
    *(("exit", exit) for exit in (1, 2, 3)),
    ("exit-recursive", 1),
    ("exit-recursive", 2),
    ("recursive", 1),
    ("recursive-norms", 2),
    ("recursive-cycle-shared", 1),
]


def prompts(count: int) -> list[list[int]]:
    dice = torch.Generator().manual_seed(7)
    return [
        torch.randint(1, VOCABULARY, (int(torch.randint(1, 12, (1,), generator=dice)),), generator=dice).tolist()
        for _ in range(count)
    ]


@pytest.mark.parametrize("draft", [1, 3, 5])
@pytest.mark.parametrize(("variant", "exit"), DRAFTING)
def test_speculation_yields_the_tokens_of_full_depth(variant, exit, draft):
    fields = {"routing_mode": "full"} if variant.startswith("exit") else {}
    accepted = drafted = 0
    for seed, prompt in enumerate(prompts(4)):
        model = tiny_model(variant, seed, **fields)
        with torch.no_grad():  # later layers that change less: some drafts are right, others are not
            for layer in model.model.layers[1:]:
                layer.mlp.down_proj.weight.mul_(0.3)
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=17, do_sample=False, eos_token_id=None)
        found = Speculator(model, exit, draft)(prompt, 17)
        assert found.tokens == expected[0, len(prompt) :].tolist() and found.finished == "length"
        accepted, drafted = accepted + found.accepted, drafted + found.drafted
    assert 0 < accepted <= drafted


def test_an_end_of_text_ends_it_and_is_left_out():
    model, prompt = tiny_model("exit", 1), prompts(1)[0]
    whole = Speculator(model, 2, 4)(prompt, 20).tokens
    stop = whole[5]
    found = Speculator(model, 2, 4)(prompt, 20, [stop])
    assert found.finished == "stop" and found.tokens == whole[: whole.index(stop)]


@pytest.mark.parametrize(("variant", "exit"), [("exit", 2), ("recursive", 1), ("recursive-cycle-shared", 1)])
def test_its_flops_are_those_that_torch_counts(variant, exit):
    """With drafts of one token, since torch counts the keys too that a check of several does not look at."""
    model, prompt = tiny_model(variant, 2).float(), prompts(1)[0]
    speculator, found = Speculator(model, exit, 1), []
    measured = measured_flops(lambda: found.append(speculator(prompt, 12)))
    alone = measured_flops(lambda: speculator(prompt, 1))  # the prompt, and its last token's head
    assert found[0].flops == measured - alone


@pytest.mark.parametrize(
    ("variant", "exit", "draft", "fault"),
    [
        ("vanilla", 1, 4, "vanilla"),
        ("expert-shared", 1, 4, "without routing"),
        ("exit", 4, 4, "1 to 3"),
        ("exit", 1, 0, "use 4"),
        ("recursive-shared", 1, 4, "middle_sequence"),
    ],
)
def test_what_cannot_draft_is_refused(variant, exit, draft, fault):
    with pytest.raises(ValueError, match=f"speculate.*{fault}"):
        Speculator(tiny_model(variant), exit, draft)


def test_the_command_tells_acceptance_and_flops(tmp_path, capsys):
    folder = str(save_tiny(tmp_path, "recursive"))
    arguments = ["--checkpoint", folder, "--prompt", "a small town", "--max-tokens", "9"]
    main(arguments)
    plain = capsys.readouterr().out
    main([*arguments, "--speculate", "1:3"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == plain.splitlines()[-1]
    assert "accepted" in shown.err and "of decoding at full depth" in shown.err
    for wrong, fault in ((["--temperature", "0.5"], "--temperature"), (["--depth", "cap:1"], "--depth")):
        with pytest.raises(SystemExit):
            main([*arguments, "--speculate", "1", *wrong])
        assert fault in capsys.readouterr().err
