"""Tokenizers: trained ones are deterministic and lossless, given ones are loaded, mistakes are named."""

import json
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_prep.config import TokenizerSettings
from data_prep.prepare import prepare
from data_prep.settings import UserError
from data_prep.synthetic import synthetic_documents
from data_prep.tokenizer import (
    encoding_form,
    end_of_text_id,
    eos_token_of,
    load_tokenizer,
    shortened,
    token_dtype,
    train_tokenizer,
)
from tests.helpers.corpus import tiny_settings


def trained(texts, **keys) -> Tokenizer:
    return train_tokenizer(texts, TokenizerSettings(**keys))


TEXTS = list(synthetic_documents(40, seed=0))


def test_training_is_deterministic_and_loses_nothing():
    one, two = (trained(TEXTS, vocab_size=400) for _ in range(2))
    assert one.to_str() == two.to_str()
    assert one.get_vocab_size() == 400
    text = "Ünïcödé, 語, \t tabs and  blanks\n\n" + TEXTS[0]
    assert one.decode(one.encode(text).ids) == text
    assert end_of_text_id(one, "<|endoftext|>") == 0


def test_training_reads_a_seeded_sample_that_its_bound_holds(tmp_path, monkeypatch):
    seen = {}
    for seed, limit in ((0, 20_000), (1, 20_000), (0, 1 << 28)):
        read = seen[seed, limit] = []

        def train(texts, settings, read=read):
            read.extend(texts)
            return train_tokenizer(read, settings)

        monkeypatch.setattr("data_prep.stages.train_tokenizer", train)
        tokenizer = {"vocab_size": 270, "train_bytes": limit}
        source = {"kind": "synthetic", "documents": 200}
        folder = tmp_path / f"{seed}-{limit}"
        prepare(tiny_settings(folder, seed=seed, tokenizer=tokenizer, source=source, part_bytes=1024))
    one, other, whole = seen.values()
    assert 15_000 < sum(map(len, one)) <= 20_000 < sum(map(len, whole))
    assert set(one[:-1]) <= set(whole) and one != whole[: len(one)]  # the last may be cut; spread, not the beginning
    assert one != other


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(UserError, match=r"tokenizer.vocab_size: the corpus yields only \d+ tokens, 1000 were asked"):
        trained(["few words"], vocab_size=1000)


def test_a_given_tokenizer_is_loaded_and_its_end_of_text_found(tmp_path):
    path = tmp_path / "tokenizer.json"
    trained(TEXTS, vocab_size=300, eos_token="</s>").save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert end_of_text_id(tokenizer, "</s>") == 0
    with pytest.raises(UserError, match=r"tokenizer.eos_token: '<eos>' is not in the vocabulary; special tokens: </s>"):
        end_of_text_id(tokenizer, "<eos>")


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(UserError, match=f"tokenizer.load: .*{name}: cannot be loaded"):
            load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either vocab_size .* or load"),
        ({"vocab_size": 300, "load": "x.json"}, "either vocab_size .* or load"),
        ({"load": "x.json", "train_bytes": 5}, "train_bytes: no meaning"),
    ],
)
def test_settings_that_contradict_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        TokenizerSettings(**keys)


def test_tokens_take_two_bytes_where_they_can():
    assert (token_dtype(1 << 16), token_dtype((1 << 16) + 1)) == (np.dtype("<u2"), np.dtype("<u4"))


def test_long_runs_are_given_to_the_trainer_in_pieces_and_nothing_is_left_out():
    text = "some words " + "x" * 1000 + " more, " + "-" * 300 + "7" * 400 + " " * 600 + "end " + "ab12" * 200
    parts = shortened(text)
    assert "".join(parts) == text
    assert not re.search(r"[a-z]{257}|-{257}|\d{257}|\s{257}", "\n".join(parts).replace("\n", "|"))
    assert shortened("ordinary text. " * 100) == ["ordinary text. " * 100]


def bpe(vocabulary, merges, **options):
    return Tokenizer(models.BPE(vocabulary, merges, **options))


def unigram(**options):
    return Tokenizer(models.Unigram([("<unk>", -9.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.5), ("<", -2.0)], 0))


CHARACTERS = {character: number for number, character in enumerate("</s>ab")}
SPELL = {
    "added, not special": lambda: bpe(CHARACTERS, []),
    "merged": lambda: bpe({**CHARACTERS, "</": 6, "s>": 7, "</s>": 8}, [("<", "/"), ("s", ">"), ("</", "s>")]),
    "ignore_merges": lambda: bpe({**CHARACTERS, "</s>": 6}, [], ignore_merges=True),
    "words": lambda: Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2}, "[UNK]")),
    "word pieces": lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]")),
    "unigram": unigram,
}


@pytest.mark.parametrize("name", SPELL)
@pytest.mark.parametrize("special", [True, False])
def test_no_text_spells_the_end_of_text_token(name, special):
    tokenizer = SPELL[name]()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(["<pad>", AddedToken("</s>", special=special, normalized=False), "<other>"])
    eos = tokenizer.token_to_id("</s>")
    form = encoding_form(tokenizer, eos)
    for text in ("a </s> b", "</s>", "a</s>a", "ab </s></s>"):
        assert eos not in form.encode(text, add_special_tokens=False).ids
    for text in ("a b", "<other> a", "ab<pad>"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert form.encode(text, add_special_tokens=False).ids == expected


def test_a_tokenizer_whose_unknown_token_ends_documents_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, "</s>"))
    with pytest.raises(UserError, match=r"x: '</s>' ends documents and stands for unknown text too"):
        encoding_form(tokenizer, 0, "x")


def test_dropout_is_taken_out_of_a_given_tokenizer(tmp_path):
    tokenizer = trained(TEXTS, vocab_size=400)
    content = json.loads(tokenizer.to_str())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(str(tmp_path))
    assert {tuple(loaded.encode(TEXTS[0]).ids) for _ in range(10)} == {tuple(tokenizer.encode(TEXTS[0]).ids)}


def test_the_folder_of_a_tokenizer_names_its_end_of_text(tmp_path):
    trained(TEXTS, vocab_size=300, eos_token="</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert eos_token_of(TokenizerSettings(load=str(tmp_path))) == "</s>"
    assert eos_token_of(TokenizerSettings(load=str(tmp_path), eos_token="a")) == "a"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer.json in this folder"):
        load_tokenizer(str(tmp_path / "empty"))
