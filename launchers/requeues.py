"""Whether a run may go back into the queue once more. For job scripts: loads no torch.

python launchers/requeues.py RUN_DIR [--limit N]

Exit codes: 0 yes, and it is counted in RUN_DIR/requeues.json; 1 no: the run was put back N times in succession without
a new checkpoint. A checkpoint of a later step sets the count back.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import re
from dataclasses import asdict, dataclass

from data_prep.settings import run_command

FILE = "requeues.json"
LIMIT = 5


@dataclass(frozen=True)
class Requeues:
    """What a run directory knows of its requeues.

    total: all there were. without_progress: those in succession since `step`, the step that checkpoints had reached.
    """

    total: int = 0
    without_progress: int = 0
    step: int = 0

    @staticmethod
    def read(run_dir: Path) -> Requeues:
        """The record of a run directory; an empty one where there is none or it cannot be read."""
        try:
            found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
            return Requeues(int(found["total"]), int(found["without_progress"]), int(found["step"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Requeues()

    def one_more(self, step: int) -> Requeues:
        """The record after a requeue at which checkpoints have reached `step`."""
        return Requeues(self.total + 1, 0 if step > self.step else self.without_progress + 1, step)

    def write(self, run_dir: Path) -> None:
        """Write the record whole or not at all."""
        partial = run_dir / f"{FILE}.partial"
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        os.replace(partial, run_dir / FILE)


def steps_saved(run_dir: Path) -> int:
    """Steps that committed checkpoints hold: the newest of the run, plus the newest of each of its branches."""
    newest: dict[Path, int] = {}
    for pattern in ("checkpoints/step-*/COMMITTED.json", "branches/*/checkpoints/step-*/COMMITTED.json"):
        for marker in run_dir.glob(pattern):
            if match := re.fullmatch(r"step-(\d+)", marker.parent.name):
                folder = marker.parent.parent
                newest[folder] = max(newest.get(folder, 0), int(match[1]))
    return sum(newest.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help="requeues in succession without progress")
    options = parser.parse_args()
    if not options.run_dir.is_dir():  # nowhere to count: Slurm's own count of this job's starts serves
        return int(int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= options.limit)
    record = Requeues.read(options.run_dir).one_more(steps_saved(options.run_dir))
    if record.without_progress > options.limit:
        print(
            f"{options.run_dir}: put back into the queue {options.limit} times without a checkpoint beyond those up to "
            f"step {record.step}; see why in the log, then submit it again (more tries: REQUEUE_LIMIT=N)"
        )
        Requeues(record.total - 1, 0, record.step).write(options.run_dir)  # submitted again, it may try again
        return 1
    try:
        record.write(options.run_dir)
    except OSError as error:
        print(f"{options.run_dir}: the requeue is not counted: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
