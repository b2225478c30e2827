"""A corpus cut into parts, the units of work of its preparation: by the corpus and `part_bytes` alone.

A part is a list of pieces that are read one after the other. A piece is a file or a range of a large one: of bytes that
begin at a line (jsonl) or a document (text with a delimiter), of row groups (parquet). What only reading from the start
can cut (compressed files, CSV, whose quotes may hold line ends, a text that is one document) is one piece.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from data_prep.config import DataSettings
from data_prep.files import CHUNK
from data_prep.inputs import safe
from data_prep.settings import UserError
from data_prep.streams import COMPRESSED, is_plain

_COMPRESSION = 4  # bytes of text that a byte of a compressed file is taken for


@dataclass(frozen=True)
class Piece:
    """What a source reads in one go.

    item: the number of a file in reading order, of a package or of a shard of a data set. start, end: range of bytes or
    row groups, all where end is None. row: rows of the file before it. size: bytes of text, about.
    """

    item: int
    start: int = 0
    end: int | None = None
    row: int = 0
    size: int = 0
    path: str = ""  # bytes of the file's name as latin-1, since a name need not be UTF-8

    @property
    def file(self) -> Path:
        return Path(os.fsdecode(self.path.encode("latin-1")))

    def after(self) -> str:
        """What a message says behind the number of a line or document."""
        return f" after byte {self.start}" if self.start else ""


Part = list[Piece]


def to_json(parts: list[Part]) -> list[list[dict[str, Any]]]:
    """Parts as they are stored."""
    return [[asdict(piece) for piece in part] for part in parts]


def from_json(stored: list[list[dict[str, Any]]]) -> list[Part]:
    """Parts as they were stored."""
    return [[Piece(**piece) for piece in part] for part in stored]


def size_of(part: Part) -> int:
    """Bytes of text of a part, about."""
    return sum(piece.size for piece in part)


def uncut(parts: list[Part], settings: DataSettings) -> list[str]:
    """What a user should know of parts of local files that are far larger than was asked for: a line, or none."""
    large = [part for part in parts if size_of(part) > 2 * settings.part_bytes]
    if not large:
        return []
    largest = max(large, key=size_of)
    size, name = size_of(largest) / 1e6, safe(largest[0].file)
    return [
        f"{len(large)} of {len(parts)} parts exceed part_bytes={settings.part_bytes}, the largest has about "
        f"{size:,.1f} MB ({name}): compressed files, CSV, texts without a delimiter and row groups of parquet are not "
        "cut; one task reads each, from its start after an interruption. Smaller files, or jsonl, would be shared out"
    ]


def cut_files(paths: list[Path], settings: DataSettings) -> list[Part]:
    """The parts of local files. Raises UserError naming a file that cannot be looked at."""
    return grouped((piece for item, path in enumerate(paths) for piece in _cut(item, path, settings)), settings)


def grouped(pieces: Iterable[Piece], settings: DataSettings) -> list[Part]:
    """Pieces, in order, as parts of about `part_bytes`."""
    parts: list[Part] = []
    total = 0
    for piece in pieces:
        if not parts or total + piece.size > settings.part_bytes:
            parts.append([])
            total = 0
        parts[-1].append(piece)
        total += piece.size
    return parts


def _cut(item: int, path: Path, settings: DataSettings) -> Iterator[Piece]:
    name = os.fsencode(os.path.abspath(path)).decode("latin-1")
    size = path.stat().st_size
    if settings.source.kind == "parquet":
        yield from _row_groups(item, path, name, settings)
        return
    boundary = _boundary(settings)
    if boundary is None or size <= settings.part_bytes or not is_plain(path):
        packed = path.suffix.lower() in COMPRESSED
        yield Piece(item, size=size * (_COMPRESSION if packed else 1), path=name)
        return
    start = 0
    for end, following in _cuts(path, size, boundary, settings.part_bytes):
        yield Piece(item, start, end, size=end - start, path=name)
        start = following
    yield Piece(item, start, size, size=size - start, path=name)


def _boundary(settings: DataSettings) -> re.Pattern[bytes] | None:
    """Where a file may be cut. Group `end`, what stands before it belongs to the piece before."""
    if settings.source.kind == "jsonl":
        return re.compile(rb"\n(?P<end>)")
    if settings.source.kind != "text" or not settings.source.delimiter:
        return None
    pieces = re.split(r"\r\n|\r|\n", settings.source.delimiter)
    return re.compile(rb"(?P<end>)" + rb"(?:\r\n|\r|\n)".join(re.escape(piece.encode()) for piece in pieces))


def _cuts(path: Path, size: int, boundary: re.Pattern[bytes], part_bytes: int) -> Iterator[tuple[int, int]]:
    """(end of one piece, start of the next), about every `part_bytes`."""
    target = part_bytes
    with path.open("rb") as file:
        while (found := _next(file, boundary, target, size)) is not None and found[1] < size:
            yield found
            target = max(target + part_bytes, found[1])


def _next(file: BinaryIO, boundary: re.Pattern[bytes], at: int, size: int) -> tuple[int, int] | None:
    """End of a piece and start of the next at the first boundary from byte `at` on; None where there is none."""
    longest = 2 * len(boundary.pattern)
    while at < size:
        file.seek(at)
        window = file.read(CHUNK + longest)
        last = at + len(window) >= size
        found = boundary.search(window)
        if found and (last or found.start() <= CHUNK):  # else the window may have cut it
            return at + found.start("end"), at + found.end()
        if last:
            return None
        at += CHUNK
    return None


def _row_groups(item: int, path: Path, name: str, settings: DataSettings) -> Iterator[Piece]:
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes = [_text_bytes(group, settings.source.field) for group in groups]
            rows = [group.num_rows for group in groups]
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"{safe(path)}: cannot be read: {reason}; the file may be truncated or of another kind"
        ) from error
    start = 0
    for number in range(len(groups) + 1):
        if number == len(groups) or (number > start and sum(sizes[start : number + 1]) > settings.part_bytes):
            row, size = sum(rows[:start]), sum(sizes[start:number])
            yield Piece(item, start, number, row=row, size=size, path=name)
            start = number


def _text_bytes(group: Any, column: str) -> int:
    """Bytes of the text column in a row group, or of all where it is not there, which reading will tell."""
    columns = [group.column(number) for number in range(group.num_columns)]
    named = [item for item in columns if item.path_in_schema in (column, column.split(".")[0])]
    return sum(item.total_uncompressed_size for item in named) or group.total_byte_size
