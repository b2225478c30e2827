"""The report of any set of runs: `python -m pretrain.report RUN... [--output DIR]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.settings import run_command
from pretrain.report.write import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description="Report on any set of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders that hold some")
    parser.add_argument("--output", type=Path, help="where the report goes (default: report/ beside or below the runs)")
    parser.add_argument("--published", action="store_true", help="draw the paper's published figures beside these")
    parser.add_argument("--allow-mixed", action="store_true", help="show runs that cannot be compared apart")
    parser.add_argument("--baseline", help="name to compare with (default: the vanilla model of the same width)")
    parser.add_argument(
        "--evidence", nargs="+", default=[], metavar="REPORT", help="reports that may answer the checklist for these"
    )
    parser.add_argument("--track", choices=["disabled", "offline", "online"], default="disabled", help="send to W&B")
    given = parser.parse_args(arguments)
    output = given.output or default_output(given.runs)
    write_report(
        given.runs,
        output,
        published=given.published,
        allow_mixed=given.allow_mixed,
        baseline=given.baseline,
        evidence=given.evidence,
        track=given.track,
    )
    return 0


def default_output(runs: Sequence[Path]) -> Path:
    """`report/` in the one folder that was given, or beside several."""
    return (runs[0] if len(runs) == 1 else runs[0].resolve().parent) / "report"


if __name__ == "__main__":
    run_command(main)
