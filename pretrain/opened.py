"""A trained model, opened for whatever looks at it: evaluation, perplexity, views."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from data_prep.settings import UserError
from model.config import MoRConfig
from model.depth import method_of
from model.inference.text import load_checkpoint
from pretrain.config import ExperimentSettings, read_settings

if TYPE_CHECKING:  # what reads the arguments alone does not wait for models and checkpoints
    from transformers import PreTrainedTokenizerFast

    from model.modeling import MoRForCausalLM

TRAINED = {"torch.bfloat16": "bf16", "bfloat16": "bf16", "torch.float32": "fp32", "float32": "fp32"}


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to be evaluated. run: the run directory that it belongs to, with its settings, or None."""

    model: MoRForCausalLM
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    run: Path | None
    settings: ExperimentSettings | None

    @property
    def is_final(self) -> bool:
        """Whether this is the last model of a finished run."""
        return self.run is not None and self.folder == self.run / "final"

    @property
    def trained_in(self) -> str:
        """The precision that the run was trained in, else the one that the weights are kept in."""
        kept = self.settings.precision if self.settings else str(self.model.config.dtype or "")
        return TRAINED.get(kept, kept)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Load a run directory's model (its final one, else its newest checkpoint), a checkpoint, or an exported folder.

    Raises UserError that names what is missing.
    """
    run = next((path for path in (folder, folder.parent, folder.parent.parent) if (path / "run.json").is_file()), None)
    settings = read_settings(run / "config.yaml") if run is not None else None
    if folder == run:
        from pretrain.checkpoint import committed

        steps = committed(folder / "checkpoints")
        if not (folder / "final" / "config.json").is_file() and not steps:
            raise UserError(f"{folder}: this run has no checkpoint yet")
        folder = folder / "final" if (folder / "final" / "config.json").is_file() else steps[-1][1]
    with _exported(folder, settings) as exported:
        try:
            model, tokenizer = load_checkpoint(exported)
        except ValueError as error:
            raise UserError(str(error)) from None
    return Checkpoint(model.eval(), wrap_tokenizer(tokenizer, model.config), folder, run, settings)


def wrap_tokenizer(tokenizer: Tokenizer, config: MoRConfig) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it, with the model's end-of-text token."""
    eos = config.eos_token_id
    token = tokenizer.id_to_token(eos) if isinstance(eos, int) else None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=token)


@contextlib.contextmanager
def _exported(folder: Path, settings: ExperimentSettings | None) -> Iterator[Path]:
    """The folder itself, or a training checkpoint in the form that `from_pretrained` reads, for as long as it takes."""
    from pretrain.checkpoint import MARKER, export, verify

    if not (folder / MARKER).is_file():
        yield folder
        return
    if settings is None:
        raise UserError(f"{folder}: a training checkpoint outside its run directory; export it first")
    if fault := verify(folder):
        raise UserError(f"{folder}: {fault}; use another checkpoint of the run")
    with tempfile.TemporaryDirectory() as temporary:
        export(folder, Path(temporary), settings.data.folders[0][0] / "tokenizer.json")
        yield Path(temporary)


def has_causal_decision(config: MoRConfig) -> bool:
    """Whether the model can route a token without looking at later ones."""
    return method_of(config).refuses(config, "causal") is None
