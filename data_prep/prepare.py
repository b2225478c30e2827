"""Raw text -> shuffled webdataset shards with a manifest.

    python data_prep/prepare.py --config configs/data/NAME.yaml [key=value ...]
    python data_prep/prepare.py --verify FOLDER
    python data_prep/prepare.py --status FOLDER
    python data_prep/prepare.py --inspect FOLDER... [--position N] [--page FILE]

The corpus is cut into parts (parts.py); each stage (stages.py) does them one by one, in this process, in several or on
many machines (engine.py, launchers/submit.py). An interrupted preparation goes on with the parts that have no mark in
FOLDER/work. The manifest comes last, then FOLDER/work is removed. The bytes depend on corpus and settings alone.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from data_prep.changes import check_unchanged, differing, other_configuration
from data_prep.config import DataSettings, SourceSettings, TokenizerSettings
from data_prep.documents import SPLITS
from data_prep.engine import check_jobs, run_stage
from data_prep.estimate import check_room
from data_prep.files import write_json
from data_prep.inputs import names_of
from data_prep.manifest import read_manifest, tool_versions, unigram_loss, verify, write_manifest
from data_prep.parts import from_json, to_json, uncut
from data_prep.progress import say, standing
from data_prep.settings import Settings, UserError, describe, load, run_command
from data_prep.shards import samples_per_member, samples_per_shard
from data_prep.sources import Corpus, open_corpus
from data_prep.stages import (
    STAGES,
    Shards,
    cores,
    document_counts,
    most_repeated,
    tokenizer_fingerprint,
    total_lengths,
    vocab_size,
)
from data_prep.tokenizer import given_tokenizer, token_dtype

ORDER = list(STAGES)
KINDS_OF_FILES = ("text", "jsonl", "csv", "parquet")  # hashed while they are read


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
        with locked(folder):
            manifest = _finished(settings, folder)  # perhaps by the process that held the lock
            if manifest is not None:
                return manifest
            check_jobs(folder)
            corpus = begin(settings, settings.workers or cores())
            try:
                for stage in ORDER:
                    run_stage(settings, stage)
            except UserError:  # its message says what to change: let the same folder go on with the change
                (folder / "work" / "refused").touch()
                raise
            return finish(settings, corpus)
    except OSError as error:
        raise _explain(error, folder) from error


def _finished(settings: DataSettings, folder: Path) -> dict[str, Any] | None:
    """The manifest, if the folder is finished; raise UserError if it is of another configuration or corpus."""
    manifest = read_manifest(folder)
    if manifest is not None:
        different = differing(manifest["source"], settings)
        if different:
            raise other_configuration(f"{folder}:", different)
        check_unchanged(settings, folder, manifest)
        shutil.rmtree(folder / "work", ignore_errors=True)  # left by a process killed after the manifest was written
    return manifest


def _explain(error: OSError, folder: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{error.filename or folder}: no space left on the disk; finished stages are kept in {folder / 'work'}: "
            "free some space and run the same command again"
        )
    return UserError(f"{error.filename or folder}: {error.strerror or error}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
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


def _stage_of(key: str) -> str:
    """The first stage whose result depends on a setting."""
    return {"tokenizer": "tokenizer", "sequence_length": "scatter", "shard_bytes": "shards"}.get(key, ORDER[0])


def begin(settings: DataSettings, workers: int | None = None) -> Corpus:
    """Look at corpus and folder, cut the corpus and keep the work that still fits.

    workers: tasks on this machine; None where they run elsewhere. Raises UserError for what would be refused after
    hours of work, also for want of disk or memory, and for another configuration's folder.
    """
    folder = Path(settings.folder)
    work = folder / "work"
    if not work.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files but no prepared data; choose another folder or empty it")
    given = _check_tokenizer(settings)
    corpus = open_corpus(settings)
    path = work / "state.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    size = settings.tokenizer.vocab_size if given is None else vocab_size(given)
    room = check_room(settings, corpus.parts, size or 0, workers) if before is None else None
    for line in [*corpus.remarks, *([room] if room else [])]:
        say(line)
    work.mkdir(exist_ok=True)
    state: dict[str, Any] = {
        "settings": settings.content(),
        "signature": corpus.signature,
        "tokenizer": None if given is None else tokenizer_fingerprint(given),
        "licence": corpus.licence,
        "inputs": None if settings.source.kind in KINDS_OF_FILES else corpus.identify(),
    }
    if before is not None:
        _drop_unfitting(settings, corpus, before, state)
    write_json(work / "parts.json", to_json(corpus.parts))
    write_json(path, state)
    (work / "refused").unlink(missing_ok=True)
    return corpus


def _check_tokenizer(settings: DataSettings) -> Tokenizer | None:
    given = None if settings.tokenizer.load is None else given_tokenizer(settings.tokenizer)
    size = settings.tokenizer.vocab_size if given is None else vocab_size(given)
    assert size is not None
    samples_per_shard(settings.sequence_length + 1, token_dtype(size), settings.shard_bytes)
    return given


def _drop_unfitting(settings: DataSettings, corpus: Corpus, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Forget the finished parts that another corpus, tokenizer or setting had led to, and say so."""
    folder, work = Path(settings.folder), Path(settings.folder, "work")
    different = differing(before["settings"], settings)
    first = min((_stage_of(key) for key in different), key=ORDER.index, default=ORDER[-1])
    touched = [stage for stage in ORDER[ORDER.index(first) :] if (work / stage).exists()]
    if different and touched and not (work / "refused").exists():
        raise other_configuration(f"{folder}: unfinished work there", different)
    if different:
        say(f"{', '.join(different)} changed since the interrupted preparation; what rests on it is redone")
        _drop(settings, first)
    if _inputs_changed(settings, corpus, before, now):
        say("the corpus changed since the interrupted preparation; starting anew")
        _drop(settings, ORDER[0])
    elif before["tokenizer"] != now["tokenizer"] and "tokenizer" not in different:
        say("the tokenizer changed since the interrupted preparation; encoding anew")
        _drop(settings, "tokenizer")


def _inputs_changed(settings: DataSettings, corpus: Corpus, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the work rests on another corpus. Files that were only touched are compared by what is in them."""
    if before["inputs"] is not None:
        return before["inputs"] != now["inputs"]
    if before["signature"] == now["signature"]:
        return False
    if not (Path(settings.folder) / "work" / "read.json").exists():
        return True  # little is lost, and what was read is not known
    return _read_inputs(settings, corpus) != corpus.identify()


def _read_inputs(settings: DataSettings, corpus: Corpus) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file as it was read."""
    read = STAGES["read"](settings)
    hashes = {int(item): found for mark in read.finished() for item, found in mark["sha256"].items()}
    names = names_of(corpus.paths)
    sizes = [path.stat().st_size for path in corpus.paths]
    return [
        {"name": name, "bytes": size, "sha256": hashes.get(item)}
        for item, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]


def _drop(settings: DataSettings, first: str) -> None:
    """Forget stage `first`, those after it, and those before it whose files are gone already."""
    folder = Path(settings.folder)
    work = folder / "work"
    if first in ("tokenizer", "encode") and _freed(work, "read", "*.bin"):
        first = "read"
    if first == "scatter" and _freed(work, "encode", "*.train"):
        first = "read"
    for stage in ORDER[ORDER.index(first) :]:
        shutil.rmtree(work / stage, ignore_errors=True)
        (work / f"{stage}.json").unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)


def _freed(work: Path, stage: str, files: str) -> bool:
    """Whether files of finished parts are gone."""
    return len(list((work / stage).glob("*.json"))) > len(list((work / stage).glob(files)))


def finish(settings: DataSettings, corpus: Corpus) -> dict[str, Any]:
    """Write the manifest from the marks of all stages and remove the work."""
    folder = Path(settings.folder)
    stages = {name: STAGES[name](settings) for name in ORDER}
    shards = stages["shards"]
    assert isinstance(shards, Shards)
    splits, counts = shards.splits()
    state = json.loads((folder / "work" / "state.json").read_text(encoding="utf-8"))
    encoded = stages["encode"].finished()
    tokenizer = {key: value for key, value in stages["tokenizer"].finished()[0].items() if key != "seconds"}
    for partial in folder.glob("*/.*.partial"):  # of a task that was killed
        partial.unlink(missing_ok=True)
    manifest = write_manifest(
        folder,
        {
            "sequence_length": settings.sequence_length,
            "token_dtype": shards.dtype.name,
            "samples_per_member": samples_per_member(shards.width, shards.dtype),
            "unknown_tokens": {split: sum(mark[split]["unknown"] for mark in encoded) for split in SPLITS},
            **tokenizer,
            "source": settings.content(),
            "inputs": _read_inputs(settings, corpus) if state["inputs"] is None else state["inputs"],
            "corpus": settings.corpus,
            "licence": corpus.licence,
            "seed": settings.seed,
            "documents": document_counts(settings),
            "document_lengths": {split: total_lengths(encoded, split) for split in SPLITS},
            "repeated_documents": most_repeated(stages["select"].finished()),
            "unigram_loss": unigram_loss(counts["train"].tolist(), counts["validation"].tolist()),
            "splits": splits,
            "tools": tool_versions(),
        },
    )
    shutil.rmtree(folder / "work")
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


def status(folder: Path) -> str:
    """How far the preparation of a folder is, by its marks: a line for each stage, whoever works on it."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return f"{summary(folder, manifest)}\n  finished"
    state = folder / "work" / "state.json"
    if not state.exists():
        raise UserError(f"{folder}: nothing is prepared here, and nothing is being prepared")
    content = json.loads(state.read_text(encoding="utf-8"))["settings"]
    parts: dict[str, type[Settings]] = {"source": SourceSettings, "tokenizer": TokenizerSettings}
    values: dict[str, Any] = {
        key: parts[key].model_construct(**value) if key in parts else value for key, value in content.items()
    }
    settings = DataSettings.model_construct(folder=str(folder), **values)
    lines = []
    for name in ORDER:
        try:
            lines.append(standing(STAGES[name](settings)).line())
        except UserError:  # an earlier stage is not done
            lines.append(f"{name}: waits for the stages before it")
    if settings.source.kind in KINDS_OF_FILES:
        lines += uncut(from_json(json.loads((folder / "work" / "parts.json").read_text(encoding="utf-8"))), settings)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare training data: raw text -> shuffled webdataset shards.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--config", metavar="FILE", help="YAML settings, for instance configs/data/sotu.yaml")
    action.add_argument("--verify", metavar="FOLDER", help="compare a prepared folder with its manifest, by sha256")
    action.add_argument("--status", metavar="FOLDER", help="how far a preparation is: parts, throughput, time left")
    action.add_argument(
        "--inspect", metavar="FOLDER", nargs="+", help="what prepared folders hold, as tables and one HTML page"
    )
    parser.add_argument(
        "--position", type=int, default=0, metavar="N", help="--inspect: first train block that is shown"
    )
    parser.add_argument("--page", metavar="FILE", help="--inspect: the HTML page (default: FOLDER.html)")
    parser.add_argument("--print-config", action="store_true", help="show the settings with their meaning and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    options = parser.parse_args(arguments)
    if options.verify:
        if options.overrides or options.print_config:
            raise UserError("--verify takes a folder and nothing else")
        print(f"{summary(Path(options.verify), verify(Path(options.verify)))}\n  every shard has its sha256")
        return 0
    if options.status:
        print(status(Path(options.status)))
        return 0
    if options.inspect:
        from data_prep.inspection import inspect

        folders = [Path(folder) for folder in options.inspect]
        inspect(folders, options.position, Path(options.page or f"{folders[0]}.html"))
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
