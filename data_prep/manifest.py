"""The manifest of a prepared folder: written last, so that a folder with a manifest is whole."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import SPLITS
from data_prep.files import fingerprint, sha256_of, write_json
from data_prep.progress import progress_bar
from data_prep.settings import UserError
from data_prep.shards import token_offsets

NAME = "manifest.json"
VERSION = 1


def unigram_loss(train_counts: Sequence[int], validation_counts: Sequence[int]) -> float:
    """Mean -log p over validation targets, in nats per token, of p = (train count + 1) / (train total + V).

    Both: [V] occurrences of each id among the targets of a split. To nine decimals: CPUs round a logarithm differently,
    and the figure is part of the fingerprint, by which the same data are known on every machine.
    """
    train = np.asarray(train_counts, np.float64) + 1.0
    validation = np.asarray(validation_counts, np.float64)
    return round(float(-(validation @ np.log(train / train.sum())) / validation.sum()), 9)


def tool_versions() -> dict[str, str]:
    """Versions that can change the bytes of a prepared folder."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "tokenizers")}


def write_manifest(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Add version and fingerprint to `fields` and write them as the folder's manifest."""
    manifest = {"version": VERSION, **fields}
    assert math.isfinite(manifest["unigram_loss"])
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(folder / NAME, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None if there is none. Raises UserError for an altered one or another version."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stated = manifest.pop("fingerprint")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of prepared data ({error})") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{path}: version {manifest.get('version')}, this code reads version {VERSION}; prepare again")
    if fingerprint(manifest) != stated:
        raise UserError(f"{path}: altered: its content does not have the fingerprint that it states; prepare again")
    return {**manifest, "fingerprint": stated}


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file of a prepared folder with its manifest; return the manifest.

    Raises UserError naming each file that is missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no {NAME}: not a prepared folder, or its preparation was not finished")
    wrong = []
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        wrong.append(f"{tokenizer}: missing")
    elif sha256_of(tokenizer) != manifest["tokenizer_fingerprint"]:
        wrong.append(f"{tokenizer}: altered: sha256 differs from the manifest's")
    width, dtype = manifest["sequence_length"] + 1, np.dtype(manifest["token_dtype"]).newbyteorder("<")
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    with progress_bar("verify", sum(shard["bytes"] for shard in shards), "bytes") as advance:
        for shard in shards:
            fault = _fault(folder / shard["name"], shard, width, dtype, manifest.get("samples_per_member"))
            if fault:
                wrong.append(f"{folder / shard['name']}: {fault}")
            advance(shard["bytes"])
    if wrong:
        raise UserError("\n".join([*wrong, "delete the folder and prepare it again, or copy these files anew"]))
    return manifest


def _fault(path: Path, shard: dict[str, Any], width: int, dtype: np.dtype, per_member: int | None) -> str | None:
    """What is wrong with one tar or the index beside it; None if nothing is."""
    if not path.exists():
        return "missing"
    if path.stat().st_size != shard["bytes"]:
        return f"truncated or altered: {path.stat().st_size} bytes, the manifest states {shard['bytes']}"
    if sha256_of(path) != shard["sha256"]:
        return "altered: sha256 differs from the manifest's"
    index = path.with_suffix(".idx.npy")
    try:
        offsets = np.load(index)
    except (OSError, ValueError) as error:
        return f"its index {index.name} cannot be read: {error}"
    if not np.array_equal(offsets, token_offsets(shard["samples"], width, dtype, per_member)):
        return f"its index {index.name} does not point to its samples"
    return None
