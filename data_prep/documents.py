"""Raw records -> clean documents of two splits, spilled to disk part by part.

    read -> decode (skip and count bytes that are not UTF-8) -> normalise (NFC, newlines) -> drop empty
         -> digest, split by digest -> PART.bin + one row each in PART.index + their order by digest in PART.order
    select -> for a range of digests, over all parts: exact duplicates (the first one stays) -> RANGE.dropped

Memory: a document and the index of one part, or the rows of one range.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import DataSettings
from data_prep.files import sync, write_json
from data_prep.settings import UserError

SPLITS = ("train", "validation")
# One row of an index: length in bytes, salted digest of the text, and the split.
INDEX_ROW = np.dtype([("length", "<i8"), ("digest", "<u8", (2,)), ("validation", "?")])
# Where a document lies in the text of its part.
SPAN = np.dtype([("offset", "<i8"), ("length", "<i8")])
# A document that another repeats: its part and its row in that part's index.
DROPPED = np.dtype([("part", "<i8"), ("row", "<i8")])
# A document that occurs several times: where it does first, and how often.
REPEATED = np.dtype([("part", "<i8"), ("row", "<i8"), ("times", "<i8")])
MOST_REPEATED = 20  # of them are told
SAVE_SECONDS = 30.0
RANGE_ROWS = 1 << 20  # documents whose digests are sorted at once, about


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


class Reading:
    """How far the reading of one part is, kept now and then, for a source that can go on from there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.written: Callable[[], dict[str, Any]] = dict  # counts and lengths of files; `spill` sets it
        self._saved = time.monotonic()

    def between(self, row: int, state: Callable[[], dict[str, Any]]) -> None:
        """Told by the source between two records, when all before is spilled: the row that comes, and its state."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            write_json(self.path, {"row": row, "state": state(), **self.written()})
            self._saved = time.monotonic()


def spill(
    records: Iterable[Record], settings: DataSettings, target: Path, reading: Reading | None = None
) -> DocumentCounts:
    """Clean the records of one part into `target`.bin, .index and .order; return what was counted.

    reading: what was spilled before an interruption stays, and `records` go on from there. Raises UserError for too
    many undecodable bytes.
    """
    kept = reading.kept if reading else {}
    counts = DocumentCounts(**kept.get("counts", {}))
    threshold = int(settings.validation_fraction * 2**64)
    salt = settings.seed.to_bytes(8, "little")
    row = np.zeros(1, INDEX_ROW)
    validation = False
    mode = "r+b" if kept else "wb"
    with target.with_suffix(".bin").open(mode) as texts, target.with_suffix(".index").open(mode) as index:
        for file, name in ((texts, "texts"), (index, "index")):
            file.seek(file.truncate(kept.get(name, 0)))

        def written() -> dict[str, Any]:
            sync(texts)
            sync(index)
            return {"counts": asdict(counts), "texts": texts.tell(), "index": index.tell()}

        if reading:
            reading.written = written
        for record in bounded(records, settings, counts):
            text, skipped = decode(record.raw)
            counts.undecodable += skipped
            check_undecodable(counts.undecodable, settings, record.where)
            data = normalise(text).encode()
            if not data:
                counts.dropped_empty += 1
                continue
            digest = np.frombuffer(hashlib.blake2b(data, digest_size=16, salt=salt).digest(), "<u8")
            if not record.continues:  # the pieces of a cut document stay in one split
                validation = int(digest[0]) < threshold
            row[0] = (len(data), digest, validation)
            texts.write(data)
            index.write(row.tobytes())
        written()
    digests = open_rows(target.with_suffix(".index"), INDEX_ROW)["digest"]
    with target.with_suffix(".order").open("wb") as order:
        order.write(np.lexsort((digests[:, 0], digests[:, 1])).astype("<i8").tobytes())
        sync(order)
    return counts


def check_undecodable(skipped: int, settings: DataSettings, where: str) -> None:
    """Raise UserError where more bytes that are not UTF-8 would be skipped than the settings allow."""
    if skipped > settings.max_undecodable_bytes:
        raise UserError(
            f"{where}: not UTF-8; with it {skipped} bytes would be skipped, more than "
            f"max_undecodable_bytes={settings.max_undecodable_bytes}; convert the file or raise the limit"
        )


def open_rows(path: Path, kind: np.dtype[Any]) -> np.ndarray:
    """A file of rows as a map, which an empty file cannot be."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


def select(targets: Sequence[Path], number: int, ranges: int) -> tuple[np.ndarray, dict[str, int], np.ndarray]:
    """Find what repeats an earlier text among the digests of one of `ranges` equal ranges.

    targets: the spilled parts, in order. Returns the rows to drop ([dropped] of DROPPED, sorted); how many documents of
    each split stay, and `train_bytes`, their length in the train split; and those that are repeated most ([n] of
    REPEATED).
    """
    low, high = (number << 64) // ranges, (number + 1 << 64) // ranges
    found, places = [np.zeros(0, INDEX_ROW)], [np.zeros(0, DROPPED)]
    for part, target in enumerate(targets):
        index, order = (
            open_rows(target.with_suffix(".index"), INDEX_ROW),
            open_rows(target.with_suffix(".order"), np.dtype("<i8")),
        )
        first, last = (
            bisect.bisect_left(range(len(order)), bound, key=lambda n: int(index["digest"][order[n], 1]))
            for bound in (low, high)
        )
        rows = np.array(order[first:last])
        found.append(index[rows])
        place = np.empty(len(rows), DROPPED)
        place["part"], place["row"] = part, rows
        places.append(place)
    documents, place = np.concatenate(found), np.concatenate(places)
    digests = documents["digest"]
    order = np.lexsort((place["row"], place["part"], digests[:, 1], digests[:, 0]))
    repeated = np.zeros(len(order), bool)
    repeated[1:] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    kept = documents[order[~repeated]]
    train = kept[~kept["validation"]]
    counts = {"train": len(train), "validation": len(kept) - len(train), "train_bytes": int(train["length"].sum())}
    firsts = np.flatnonzero(~repeated)
    times = np.diff(firsts, append=len(order))
    most = np.argsort(-times, kind="stable")[:MOST_REPEATED]
    most = most[times[most] > 1]
    told = np.empty(len(most), REPEATED)
    told["times"] = times[most]
    for key in ("part", "row"):
        told[key] = place[key][order[firsts[most]]]
    return np.sort(place[order[repeated]]), counts, told


def kept_rows(part: int, rows: int, dropped: Sequence[Path]) -> np.ndarray:
    """Which documents of a part stay: [rows] bool. dropped: what `select` found in each range."""
    keep = np.ones(rows, bool)
    for path in dropped:
        found = open_rows(path, DROPPED)
        first, last = (
            bisect.bisect_left(range(len(found)), bound, key=lambda n: int(found["part"][n]))
            for bound in (part, part + 1)
        )
        keep[found["row"][first:last]] = False
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
