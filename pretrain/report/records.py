"""Records of runs: what a report needs of each, in one small file beside it.

Whoever doubts a report makes it again from its records, and a comparison goes on from them where its checkpoints are
not: `records` of launchers/compare.py. A record holds a run's config.yaml, run.json and metrics.jsonl, of the training
lines at most `LINES`, and no weights: a run that is not finished has none.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.settings import UserError
from pretrain.report.runs import Run, read_run

FILE = "records.tar.xz"
LINES = 100  # training lines that are kept of a run; all that tell of a validation or an event are


def pack(runs: Sequence[Run], path: Path) -> None:
    """Write the records of all finished runs, the same bytes for the same runs; none are left from before."""
    found = {run.folder.resolve(): run for run in runs if run.finished}
    for folder in [folder for folder in found if folder.parent.name == "branches"]:
        trunk = folder.parent.parent
        found.setdefault(trunk, read_run(trunk))
    path.unlink(missing_ok=True)
    if not found:
        return
    root = Path(os.path.commonpath([folder.parent for folder in found]))
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w:xz") as archive:
        for folder in sorted(found):
            for name, text in _record(found[folder]):
                content = text.encode()
                entry = tarfile.TarInfo(str(folder.relative_to(root) / name))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    os.replace(partial, path)


def unpack(path: Path, folder: Path) -> int:
    """Put the records into a comparison's folder; returns how many. A run that is there already stays as it is.

    Raises UserError for a file that is none of records.
    """
    partial = folder / f"{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    taken = 0
    try:
        with tarfile.open(path) as archive:
            archive.extractall(partial, filter="data")  # refuses what would lie outside
        for record in sorted(file.parent for file in partial.rglob("run.json")):
            target = folder / record.relative_to(partial)
            if record.parent.name != "branches" and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(record, target)
                taken += 1
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as records of runs: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return taken


def _record(run: Run) -> Iterable[tuple[str, str]]:
    """(name, content) of each file of a record."""
    facts = dict(run.facts)
    if parent := facts.get("parent"):
        facts["parent"] = parent | {"folder": parent["path"]}  # on another machine its place means nothing
    yield "run.json", json.dumps(facts, indent=1)
    with contextlib.suppress(FileNotFoundError):  # of a run that an older version trained
        yield "config.yaml", (run.folder / "config.yaml").read_text(encoding="utf-8")
    yield "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in _thinned(run.lines))


def _thinned(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines but those of training steps, and `LINES` of these, spread evenly, and the last; thinned ones stay."""
    training = [place for place, line in enumerate(lines) if not line.keys() & {"validation_loss", "event"}]
    dropped = set(training) - {*training[:: -(-(len(training) - 1) // LINES) or 1], *training[-1:]}
    return [line for place, line in enumerate(lines) if place not in dropped]
