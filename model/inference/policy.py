"""How deep tokens go: as the router says, or as whoever asks wants it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from model.config import MoRConfig
from model.depth import method_of, stages_of

FORMS = "adaptive, uniform:N, cap:N, progressive:A-B, or of exits exit:THRESHOLD or full"


@dataclass(frozen=True)
class DepthPolicy:
    """How many recursions a token executes: as the router says (`adaptive`), exactly n (`uniform`), at most n (`cap`),
    or exactly as many as its place says (`progressive`), which rise from `first` to n in equal stretches over the
    prompt and as long an answer as was asked for.

    With exits, 1 is to leave at the first of them; for a whole engine, `exit` takes another threshold than the model's,
    and `full` closes them. Without a router `adaptive` is all of them.
    """

    mode: str = "adaptive"
    recursions: int | None = None
    first: int | None = None
    threshold: float | None = None

    @classmethod
    def parse(cls, text: str) -> DepthPolicy:
        """From one of `FORMS`. Raises ValueError."""
        if text in ("adaptive", "full"):
            return cls(text)
        if found := re.fullmatch(r"exit:(\d{1,6}(\.\d{0,9})?(e-?\d{1,2})?)", text, re.ASCII):
            return cls("exit", threshold=float(found[1]))
        if found := re.fullmatch(r"(uniform|cap):(\d{1,6})", text, re.ASCII):
            return cls(found[1], int(found[2]))
        if found := re.fullmatch(r"progressive:(\d{1,6})-(\d{1,6})", text, re.ASCII):
            return cls("progressive", int(found[2]), int(found[1]))
        raise ValueError(f"depth: expected {FORMS}, got {text[:100]!r}")

    def __str__(self) -> str:
        if self.recursions is None:
            return self.mode if self.threshold is None else f"{self.mode}:{self.threshold:g}"
        return f"{self.mode}:{'' if self.first is None else f'{self.first}-'}{self.recursions}"

    def checked(self, config: MoRConfig, most: int | None = None) -> DepthPolicy:
        """Self, if a model of this configuration can follow it. most: recursions that are offered; None: all.

        Raises ValueError."""
        if self.mode == "adaptive":
            return self
        if self.mode in ("exit", "full"):
            if most is not None:
                raise ValueError(f"depth: {self} is set for a whole engine, not for a request; leave it out")
            if "full" not in method_of(config).modes(config):
                raise ValueError(f"depth: {self} needs exits, and this is a {config.architecture} model; use adaptive")
            return self
        most, first = method_of(config).levels(config) if most is None else most, self.first or 1
        if self.recursions is None or not 1 <= first <= self.recursions <= most:
            raise ValueError(f"depth: {self} does not fit 1 to {most} recursions")
        if self.first is not None and any(s.gate is None and s.uses[-1].recursion for s in stages_of(config)):
            raise ValueError(
                f"depth: {self} needs tokens that may stop at different recursions; those of a {config.architecture} "
                "model pass the same ones; use cap:N"
            )
        return self

    def limit(self, config: MoRConfig) -> int:
        """Most recursions of a token."""
        return method_of(config).levels(config) if self.recursions is None else self.recursions

    @property
    def exact(self) -> bool:
        """Whether every token takes all that it may."""
        return self.mode in ("uniform", "progressive")

    def limits(self, positions: np.ndarray, length: int, most: int) -> np.ndarray:
        """Recursions that tokens at `positions` of a text of `length` may take, at most `most`."""
        if self.first is None:
            return np.full(len(positions), most)
        return self.first + positions * (most - self.first + 1) // length
