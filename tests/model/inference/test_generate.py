"""The command line as a user types it: answers, JSONL, colours, and mistakes that end with one clear message."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from model.inference import generate
from model.inference.text import TextStream, load_checkpoint, pieces
from tests.helpers.late import signalled_at_the_end
from tests.helpers.tiny import save_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("checkpoint"), "expert-recursion_wise"))


def run(capsys, *arguments: str) -> str:
    generate.main(arguments)
    return capsys.readouterr().out


def results(output) -> list[dict]:
    """Lines of an output in the order of the prompts; they are written as the answers end."""
    return sorted((json.loads(line) for line in output.read_text().split("\n") if line), key=lambda line: line["line"])


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        generate.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    return error


def test_prompts_become_answers_and_jsonl(capsys, checkpoint, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "the sea"}, {"prompt": "a dog", "max_tokens": 3}, {"prompt": "x", "temperature": 1.0, "seed": 4}]
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    arguments = ["--checkpoint", checkpoint, "--prompts", str(prompts), "--output", str(output), "--max-tokens", "8"]
    shown = run(capsys, *arguments)
    lines = results(output)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    for line in lines:
        assert line["prompt"] + line["text"] in shown
        assert len(line["prompt_depths"]) == len(line["prompt"]) and set(line["prompt_depths"]) <= {1, 2, 3}
        assert len(line["depths"]) <= len(line["tokens"]) <= 8
    assert len(lines[1]["tokens"]) <= 3
    output.unlink()
    run(capsys, *arguments)
    assert results(output) == lines
    single = tmp_path / "single.jsonl"
    run(capsys, "--checkpoint", checkpoint, "--prompt", "the sea", "--output", str(single), "--max-tokens", "8")
    assert json.loads(single.read_text()) == lines[0]


@pytest.mark.parametrize(
    ("variant", "most"), [("mod-predictor", 2), ("ut", 3), ("ut-frozen", 3), ("token-propagated", 3)]
)
def test_every_way_of_spending_depth_answers(capsys, tmp_path, variant, most):
    save_tiny(tmp_path / "in", variant)
    shown = run(
        capsys, "--checkpoint", str(tmp_path / "in"), "--prompt", "the sea", "--output", str(tmp_path / "out.jsonl")
    )
    (line,) = results(tmp_path / "out.jsonl")
    assert line["prompt"] + line["text"] in shown and len(line["prompt_depths"]) == len("the sea")
    assert set(line["prompt_depths"] + line["depths"]) <= set(range(most + 1))


def test_depth_and_stop_options_change_the_answer_as_they_say(capsys, checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    common = ["--checkpoint", checkpoint, "--prompt", "hello there", "--output", str(output), "--max-tokens", "10"]
    run(capsys, *common)
    whole = json.loads(output.read_text())
    output.unlink()
    stop = whole["text"][4:6]
    run(capsys, *common, "--stop", stop)
    stopped = json.loads(output.read_text())
    output.unlink()
    assert (stopped["text"], stopped["finished"]) == (whole["text"][: whole["text"].find(stop)], "stop")
    run(capsys, *common, "--depth", "uniform:2")
    assert set(json.loads(output.read_text())["prompt_depths"]) == {2}


def test_a_line_may_bring_its_own_depth(capsys, checkpoint, tmp_path):
    """As the request of that line alone, of all that the command's own depth allows."""
    depths = ["cap:1", "uniform:2", "progressive:1-3", None, "adaptive"]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "hello", "depth": depth}) + "\n" for depth in depths))
    options = ["--checkpoint", checkpoint, "--max-tokens", "4"]
    run(capsys, *options, "--prompts", str(prompts), "--output", str(output))
    lines = sorted(results(output), key=lambda line: line["line"])
    assert [line["depth"] for line in lines] == depths
    for line in lines:
        alone = tmp_path / f"{line['line']}.jsonl"
        run(capsys, *options, "--prompt", "hello", "--depth", line["depth"] or "adaptive", "--output", str(alone))
        (expected,) = results(alone)
        names = ("text", "prompt_depths", "depths")
        assert [line[name] for name in names] == [expected[name] for name in names]
    assert set(lines[0]["prompt_depths"]) == {1} and set(lines[1]["prompt_depths"]) == {2}
    assert lines[2]["prompt_depths"] != lines[3]["prompt_depths"]
    output.unlink()
    with pytest.raises(SystemExit):
        run(capsys, *options, "--prompts", str(prompts), "--output", str(output), "--depth", "cap:1")
    assert "line 2: depth: uniform:2 does not fit 1 to 1 recursions" in capsys.readouterr().err


def test_depths_are_coloured(checkpoint, tmp_path):
    options = generate.make_parser().parse_args(["--checkpoint", checkpoint, "--prompt", "x"])
    session = generate.Session(*generate.load_engine(options), options)
    request, stream = session.submit("some words")
    session.run([(request, stream)])
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="standard").print(session.coloured(request))
    codes = {1: "34", 2: "36", 3: "32"}
    assert all(f"{codes[depth]}m" in screen.getvalue() for depth in set(request.depths))
    assert len(set(request.depths)) > 1


def test_a_conversation_answers_until_an_empty_line(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first words\nmore\n\nnever read\n"))
    shown = run(capsys, "--checkpoint", checkpoint, "--max-tokens", "4")
    assert "first words" in shown and "more" in shown and "never read" not in shown


def test_ctrl_c_ends_the_answer_and_not_the_conversation(capsys, checkpoint, monkeypatch):
    class Impatient(generate.Session):
        def coloured(self, request, whole=True):
            if request.prompt == request.text[:-3]:  # two tokens in
                signal.raise_signal(signal.SIGINT)
            lengths[request.order] = len(request.tokens)
            return super().coloured(request, whole)

    lengths: dict[int, int] = {}
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(generate, "Session", Impatient)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n\n"))
    run(capsys, "--checkpoint", checkpoint, "--max-tokens", "40")
    assert list(lengths.values()) == [3, 3] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_ctrl_c_after_the_last_answer_changes_nothing(checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ["--checkpoint", checkpoint, "--prompt", "the sea", "--output", output, "--max-tokens", "3"]
    command = signalled_at_the_end(signal.SIGINT, "model/inference/generate.py", *arguments)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(results(output)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt: empty"),
        (["--prompt", "a" * 300], "no room in the context of 256"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-p", "2"], "top_p"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "a", "--depth", "cap:9"], "does not fit 1 to 3"),
        (["--prompt", "a", "--depth", "deep"], "expected adaptive"),
        (["--prompt", "a", "--kv-tokens", "0"], "kv_tokens"),
        (["--prompt", "a", "--output", "/nowhere/at/all.jsonl"], "no folder /nowhere/at"),
        (["--prompts", "/nowhere/prompts.txt"], "/nowhere/prompts.txt: cannot be read"),
    ],
)
def test_mistakes_end_with_one_message(capsys, checkpoint, arguments, message):
    assert message in failure(capsys, "--checkpoint", checkpoint, *arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl:1: no JSON"),
        ('{"text": 1}', "p.jsonl:1: expected an object"),
        ('{"prompt": "a", "text": "b"}', "p.jsonl:1: text is a field of the output"),
        ('{"prompt": "a", "top_k": "x"}', "p.jsonl:1: sampling fields of the wrong type"),
        ('{"prompt": "a", "depth": "deep"}', "p.jsonl:1: depth: expected adaptive"),
        ('{"prompt": "a", "depth": 2}', "p.jsonl:1: depth: expected adaptive"),
        ('{"prompt": "a", "top_p": 3}', "p.jsonl:1: top_p"),
        ("", "holds no prompts"),
    ],
)
def test_mistakes_in_a_file_name_the_line(capsys, checkpoint, tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    assert message in failure(capsys, "--checkpoint", checkpoint, "--prompts", str(path))


def test_a_batch_goes_on_where_it_was_cut(capsys, checkpoint, tmp_path):
    """Other fields pass through, a byte order mark and carriage returns are no text, \\u2028 ends no line."""
    prompts, output = tmp_path / "a prompt=[1].jsonl", tmp_path / "an output=[1].jsonl"
    rows = [{"prompt": f"the sea {i}", "id": {"x": i}, "note": None, "max_tokens": 3 + i} for i in range(4)]
    rows.append({"prompt": "one\u2028line\x0b", "id": "last"})
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    prompts.write_bytes(b"\xef\xbb\xbf" + text.encode())
    arguments = ["--checkpoint", checkpoint, "--prompts", str(prompts), "--output", str(output), "--max-tokens", "5"]
    generate.main(arguments)
    shown = capsys.readouterr()
    assert "recursions:" in shown.err and "5 prompts" in shown.err and "tokens/s" in shown.err
    assert "recursions:" not in shown.out
    whole = results(output)
    assert [line["line"] for line in whole] == [1, 2, 3, 4, 5]
    assert [line["id"] for line in whole] == [row["id"] for row in rows] and whole[0]["note"] is None
    assert "exists; add --resume" in failure(capsys, *arguments)
    written = [line + "\n" for line in output.read_text().split("\n")]
    output.write_text("".join(written[:2]) + written[2][:20])
    run(capsys, *arguments, "--resume")
    assert results(output) == whole and output.read_text().startswith("".join(written[:2]))
    assert run(capsys, *arguments, "--resume") == ""
    prompts.write_text(json.dumps({"prompt": "another"}))
    assert "answers another prompt than line" in failure(capsys, *arguments, "--resume")


def test_prompts_that_are_too_long_are_named_skipped_or_cut(capsys, checkpoint, tmp_path):
    prompts, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("short\n\n" + "a" * 300 + "\n")
    arguments = ["--checkpoint", checkpoint, "--prompts", str(prompts), "--output", str(output), "--max-tokens", "4"]
    assert "line 3: prompt: 300 tokens leave no room" in failure(capsys, *arguments)
    run(capsys, *arguments, "--too-long", "skip", "--resume")
    short, long = results(output)
    assert short["finished"] == "length" and (long["line"], long["finished"]) == (3, "skipped")
    assert "no room" in long["error"]
    output.unlink()
    run(capsys, *arguments, "--too-long", "cut")
    assert [(line["finished"], len(line["tokens"])) for line in results(output)] == [("length", 4)] * 2
    assert len(results(output)[1]["prompt_depths"]) == 252


def test_another_tokenizer_may_be_given(capsys, checkpoint, tmp_path):
    tokenizer = json.loads(tiny_tokenizer().to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other.json").write_text(json.dumps(tokenizer))
    common = ["--checkpoint", checkpoint, "--max-tokens", "8"]
    plain = run(capsys, *common, "--prompt", "bbb")
    other = run(capsys, *common, "--prompt", "aaa", "--tokenizer", str(tmp_path / "other.json"))
    assert other.translate(str.maketrans("ab", "ba")) == plain
    assert "no tokenizer.json" in failure(capsys, *common, "--prompt", "a", "--tokenizer", str(tmp_path))


def test_folders_that_are_no_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)
    save_tiny(tmp_path / "final", "vanilla")
    with pytest.raises(ValueError, match=r"did you mean .*final"):
        load_checkpoint(tmp_path)
    (tmp_path / "final" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_checkpoint(tmp_path / "final")
    (tmp_path / "final" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="type 'llama'"):
        load_checkpoint(tmp_path / "final")


def test_text_comes_in_whole_characters_and_without_stop_strings():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = tokenizer.encode("naïve café ends").ids
    assert len(ids) > len("naïve café ends")
    stream = TextStream(tokenizer, ["ends", "é x"])
    parts = [stream.feed([token], last=False) for token in ids]
    assert "".join(parts) == stream.shown == "naïve café " and stream.stopped
    assert all("\ufffd" not in part for part in parts)
    assert "".join(pieces(tokenizer, ids)) == "naïve café ends"
    cut = TextStream(tokenizer)
    assert cut.feed(ids[:3], last=False) == "na" and cut.feed([], last=True) == "\ufffd"
    held = TextStream(tiny_tokenizer(), ["abc"])
    assert [held.feed([token], token == 4) for token in (1, 2, 1, 2, 4)] == ["", "", "ab", "", "abd"]
