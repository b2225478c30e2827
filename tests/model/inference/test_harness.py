"""lm-evaluation-harness through the server gives what it gives on the model itself, digit for digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.folder import write_folder
from model.inference.engine import Engine
from model.inference.text import load_checkpoint
from tests.helpers.tiny import tiny_model
from tests.model.inference.test_serve import serving
from tests.model.test_export import byte_bpe
from tests.pretrain.test_evaluate import CHOICE, WORDS

GENERATED = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: tiny_documents
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{document}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""


def task_files(folder: Path) -> list[str]:
    """Four tiny tasks, one of each kind of request, in `folder`; their names."""
    words = ["one", "No lound", "gest", "old", "bulbail has", "x", "naïve café", "rast"]
    questions = [
        {"text": f"the {w}", "choices": ["a", "the bird", "moufests"], "answer": i % 3, "document": f"{w} sea " * 30}
        for i, w in enumerate(words)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for i, text in enumerate((CHOICE, WORDS, GENERATED, ROLLING)):
        (folder / f"task{i}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return ["tiny_choice", "tiny_words", "tiny_answers", "tiny_documents"]


@pytest.mark.slow
def test_the_harness_reads_a_final_folder_without_an_export(tmp_path: Path) -> None:
    """Its own command with `--model hf`, registered by an import alone, gives what the loaded model gives."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task_files(tmp_path)
    byte_bpe(tmp_path / "tokenizer.json")
    final = tmp_path / "final"
    write_folder(tiny_model("expert-recursion_wise", 1, vocab_size=290).float(), final, tmp_path / "tokenizer.json")
    command = [sys.executable, "-m", "model.harness", "run", "--model", "hf", "--model_args", f"pretrained={final}"]
    command += ["--tasks", "tiny_words", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
    command += ["--device", "cpu", "--batch_size", "1"]
    environment = os.environ | {"DISABLE_MULTIPROC": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("out*.json")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model, _ = load_checkpoint(final)
    lm = HFLM(model, tokenizer=str(final), batch_size=1)
    direct = evaluator.simple_evaluate(lm, tasks=["tiny_words"], task_manager=manager, bootstrap_iters=0)
    found = json.loads(written.read_text())["results"]["tiny_words"]
    assert found["perplexity,none"] == direct["results"]["tiny_words"]["perplexity,none"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vanilla", "expert-recursion_wise"])
def test_the_harness_gives_the_same_through_the_server(tmp_path: Path, monkeypatch, variant: str) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    pytest.importorskip("tenacity", reason="the extra api of lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    names = task_files(tmp_path)
    byte_bpe(tmp_path / "tokenizer.json")
    write_folder(tiny_model(variant, 1, vocab_size=290).float(), tmp_path / "final", tmp_path / "tokenizer.json")
    model, tokenizer = load_checkpoint(tmp_path / "final")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def figures(lm) -> dict[str, dict[str, float]]:
        got = evaluator.simple_evaluate(lm, tasks=names, num_fewshot=0, task_manager=manager, bootstrap_iters=0)
        return {
            name: {k: v for k, v in values.items() if isinstance(v, float) and "stderr" not in k}
            for name, values in got["results"].items()
        }

    # Windows as long for both: the server generates one token beside those that it scores.
    direct = figures(HFLM(model, tokenizer=str(tmp_path / "final"), batch_size=1, max_length=254))
    with serving(Engine(model), tokenizer) as address:
        served = figures(
            LocalCompletionsAPI(
                base_url=f"{address}/v1/completions",
                model="tiny",
                tokenizer=str(tmp_path / "final"),
                tokenizer_backend="huggingface",
                max_length=256,
                num_concurrent=4,
            )
        )
    assert set(served) == set(names) and all(served.values())
    for name in names:
        assert served[name].keys() == direct[name].keys()
        for figure, value in direct[name].items():
            assert float(f"{served[name][figure]:.6g}") == float(f"{value:.6g}"), (name, figure)
