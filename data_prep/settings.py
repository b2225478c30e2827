"""Typed YAML settings: load, compose, override, explain. Used by every command line of the project.

A settings class is a pydantic model whose fields carry `Field(description=...)`. A YAML file may start from others:
`extends: other.yaml` at its top, or, wherever a section is expected, the path of a YAML file in place of a mapping.
Paths in a YAML file are relative to the current folder, the repository's root in every documented command; YAML files
are looked for in the repository too, so that `configs/...` is found from everywhere; `~` and `$VARIABLE` are expanded.

The schema says what a value is, YAML does not: `name=123` is text because a name is text, `off` is a switch where a
switch is expected and a word elsewhere, `1_000`, `1e3` and `16.5e18` are numbers where numbers are. A value that no
schema describes is what YAML 1.2 takes it for: null, true, false, a decimal number, or text; never a date, an octal
number or a time of day.
"""

from __future__ import annotations

import difflib
import gc
import os
import re
import select
import signal
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator

NULLS = {"", "~", "null", "Null", "NULL"}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LARGEST_EXPONENT = 100  # of a number in exponent notation that stands for a whole one


class UserError(Exception):
    """A mistake in what the user gave: one message that names file, field, row or shard, and what to do about it."""


def expand(path: str) -> str:
    """`~` and `$VARIABLE` in a path replaced by what they stand for; ValueError for a variable that is not set."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if left := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"{left[0]} in {path!r} is not set in the environment")
    return expanded


PathText = Annotated[str, AfterValidator(expand)]  # a path, or a glob pattern or name that may be one


class Settings(BaseModel):
    """Base of every settings class: unknown keys, lossy conversions and numbers without end are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _expand_paths(cls, value: Any) -> Any:
        return Path(expand(str(value))) if isinstance(value, Path) else value


S = TypeVar("S", bound=Settings)


# --- scalars --------------------------------------------------------------------------------------------------------


class Plain(str):
    """A scalar as it stands in a YAML file, without quotes: what it is, the schema decides."""


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, as `Plain`, and whose mappings say no key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}  # noqa: RUF012 (pyyaml's own)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if not isinstance(node, yaml.ScalarNode) or node.style is not None or node.tag != "tag:yaml.org,2002:str":
            return text
        return None if text in NULLS else Plain(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items() if key is not None}


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)


def _parse(text: str) -> Any:
    """YAML text with its plain scalars as `Plain`; ValueError in one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(" ".join(f"{error.problem or error.context}{at}".split())) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def number(text: str) -> int | float | None:
    """The decimal number that a text stands for, a whole one in exponent notation exactly; None where it is none."""
    if re.fullmatch(r"[-+]?\d[\d_]*", text) and len(text) < 1000:
        return int(text.rstrip("_"))
    if re.fullmatch(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d{1,9})?", text):
        value = Decimal(text.replace("_", ""))
        whole = "e" in text.lower() and abs(value.adjusted()) < LARGEST_EXPONENT and value == value.to_integral_value()
        return int(value) if whole else float(value)
    return float(text.replace(".", "")) if text.lower() in (".inf", "-.inf", ".nan") else None


def guess(value: Any) -> Any:
    """A value without a schema, as YAML 1.2 reads it; mappings and lists throughout."""
    if isinstance(value, dict):
        return {key: guess(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [guess(entry) for entry in value]
    if not isinstance(value, Plain):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    found = number(value)
    return str(value) if found is None else found


def typed(value: Any, hint: Any) -> Any:
    """`value` with its plain scalars read as the type `hint` has them; what does not fit stays text, for the validation
    to refuse."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return typed(value, arguments[0])
    if origin in (Union, types.UnionType):
        return typed(value, _arm(value, arguments))
    if isinstance(value, dict):
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            fields = hint.model_fields
            return {k: typed(v, fields[k].annotation) if k in fields else guess(v) for k, v in value.items()}
        entry = arguments[1] if origin is dict else Any
        return {key: typed(item, entry) for key, item in value.items()}
    if isinstance(value, list):
        if origin is tuple and len(arguments) == len(value) and Ellipsis not in arguments:
            return [typed(item, entry) for item, entry in zip(value, arguments, strict=True)]
        return [typed(item, arguments[0] if origin in (list, tuple) else Any) for item in value]
    if isinstance(value, Plain):
        return _scalar(value, hint, origin, arguments)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _arm(value: Any, options: Sequence[Any]) -> Any:
    """Which type of a union a value is meant for."""
    for hint in options:
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        origin = get_origin(plain)
        if isinstance(value, dict):
            fits = origin is dict or (isinstance(plain, type) and issubclass(plain, BaseModel))
        elif isinstance(value, list):
            fits = origin in (list, tuple)
        elif isinstance(value, Plain):
            found = _scalar(value, plain, origin, get_args(plain))
            fits = found in get_args(plain) if origin is Literal else plain is str or not isinstance(found, str)
        else:
            fits = isinstance(value, int | float) and plain is float
        if fits:
            return hint
    return Any if isinstance(value, dict | list) else options[0]


def _scalar(value: Plain, hint: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    if origin is Literal:
        return str(value) if value in arguments else guess(value) if guess(value) in arguments else str(value)
    if hint is bool:
        return SWITCHES.get(value.lower(), str(value))
    if hint is int or hint is float:
        found = number(value)
        if found is None:
            return str(value)
        return float(found) if hint is float and abs(found) < 1e300 else found
    return guess(value) if hint is Any else str(value)


# --- files and overrides --------------------------------------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[1]


def find_yaml(path: Path) -> Path:
    """`path` from the current folder or, where it is not there, from the repository's root."""
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping without a schema, following `extends`. Raises UserError naming the file."""
    return guess(_read(path))


def _read(path: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """One YAML mapping, its plain scalars as `Plain`.

    above: the files that led here by `extends`, so that a circle is refused.
    """
    try:
        path = find_yaml(Path(expand(str(path))))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    chain = (*above, str(path))
    if str(path) in above:
        raise UserError(f"{path}: `extends` goes in a circle: {' -> '.join(chain)}")
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(guess(content)).__name__}")
    parent = content.pop("extends", None)
    return merge(_read(_path_of(parent, path, "extends"), chain), content) if parent is not None else content


def _path_of(value: Any, where: str | Path, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: expected the path of a YAML file (given: {guess(value)!r})")
    return value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; `over` wins, and a path in place of a section is read first."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            below = result.get(key)
            if isinstance(below, str) and below.endswith(".yaml"):
                below = _read(below)
            result[key] = merge(below, value) if isinstance(below, dict) else value
        else:
            result[key] = value
    return result


def _value(text: str) -> Any:
    """A value of the command line: YAML, in which nothing is a comment, or a path as it stands (`[a]/b`)."""
    try:
        value = _parse(text)
    except ValueError:
        if "/" in text and text[:1] not in "'\"" and "\n" not in text:
            return Plain(text)
        raise
    return Plain(text.strip()) if isinstance(value, Plain) else value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `["a.b=1", "c=x"]` into `{"a": {"b": 1}, "c": "x"}`, without a schema. Raises UserError."""
    return guess(_overrides(overrides))


def _overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides as one mapping, plain scalars as `Plain`; the later of two values of one key wins.

    Refuses what drops another override whole by its order: `model.x=1` before `model=FILE`.
    """
    result: dict[str, Any] = {}
    given: list[tuple[str, str]] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{item!r}: expected key=value, for instance seed=1 or model.hidden_size=64")
        try:
            value = _value(text)
        except ValueError as error:
            raise UserError(f"{item!r}: the value cannot be read: {error}") from None
        for earlier, whole in given:
            below = earlier.startswith(f"{key}.") and not isinstance(value, dict)
            above = key.startswith(f"{earlier}.") and not _section(_at(result, earlier))
            if below or above:
                last = f"put {item} first" if below else "leave one out"
                raise UserError(f"{item!r} drops {whole!r}, which was given before it; {last}")
        given.append((key, item))
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.endswith(".yaml"))


def _open_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the path of a YAML file that stands for a section by the mapping in it."""
    opened = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if value.get("extends") is not None:
                parent = _read(_path_of(value["extends"], "extends", key))
                value = merge(parent, {k: v for k, v in value.items() if k != "extends"})
            value = _open_sections(value)
        opened[key] = value
    return opened


def load(
    cls: type[S],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    sections: Sequence[str] = (),
    alone: Mapping[str, str] = MappingProxyType({}),
) -> S:
    """Build `cls` from a YAML file and `key=value` overrides.

    sections: top-level keys where the path of a YAML file may stand for a mapping (`model: configs/model/x.yaml`).
    alone: top-level keys whose mapping may be given by one of its values, `start_from=X` for `start_from.path=X`.
    Raises UserError that names the file, the key and, for an unknown key, the nearest valid names.
    """
    values = _read(path) if path is not None else {}
    for key, field in alone.items():
        if isinstance(values.get(key), str):
            values[key] = {field: values[key]}
        overrides = [_spelt_out(item, key, field) for item in overrides]
    for key in sections:
        if isinstance(values.get(key), str):
            values[key] = _read(values[key])
    over = _overrides(overrides)
    for key in sections:
        if isinstance(over.get(key), str):
            values[key] = _read(over.pop(key))
    values = _open_sections(merge(values, over))
    return build(cls, values, str(path or "command line"))


def _spelt_out(override: str, key: str, field: str) -> str:
    """`key=X` as `key.field=X`, where X is text."""
    start, _, text = override.partition("=")
    plain = start == key and text not in NULLS and not text.startswith("{")
    return f"{key}.{field}={text}" if plain else override


def build(cls: type[S], values: dict[str, Any], where: str) -> S:
    """Validate `values` as `cls`; raise UserError with one line per wrong field, each naming `where`."""
    try:
        return cls.model_validate(typed(values, cls))
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
    """Run a command line's `main`; a UserError becomes its message on stderr and exit code 2, a Ctrl-C exit code 130.

    A Ctrl-C that comes once `main` has done its work changes nothing any more. Where whoever read the output has gone
    (`... | head`), the command ends without a word, as by SIGPIPE.
    """
    gc.freeze()  # what is imported stays: Python's end need not look through it once more
    try:
        code = main() or 0
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python gives back the default as it ends, which kills it
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue where it was", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _unread():
            raise
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(code)


def _unread() -> bool:
    """Whether nobody reads this process's output any more; then what is left of it goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    broken = bool(output.poll(0))  # nothing but an error was asked for
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken
