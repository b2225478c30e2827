"""Tiny corpora and prepared folders, made by the real preparation code in about a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.config import DataSettings
from data_prep.prepare import prepare

SYNTHETIC_TOKENS = 120  # a synthetic document has more tokens than this with a vocabulary of 300 to 600


def tiny_settings(folder: Path | str, **changes: Any) -> DataSettings:
    """Settings of a small synthetic corpus that is prepared in this process; `changes` replace top-level keys."""
    values: dict[str, Any] = {
        "folder": str(folder),
        "workers": 1,
        "corpus": "tiny",
        "sequence_length": 32,
        "source": {"kind": "synthetic", "documents": 60},
        "tokenizer": {"vocab_size": 300},
        "validation_fraction": 0.25,
    }
    return DataSettings.model_validate(values | changes)


def prepare_tiny(
    folder: Path | str,
    sequence_length: int = 32,
    vocab_size: int = 300,
    samples: int = 64,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Prepare a folder with at least `samples` train blocks of sequence_length + 1 tokens; return its manifest.

    changes: further keys of DataSettings, for instance shard_bytes=100_000 for several shards.
    """
    documents = 60 + 3 * samples * (sequence_length + 1) // (2 * SYNTHETIC_TOKENS)
    settings = tiny_settings(
        folder,
        sequence_length=sequence_length,
        seed=seed,
        source={"kind": "synthetic", "documents": documents},
        tokenizer={"vocab_size": vocab_size},
        **changes,
    )
    manifest = prepare(settings)
    assert manifest["splits"]["train"]["samples"] >= samples
    return manifest
