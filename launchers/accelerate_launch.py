"""`accelerate launch` that lets ranks stop in order and passes on how they ended, as launchers/torchrun.py does.

python launchers/accelerate_launch.py [--shutdown-timeout SECONDS] [OPTIONS OF accelerate launch] pretrain/main.py ...

accelerate itself ends its ranks 30 s after a SIGTERM and exits with 1 and a traceback where they exited with 75.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    gc.disable()  # until all is imported (exit_status)

from accelerate.commands.launch import launch_command, launch_command_parser

from launchers.torchrun import exit_status, take_patience


def main(arguments: Sequence[str]) -> int:
    """Run `accelerate launch` with `arguments`; its ranks' exit status, as `exit_status`."""
    patience, rest = take_patience(arguments)
    options = launch_command_parser().parse_args(rest)
    return exit_status(lambda: launch_command(options), patience)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
