"""Typed YAML settings: load, compose, override, explain. Used by every command line of the project.

A settings class is a pydantic model whose fields carry `Field(description=...)`. A YAML file may start from others:
`extends: other.yaml` at its top, or, wherever a section is expected, the path of a YAML file in place of a mapping.
Paths in a YAML file are relative to the current folder, the repository's root in every documented command; YAML
files are looked for in the repository too, so that `configs/...` is found from everywhere.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(Exception):
    """A mistake in what the user gave: one message that names file, field, row or shard, and what to do about it."""


class Settings(BaseModel):
    """Base of every settings class: unknown keys and lossy conversions are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-3` and `16.5e18` as strings; here they are numbers, as everyone expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


ROOT = Path(__file__).resolve().parents[1]


def find_yaml(path: str | Path) -> Path:
    """`path` from the current folder or, where it is not there, from the repository's root."""
    path = Path(path)
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path


def read_yaml(path: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read one YAML mapping, following `extends`. Raises UserError naming the file.

    above: the files that led here by `extends`, so that a circle is refused.
    """
    path = find_yaml(path)
    chain = (*above, str(path))
    if str(path) in above:
        raise UserError(f"{path}: `extends` goes in a circle: {' -> '.join(chain)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}")
    parent = content.pop("extends", None)
    return merge(read_yaml(parent, chain), content) if parent else content


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; `over` wins, and a path in place of a section is read first."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            below = result.get(key)
            if isinstance(below, str) and below.endswith(".yaml"):
                below = read_yaml(below)
            result[key] = merge(below, value) if isinstance(below, dict) else value
        else:
            result[key] = value
    return result


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `["a.b=1", "c=x"]` into `{"a": {"b": 1}, "c": "x"}`; values are YAML."""
    result: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item!r}: expected key=value, for instance seed=1 or model.hidden_size=64")
        value = yaml.load(text, Loader=_Loader)
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _open_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the path of a YAML file that stands for a section by the mapping in it."""
    opened = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if "extends" in value:
                value = merge(read_yaml(value["extends"]), {k: v for k, v in value.items() if k != "extends"})
            value = _open_sections(value)
        opened[key] = value
    return opened


def load(cls: type[S], path: str | Path | None, overrides: Sequence[str] = (), sections: Sequence[str] = ()) -> S:
    """Build `cls` from a YAML file and `key=value` overrides.

    sections: top-level keys where the path of a YAML file may stand for a mapping (`model: configs/model/x.yaml`).
    Raises UserError that names the file, the key and, for an unknown key, the nearest valid names.
    """
    values = read_yaml(path) if path is not None else {}
    for key in sections:
        if isinstance(values.get(key), str):
            values[key] = read_yaml(values[key])
    over = parse_overrides(overrides)
    for key in sections:
        if isinstance(over.get(key), str):
            values[key] = read_yaml(over.pop(key))
    values = _open_sections(merge(values, over))
    return build(cls, values, str(path or "command line"))


def build(cls: type[S], values: dict[str, Any], where: str) -> S:
    """Validate `values` as `cls`; raise UserError with one line per wrong field, each naming `where`."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}: {_explain(cls, item)}" for item in error.errors()]
        raise UserError("\n".join(lines)) from None


def _explain(cls: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        names = _names_at(cls, location[:-1])
        near = difflib.get_close_matches(location[-1], names, n=3, cutoff=0.5) or sorted(names)
        return f"unknown key {key!r}; nearest valid: {', '.join(near)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"key {key!r} is required"
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{key}: {message}{given}" if key else message


def _names_at(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    current: Any = cls
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        options = [field.annotation, *get_args(field.annotation)]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), current)
    return list(current.model_fields)


def describe(settings: BaseModel, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field as (dotted key, value, meaning), for `--print-config`."""
    rows: list[tuple[str, str, str]] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            rows += describe(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", repr(value), field.description or ""))
    return rows


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main`; a UserError becomes its message on stderr and exit code 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue where it was", file=sys.stderr)
        sys.exit(130)
