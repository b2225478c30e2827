"""The command line as a user types it: answers, JSONL, colours, and mistakes that end with one clear message."""

from __future__ import annotations

import io
import json
import signal

import pytest
from rich.console import Console

from model.inference import generate
from model.inference.text import TextStream, load_checkpoint, pieces
from tests.helpers.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("checkpoint"), "expert-recursion_wise"))


def run(capsys, *arguments: str) -> str:
    generate.main(arguments)
    return capsys.readouterr().out


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
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    for line in lines:
        assert line["prompt"] + line["text"] in shown
        assert len(line["prompt_depths"]) == len(line["prompt"]) and set(line["prompt_depths"]) <= {1, 2, 3}
        assert len(line["depths"]) <= len(line["tokens"]) <= 8
    assert len(lines[1]["tokens"]) <= 3
    run(capsys, *arguments)
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    single = tmp_path / "single.jsonl"
    run(capsys, "--checkpoint", checkpoint, "--prompt", "the sea", "--output", str(single), "--max-tokens", "8")
    assert json.loads(single.read_text()) == lines[0]


def test_depth_and_stop_options_change_the_answer_as_they_say(capsys, checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    common = ["--checkpoint", checkpoint, "--prompt", "hello there", "--output", str(output), "--max-tokens", "10"]
    run(capsys, *common)
    whole = json.loads(output.read_text())
    stop = whole["text"][4:6]
    run(capsys, *common, "--stop", stop)
    stopped = json.loads(output.read_text())
    assert (stopped["text"], stopped["finished"]) == (whole["text"][: whole["text"].find(stop)], "stop")
    run(capsys, *common, "--depth", "uniform:2")
    assert set(json.loads(output.read_text())["prompt_depths"]) == {2}


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
        ('{"prompt": "a", "beams": 2}', "unknown field 'beams'"),
        ('{"prompt": "a", "top_k": "x"}', "wrong type"),
        ("", "holds no prompts"),
    ],
)
def test_mistakes_in_a_file_name_the_line(capsys, checkpoint, tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    assert message in failure(capsys, "--checkpoint", checkpoint, "--prompts", str(path))


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
