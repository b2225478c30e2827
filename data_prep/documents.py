"""Raw records -> clean documents of two splits, spilled to disk.

    read -> decode (skip and count bytes that are not UTF-8) -> normalise (NFC, newlines) -> drop empty
         -> digest, split by digest -> documents.bin + one row each in documents.index
         -> drop exact duplicates (first one stays) -> train.spans, validation.spans

Memory: one document, plus one byte for each document and a bounded sort buffer.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.config import DataSettings
from data_prep.files import CHUNK, sync
from data_prep.progress import progress_bar
from data_prep.settings import UserError

SPLITS = ("train", "validation")
# One row of documents.index: length in bytes, salted digest of the text, and the split.
INDEX_ROW = np.dtype([("length", "<i8"), ("digest", "<u8", (2,)), ("validation", "?")])
# One row of SPLIT.spans: where a document lies in documents.bin.
SPAN = np.dtype([("offset", "<i8"), ("length", "<i8")])


@dataclass(frozen=True)
class Record:
    """What a source yields: bytes that should be UTF-8, where they stand, whether they continue the record before."""

    where: str
    raw: bytes
    continues: bool = False


@dataclass
class DocumentCounts:
    """What became of the records. `undecodable` counts bytes, `split_long` documents that were cut."""

    train: int = 0
    validation: int = 0
    dropped_empty: int = 0
    dropped_duplicate: int = 0
    undecodable: int = 0
    split_long: int = 0


def decode(raw: bytes) -> tuple[str, int]:
    """Text of `raw` and the number of bytes skipped because they are not UTF-8."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode(errors="ignore")
        return text, len(raw) - len(text.encode())


LONG_RUN = 64  # combining marks in a row that are sorted here before Python normalises them
# Long runs without Latin, Han and Hangul, among which are no combining marks: quickly found, and rare.
_MAY_BE_MARKS = re.compile(rf"[\u0300-\u4dff\ua000-\uabff\ud7a4-\U0010ffff]{{{LONG_RUN},}}")


def normalise(text: str) -> str:
    """NFC, newlines as \\n, no white space at both ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if text.isascii():
        return text
    text = _MAY_BE_MARKS.sub(lambda run: _long_runs().sub(_ordered, run.group()), text)
    return unicodedata.normalize("NFC", text).strip()


@functools.cache
def _long_runs() -> re.Pattern[str]:
    """Runs of at least LONG_RUN combining marks."""
    marks = {code for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code))}
    starts = sorted(code for code in marks if code - 1 not in marks)
    ends = sorted(code for code in marks if code + 1 not in marks)
    ranges = "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))
    return re.compile(f"[{ranges}]{{{LONG_RUN},}}")


def _ordered(run: re.Match[str]) -> str:
    """The marks of a run decomposed and in canonical order, which is what NFC does first.

    Python sorts them by insertion, in time quadratic in the run's length (cpython issue 149079); of marks in order
    nothing is left to sort. The text that results is the same.
    """
    decomposed = "".join(unicodedata.normalize("NFD", mark) for mark in run.group())
    return "".join(sorted(decomposed, key=unicodedata.combining))


def cut_position(raw: bytes | bytearray, limit: int) -> int:
    """Where to cut text longer than `limit` bytes: after the last newline or blank, never inside a character."""
    for separator in (b"\n", b" "):
        position = raw.rfind(separator, limit // 2, limit)
        if position >= 0:
            return position + 1
    position = limit
    while position > limit - 4 and raw[position] & 0xC0 == 0x80:
        position -= 1
    return position


def bounded(records: Iterable[Record], settings: DataSettings, counts: DocumentCounts) -> Iterator[Record]:
    """Refuse or cut the records that are longer than `max_document_bytes`."""
    limit = settings.max_document_bytes
    for record in records:
        if len(record.raw) <= limit and not record.continues:
            yield record
            continue
        if settings.long_documents == "refuse":
            raise UserError(
                f"{record.where}: document longer than max_document_bytes={limit}; "
                "raise that limit, or set long_documents=split to cut such documents"
            )
        counts.split_long += not record.continues
        start, continues = 0, record.continues
        while len(record.raw) - start > limit:
            rest = record.raw[start : start + limit + 1]  # never all of it: a record may be a thousand limits long
            end = start + cut_position(rest, limit)
            yield Record(record.where, record.raw[start:end], continues)
            start, continues = end, True
        yield Record(record.where, record.raw[start:], continues)


def spill(records: Iterable[Record], settings: DataSettings, folder: Path) -> DocumentCounts:
    """Clean all records into `folder`/documents.bin, documents.index and SPLIT.spans; return what was counted.

    Raises UserError for a corpus without text, one with too many undecodable bytes, and an empty split.
    """
    counts = DocumentCounts()
    threshold = int(settings.validation_fraction * 2**64)
    salt = settings.seed.to_bytes(8, "little")
    row = np.zeros(1, INDEX_ROW)
    validation = False
    with (
        (folder / "documents.bin").open("wb") as texts,
        (folder / "documents.index").open("wb") as index,
        progress_bar("read", None, "documents") as advance,
    ):
        for record in bounded(records, settings, counts):
            advance(1)
            text, skipped = decode(record.raw)
            counts.undecodable += skipped
            if counts.undecodable > settings.max_undecodable_bytes:
                raise UserError(
                    f"{record.where}: not UTF-8; with it {counts.undecodable} bytes would be skipped, more than "
                    f"max_undecodable_bytes={settings.max_undecodable_bytes}; convert the file or raise the limit"
                )
            data = normalise(text).encode()
            if not data:
                counts.dropped_empty += 1
                continue
            digest = np.frombuffer(hashlib.blake2b(data, digest_size=16, salt=salt).digest(), "<u8")
            if not record.continues:  # the parts of a cut document stay in one split
                validation = int(digest[0]) < threshold
            row[0] = (len(data), digest, validation)
            texts.write(data)
            index.write(row.tobytes())
        sync(texts)
        sync(index)
    select(folder, counts)
    check_splits(counts, settings)
    return counts


def select(folder: Path, counts: DocumentCounts, rows_per_pass: int = 1 << 24) -> None:
    """Write SPLIT.spans for the first occurrence of each text, in the order of the source."""
    path = folder / "documents.index"
    index = np.memmap(path, INDEX_ROW, "r") if path.stat().st_size else np.zeros(0, INDEX_ROW)
    keep = first_occurrences(index, rows_per_pass)
    counts.dropped_duplicate = len(index) - int(keep.sum())
    offset = 0
    with (folder / "train.spans").open("wb") as train, (folder / "validation.spans").open("wb") as validation:
        for start in range(0, len(index), CHUNK):
            rows = index[start : start + CHUNK]
            spans = np.empty(len(rows), SPAN)
            spans["length"] = rows["length"]
            spans["offset"] = offset + np.cumsum(rows["length"]) - rows["length"]
            offset += int(rows["length"].sum())
            kept = keep[start : start + CHUNK]
            for file, chosen in ((train, kept & ~rows["validation"]), (validation, kept & rows["validation"])):
                file.write(spans[chosen].tobytes())
        counts.train, counts.validation = train.tell() // SPAN.itemsize, validation.tell() // SPAN.itemsize
        sync(train)
        sync(validation)


def first_occurrences(index: np.ndarray, rows_per_pass: int) -> np.ndarray:
    """Mark the first row of each digest. index: [N] of INDEX_ROW, may be a map of a file; result: [N] bool.

    Several passes over the index, each for one residue of the digest, keep the sort within `rows_per_pass` rows
    or so.
    """
    passes = max(1, -(-len(index) // rows_per_pass))
    keep = np.zeros(len(index), bool)
    for number in range(passes):
        rows_found, digests_found = [], []
        for start in range(0, len(index), CHUNK):
            digests = index["digest"][start : start + CHUNK]
            rows = np.flatnonzero(digests[:, 1] % np.uint64(passes) == number)
            rows_found.append(rows + start)
            digests_found.append(digests[rows])
        if not rows_found:
            continue
        rows, digests = np.concatenate(rows_found), np.concatenate(digests_found)
        order = np.lexsort((rows, digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        first = np.ones(len(order), bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        keep[rows[order[first]]] = True
    return keep


def check_splits(counts: DocumentCounts, settings: DataSettings) -> None:
    """Raise UserError for an empty corpus and for a split without documents."""
    if counts.train + counts.validation == 0:
        raise UserError(f"corpus {settings.corpus!r} holds no text ({asdict(counts)}); check the source")
    for split in SPLITS:
        if getattr(counts, split) == 0:
            raise UserError(
                f"corpus {settings.corpus!r}: no document of {counts.train + counts.validation} falls into the {split} "
                f"split with validation_fraction={settings.validation_fraction} and seed={settings.seed}; change one "
                "of them, or give more documents (source.delimiter cuts a text file into several)"
            )
