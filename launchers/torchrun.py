"""`torchrun`, with the exit status of the first rank that failed.

torchrun itself exits with 1 whatever its ranks exited with, so that a scheduler cannot tell a run that asks to be
started again (75, after a checkpoint) from one that failed. The arguments are torchrun's own.
"""

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

EXPLAINED = (2, 75)  # a user's mistake and the request to be started again: the ranks have said all there is to say


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments`; 0, the first failed rank's exit status, or 128 + the number of the signal."""
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode not in EXPLAINED:
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
