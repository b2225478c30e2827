"""What a preparation does to each part of its corpus, stage after stage; any task may do any part.

    read -> select -> tokenizer -> encode -> scatter -> shards
    (documents.py)    (tokenizer.py) (encode.py) (shuffle.py) (shards.py)

A stage works on parts that the corpus and the earlier stages determine: pieces of the corpus (read, encode), ranges of
digests (select), chunks and buckets of the shuffle (scatter, shards). A part that is done leaves its files and a mark,
FOLDER/work/STAGE/NUMBER.json, written last; an interrupted stage goes on with the parts that have none. Files that no
later part needs are removed as soon as that is known.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep import documents
from data_prep.config import DataSettings
from data_prep.documents import INDEX_ROW, SPAN, SPLITS, DocumentCounts, check_splits, check_undecodable, open_rows
from data_prep.encode import Encoder, EncoderFiles, added, encode
from data_prep.files import atomic, sha256_of, write_json
from data_prep.inputs import safe, signature
from data_prep.parts import Part, from_json, size_of
from data_prep.settings import UserError
from data_prep.shards import samples_per_shard, write_split
from data_prep.shuffle import Scattered, cut_blocks, scatter
from data_prep.sources import dataset_files, read_part
from data_prep.tokenizer import (
    encoding_form,
    end_of_text_id,
    eos_token_of,
    given_tokenizer,
    token_dtype,
    train_tokenizer,
    unknown_id,
)

EXCERPT = 200  # bytes of a repeated document that the manifest keeps
UNKNOWN_SHARE = 0.001  # of the tokens; more is told


class Stage:
    """A stage of one preparation. What it needs to know it reads from the folder, on any machine."""

    name: str
    unit: str  # what `sizes` counts

    def __init__(self, settings: DataSettings, threads: int = 1) -> None:
        self.settings = settings
        self.threads = threads
        self.folder = Path(settings.folder)
        self.work = self.folder / "work"

    def check(self) -> list[str]:
        """What the user should know before this stage. Raises UserError where the stages before leave nothing to do."""
        return []

    def sizes(self) -> list[int]:
        """Size of each part, in units."""
        raise NotImplementedError

    def run(self, part: int) -> dict[str, Any]:
        """Do one part; what its mark records."""
        raise NotImplementedError

    def free(self, part: int) -> None:
        """Remove what only this part, now done, needed. May be called again."""

    def do(self, part: int) -> None:
        """Do one part unless its mark exists."""
        if not self.mark(part).exists():
            started = time.perf_counter()
            result = self.run(part)
            write_json(self.mark(part), {**result, "seconds": round(time.perf_counter() - started, 3)})
        self.free(part)

    def at(self, stage: str, part: int, suffix: str) -> Path:
        """A file of one part of any stage."""
        return self.work / stage / f"{part:06d}{suffix}"

    def mark(self, part: int) -> Path:
        return self.at(self.name, part, ".json")

    def missing(self) -> list[int]:
        """The parts that are not done."""
        if (self.work / f"{self.name}.json").exists():
            return []
        return [part for part in range(len(self.sizes())) if not self.mark(part).exists()]

    def finished(self) -> list[dict[str, Any]]:
        """The marks of all parts, gathered in one file by whoever asks first. Raises UserError where one lacks."""
        path = self.work / f"{self.name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        lacking = self.missing()
        if lacking:
            raise UserError(
                f"{self.folder}: {len(lacking)} parts of stage {self.name} are not done; run the same command again"
            )
        marks = [json.loads(self.mark(part).read_text(encoding="utf-8")) for part in range(len(self.sizes()))]
        write_json(path, marks)
        return marks

    def before(self, name: str) -> list[dict[str, Any]]:
        """The marks of an earlier stage."""
        return STAGES[name](self.settings).finished()


class Read(Stage):
    """Pieces of the corpus -> clean documents and their digests."""

    name, unit = "read", "bytes"

    @cached_property
    def parts(self) -> list[Part]:
        return from_json(json.loads((self.work / "parts.json").read_text(encoding="utf-8")))

    def sizes(self) -> list[int]:
        return [size_of(part) for part in self.parts]

    def run(self, part: int) -> dict[str, Any]:
        target = self.at("read", part, ".bin")
        target.parent.mkdir(exist_ok=True)
        # Other sources have small parts, and no state to go on from.
        reading = (
            documents.Reading(self.at("read", part, ".reading")) if self.settings.source.kind == "datasets" else None
        )
        counts = documents.spill(read_part(self.settings, self.parts[part], reading), self.settings, target, reading)
        hashed = {}
        if self.settings.source.kind not in ("packaged", "synthetic", "datasets"):
            hashed = {str(piece.item): sha256_of(piece.file) for piece in self.parts[part] if piece.start == 0}
        self._check_unchanged(self.parts[part])
        rows = target.with_suffix(".index").stat().st_size // INDEX_ROW.itemsize
        first = next(iter(self.parts[part]), None)
        return {
            **asdict(counts),
            "rows": rows,
            "bytes": target.stat().st_size,
            "sha256": hashed,
            "where": safe(first.file) if first is not None and first.path else self.settings.corpus,
        }

    def free(self, part: int) -> None:
        self.at("read", part, ".reading").unlink(missing_ok=True)

    def _check_unchanged(self, part: Part) -> None:
        """Raise UserError where a file of the part is no longer what it was when the corpus was cut."""
        known = json.loads((self.work / "state.json").read_text(encoding="utf-8"))["signature"]
        if self.settings.source.kind == "datasets":
            files = dataset_files(self.settings)
            changed = files is not None and signature(files.paths) != known
        else:
            changed = any(piece.path and signature([piece.file]) != [known[piece.item]] for piece in part)
        if changed:
            raise UserError(
                f"corpus {self.settings.corpus!r}: its files changed while they were read; run the same command again "
                "once nothing writes to them"
            )


class Select(Stage):
    """Ranges of digests -> exact duplicates."""

    name, unit = "select", "documents"

    def check(self) -> list[str]:
        skipped = Counter({mark["where"]: mark["undecodable"] for mark in self.before("read")})
        most = skipped.most_common(1)
        check_undecodable(skipped.total(), self.settings, most[0][0] if most else "")
        return []

    def sizes(self) -> list[int]:
        rows = sum(mark["rows"] for mark in self.before("read"))
        ranges = max(1, -(-rows // documents.RANGE_ROWS))
        return [rows // ranges] * ranges

    def run(self, part: int) -> dict[str, Any]:
        targets = [self.at("read", number, ".bin") for number in range(len(self.before("read")))]
        dropped, counts, repeated = documents.select(targets, part, len(self.sizes()))
        with atomic(self.at("select", part, ".dropped")) as file:
            file.write(dropped.tobytes())
        return {**counts, "dropped_duplicate": len(dropped), "repeated": self._excerpts(repeated)}

    def _excerpts(self, repeated: np.ndarray) -> list[dict[str, Any]]:
        """How often each of these documents ([n] of REPEATED) occurs, and how it begins."""
        found = []
        for row in repeated:
            index = open_rows(self.at("read", row["part"], ".index"), INDEX_ROW)
            offset, length = int(index["length"][: row["row"]].sum()), int(index["length"][row["row"]])
            with self.at("read", row["part"], ".bin").open("rb") as texts:
                texts.seek(offset)
                start = texts.read(min(length, EXCERPT)).decode(errors="ignore")
            found.append({"times": int(row["times"]), "text": start})
        return found


class _Documents(Stage):
    """What the stages that look at the documents share."""

    def kept(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Index rows and places in the text of the documents of a part that stay: [documents] INDEX_ROW, SPAN."""
        index = np.array(open_rows(self.at("read", part, ".index"), INDEX_ROW))
        spans = np.empty(len(index), SPAN)
        spans["length"] = index["length"]
        spans["offset"] = np.cumsum(index["length"]) - index["length"]
        ranges = [self.at("select", number, ".dropped") for number in range(len(self.before("select")))]
        keep = documents.kept_rows(part, len(index), ranges)
        return index[keep], spans[keep]


class TokenizerStage(_Documents):
    """The tokenizer: the given one, or one trained on a sample of the train split."""

    name, unit = "tokenizer", "bytes"

    def check(self) -> list[str]:
        check_splits(DocumentCounts(**document_counts(self.settings)), self.settings)
        return []

    def sizes(self) -> list[int]:
        total = sum(mark["train_bytes"] for mark in self.before("select"))
        return [0 if self.settings.tokenizer.load else min(total, self.settings.tokenizer.train_bytes)]

    def run(self, part: int) -> dict[str, Any]:
        settings = self.settings.tokenizer
        tokenizer = train_tokenizer(self._sample(), settings) if settings.load is None else given_tokenizer(settings)
        path = self.folder / "tokenizer.json"
        with atomic(path) as file:
            file.write(tokenizer.to_str(pretty=True).encode())
        return {
            "vocab_size": vocab_size(tokenizer),
            "eos_token_id": end_of_text_id(tokenizer, eos_token_of(settings)),
            "tokenizer_fingerprint": sha256_of(path),
        }

    def _sample(self) -> Iterator[str]:
        """All documents of the train split in order or, of more than `train_bytes`, those of the lowest digests.

        Digests are salted with the seed. What the sample exceeds `train_bytes` by is left out at its end.
        """
        total = sum(mark["train_bytes"] for mark in self.before("select"))
        left = self.settings.tokenizer.train_bytes
        highest = min(2**64 - 1, left * 2**64 // max(total, 1))
        for part in range(len(self.before("read"))):
            index, spans = self.kept(part)
            chosen = spans[~index["validation"] & (index["digest"][:, 1] <= highest)]
            texts = open_rows(self.at("read", part, ".bin"), np.dtype(np.uint8))
            for offset, length in chosen.tolist():
                if left <= 0:
                    return
                yield texts[offset : offset + min(length, left)].tobytes().decode(errors="ignore")
                left -= length


class Encode(_Documents):
    """Documents of a piece of the corpus -> tokens of both splits."""

    name, unit = "encode", "bytes"

    def sizes(self) -> list[int]:
        return [mark["bytes"] for mark in self.before("read")]

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        return self.before("tokenizer")[0]

    @cached_property
    def _form(self) -> tuple[Tokenizer, int | None]:
        """The tokenizer as it encodes, read once: each reading of one leaves some memory behind; and its unknown id."""
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        return encoding_form(tokenizer, self._tokenizer["eos_token_id"]), unknown_id(tokenizer)

    def run(self, part: int) -> dict[str, Any]:
        form, unknown = self._form
        files = EncoderFiles(
            tokenizer=self.folder / "tokenizer.json",
            texts=self.at("read", part, ".bin"),
            eos_token_id=self._tokenizer["eos_token_id"],
            dtype=token_dtype(self._tokenizer["vocab_size"]).str,
            unknown_id=unknown,
        )
        encoder = Encoder(files, form)
        index, spans = self.kept(part)
        chosen = {"train": ~index["validation"], "validation": index["validation"]}
        return {
            split: encode(spans[chosen[split]], encoder, self.at("encode", part, f".{split}"), self.threads)
            for split in SPLITS
        }

    def free(self, part: int) -> None:
        for suffix in (".bin", ".index", ".order"):
            self.at("read", part, suffix).unlink(missing_ok=True)


class _Blocks(Stage):
    """What the stages of the shuffle share: both splits' parts are numbered one after the other, train first."""

    unit = "tokens"

    @cached_property
    def width(self) -> int:
        return self.settings.sequence_length + 1

    @cached_property
    def dtype(self) -> np.dtype:
        return token_dtype(self.before("tokenizer")[0]["vocab_size"])

    @cached_property
    def starts(self) -> dict[str, np.ndarray]:
        """Where the tokens of each part begin in the stream of a split, and where the stream ends: [parts + 1]."""
        marks = self.before("encode")
        return {split: np.cumsum([0, *(mark[split]["tokens"] for mark in marks)]) for split in SPLITS}

    def blocks(self, split: str) -> int:
        return int(self.starts[split][-1]) // self.width

    def cut(self, split: str) -> tuple[int, int, int]:
        """Number of chunks and of buckets, and blocks of a chunk."""
        buckets, chunk = cut_blocks(self.blocks(split), self.width * self.dtype.itemsize)
        return -(-self.blocks(split) // chunk), buckets, chunk

    def scattered(self, split: str) -> list[Path]:
        """The scattered chunks of a split."""
        first = 0 if split == SPLITS[0] else self.cut(SPLITS[0])[0]
        return [self.at("scatter", first + number, ".blocks") for number in range(self.cut(split)[0])]


class Scatter(_Blocks):
    """Chunks of blocks -> the same blocks sorted by bucket."""

    name = "scatter"

    def check(self) -> list[str]:
        """Also says where the tokenizer does not know the text."""
        said = []
        for split in SPLITS:
            marks = [mark[split] for mark in self.before("encode")]
            tokens, unknown = (sum(mark[key] for mark in marks) for key in ("tokens", "unknown"))
            if tokens < self.width:
                raise UserError(
                    f"corpus {self.settings.corpus!r}: its {split} split has {tokens} tokens, one block needs "
                    f"{self.width}; shorten sequence_length, change validation_fraction or give more text"
                )
            if unknown > UNKNOWN_SHARE * tokens:
                said.append(
                    f"warning: {unknown:,} of {tokens:,} tokens of the {split} split ({unknown / tokens:.1%}) are "
                    "unknown to the tokenizer and lost as text; is it one for this language?"
                )
        return said

    def _place(self, part: int) -> tuple[str, int, int, int]:
        """Split, number of the chunk in it, and the tokens of its stream that the chunk holds."""
        train = self.cut(SPLITS[0])[0]
        split, number = (SPLITS[0], part) if part < train else (SPLITS[1], part - train)
        chunk = self.cut(split)[2]
        last = min((number + 1) * chunk, self.blocks(split))
        return split, number, number * chunk * self.width, last * self.width

    def sizes(self) -> list[int]:
        chunks = sum(self.cut(split)[0] for split in SPLITS)
        return [last - first for _, _, first, last in map(self._place, range(chunks))]

    def run(self, part: int) -> dict[str, Any]:
        split, number, first, last = self._place(part)
        tokens = np.empty(last - first, self.dtype)
        for source, start, end in self._sources(split, first, last):
            offset = max(first - start, 0)
            count = min(end, last) - start - offset
            path = self.at("encode", source, f".{split}")
            begin = start + offset - first
            tokens[begin : begin + count] = np.fromfile(path, self.dtype, count, offset=offset * self.dtype.itemsize)
        target = self.scattered(split)[number]
        scatter(tokens.reshape(-1, self.width), number, self.cut(split)[1], self.settings.seed, target)
        return {"tokens": len(tokens)}

    def _sources(self, split: str, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The encoded parts that hold some of these tokens: number, first token and last."""
        starts = self.starts[split]
        begin = max(int(np.searchsorted(starts, first, side="right")) - 1, 0)
        for source in range(begin, len(starts) - 1):
            if starts[source] >= last:
                return
            if starts[source + 1] > max(first, starts[source]):
                yield source, int(starts[source]), int(starts[source + 1])

    def free(self, part: int) -> None:
        split, number, first, last = self._place(part)
        chunk, base = self.cut(split)[2] * self.width, part - number
        final = self.cut(split)[0] - 1
        for source, start, end in self._sources(split, first, last):
            users = range(start // chunk, min((end - 1) // chunk, final) + 1)
            if all(user == number or self.mark(base + user).exists() for user in users):
                self.at("encode", source, f".{split}").unlink(missing_ok=True)


class Shards(_Blocks):
    """Buckets -> the shards that begin in them."""

    name = "shards"

    def sizes(self) -> list[int]:
        sizes = []
        for split in SPLITS:
            buckets = self.cut(split)[1]
            sizes += [self.blocks(split) * self.width // buckets] * buckets
        return sizes

    def run(self, part: int) -> dict[str, Any]:
        train = self.cut(SPLITS[0])[1]
        split, bucket = (SPLITS[0], part) if part < train else (SPLITS[1], part - train)
        mixed = Scattered(self.scattered(split), self.width, self.dtype, self.settings.seed)
        begins = mixed.first_rows()
        capacity = samples_per_shard(self.width, self.dtype, self.settings.shard_bytes)
        number = -(-int(begins[bucket]) // capacity)
        first = number * capacity
        last = min(-(-int(begins[bucket + 1]) // capacity) * capacity, int(begins[-1]))

        def arrays() -> Iterator[np.ndarray]:
            for source in range(bucket, len(begins) - 1):
                low, high = max(first, int(begins[source])), min(last, int(begins[source + 1]))
                if low < high:
                    yield mixed.rows(source, low - int(begins[source]), high - int(begins[source]))

        size = self.before("tokenizer")[0]["vocab_size"]
        written = write_split(arrays(), self.folder, split, self.settings.shard_bytes, size, number)
        with atomic(self.at("shards", part, ".counts.npy")) as file:
            np.save(file, np.array(written.pop("counts"), np.int64))
        return {"split": split, **written}

    def splits(self) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
        """What the manifest says of each split, and how often each id is a target in it."""
        marks = self.finished()
        found: dict[str, dict[str, Any]] = {split: {"samples": 0, "tokens": 0, "shards": []} for split in SPLITS}
        counts: dict[str, np.ndarray] = {}
        for part, mark in enumerate(marks):
            split, counted = mark["split"], np.load(self.at("shards", part, ".counts.npy"))
            counts[split] = counts[split] + counted if split in counts else counted
            for key in ("samples", "tokens", "shards"):
                found[split][key] += mark[key]
        return found, counts


STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (Read, Select, TokenizerStage, Encode, Scatter, Shards)
}


def document_counts(settings: DataSettings) -> dict[str, int]:
    """What became of the records of all parts: the fields of DocumentCounts."""
    counts: Counter[str] = Counter()
    for name in ("read", "select"):
        for mark in STAGES[name](settings).finished():
            counts.update({key: mark[key] for key in DocumentCounts.__dataclass_fields__ if key in mark})
    return {key: counts[key] for key in DocumentCounts.__dataclass_fields__}


def total_lengths(encoded: list[dict[str, Any]], split: str) -> list[int]:
    """How many documents of a split have 1, 2 to 3, 4 to 7, ... tokens."""
    return functools.reduce(added, (np.array(mark[split]["lengths"], np.int64) for mark in encoded)).tolist()


def most_repeated(selected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents that occur most often in the corpus, which holds each of them once now."""
    found = (item for mark in selected for item in mark["repeated"])
    return sorted(found, key=lambda item: (-item["times"], item["text"]))[: documents.MOST_REPEATED]


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab().values())) + 1


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer.json that a prepared folder would hold."""
    return hashlib.sha256(tokenizer.to_str(pretty=True).encode()).hexdigest()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
