"""Sources: the same texts come out of every kind of file; what cannot be read is refused by file and row."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_prep.documents import DocumentCounts, bounded, decode
from data_prep.settings import UserError
from data_prep.sources import open_corpus, read_part
from tests.helpers.corpus import tiny_settings

TEXTS = ['plain, with "quotes"', "two\nlines", "naïve – ünïcödé 語", "last"]


def records(settings) -> list:
    return [record for part in open_corpus(settings).parts for record in read_part(settings, part)]


def read(source: dict, **changes) -> list[str]:
    return [decode(record.raw)[0] for record in records(tiny_settings("unused", source=source, **changes))]


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
    pieces = list(bounded(records(rules), rules, DocumentCounts()))
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
        assert [decode(record.raw) for record in records(rules)] == [("caf", 1)], kind


def test_half_a_surrogate_pair_in_json_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\\ud83d"}\n')
    rules = tiny_settings("unused", source={"kind": "jsonl", "paths": [str(tmp_path)]})
    assert [decode(record.raw) for record in records(rules)] == [("x", 3)]


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
        ("jsonl", "a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-20], r"a.jsonl.gz: cannot be read: Truncated"),
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


def jsonl(tmp_path, content: bytes, **source):
    (tmp_path / "a.jsonl").write_bytes(content)
    return read({"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")], **source})


def test_json_that_python_does_not_convert_is_read_or_named(tmp_path):
    assert jsonl(tmp_path, b'{"text": "x", "n": ' + b"7" * 5000 + b', "m": NaN}\n') == ["x"]
    with pytest.raises(UserError, match=r"a.jsonl, line 2: nested too deeply"):
        jsonl(tmp_path, b'{"text": "x"}\n{"text": "y", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 1: the key 'text' stands twice"):
        jsonl(tmp_path, b'{"text": "x", "text": "y"}\n')
    assert jsonl(tmp_path, b'{"text": "x", "n": {"text": "y"}}\n') == ["x"]
    assert jsonl(tmp_path, b'{"doc": {"text": "x"}}\n{"doc": null}\n{"doc.text": "y"}\n', field="doc.text") == [
        "x",
        "",
        "y",
    ]
    with pytest.raises(UserError, match=r"not JSON: .*write one object a line"):
        jsonl(tmp_path, b'[\n{"text": "x"}\n]\n')


def test_a_small_text_may_stand_beside_a_large_field(tmp_path):
    row = b'{"image": "' + b"x" * (40 << 20) + b'", "text": "small"}\n'
    (tmp_path / "a.jsonl").write_bytes(row)
    source = {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")]}
    assert read(source, max_document_bytes=4096) == ["small"]


def test_escaped_surrogates_never_become_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\udcc3\\udca9"}\n{"text": "\\udcc3\\udca9 \xff"}\n')
    rules = tiny_settings("unused", source={"kind": "jsonl", "paths": [str(tmp_path)]})
    decoded = [decode(record.raw) for record in records(rules)]
    assert [text.strip() for text, _ in decoded] == ["", ""]
    assert all(count >= 3 for _, count in decoded)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig"]
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_text_of_every_encoding_and_compression(tmp_path, encoding, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    texts = ["plain english text first", *TEXTS]
    raw = "<|>".join(texts).replace("\n", "\r\n").encode(encoding)
    half = len(raw) // 3
    (tmp_path / f"A.TXT{suffix}").write_bytes(compress[suffix](raw[:half]) + compress[suffix](raw[half:]))
    found = read({"kind": "text", "paths": [str(tmp_path)], "delimiter": "<|>"})
    assert found == [text.replace("\r\n", "\n") for text in texts]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_file_of_every_compression_is_refused(tmp_path, suffix):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress[suffix](lines() * 50)[:-20])
    with pytest.raises(UserError, match=f"a.jsonl{suffix}: cannot be read"):
        read({"kind": "jsonl", "paths": [str(tmp_path)]})


def test_half_a_utf16_letter_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16") + b"\x00\xd8" + b"a")
    rules = tiny_settings("unused", source={"kind": "text", "paths": [str(tmp_path)]})
    ((text, skipped),) = [decode(record.raw) for record in records(rules)]
    assert text == "text" and skipped > 0


COLUMNS = {
    "string": pyarrow.array(TEXTS),
    "large string": pyarrow.array(TEXTS, pyarrow.large_string()),
    "string view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "large binary": pyarrow.array([text.encode() for text in TEXTS], pyarrow.large_binary()),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_arrow_type_that_holds_text(tmp_path, name):
    column = COLUMNS[name]
    nested = pyarrow.StructArray.from_arrays([column], ["text"])
    parquet.write_table(pyarrow.table({"text": column, "doc": nested}), tmp_path / "a.parquet")
    for field in ("text", "doc.text"):
        assert read({"kind": "parquet", "paths": [str(tmp_path)], "field": field}) == TEXTS
    with pytest.raises(UserError, match=r"a.parquet: no column 'doc.body'; found: text"):
        read({"kind": "parquet", "paths": [str(tmp_path)], "field": "doc.body"})
    with pytest.raises(UserError, match=r"a.parquet: column 'doc' holds struct"):
        read({"kind": "parquet", "paths": [str(tmp_path)], "field": "doc"})


def test_a_csv_row_must_fit_its_header(tmp_path):
    source = {"kind": "csv", "paths": [str(tmp_path / "a.csv")]}
    for content, message in [
        (b"id,text\n1,one, two\n", r"line 2: more fields than the header has: 3 against 2"),
        (b"text,text\none,two\n", r"line 2: 2 columns are named 'text'"),
    ]:
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(source)
    (tmp_path / "a.csv").write_bytes(b"id,id,text\n1,2,one,\n\n3,4,two\n")
    assert read(source) == ["one", "two"]
