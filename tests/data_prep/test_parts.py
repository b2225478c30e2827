"""Parts: cut anywhere, a corpus holds the same documents in the same order; what cannot be cut is one piece."""

import gzip
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_prep.documents import decode, normalise
from data_prep.parts import from_json, size_of, to_json
from data_prep.prepare import begin, main
from data_prep.settings import UserError
from data_prep.sources import open_corpus, read_part
from data_prep.synthetic import synthetic_documents
from tests.helpers.corpus import tiny_settings

TEXTS = [f"{n}: {text} naïve 語" for n, text in enumerate(synthetic_documents(60, seed=0))]


def rules(folder, kind, part_bytes, **source):
    return tiny_settings("unused", source={"kind": kind, "paths": [str(folder)], **source}, part_bytes=part_bytes)


def read(chosen):
    """The texts of every part, and the parts, as a task finds them."""
    parts = from_json(json.loads(json.dumps(to_json(open_corpus(chosen).parts))))
    records = (record for part in parts for record in read_part(chosen, part))
    return [text for record in records if (text := normalise(decode(record.raw)[0]))], parts


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name in ("jsonl", "text", "crlf", "parquet"):
        (root / name).mkdir()
    for number, some in enumerate((TEXTS[:35], TEXTS[35:36], TEXTS[36:])):
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in some]
        (root / "jsonl" / f"{number}.jsonl").write_text("\n".join(rows))
        (root / "text" / f"{number}.txt").write_text(("\ufeff" if number else "") + "\n\n".join(some) + "\n\n\n")
        (root / "crlf" / f"{number}.txt").write_bytes("\r\n\r\n".join(some).encode())
        table = pyarrow.table({"id": list(range(len(some))), "text": some})
        parquet.write_table(table, root / "parquet" / f"{number}.parquet", row_group_size=3)
    return root


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["jsonl", "text", "crlf", "parquet"]), st.integers(1024, 60_000))
def test_parts_of_any_size_hold_all_documents_in_order(corpora, name, part_bytes):
    kind = "text" if name == "crlf" else name
    delimiter = {"delimiter": "\n\n"} if kind == "text" else {}
    texts, parts = read(rules(corpora / name, kind, part_bytes, **delimiter))
    assert texts == TEXTS
    total = sum(map(size_of, parts))
    longest = 6 * max(len(text.encode()) for text in TEXTS)  # three rows of a row group with their statistics
    assert all(size_of(part) <= part_bytes + longest for part in parts)
    assert len(parts) >= total // (part_bytes + longest)


def test_what_cannot_be_cut_is_one_piece(tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "b.jsonl").write_bytes(rows.encode("utf-16"))
    (tmp_path / "c.jsonl").write_text(rows)
    texts, parts = read(rules(tmp_path, "jsonl", 4096))
    assert texts == TEXTS * 3
    pieces = [piece for part in parts for piece in part]
    assert [piece.end for piece in pieces[:2]] == [None, None] and all(piece.end for piece in pieces[2:])
    (tmp_path / "d.txt").write_text("\n\n".join(TEXTS))
    _, parts = read(rules(tmp_path / "d.txt", "text", 4096))
    assert len(parts) == 1


def test_a_fault_in_a_later_piece_is_found_by_byte_and_line(tmp_path):
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    rows[50] = "no JSON\n"
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with pytest.raises(UserError, match=r"a.jsonl, line \d+ after byte \d+: not JSON") as caught:
        read(rules(tmp_path, "jsonl", 4096))
    words = str(caught.value).split()
    line, byte = int(words[words.index("line") + 1]), int(words[words.index("byte") + 1].rstrip(":"))
    assert (tmp_path / "a.jsonl").read_bytes()[byte:].splitlines()[line - 1] == b"no JSON"


def test_what_is_far_larger_than_a_part_is_told_with_what_an_interruption_costs(tmp_path, capsys):
    with gzip.open(tmp_path / "large.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with (tmp_path / "small.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[:3])
    (told,) = open_corpus(rules(tmp_path, "jsonl", 2000)).remarks
    assert told.startswith("1 of 2 parts exceed part_bytes=2000") and "large.jsonl.gz" in told
    assert "from its start after an interruption" in told
    assert not open_corpus(rules(tmp_path, "jsonl", 200_000)).remarks
    chosen = rules(tmp_path, "jsonl", 2000).model_copy(update={"folder": str(tmp_path / "out")})
    (tmp_path / "out").mkdir()
    begin(chosen)
    assert main(["--status", str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out.splitlines()
