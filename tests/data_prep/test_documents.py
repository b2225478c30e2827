"""Documents: decoding, normalising, cutting, exact duplicates, the split. Laws by hypothesis, messages by example."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.documents import (
    INDEX_ROW,
    SPAN,
    DocumentCounts,
    Record,
    bounded,
    cut_position,
    decode,
    first_occurrences,
    normalise,
    spill,
)
from data_prep.settings import UserError
from tests.helpers.corpus import tiny_settings

LAW = settings(deadline=None, max_examples=40)


def records(*texts: bytes) -> list[Record]:
    return [Record(f"row {number}", text) for number, text in enumerate(texts)]


def spilled(folder, split):
    data = (folder / "documents.bin").read_bytes()
    return [
        data[offset : offset + length].decode()
        for offset, length in np.fromfile(folder / f"{split}.spans", SPAN).tolist()
    ]


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
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 80))
def test_first_occurrences_are_those_of_a_set_for_any_number_of_passes(values, rows_per_pass):
    index = np.zeros(len(values), INDEX_ROW)
    index["digest"] = np.array(values, np.uint64)[:, None] * np.array([3, 7], np.uint64)
    seen: set[int] = set()
    expected = [value not in seen and not seen.add(value) for value in values]
    assert first_occurrences(index, rows_per_pass).tolist() == expected


def test_empty_and_duplicate_documents_are_dropped_and_counted(tmp_path):
    texts = [f"document {number}".encode() for number in range(40)]
    counts = spill(records(*texts, b" \n", texts[3], texts[3] + b"\r\n"), tiny_settings("unused"), tmp_path)
    assert (counts.dropped_empty, counts.dropped_duplicate) == (1, 2)
    train, validation = spilled(tmp_path, "train"), spilled(tmp_path, "validation")
    assert sorted(train + validation) == sorted(text.decode() for text in texts)
    assert (len(train), len(validation)) == (counts.train, counts.validation)


def test_the_split_depends_on_text_and_seed_alone(tmp_path):
    texts = [f"document {number}".encode() for number in range(200)]
    found = {}
    for name, order, seed in (("one", texts, 0), ("two", texts[::-1], 0), ("three", texts, 1)):
        (tmp_path / name).mkdir()
        spill(records(*order), tiny_settings("unused", seed=seed), tmp_path / name)
        found[name] = set(spilled(tmp_path / name, "validation"))
    assert found["one"] == found["two"] != found["three"]
    assert 20 < len(found["one"]) < 80  # a quarter of 200


def test_parts_of_a_cut_document_stay_in_one_split(tmp_path):
    texts = [" ".join(f"{number}:{word}" for word in range(100)).encode() for number in range(30)]
    rules = tiny_settings("unused", max_document_bytes=64, long_documents="split")
    counts = spill(records(*texts), rules, tmp_path)
    assert counts.split_long == 30
    sides = [{piece.split(":")[0] for piece in spilled(tmp_path, split)} for split in ("train", "validation")]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == {str(number) for number in range(30)}


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "corpus 'tiny' holds no text"),
        ([b" ", b"\n"], {}, "corpus 'tiny' holds no text"),
        ([b"only one"], {}, r"no document of 1 falls into the (train|validation) split.*source.delimiter"),
        ([b"\xff" * 5], {"max_undecodable_bytes": 4}, r"row 0: not UTF-8; with it 5 bytes.*max_undecodable_bytes=4"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(tmp_path, texts, changes, message):
    with pytest.raises(UserError, match=message):
        spill(records(*texts), tiny_settings("unused", **changes), tmp_path)


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
