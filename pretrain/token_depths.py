"""What each recursion does to each token: its loss with depth capped at 1 .. L, by class and by the depth that it took.

A cap lets no token execute more recursions, or pass a later exit (paper, Fig. 5c). A token's loss is that of predicting
the next one, whose class counts; its depth is its own.

Shapes: B rows, T tokens of a row, N validation tokens, L levels of depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.depth import method_of
from model.inference.text import pieces
from pretrain.data import fixed_batches
from pretrain.manifest import Mixture

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pretrain.parallel.strategy import Parallel
    from pretrain.validation import Validation

MOVED = 0.01  # nats: a token whose loss moves by less is neither better nor worse
END_OF_TEXT, PARTIAL = "end of text", "part of a character"
CLASSES = ("word start", "word continuation", "digit", "punctuation", "whitespace", PARTIAL, END_OF_TEXT)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def classify(piece: str, before: str, is_end: bool) -> str:
    """The class of a token, one of `CLASSES`. piece: the text that it stands for; before: that of the token before."""
    word = piece.strip()
    if is_end:
        return END_OF_TEXT
    if "\ufffd" in piece or not piece:
        return PARTIAL
    if not word:
        return "whitespace"
    if word.isdigit():
        return "digit"
    if not any(character.isalnum() for character in word):
        return "punctuation"
    return "word start" if piece[0].isspace() or not before or before[-1].isspace() else "word continuation"


def classes_of(row: Sequence[int], tokenizer: Tokenizer, ends: Iterable[int]) -> list[str]:
    """The class of every token of a row. ends: the tokens that end a text."""
    texts = ["", *pieces(tokenizer, list(row))]
    return [classify(texts[i + 1], texts[i], token in ends) for i, token in enumerate(row)]


@torch.no_grad()
def token_depths(validation: Validation, parallel: Parallel, tokenizer: Tokenizer) -> dict[str, Any]:
    """`summary` over the validation split, of one process. Causal where the model decides so, else top-k."""
    config = validation.config
    mode = "causal" if "causal" in method_of(config).modes(config) else "topk"
    caps: list[int | None] = [*range(1, method_of(config).levels(config) + 1), None]
    manifest = validation.manifest
    losses: list[list[Tensor]] = [[] for _ in caps]
    depths: list[Tensor] = []
    classes: list[str] = []
    parallel.model.eval()
    for source in manifest.sources.values() if isinstance(manifest, Mixture) else [manifest]:
        batches = fixed_batches(
            source,
            "validation",
            validation.micro_size,
            samples=validation.sequences,
            document_masking=validation.document_masking,
        )
        for batch in batches:
            rows = slice(batch.samples)  # the others only fill up the last batch
            targets = batch.targets[rows]
            real = targets != -100
            read = torch.cat([batch.input_ids[rows, :1], targets.where(real, 0)], 1)
            for row, kept in zip(read.tolist(), real.tolist(), strict=True):
                named = classes_of(row, tokenizer, np.ravel([config.eos_token_id]))[1:]
                classes += [name for name, keep in zip(named, kept, strict=True) if keep]
            there = batch.to(parallel.device)
            for place, cap in enumerate(caps):
                output = parallel.forward(
                    input_ids=there.input_ids,
                    document_ids=there.document_ids,
                    num_documents=there.num_documents,
                    routing_mode=mode,
                    max_recursions=cap,
                    use_cache=False,
                )
                logits = output.logits[rows].float()
                each = F.cross_entropy(logits.transpose(1, 2), there.targets[rows], reduction="none", ignore_index=-100)
                losses[place].append(each.cpu()[real])
            routing = output.routing
            depths.append(torch.full_like(targets, -1)[real] if routing is None else routing.depth[rows].cpu()[real])
    parallel.model.train()
    capped = np.stack([torch.cat(found).double().numpy() for found in losses])
    depth = torch.cat(depths).numpy()
    return {"routing_mode": mode} | summary(capped[:-1], capped[-1], depth, classes)


def summary(capped: Floats, own: Floats, depth: Ints, classes: Sequence[str]) -> dict[str, Any]:
    """capped: [L, N] losses under each cap; own: [N] without; depth: [N] recursions executed, -1 where none is routed.

    steps: from one cap to the next, the share of tokens whose loss falls (`better`) or rises (`worse`) by `MOVED` or
    more, and the mean change in nats. classes: tokens, mean losses under each cap, mean depth. depths: of each depth
    that was taken, tokens, their mean loss, and what it would be at depth 1.
    """
    named = np.array(classes)
    steps = []
    for place, change in enumerate(np.diff(capped, axis=0)):
        moved = {"better": (change <= -MOVED).mean(), "worse": (change >= MOVED).mean(), "change": change.mean()}
        steps.append({"to": place + 2, **{key: float(value) for key, value in moved.items()}})
    found: dict[str, Any] = {}
    for name in CLASSES:
        here = named == name
        if here.any():
            mean = float(depth[here].mean()) if depth[0] >= 0 else None
            found[name] = {"tokens": int(here.sum()), "losses": capped[:, here].mean(1).tolist(), "depth": mean}
    taken = []
    for value in np.unique(depth[depth >= 0]):
        here = depth == value
        row = {"depth": int(value), "tokens": int(here.sum())}
        taken.append(row | {"loss": float(own[here].mean()), "loss_at_one": float(capped[0, here].mean())})
    return {"tokens": len(own), "moved": MOVED, "steps": steps, "classes": found, "depths": taken}
