"""Reading DeepSpeed's checkpoints as data: its loader and its converter unpickle, which could run code of who wrote.

Both read through torch.load, which is made to build tensors and the three plain classes that DeepSpeed writes, and
nothing else. Run by path, with the arguments of `deepspeed.checkpoint.ds_to_universal`, it is that converter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # outdoes weights_only=False, which DeepSpeed asks for


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within it torch.load refuses (UnpicklingError) what is neither a tensor nor a class of DeepSpeed's own files."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def main() -> None:
    from deepspeed.checkpoint import ds_to_universal

    with safe_loading():
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
