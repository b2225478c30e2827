"""Whether a prepared or half prepared folder still is what the settings ask for: same configuration, same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.config import DataSettings, needed_key
from data_prep.files import sha256_of
from data_prep.inputs import differences, find_files, signature_time
from data_prep.packages import CORPORA
from data_prep.progress import say
from data_prep.settings import UserError
from data_prep.sources import dataset_files, dataset_revision
from data_prep.stages import tokenizer_fingerprint
from data_prep.tokenizer import load_tokenizer


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
            now = tokenizer_fingerprint(load_tokenizer(settings.tokenizer.load))
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


def differing(stated: dict[str, Any], settings: DataSettings) -> dict[str, str]:
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


def other_configuration(what: str, different: dict[str, str]) -> UserError:
    changes = "; ".join(f"{key}: {values}" for key, values in different.items())
    return UserError(f"{what} belongs to another configuration ({changes}); delete the folder or choose another")
