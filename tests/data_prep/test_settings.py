"""Settings: composition, overrides, and messages that name the file, the key and the nearest valid names."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from data_prep.settings import (
    PathText,
    Settings,
    UserError,
    describe,
    load,
    parse_overrides,
    read_yaml,
    run_command,
)
from tests.helpers.late import signalled_at_the_end

ROOT = Path(__file__).resolve().parents[2]


class Inner(Settings):
    rate: float = Field(1.0, description="a rate, per second")
    names: list[str] = Field([], description="names")


class Outer(Settings):
    inner: Inner = Field(Inner(), description="the inner part")
    seed: int = Field(0, description="seed of everything random")


class Kinds(Settings):
    """One field of each kind that a value may have."""

    text: str = Field("", description="text")
    whole: int = Field(0, description="a whole number")
    fraction: float = Field(0.0, description="a fraction")
    switch: bool = Field(False, description="a switch")
    word: Literal["on", "off", "1"] = Field("on", description="a word")
    maybe: float | None = Field(None, description="a fraction, or none")
    either: int | list[int] = Field(0, description="one or several")
    fractions: list[float] = Field([], description="fractions")
    pair: tuple[float, str] = Field((0.0, ""), description="a fraction and a text")
    place: Path = Field(Path("."), description="a path")
    pattern: PathText = Field("", description="a path as text")
    anything: dict[str, Any] = Field({}, description="no schema")


def test_files_extend_one_another_and_the_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner.yaml").write_text("rate: 2\nnames: [a, b]\n")
    (tmp_path / "base.yaml").write_text("inner: inner.yaml\nseed: 1\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ninner: {rate: 3e-3}\n")
    built = load(Outer, "top.yaml", ["seed=7"], sections=["inner"])
    assert built.inner.rate == 3e-3
    assert built.inner.names == ["a", "b"]
    assert built.seed == 7


def test_a_section_is_replaced_by_a_path_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("rate: 1\nnames: [kept]\n")
    (tmp_path / "two.yaml").write_text("rate: 2\n")
    (tmp_path / "top.yaml").write_text("inner: one.yaml\n")
    built = load(Outer, "top.yaml", ["inner=two.yaml"], sections=["inner"])
    assert built.inner.rate == 2
    assert built.inner.names == []


def test_numbers_in_exponent_notation_are_numbers():
    assert parse_overrides(["a=16.5e18", "b=2e18", "c=3e-3"]) == {"a": 16.5e18, "b": 2e18, "c": 3e-3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.rat=1"], r"unknown key 'inner.rat'; nearest valid: rate"),
        (["sed=1"], r"unknown key 'sed'; nearest valid: seed"),
        (["seed=1.5"], r"seed: .*integer.*given: 1.5"),
        (["seed"], r"'seed': expected key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        load(Outer, None, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "cannot be read as YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("extends: nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


def test_a_missing_file_suggests_the_nearest(tmp_path):
    (tmp_path / "smoke.yaml").write_text("")
    with pytest.raises(UserError, match=r"smok.yaml: no such file; did you mean smoke.yaml"):
        read_yaml(tmp_path / "smok.yaml")


def test_a_circle_of_extends_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(UserError, match=r"a.yaml -> b.yaml -> a.yaml"):
        read_yaml("a.yaml")


def test_every_field_is_described():
    assert ("inner.rate", "1.0", "a rate, per second") in describe(Outer())


@pytest.mark.parametrize(("error", "code"), [(UserError("what and where"), 2), (KeyboardInterrupt(), 130)])
def test_a_users_mistake_is_a_message_and_an_exit_code(capsys, error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_ctrl_c_after_all_is_done_changes_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from data_prep.settings import run_command\nrun_command(lambda: print('all done') or 3)\n")
    command = signalled_at_the_end(signal.SIGINT, str(script))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "all done\n", "")


@pytest.mark.parametrize("flushed", [False, True])
def test_output_that_nobody_reads_ends_a_command_without_a_word(tmp_path, flushed):
    """As by SIGPIPE; a pipe that breaks elsewhere is told as ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom data_prep.settings import run_command\n"
        f"def main():\n    while True:\n        print('a line', flush={flushed})\n"
        "def elsewhere():\n    raise BrokenPipeError('elsewhere')\n"
        "run_command(elsewhere if sys.argv[1:] else main)\n"
    )
    command, environment = [sys.executable, str(script)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == "a line\n"
        run.stdout.close()
        assert (run.wait(60), run.stderr.read()) == (128 + signal.SIGPIPE, "")
    other = subprocess.run([*command, "elsewhere"], env=environment, capture_output=True, text=True)
    assert other.returncode == 1 and "BrokenPipeError: elsewhere" in other.stderr


# The schema says what a value is


@pytest.mark.parametrize("text", ["123", "1e3", "010", "2024-01-01", "1:30", "1_000", "on", "off", "yes", "true", ".5"])
def test_a_text_stays_what_was_typed(text: str):
    assert load(Kinds, None, [f"text={text}"]).text == text


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("fraction=1", "fraction", 1.0),
        ("fraction=1e-3", "fraction", 1e-3),
        ("whole=1_000", "whole", 1000),
        ("whole=1e3", "whole", 1000),
        ("whole=010", "whole", 10),
        ("switch=on", "switch", True),
        ("switch=No", "switch", False),
        ("word=off", "word", "off"),
        ("word=1", "word", "1"),
        ("maybe=2", "maybe", 2.0),
        ("maybe=~", "maybe", None),
        ("either=[1e2, 2]", "either", [100, 2]),
        ("either=16.5e18", "either", 16_500_000_000_000_000_000),
        ("fractions=[1, 1, 1]", "fractions", [1.0, 1.0, 1.0]),
        ("pair=[1, 2]", "pair", (1.0, "2")),
        ("text=[a]/b", "text", "[a]/b"),
        ("text={a} b/c=d", "text", "{a} b/c=d"),
        ("text=a #b", "text", "a #b"),
        ("anything={a: off, b: 1, c: 010, d: 1:30, e: true}", "anything",
         {"a": "off", "b": 1, "c": 10, "d": "1:30", "e": True}),
    ],
)  # fmt: skip
def test_a_value_is_what_its_field_is(override: str, key: str, value: Any):
    found = getattr(load(Kinds, None, [override]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fraction=inf", "fraction: .*finite"),
        ("fraction=.nan", "fraction: .*finite"),
        ("fraction=1e999", "fraction: .*finite"),
        ("whole=1e999999999", "whole"),
        ("whole=0x1F", "whole: .*integer.*0x1F"),
        ("whole=true", "whole: .*integer.*true"),
        ("fraction=1:30", "fraction: .*number.*1:30"),
        ("fraction=2024-01-01", "fraction"),
        ("place=$NOT_SET_ANYWHERE/x", r"place: \$NOT_SET_ANYWHERE .*not set"),
        ("whole=[1", "whole=.*cannot be read"),
        ("whole={a: 1, a: 2}", "'a' is given twice"),
        ("a..b=1", "expected key=value"),
        ("=1", "expected key=value"),
    ],
)
def test_what_cannot_have_been_meant_is_one_line(override: str, words: str):
    with pytest.raises(UserError, match=words) as caught:
        load(Kinds, None, [override])
    assert "\n" not in str(caught.value)


def test_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", str(tmp_path))
    built = load(Kinds, None, ["place=~/runs", "pattern=$CORPUS/*.txt"])
    assert built.place == tmp_path / "runs" and built.pattern == f"{tmp_path}/*.txt"
    (tmp_path / "base.yaml").write_text("whole: 3\n")
    (tmp_path / "top.yaml").write_text("extends: ${CORPUS}/base.yaml\n")
    assert load(Kinds, "$CORPUS/top.yaml").whole == 3


def test_a_key_that_a_file_says_twice_is_refused_by_file_line_and_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("whole: 1\nanything: {a: 1}\nwhole: 2\n")
    with pytest.raises(UserError, match=r"x\.yaml: .*'whole' is given twice \(line 3, column 1\)$"):
        load(Kinds, path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["inner.rate=2", "inner=two.yaml"], r"'inner=two\.yaml' drops 'inner\.rate=2'.*put inner=two\.yaml first"),
        (["inner.rate=2", "inner=null"], "drops 'inner.rate=2'"),
        (["inner=null", "inner.rate=2"], "drops 'inner=null'"),
    ],
)
def test_overrides_that_drop_each_other_by_their_order_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load(Outer, None, overrides, sections=["inner"])


WORDS = st.from_regex(r"[A-Za-z0-9_.+-]{1,12}", fullmatch=True).filter(
    lambda text: text not in ("null", "Null", "NULL", "~", "-") and not text.startswith(("---", "..."))
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(WORDS)
def test_no_word_is_changed_on_its_way_to_a_text(text: str):
    assert load(Kinds, None, [f"text={text}", "anything={a: x}"]).text == text


@given(st.builds(dict, text=WORDS, whole=st.integers(), fraction=FINITE, switch=st.booleans(), maybe=st.none() | FINITE,
                 fractions=st.lists(FINITE | st.integers(-(2**53), 2**53), max_size=3)))  # fmt: skip
def test_what_is_dumped_is_read_back(values: dict[str, Any]):
    built = Kinds.model_validate(values)
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()]
    assert load(Kinds, None, [text.removesuffix("...\n") for text in overrides]) == built


@given(st.text(max_size=30), st.sampled_from(["text", "whole", "switch", "fractions", "place", "anything", "either"]))
def test_any_text_is_a_value_or_one_users_error(text: str, key: str):
    refused = ""
    try:
        load(Kinds, None, [f"{key}={text}"])
    except UserError as error:
        refused = str(error)
    assert not refused or key in refused
