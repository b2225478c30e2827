"""Documents: decoding, normalising, cutting, exact duplicates, the split. Laws by hypothesis, messages by example."""

import unicodedata
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.documents import (
    INDEX_ROW,
    DocumentCounts,
    Record,
    bounded,
    cut_position,
    decode,
    kept_rows,
    normalise,
    open_rows,
    select,
    spill,
)
from data_prep.prepare import prepare
from data_prep.settings import UserError
from tests.helpers.corpus import tiny_settings

LAW = settings(deadline=None, max_examples=40)


def records(*texts: bytes) -> list[Record]:
    return [Record(f"row {number}", text) for number, text in enumerate(texts)]


def spilled(texts_or_records, rules, folder, parts=1, ranges=1):
    """Spill and select by parts: what was counted, and the texts of each split."""
    given, counts = list(texts_or_records), Counter()
    targets = [folder / f"{number}.bin" for number in range(parts)]
    for number, target in enumerate(targets):
        counts.update(asdict(spill(given[slice(*cut(given, number, parts))], rules, target)))
    dropped = [folder / f"{number}.dropped" for number in range(ranges)]
    for number, path in enumerate(dropped):
        rows, found, _ = select(targets, number, ranges)
        path.write_bytes(rows.tobytes())
        counts.update(found, dropped_duplicate=len(rows))
    texts = {"train": [], "validation": []}
    for number, target in enumerate(targets):
        index = open_rows(target.with_suffix(".index"), INDEX_ROW)
        keep = kept_rows(number, len(index), dropped)
        ends = np.cumsum(index["length"])
        data = target.read_bytes()
        for row, end, kept in zip(index, ends, keep, strict=True):
            if kept:
                texts["validation" if row["validation"] else "train"].append(data[end - row["length"] : end].decode())
    return counts, texts


def cut(given, number, parts):
    return number * len(given) // parts, (number + 1) * len(given) // parts


def test_bytes_that_are_not_utf8_are_skipped_and_counted():
    assert decode("né".encode() + b"\xff\xfe!") == ("né!", 2)
    assert decode("né".encode()) == ("né", 0)


def test_normalised_text_is_composed_with_plain_newlines():
    assert normalise(" e\u0301a\r\nb\rc\n ") == "éa\nb\nc"


@LAW
@given(st.text(min_size=20, max_size=300), st.integers(16, 60))
def test_cut_text_is_whole_in_valid_pieces_within_the_limit(text, limit):
    raw = text.encode()
    rules = tiny_settings("unused", max_document_bytes=limit, long_documents="split")
    counts = DocumentCounts()
    pieces = list(bounded([Record("here", raw)], rules, counts))
    assert b"".join(piece.raw for piece in pieces) == raw
    assert all(len(piece.raw) <= limit and decode(piece.raw)[1] == 0 for piece in pieces)
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert counts.split_long == (len(raw) > limit)


def test_a_cut_prefers_a_newline_then_a_blank():
    assert cut_position(b"aaaa aaaa\naa aaaaaa", 14) == 10
    assert cut_position(b"aaaa aaaa aa aaaaaa", 14) == 13
    assert cut_position("ééééééééé".encode(), 13) == 12


def test_a_long_document_is_refused_by_name():
    rules = tiny_settings("unused", max_document_bytes=16)
    with pytest.raises(UserError, match=r"row 1: document longer than max_document_bytes=16.*long_documents=split"):
        list(bounded(records(b"short", b"x" * 17), rules, DocumentCounts()))


@LAW
@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_the_first_of_equal_texts_stays_whatever_the_parts_and_ranges(tmp_path_factory, values, parts, ranges):
    given = records(*(f"document {value}".encode() for value in values))
    counts, texts = spilled(given, tiny_settings("unused"), tmp_path_factory.mktemp("parts"), parts, ranges)
    together = texts["train"] + texts["validation"]
    assert sorted(together) == sorted({f"document {value}" for value in values})
    first = [value for n, value in enumerate(values) if value not in values[:n]]
    for split in texts:
        assert texts[split] == [text for value in first if (text := f"document {value}") in texts[split]]
    assert counts["dropped_duplicate"] == len(values) - len(together)
    assert (counts["train"], counts["validation"]) == (len(texts["train"]), len(texts["validation"]))
    assert counts["train_bytes"] == sum(map(len, texts["train"]))


def test_empty_and_duplicate_documents_are_dropped_and_counted(tmp_path):
    texts = [f"document {number}".encode() for number in range(40)]
    given = records(*texts, b" \n", texts[3], texts[3] + b"\r\n")
    counts, found = spilled(given, tiny_settings("unused"), tmp_path)
    assert (counts["dropped_empty"], counts["dropped_duplicate"]) == (1, 2)
    assert sorted(found["train"] + found["validation"]) == sorted(text.decode() for text in texts)


def test_the_split_depends_on_text_and_seed_alone(tmp_path):
    texts = [f"document {number}".encode() for number in range(200)]
    found = []
    for order, seed in ((texts, 0), (texts[::-1], 0), (texts, 1)):
        found.append(set(spilled(records(*order), tiny_settings("unused", seed=seed), tmp_path)[1]["validation"]))
    assert found[0] == found[1] != found[2]
    assert 20 < len(found[0]) < 80  # a quarter of 200


def test_parts_of_a_cut_document_stay_in_one_split(tmp_path):
    texts = [" ".join(f"{number}:{word}" for word in range(100)).encode() for number in range(30)]
    rules = tiny_settings("unused", max_document_bytes=64, long_documents="split")
    counts, found = spilled(records(*texts), rules, tmp_path)
    assert counts["split_long"] == 30
    sides = [{piece.split(":")[0] for piece in found[split]} for split in ("train", "validation")]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == {str(number) for number in range(30)}


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "corpus 'tiny' holds no text"),
        ([b" ", b"\n"], {}, "corpus 'tiny' holds no text"),
        ([b"only one"], {}, r"no document of 1 falls into the (train|validation) split.*source.delimiter"),
        ([b"\xff" * 5], {"max_undecodable_bytes": 4}, r"line 1: not UTF-8; with it 5 bytes.*max_undecodable_bytes=4"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(tmp_path, texts, changes, message):
    source = {"kind": "jsonl", "paths": [str(tmp_path / "in.jsonl")]}
    rows = (b'{"text": "' + text.replace(b"\n", b"\\n") + b'"}\n' for text in texts)
    (tmp_path / "in.jsonl").write_bytes(b"".join(rows))
    with pytest.raises(UserError, match=message):
        prepare(tiny_settings(tmp_path / "out", source=source, **changes))


def test_long_runs_of_combining_marks_are_normalised_exactly():
    marks = [chr(code) for code in range(0x10FFFF) if unicodedata.combining(chr(code))]
    drawn = np.random.default_rng(0)
    for length in (1, 63, 64, 65, 200, 500):
        text = (
            "naïve a"
            + "".join(drawn.choice(marks, length))
            + "é \u1100\u1161 語"
            + "".join(drawn.choice(marks, length))
        )
        assert normalise(text) == unicodedata.normalize("NFC", text)


def test_a_record_of_many_limits_is_cut_as_its_copies_would_be():
    raw = " ".join(str(number) for number in range(5000)).encode()
    rules = tiny_settings("unused", max_document_bytes=64, long_documents="split")
    pieces = list(bounded([Record("here", raw)], rules, DocumentCounts()))
    assert b"".join(piece.raw for piece in pieces) == raw
    assert all(cut_position(piece.raw + b"x" * 64, 64) for piece in pieces)
