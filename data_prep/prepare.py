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
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

from data_prep.config import DataSettings
from data_prep.documents import SPAN, SPLITS, spill
from data_prep.encode import EncoderFiles, encode_split
from data_prep.files import atomic, sha256_of, write_json
from data_prep.manifest import read_manifest, tool_versions, unigram_loss, verify, write_manifest
from data_prep.settings import UserError, describe, load, run_command
from data_prep.shards import samples_per_shard, write_split
from data_prep.shuffle import shuffled_blocks
from data_prep.sources import Corpus, open_corpus
from data_prep.tokenizer import end_of_text_id, load_tokenizer, token_dtype, train_tokenizer

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


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
    """The manifest, if the folder is finished; raise UserError if it is of another configuration."""
    manifest = read_manifest(folder)
    if manifest is not None:
        _check_same(manifest["source"], settings, f"{folder}:")
        shutil.rmtree(folder / "work", ignore_errors=True)  # left by a process killed after the manifest was written
    return manifest


def _explain(error: OSError, folder: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{error.filename or folder}: no space left on the disk; finished stages are kept in {folder / 'work'}: "
            "free some space and run the same command again"
        )
    return UserError(f"{error.filename or folder}: {error.strerror or error}")


def _check_same(stated: dict[str, Any], settings: DataSettings, what: str) -> None:
    """Raise UserError naming the keys in which the configuration of `what` differs from the settings."""
    mine = settings.content()
    different = sorted(key for key in mine.keys() | stated.keys() if mine.get(key) != stated.get(key))
    if different:
        changes = "; ".join(f"{key}: {stated.get(key)!r} there, {mine.get(key)!r} asked for" for key in different)
        raise UserError(f"{what} belongs to another configuration ({changes}); delete the folder or choose another")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process prepares a folder; others wait, and then find it finished."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"{folder}: another process is preparing this folder; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Preparation:
    """The stages, in order. Each is a method that returns what its mark records."""

    def __init__(self, settings: DataSettings, folder: Path, work: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.work = work
        self.marks: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        corpus = self._begin()
        self._stage("documents", lambda: asdict(spill(corpus.records, self.settings, self.work)))
        self._stage("tokenizer", self._tokenizer)
        for split in SPLITS:
            self._stage(f"tokens-{split}", lambda split=split: self._tokens(split))  # type: ignore[misc]
        for split in SPLITS:
            self._stage(f"shards-{split}", lambda split=split: self._shards(split))  # type: ignore[misc]
        return self._finish(corpus)

    def _begin(self) -> Corpus:
        """Open the corpus; drop unfinished work if the corpus changed since; refuse another configuration's."""
        state = self.work / "state.json"
        corpus = open_corpus(self.settings)
        if state.exists():
            stated = json.loads(state.read_text(encoding="utf-8"))
            _check_same(stated["settings"], self.settings, f"{self.folder}: unfinished work there")
            if stated["inputs"] == corpus.inputs and stated["modified"] == corpus.modified:
                return corpus
            console.print("the corpus changed since the interrupted preparation; starting anew")
            for path in self.work.iterdir():
                path.unlink()
        content = self.settings.content()
        write_json(state, {"settings": content, "inputs": corpus.inputs, "modified": corpus.modified})
        return corpus

    def _stage(self, name: str, action: Callable[[], dict[str, Any]]) -> None:
        """Run a stage unless its mark exists."""
        mark = self.work / f"{name}.done.json"
        if not mark.exists():
            write_json(mark, action())
        self.marks[name] = json.loads(mark.read_text(encoding="utf-8"))

    def _tokenizer(self) -> dict[str, Any]:
        settings = self.settings.tokenizer
        if settings.load is not None:
            tokenizer = load_tokenizer(settings.load)
        else:
            texts = np.memmap(self.work / "documents.bin", np.uint8, "r")
            spans = np.memmap(self.work / "train.spans", SPAN, "r")
            tokenizer = train_tokenizer(texts, spans, settings)
        identifier = end_of_text_id(tokenizer, settings.eos_token)
        path = self.folder / "tokenizer.json"
        with atomic(path) as file:
            file.write(tokenizer.to_str(pretty=True).encode())
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        width = self.settings.sequence_length + 1
        samples_per_shard(width, token_dtype(vocab_size), self.settings.shard_bytes)  # refuse now, not after hours
        return {
            "vocab_size": vocab_size,
            "eos_token_id": identifier,
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
        )
        workers = self.settings.workers or len(os.sched_getaffinity(0))
        result = encode_split(self.work / f"{split}.spans", files, self.work / f"{split}.tokens", workers)
        rate = result["new_tokens"] / max(result["seconds"], 1e-9)
        console.print(f"tokenize {split}: {result['tokens']:,} tokens, {rate:,.0f} tokens/s")
        width = self.settings.sequence_length + 1
        if result["tokens"] < width:
            raise UserError(
                f"corpus {self.settings.corpus!r}: its {split} split has {result['tokens']} tokens, one block needs "
                f"{width}; shorten sequence_length, change validation_fraction or give more text"
            )
        return {"tokens": result["tokens"]}

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
                **self.marks["tokenizer"],
                "source": self.settings.content(),
                "inputs": corpus.inputs,
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
