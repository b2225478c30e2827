"""Sources: the same texts come out of every kind of file; what cannot be read is refused by file and row."""

import csv
import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_prep.documents import DocumentCounts, bounded, decode
from data_prep.settings import UserError
from data_prep.sources import open_corpus
from tests.helpers.corpus import tiny_settings

TEXTS = ['plain, with "quotes"', "two\nlines", "naïve – ünïcödé 語", "last"]


def read(source: dict, **changes) -> list[str]:
    return [decode(record.raw)[0] for record in open_corpus(tiny_settings("unused", source=source, **changes)).records]


def lines(texts=TEXTS, field="text") -> bytes:
    return b"".join(json.dumps({"id": n, field: text}).encode() + b"\n" for n, text in enumerate(texts))


def test_a_folder_of_text_files_gives_one_document_a_file(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "other.md").write_text("not read")
    assert read({"kind": "text", "paths": [str(tmp_path)]}) == TEXTS
    assert read({"kind": "text", "paths": [f"{tmp_path}/[12].txt", f"{tmp_path}/1.txt"]}) == TEXTS[1:3]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_a_delimiter_cuts_a_text_file_wherever_the_reads_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("data_prep.sources.CHUNK", chunk)
    (tmp_path / "all.txt").write_text("\ufeff" + "<|>".join(TEXTS))
    assert read({"kind": "text", "paths": [str(tmp_path / "all.txt")], "delimiter": "<|>"}) == TEXTS


def test_a_long_text_file_comes_in_parts(tmp_path):
    text = " ".join(str(number) for number in range(1000))
    (tmp_path / "long.txt").write_text(text)
    rules = tiny_settings(
        "unused", source={"kind": "text", "paths": [str(tmp_path)]}, max_document_bytes=64, long_documents="split"
    )
    pieces = list(bounded(open_corpus(rules).records, rules, DocumentCounts()))
    assert b"".join(piece.raw for piece in pieces) == text.encode()
    assert max(len(piece.raw) for piece in pieces) <= 64
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl_plain_and_compressed(tmp_path, suffix):
    compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix]
    (tmp_path / f"part.{suffix}").write_bytes(compress(lines()))
    assert read({"kind": "jsonl", "paths": [str(tmp_path)]}) == TEXTS


def test_csv(tmp_path):
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "body"], *enumerate(TEXTS)])
    assert read({"kind": "csv", "paths": [str(tmp_path)], "field": "body"}) == TEXTS


def test_parquet(tmp_path):
    table = pyarrow.table({"text": [*TEXTS, None], "id": list(range(5))})
    parquet.write_table(table, tmp_path / "table.parquet", row_group_size=2)
    assert read({"kind": "parquet", "paths": [str(tmp_path)]}) == [*TEXTS, ""]


def test_the_datasets_library_is_streamed(tmp_path):
    (tmp_path / "part.jsonl").write_bytes(lines())
    source = {"kind": "datasets", "name": "json", "data_files": [str(tmp_path / "part.jsonl")]}
    assert read(source) == TEXTS


def test_a_synthetic_corpus_is_a_function_of_its_seed():
    source = {"kind": "synthetic", "documents": 5}
    assert read(source, seed=1) == read(source, seed=1) != read(source, seed=2)


def test_invalid_bytes_reach_the_counter_from_every_kind(tmp_path):
    bad = b"caf\xe9"
    (tmp_path / "a.txt").write_bytes(bad)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + bad + b'"}\n')
    (tmp_path / "a.csv").write_bytes(b"text\n" + bad + b"\n")
    table = pyarrow.table({"text": pyarrow.array([bad], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    for kind, name in (("text", "a.txt"), ("jsonl", "a.jsonl"), ("csv", "a.csv"), ("parquet", "a.parquet")):
        rules = tiny_settings("unused", source={"kind": kind, "paths": [str(tmp_path / name)]})
        assert [decode(record.raw) for record in open_corpus(rules).records] == [("caf", 1)], kind


def test_half_a_surrogate_pair_in_json_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\\ud83d"}\n')
    rules = tiny_settings("unused", source={"kind": "jsonl", "paths": [str(tmp_path)]})
    assert [decode(record.raw) for record in open_corpus(rules).records] == [("x", 3)]


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("text", "no-such.txt", None, r"no-such.txt: no such file"),
        ("text", "folder", None, r"folder: no .txt file in this folder"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl, line 2: not JSON"),
        ("jsonl", "a.jsonl", b'{"body": "x"}\n', r"a.jsonl, line 1: no column 'text'; found: body; set source.field"),
        ("jsonl", "a.jsonl", b'{"text": 3}\n', r"a.jsonl, line 1: 'text' holds int, not text"),
        ("jsonl", "a.jsonl", b"[1]\n", r"a.jsonl, line 1: expected an object with the key 'text', found list"),
        ("jsonl", "a.jsonl", b"x" * (3 << 20), r"a.jsonl, line 1: longer than .*max_document_bytes=4096"),
        ("jsonl", "a.jsonl.gz", gzip.compress(lines())[:-20], r"a.jsonl.gz: cannot be read: Truncated"),
        ("jsonl", "a.jsonl.gz", b"not gzip", r"a.jsonl.gz: cannot be read"),
        ("jsonl", "a.jsonl.zst", zstandard.compress(lines())[:-9], r"a.jsonl.zst: cannot be read: Truncated"),
        ("csv", "a.csv", b'id,text\n1,"x\n', r"a.csv, line 2: not CSV"),
        ("csv", "a.csv", b"id,body\n1,x\n", r"a.csv, line 2: no column 'text'; found: id, body"),
        ("csv", "a.csv", b"id,text\n1\n", r"a.csv, line 2: fewer fields than the header"),
        ("parquet", "a.parquet", b"PAR1 not really", r"a.parquet: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, kind, name, content, message):
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read({"kind": kind, "paths": [str(tmp_path / name)]}, max_document_bytes=4096)


def test_a_parquet_column_is_checked(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    source = {"kind": "parquet", "paths": [str(tmp_path)]}
    with pytest.raises(UserError, match=r"a.parquet: no column 'text'; found: id"):
        read(source)
    with pytest.raises(UserError, match=r"a.parquet: column 'id' holds int64, not text"):
        read({**source, "field": "id"})


def test_a_data_set_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"source.name: .*nowhere: the datasets library says"):
        read({"kind": "datasets", "name": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "text", "paths": ["x"], "field": "body"}, "field: no meaning for kind 'text'"),
        ({"kind": "text"}, "kind 'text' needs the key 'paths'"),
        ({"kind": "synthetic", "documents": 3, "paths": ["x"]}, "paths: no meaning for kind 'synthetic'"),
    ],
)
def test_keys_without_meaning_for_a_kind_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        tiny_settings("unused", source=source)
