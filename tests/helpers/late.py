"""A command that gets a signal when all is done and only Python's own end is left, where its handlers are gone."""

from __future__ import annotations

import signal
import sys

PROGRAM = """
import os, runpy, sys
class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=int(sys.argv[1])):
        kill(me, number)
sys.late = Late()
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def signalled_at_the_end(number: signal.Signals, script: str, *arguments: object) -> list[str]:
    """The command line that runs `script` (a path from the repository's root) with `arguments`, and then signals it."""
    return [sys.executable, "-c", PROGRAM, str(int(number)), script, *map(str, arguments)]
