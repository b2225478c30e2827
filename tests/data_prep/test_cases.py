"""Small inputs that once were read wrongly, hung or ended in a traceback, each with its right outcome.

A case is a folder with a config.yaml, whose paths begin with ../shared/data_cases/NAME, the files that it names,
perhaps make_input.py that writes those too large to be kept, and a README line. The folders in `cases` are always run;
those of DATA_CASES (by default ../shared/data_cases, where that exists) too. A case that OUTCOMES does not know must
end with prepared data or one clear message.
"""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from tokenizers import Tokenizer

from data_prep import prepare as prepare_module
from data_prep import stages
from data_prep.files import sha256_of
from data_prep.manifest import read_manifest, verify
from data_prep.prepare import main
from data_prep.settings import UserError
from data_prep.sources import read_part

HERE = Path(__file__).parent / "cases"
ELSEWHERE = Path(os.environ.get("DATA_CASES", Path(__file__).resolve().parents[2].parent / "shared" / "data_cases"))


def folders() -> list:
    found = [path for root in (HERE, ELSEWHERE) if root.is_dir() for path in sorted(root.iterdir()) if path.is_dir()]
    return [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in found]


class Case:
    """A copy of a case's folder that may be changed, run from beside it as its config expects."""

    def __init__(self, source: Path, folder: Path, monkeypatch) -> None:
        self.name = source.name
        self.path = folder / "shared" / "data_cases" / source.name
        shutil.copytree(source, self.path, symlinks=True)
        for path in [self.path, *self.path.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        self.out = folder / "repository" / "out"
        self.out.parent.mkdir()
        monkeypatch.chdir(self.out.parent)
        if (self.path / "make_input.py").exists():
            runpy.run_path(str(self.path / "make_input.py"))

    def run(self, *overrides: str) -> dict:
        assert main(["--config", str(self.path / "config.yaml"), "workers=1", *overrides]) == 0
        return verify(self.out)

    def refused(self, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            self.run(*overrides)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 1500
        return message

    def tokens(self) -> np.ndarray:
        manifest = read_manifest(self.out)
        assert manifest is not None
        width, dtype = manifest["sequence_length"] + 1, np.dtype(manifest["token_dtype"]).newbyteorder("<")
        found = []
        for split in ("train", "validation"):
            for shard in manifest["splits"][split]["shards"]:
                content = np.fromfile(self.out / shard["name"], np.uint8)
                offsets = np.load((self.out / shard["name"]).with_suffix(".idx.npy"))
                found += [content[at : at + width * dtype.itemsize].view(dtype) for at in offsets]
        return np.concatenate(found)

    def text(self) -> str:
        tokenizer = Tokenizer.from_file(str(self.out / "tokenizer.json"))
        return tokenizer.decode(self.tokens().tolist(), skip_special_tokens=False)


def documents(manifest: dict) -> int:
    return manifest["documents"]["train"] + manifest["documents"]["validation"]


def prepared(number: int, **counts: int):
    def check(case: Case) -> None:
        manifest = case.run()
        assert documents(manifest) == number
        assert {name: manifest["documents"][name] for name in counts} == counts

    return check


def refused(pattern: str):
    def check(case: Case) -> None:
        assert re.search(pattern, case.refused())
        assert read_manifest(case.out) is None

    return check


def linked_folder(case: Case, capfd) -> None:
    (case.path / "data" / "more").unlink(missing_ok=True)
    (case.path / "data" / "more").symlink_to("../elsewhere")
    (case.path / "elsewhere" / "circle").symlink_to("../data")
    (case.path / "data" / ".hidden.jsonl").write_text("not JSON")
    (case.path / "data" / "notes.md").write_text("not read")
    assert documents(case.run()) == 120
    said = capfd.readouterr().err
    assert "followed" in said and "more" in said
    assert "passed over 1 files" in said and "notes.md" in said


def name_not_utf8(case: Case) -> None:
    (case.path / "data").mkdir(exist_ok=True)
    texts = (f"document {number} of a folder with an old name " * 4 for number in range(60))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path(os.fsdecode(os.fsencode(case.path / "data") + b"/caf\xe9.jsonl")).write_text(rows)
    manifest = case.run()
    assert documents(manifest) == 60
    assert manifest["inputs"][0]["name"] == "caf\\xe9.jsonl"
    Path(os.fsdecode(os.fsencode(case.path / "data") + b"/caf\xe8.jsonl")).write_text("no JSON\n")
    assert "caf\\xe8.jsonl is new" in case.refused()
    assert "caf\\xe8.jsonl, line 1: not JSON" in case.refused("folder=other")


def no_injection(case: Case, capfd) -> None:
    manifest = case.run()
    work = case.tokens()
    ends = int((work == manifest["eos_token_id"]).sum())
    # Of two splits, the rest that makes no block may hold the last ends.
    assert documents(manifest) - 4 <= ends <= documents(manifest)
    if manifest["unknown_tokens"]["train"]:
        assert "unknown to the tokenizer" in capfd.readouterr().err


def long_word(case: Case, capfd) -> None:
    manifest = case.run()
    assert manifest["vocab_size"] == 2000
    assert "words of more than" in capfd.readouterr().err


def escapes(case: Case) -> None:
    assert documents(case.run(r"source.delimiter='\n\n'")) == 60
    finished = sha256_of(case.out / "manifest.json")
    case.run('source.delimiter="\\n\\n"', f"source.paths=[{case.path / 'a.txt'}]")  # the same, with an absolute path
    assert sha256_of(case.out / "manifest.json") == finished


def changed_after_finish(case: Case, capfd) -> None:
    case.run()
    finished = sha256_of(case.out / "manifest.json")
    case.run()
    original = (case.path / "a.jsonl").read_bytes()
    times = (case.path / "a.jsonl").stat()
    (case.path / "a.jsonl").write_bytes(original.replace(b"stone", b"STONE"))
    os.utime(case.path / "a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times has
    assert "a.jsonl has other content" in case.refused()
    (case.path / "a.jsonl").write_bytes(original)
    case.run()
    assert sha256_of(case.out / "manifest.json") == finished
    (case.path / "a.jsonl").unlink()
    capfd.readouterr()
    case.run()  # the corpus may be deleted once it is prepared; that is said
    assert "whether its corpus changed since cannot be told" in capfd.readouterr().err


def datasets_changed(case: Case, monkeypatch) -> None:
    tokenizer = case.path / "tokenizer.json"
    if not tokenizer.exists():
        shutil.copy(HERE / "60_tok_folder" / "tok" / "tokenizer.json", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(stages.TokenizerStage, "run", lambda self, part: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.run()
    original = (case.path / "a.jsonl").read_bytes()
    (case.path / "a.jsonl").write_bytes(original.replace(b"stone", b"zebra"))
    case.run()
    assert "zebra" in case.text() and "stone" not in case.text()
    (case.path / "a.jsonl").write_bytes(original)
    assert "a.jsonl has other content" in case.refused()


def grown(case: Case) -> None:
    case.run()
    (case.path / "b.jsonl").write_text('{"text": "one more"}\n')
    assert "b.jsonl is new" in case.refused()
    (case.path / "b.jsonl").unlink()
    case.run()


def big_row_group(case: Case) -> None:
    size = (case.path / "a.parquet").stat().st_size
    settings = prepare_module.load(prepare_module.DataSettings, case.path / "config.yaml")
    before = pyarrow.total_allocated_bytes()
    most = 0
    for _ in (record for part in prepare_module.open_corpus(settings).parts for record in read_part(settings, part)):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < min(size / 2, 48 << 20)


def advice_helps(case: Case) -> None:
    said = case.refused("sequence_length=3000")
    assert "shorten sequence_length" in said
    read = (case.out / "work" / "read" / "000000.json").stat().st_mtime_ns
    assert case.refused("sequence_length=2900")
    assert (case.out / "work" / "read" / "000000.json").stat().st_mtime_ns == read  # nothing is read again for it
    assert case.run()["sequence_length"] == 16
    said = case.refused("tokenizer.vocab_size=60000", "folder=other")
    (size,) = re.findall(r"set (tokenizer\.vocab_size=\d+)", said)
    case.out = case.out.with_name("other")
    assert f"tokenizer.vocab_size={case.run(size, 'folder=other')['vocab_size']}" == size


def tokenizer_first(case: Case) -> None:
    assert "tokenizer.load" in case.refused()
    assert not (case.out / "work" / "read" / "000000.bin").exists()
    shutil.copy(HERE / "60_tok_folder" / "tok" / "tokenizer.json", case.path / "tokenizer.json")
    assert "'<eos>' is not in the vocabulary" in case.refused("tokenizer.eos_token=<eos>")
    assert not (case.out / "work" / "read" / "000000.bin").exists()
    case.run()


OUTCOMES = {
    "03_jsonl_nan": prepared(62),
    "11_jsonl_mixed_names": prepared(200),
    "15_zst_long": prepared(60),
    "21_parquet_dictionary": prepared(60),
    "24_parquet_null_file": prepared(60, dropped_empty=2),
    "27_parquet_dup_column": refused("a.parquet: 2 columns are named 'text'"),
    "31_csv_unquoted_commas": refused("a.csv, line 2: more fields than the header has: 4 against 2"),
    "40_text_utf16": prepared(60),
    "42_text_crlf_delimiter": prepared(60),
    "44_symlink_dir": linked_folder,
    "47_nonutf8_name": name_not_utf8,
    "51_tok_inject_nonspecial": no_injection,
    "52_tok_inject_unigram": no_injection,
    "60_tok_folder": prepared(60),
    "70_nfc_quadratic": prepared(61),
    "71_bpe_long_word": long_word,
    "83_cli_delimiter": escapes,
    "90_inputs_changed": changed_after_finish,
    "91_datasets_changed": datasets_changed,
    "94_grown_glob": grown,
    "96_big_row_group": big_row_group,
    "97_advice_loop": advice_helps,
    "98_tokenizer_late": tokenizer_first,
}


def prepared_or_refused(case: Case) -> None:
    """For cases that are not known here: anything but a traceback, a hang or silence."""
    try:
        case.run()
    except UserError:
        assert case.refused()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("source", folders())
def test_case_ends_as_it_should(source, tmp_path, monkeypatch, request):
    check = OUTCOMES.get(source.name, prepared_or_refused)
    wanted = check.__code__.co_varnames[1 : check.__code__.co_argcount]
    arguments = {name: request.getfixturevalue(name) for name in wanted}
    check(Case(source, tmp_path, monkeypatch), **arguments)


def test_every_known_case_is_kept_here():
    assert {path.name for path in HERE.iterdir()} == set(OUTCOMES)
