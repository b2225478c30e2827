"""Print the run directory of an experiment; the arguments are pretrain/main.py's. For job scripts: loads no torch."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from data_prep.settings import UserError, expand, merge, parse_overrides, read_yaml, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--restart", action="store_true", help="changes nothing here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    settings = merge(read_yaml(options.config), parse_overrides(options.overrides))
    if not settings.get("run_dir"):
        raise UserError(f"{options.config}: key 'run_dir' is required")
    print(expand(str(settings["run_dir"])))
    return 0


if __name__ == "__main__":
    run_command(main)
