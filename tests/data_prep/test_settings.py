"""Settings: composition, overrides, and messages that name the file, the key and the nearest valid names."""

import pytest
from pydantic import Field

from data_prep.settings import Settings, UserError, describe, load, parse_overrides, read_yaml, run_command


class Inner(Settings):
    rate: float = Field(1.0, description="a rate, per second")
    names: list[str] = Field([], description="names")


class Outer(Settings):
    inner: Inner = Field(Inner(), description="the inner part")
    seed: int = Field(0, description="seed of everything random")


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
