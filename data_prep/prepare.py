"""Raw text -> shuffled webdataset shards with a manifest.

    python data_prep/prepare.py --config configs/data/NAME.yaml [key=value ...]
    python data_prep/prepare.py --verify FOLDER

    source -> documents -> tokenizer -> tokens -> shuffled blocks -> shards -> manifest
              (documents.py) (tokenizer.py) (encode.py) (shuffle.py) (shards.py) (manifest.py)

Each stage leaves its files and a mark in FOLDER/work; an interrupted preparation continues with the first stage that
has no mark. The manifest comes last, then FOLDER/work is removed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep.config import DataSettings, needed_key
from data_prep.documents import SPAN, SPLITS, spill
from data_prep.encode import EncoderFiles, encode_split
from data_prep.files import atomic, sha256_of, write_json
from data_prep.inputs import differences, find_files, signature_time
from data_prep.manifest import read_manifest, tool_versions, unigram_loss, verify, write_manifest
from data_prep.packages import CORPORA
from data_prep.progress import say
from data_prep.settings import UserError, describe, load, run_command
from data_prep.shards import samples_per_member, samples_per_shard, write_split
from data_prep.shuffle import shuffled_blocks
from data_prep.sources import Corpus, dataset_files, dataset_revision, open_corpus
from data_prep.tokenizer import (
    end_of_text_id,
    eos_token_of,
    given_tokenizer,
    load_tokenizer,
    token_dtype,
    train_tokenizer,
    unknown_id,
)

STAGES = ("documents", "tokenizer", *(f"tokens-{split}" for split in SPLITS), *(f"shards-{split}" for split in SPLITS))
UNKNOWN_SHARE = 0.001  # of the tokens; more is told


def prepare(settings: DataSettings) -> dict[str, Any]:
    """Bring `settings.folder` to the state that the settings describe; return its manifest.

    Does nothing when the folder is finished. Raises UserError for every mistake in corpus or settings, for a folder
    of another configuration, and when the disk is full; finished stages are kept.
    """
    folder = Path(settings.folder)
    try:
        manifest = _finished(settings, folder)
        if manifest is not None:
            return manifest
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            manifest = _finished(settings, folder)  # perhaps by the process that held the lock
            if manifest is not None:
                return manifest
            work = folder / "work"
            if not work.exists() and any(folder.iterdir()):
                raise UserError(f"{folder}: holds files but no prepared data; choose another folder or empty it")
            work.mkdir(exist_ok=True)
            return _Preparation(settings, folder, work).run()
    except OSError as error:
        raise _explain(error, folder) from error
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder}: a tokenizing process died, most likely for want of memory; work done is kept: run the same "
            "command again with a smaller workers= or max_document_bytes="
        ) from error


def _finished(settings: DataSettings, folder: Path) -> dict[str, Any] | None:
    """The manifest, if the folder is finished; raise UserError if it is of another configuration or corpus."""
    manifest = read_manifest(folder)
    if manifest is not None:
        different = _differing(manifest["source"], settings)
        if different:
            raise _other_configuration(f"{folder}:", different)
        check_unchanged(settings, folder, manifest)
        shutil.rmtree(folder / "work", ignore_errors=True)  # left by a process killed after the manifest was written
    return manifest


def check_unchanged(settings: DataSettings, folder: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError if the corpus or the tokenizer is no longer what the finished `folder` was made from.

    Says so where they are gone, or elsewhere, and cannot be compared.
    """
    try:
        changes = list(_input_changes(settings, manifest, (folder / "manifest.json").stat().st_mtime))
    except UserError as error:
        say(f"{folder}: finished; whether its corpus changed since cannot be told: {error}")
        changes = []
    if settings.tokenizer.load is not None:
        try:
            now = _fingerprint(load_tokenizer(settings.tokenizer.load))
        except UserError as error:
            say(f"{folder}: finished; whether its tokenizer changed since cannot be told: {error}")
        else:
            if now != manifest["tokenizer_fingerprint"]:
                changes.append(f"{settings.tokenizer.load} is another tokenizer")
    if changes:
        shown = "; ".join(changes[:10]) + (f"; and {len(changes) - 10} more" if len(changes) > 10 else "")
        raise UserError(
            f"{folder}: was prepared from other input than there is now ({shown}); delete the folder to prepare it "
            "anew, choose another folder, or restore the input"
        )


def _input_changes(settings: DataSettings, manifest: dict[str, Any], since: float) -> list[str]:
    source, stated = settings.source, manifest["inputs"]
    if source.kind == "synthetic":
        return []
    if source.kind == "packaged":
        assert source.name is not None
        missing = [p for p in CORPORA[source.name] if not list(Path(settings.cache).glob(p.file))]
        if missing:
            raise UserError(f"package {missing[0].name} is not in {settings.cache}")
        if signature_time(paths := [min(Path(settings.cache).glob(p.file)) for p in CORPORA[source.name]]) < since:
            return []
        hashes = [sha256_of(path) for path in paths]
        pairs = zip(stated, hashes, strict=True)
        return [f"package {item['name']} has other content" for item, found in pairs if item["sha256"] != found]
    if source.kind == "datasets":
        files = dataset_files(settings)
        if files is None:
            revision, before = dataset_revision(settings), stated[0].get("revision")
            same = len(stated) == 1 and before == revision
            return [] if same else [f"{source.name} is at revision {revision}, was {before}"]
        if "bytes" not in stated[0]:
            raise UserError("its manifest, of an earlier version, states no files")
        return list(differences(files.paths, stated, since))
    files = find_files(source.kind, source.paths or [])
    for line in files.remarks(source.kind):
        say(line)
    return list(differences(files.paths, stated, since))


def _fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer.json that a prepared folder would hold."""
    return hashlib.sha256(tokenizer.to_str(pretty=True).encode()).hexdigest()


def _explain(error: OSError, folder: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{error.filename or folder}: no space left on the disk; finished stages are kept in {folder / 'work'}: "
            "free some space and run the same command again"
        )
    return UserError(f"{error.filename or folder}: {error.strerror or error}")


def _differing(stated: dict[str, Any], settings: DataSettings) -> dict[str, str]:
    """Keys in which a stated configuration differs from the settings, each with both values.

    A key that an earlier version did not know has its default. Where the corpus or a tokenizer lies is no difference;
    what is in them is compared by itself.
    """
    mine, defaults = _comparable(settings.content()), _comparable(_defaults(settings))
    stated = _comparable(stated)
    different = {}
    for key in sorted(mine.keys() | stated.keys()):
        before = stated.get(key, defaults.get(key))
        if isinstance(before, dict) and isinstance(defaults.get(key), dict):
            before = {**{name: value for name, value in defaults[key].items() if name not in before}, **before}
        if before != mine.get(key):
            different[key] = f"{before!r} there, {mine.get(key)!r} asked for"
    return different


def _defaults(settings: DataSettings) -> dict[str, Any]:
    """What a configuration says that sets only what must be set."""
    source = {"kind": settings.source.kind, "paths": ["x"], "name": "x", "documents": 1}
    allowed = {"kind", needed_key(settings.source.kind)}
    least = {"folder": "x", "corpus": "x", "sequence_length": 1, "tokenizer": {"load": "x"}}
    least["source"] = {key: value for key, value in source.items() if key in allowed}
    return DataSettings.model_validate(least).content()


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the places in it."""
    content = {**content, "source": dict(content["source"]), "tokenizer": dict(content["tokenizer"])}
    content["source"].pop("paths", None)
    if content["source"].get("data_files"):
        content["source"]["data_files"] = [Path(name).name for name in content["source"]["data_files"]]
    if content["tokenizer"].get("load"):
        content["tokenizer"]["load"] = "given"
    return content


def _other_configuration(what: str, different: dict[str, str]) -> UserError:
    changes = "; ".join(f"{key}: {values}" for key, values in different.items())
    return UserError(f"{what} belongs to another configuration ({changes}); delete the folder or choose another")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process prepares a folder; others wait, and then find it finished."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process is preparing this folder; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _vocab_size(tokenizer: Tokenizer) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


def _stage_of(key: str) -> str:
    """The first stage whose result depends on a setting."""
    return {"tokenizer": "tokenizer", "sequence_length": "shards-train", "shard_bytes": "shards-train"}.get(
        key, STAGES[0]
    )


class _Preparation:
    """The stages, in order. Each is a method that returns what its mark records."""

    def __init__(self, settings: DataSettings, folder: Path, work: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.work = work
        self.marks: dict[str, Any] = {}
        self.given: Tokenizer | None = None
        self.state: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        self._check_tokenizer()
        corpus = self._begin()
        try:
            self._stage("documents", lambda: self._documents(corpus))
            self._stage("tokenizer", self._tokenizer)
            for split in SPLITS:
                self._stage(f"tokens-{split}", lambda split=split: self._tokens(split))  # type: ignore[misc]
            self._check_blocks()
            for split in SPLITS:
                self._stage(f"shards-{split}", lambda split=split: self._shards(split))  # type: ignore[misc]
        except UserError:  # its message says what to change: let the same folder go on with the change
            write_json(self.work / "state.json", {**self.state, "refused": True})
            raise
        return self._finish(corpus)

    def _check_tokenizer(self) -> None:
        """Refuse now what would be refused after hours of reading."""
        settings = self.settings.tokenizer
        given = None if settings.load is None else given_tokenizer(settings)
        self.given = given
        vocab_size = settings.vocab_size if given is None else _vocab_size(given)
        assert vocab_size is not None
        samples_per_shard(self.settings.sequence_length + 1, token_dtype(vocab_size), self.settings.shard_bytes)

    def _begin(self) -> Corpus:
        """Open the corpus; drop the work that no longer fits it; refuse another configuration's."""
        corpus = open_corpus(self.settings)
        for line in corpus.remarks:
            say(line)
        path = self.work / "state.json"
        state: dict[str, Any] = {
            "settings": self.settings.content(),
            "signature": corpus.signature,
            "tokenizer": None if self.given is None else _fingerprint(self.given),
        }
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        same = before is not None and corpus.signature and before.get("signature") == corpus.signature
        state["inputs"] = before["inputs"] if before is not None and same else corpus.identify()
        if before is not None:
            self._drop_unfitting(before, state)
        write_json(path, state)
        self.state = state
        return corpus

    def _drop_unfitting(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Forget the finished stages that another corpus, tokenizer or setting had led to, and say so."""
        different = _differing(before["settings"], self.settings)
        first = min((_stage_of(key) for key in different), key=STAGES.index, default=STAGES[-1])
        touched = [stage for stage in STAGES[STAGES.index(first) :] if (self.work / f"{stage}.done.json").exists()]
        if different and touched and not before.get("refused"):
            raise _other_configuration(f"{self.folder}: unfinished work there", different)
        if different:
            say(f"{', '.join(different)} changed since the interrupted preparation; what rests on it is redone")
            self._drop(first)
        if before["inputs"] != now["inputs"]:
            say("the corpus changed since the interrupted preparation; starting anew")
            self._drop(STAGES[0])
        elif before.get("tokenizer") != now["tokenizer"] and "tokenizer" not in different:
            say("the tokenizer changed since the interrupted preparation; encoding anew")
            self._drop("tokenizer")

    def _drop(self, first: str) -> None:
        """Forget stage `first` and those after it."""
        for stage in STAGES[STAGES.index(first) :]:
            names = [f"{stage}.done.json"]
            if stage.startswith("tokens-"):
                split = stage.removeprefix("tokens-")
                names += [f"{split}.tokens", f"{split}.json"]
            for name in names:
                (self.work / name).unlink(missing_ok=True)

    def _stage(self, name: str, action: Callable[[], dict[str, Any]]) -> None:
        """Run a stage unless its mark exists."""
        mark = self.work / f"{name}.done.json"
        if not mark.exists():
            write_json(mark, action())
        self.marks[name] = json.loads(mark.read_text(encoding="utf-8"))

    def _documents(self, corpus: Corpus) -> dict[str, Any]:
        counts = asdict(spill(corpus.records, self.settings, self.work))
        if corpus.signature and open_corpus(self.settings).signature != corpus.signature:
            raise UserError(
                f"corpus {self.settings.corpus!r}: its files changed while they were read; run the same command again "
                "once nothing writes to them"
            )
        return counts

    def _tokenizer(self) -> dict[str, Any]:
        settings = self.settings.tokenizer
        tokenizer = self.given
        if tokenizer is None:
            texts = np.memmap(self.work / "documents.bin", np.uint8, "r")
            spans = np.memmap(self.work / "train.spans", SPAN, "r")
            tokenizer = train_tokenizer(texts, spans, settings)
        path = self.folder / "tokenizer.json"
        with atomic(path) as file:
            file.write(tokenizer.to_str(pretty=True).encode())
        return {
            "vocab_size": _vocab_size(tokenizer),
            "eos_token_id": end_of_text_id(tokenizer, eos_token_of(settings)),
            "tokenizer_fingerprint": sha256_of(path),
        }

    def _dtype(self) -> np.dtype:
        return token_dtype(self.marks["tokenizer"]["vocab_size"])

    def _tokens(self, split: str) -> dict[str, Any]:
        files = EncoderFiles(
            tokenizer=self.folder / "tokenizer.json",
            texts=self.work / "documents.bin",
            eos_token_id=self.marks["tokenizer"]["eos_token_id"],
            dtype=self._dtype().str,
            unknown_id=unknown_id(Tokenizer.from_file(str(self.folder / "tokenizer.json"))),
        )
        workers = self.settings.workers or len(os.sched_getaffinity(0))
        result = encode_split(self.work / f"{split}.spans", files, self.work / f"{split}.tokens", workers)
        rate = result["new_tokens"] / max(result["seconds"], 1e-9)
        say(f"tokenize {split}: {result['tokens']:,} tokens, {rate:,.0f} tokens/s")
        return {"tokens": result["tokens"], "unknown": result["unknown"]}

    def _check_blocks(self) -> None:
        """Raise UserError for a split without a block; say where the tokenizer does not know the text."""
        width = self.settings.sequence_length + 1
        for split in SPLITS:
            tokens, unknown = self.marks[f"tokens-{split}"]["tokens"], self.marks[f"tokens-{split}"]["unknown"]
            if tokens < width:
                raise UserError(
                    f"corpus {self.settings.corpus!r}: its {split} split has {tokens} tokens, one block needs {width}; "
                    "shorten sequence_length, change validation_fraction or give more text"
                )
            if unknown > UNKNOWN_SHARE * tokens:
                say(
                    f"warning: {unknown:,} of {tokens:,} tokens of the {split} split ({unknown / tokens:.1%}) are "
                    "unknown to the tokenizer and lost as text; is it one for this language?"
                )

    def _shards(self, split: str) -> dict[str, Any]:
        settings = self.settings
        width = settings.sequence_length + 1
        shutil.rmtree(self.folder / split, ignore_errors=True)  # of an interrupted attempt
        tokens = np.memmap(self.work / f"{split}.tokens", self._dtype(), "r")
        blocks = shuffled_blocks(tokens, width, settings.seed, self.work)
        return write_split(blocks, self.folder, split, settings.shard_bytes, self.marks["tokenizer"]["vocab_size"])

    def _finish(self, corpus: Corpus) -> dict[str, Any]:
        splits = {split: dict(self.marks[f"shards-{split}"]) for split in SPLITS}
        counts = {split: content.pop("counts") for split, content in splits.items()}
        manifest = write_manifest(
            self.folder,
            {
                "sequence_length": self.settings.sequence_length,
                "token_dtype": self._dtype().name,
                "samples_per_member": samples_per_member(self.settings.sequence_length + 1, self._dtype()),
                "unknown_tokens": {split: self.marks[f"tokens-{split}"]["unknown"] for split in SPLITS},
                **self.marks["tokenizer"],
                "source": self.settings.content(),
                "inputs": self.state["inputs"],
                "corpus": self.settings.corpus,
                "licence": corpus.licence,
                "seed": self.settings.seed,
                "documents": self.marks["documents"],
                "unigram_loss": unigram_loss(counts["train"], counts["validation"]),
                "splits": splits,
                "tools": tool_versions(),
            },
        )
        shutil.rmtree(self.work)
        return manifest


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """What a finished preparation prints."""
    documents, splits = manifest["documents"], manifest["splits"]
    lines = [f"{folder}: {manifest['corpus']} ({manifest['licence']})"]
    for split in SPLITS:
        content = splits[split]
        lines.append(
            f"  {split}: {documents[split]:,} documents, {content['tokens']:,} tokens in "
            f"{content['samples']:,} blocks, {len(content['shards'])} shards"
        )
    dropped = ", ".join(f"{key} {value}" for key, value in documents.items() if key not in SPLITS)
    lines.append(f"  {dropped}")
    lines.append(f"  vocabulary {manifest['vocab_size']:,}, unigram loss {manifest['unigram_loss']:.4f} nats per token")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare training data: raw text -> shuffled webdataset shards.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--config", metavar="FILE", help="YAML settings, for instance configs/data/sotu.yaml")
    action.add_argument("--verify", metavar="FOLDER", help="compare a prepared folder with its manifest, by sha256")
    parser.add_argument("--print-config", action="store_true", help="show the settings with their meaning and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    options = parser.parse_args(arguments)
    if options.verify:
        if options.overrides or options.print_config:
            raise UserError("--verify takes a folder and nothing else")
        print(f"{summary(Path(options.verify), verify(Path(options.verify)))}\n  every shard has its sha256")
        return 0
    settings = load(DataSettings, options.config, options.overrides)
    if options.print_config:
        for key, value, meaning in describe(settings):
            print(f"{key} = {value}\n    {meaning}")
        return 0
    print(summary(Path(settings.folder), prepare(settings)))
    return 0


if __name__ == "__main__":
    run_command(main)
