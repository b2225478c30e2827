"""Perplexity of texts: against lm-evaluation-harness, against a plain sum, windows, documents, depths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from data_prep.settings import UserError
from model.folder import write_folder
from model.inference.text import load_checkpoint
from pretrain.evaluate import main
from pretrain.perplexity import read_documents, windows
from tests.helpers.tiny import save_tiny, tiny_model
from tests.model.test_export import byte_bpe

TEXTS = ["the state of the union", "naïve café\n" + "sea and land " * 60, "a"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)) + "\n\n")
    return path


@pytest.fixture(scope="module", params=["vanilla", "expert-recursion_wise", "token-shared"])
def folder(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    byte_bpe(root / "tokenizer.json")
    write_folder(tiny_model(request.param, 1, vocab_size=290).float(), root / "final", root / "tokenizer.json")
    return root / "final"


def measured(folder: Path, file: Path, tmp_path: Path, *options: str) -> dict:
    output = tmp_path / "out.json"
    arguments = ["--checkpoint", str(folder), "--perplexity", str(file), "--output", str(output), *options]
    assert main([*arguments, "--precision", "fp32"]) == 0
    return json.loads(output.read_text())


def test_windows_score_every_token_once() -> None:
    for length in range(2, 40):
        ids = list(range(length))
        for size, stride in ((8, 8), (8, 3), (8, 1), (64, 5)):
            found = list(windows(ids, size, stride))
            assert [token for w in found for token in w.ids[-w.scored :]] == ids[1:]
            assert all(len(w.ids) - 1 <= size for w in found)
            assert all(len(w.ids) - 1 == size for w in found[1:])  # the others have all the context there is


def test_the_sum_is_that_of_the_harness(folder: Path, file: Path, tmp_path: Path) -> None:
    """Windows without overlap but for a token, as its rolling likelihood has them, where a text fits one window."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, _ = load_checkpoint(folder)
    harness = HFLM(model, tokenizer=str(folder), batch_size=1)
    short = [0, 2]
    asked = [Instance("loglikelihood_rolling", {}, (TEXTS[i],), i) for i in short]
    expected = harness.loglikelihood_rolling(asked, disable_tqdm=True)
    documents = measured(folder, file, tmp_path)["documents"]
    for i, value in zip(short, expected, strict=True):
        found = documents[i]
        assert found["loss"] * found["tokens"] == pytest.approx(-value, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(-value / len(TEXTS[i].encode()) / math.log(2), rel=1e-5)


def test_a_long_document_is_scored_with_the_context_that_its_windows_give(folder, file, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(folder)
    ids = [model.config.eos_token_id, *tokenizer.encode(TEXTS[1]).ids]
    assert len(ids) > model.config.max_position_embeddings
    expected, done, size, stride = 0.0, 0, model.config.max_position_embeddings, 100
    while done < len(ids) - 1:
        end = min(done + (stride if done else size), len(ids) - 1)
        begin = max(0, end - size)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
        expected -= sum(float(logits[place - 1 - begin, ids[place]]) for place in range(done + 1, end + 1))
        done = end
    results = measured(folder, file, tmp_path, "--stride", str(stride), "--batch-size", "2")
    assert results["documents"][1]["loss"] * (len(ids) - 1) == pytest.approx(expected, rel=1e-5)
    assert results["total"]["tokens"] == sum(document["tokens"] for document in results["documents"])
    assert results["total"]["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_losses_by_depth(tmp_path: Path) -> None:
    folder, text = save_tiny(tmp_path / "model", "expert-recursion_wise"), tmp_path / "text.txt"
    text.write_text("hello there, 3 of them")
    results = measured(folder, text, tmp_path, "--depths")
    losses = [depth["loss"] for depth in results["depths"]]
    assert len(losses) == 3 and len(set(losses)) == 3 and losses[-1] == results["total"]["loss"]
    again = measured(folder, text, tmp_path)
    assert again["total"] == results["total"] and "depths" not in again


def test_mistakes_name_file_and_line(tmp_path: Path) -> None:
    for content, message in (
        ('{"text": "a"}\n{"text": 3}', r"bad\.jsonl:2: expected an object with a text"),
        ('{"text": "a"}\n\n{', r"bad\.jsonl:3: no JSON"),
        ('{"text": ""}', "holds no text"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_documents(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_documents(tmp_path / "nothing.txt")
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--stride", "3"])
