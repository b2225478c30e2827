"""What may be asked of the server: OpenAI's fields of a completion, limits, and errors in OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.inference.sampling import SamplingParams

Ids = list[int]


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which a request is refused, and seconds after which a connection is closed.

    body: bytes; fields: names in a body; choices: prompts times n or best_of; messages: of a conversation; stops,
    stop_length: stop texts and characters of each; biases: entries of logit_bias; scores: log-probabilities in one
    answer; connections: open at once; head_seconds, body_seconds, write_seconds: for a request's head, its body, and a
    client that does not read; patience: for what runs when the server stops.
    """

    body: int = 1 << 20
    fields: int = 4096
    choices: int = 64
    messages: int = 1024
    stops: int = 16
    stop_length: int = 1024
    biases: int = 1024
    scores: int = 250_000
    connections: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    write_seconds: float = 60.0
    patience: int = 30


class ServiceError(Exception):
    """A refusal, with its HTTP status."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        # What a client sent may stand in it: no lone surrogates, which JSON's UTF-8 cannot carry, and no megabytes.
        message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message if len(message) <= 1000 else message[:1000] + "...")
        self.status, self.kind = status, kind


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    name, colon, _ = str(error).partition(":")
    param = name if colon and name.isidentifier() else None
    return {"error": {"message": str(error), "type": error.kind, "param": param, "code": error.status}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(BaseModel):
    """Fields that every request may have: OpenAI's, and those of this server: top_k, depth (a `DepthPolicy`), and what
    `mor` in the answer holds: return_depth (recursions of each token), return_scores (of its gates), return_flops.

    Null means the default everywhere.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    n: int = Field(1, ge=1)
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    user: str | None = None
    top_k: int = 0
    depth: str | None = None
    return_depth: bool = False
    return_scores: bool = False
    return_flops: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None or k == "prompt"} if isinstance(body, dict) else body

    def checked(self) -> Asked:
        """Self. Raises ValueError where fields do not fit together."""
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream")
        if self.stream_options and self.stream_options.include_obfuscation:
            raise ValueError("stream_options: include_obfuscation is not offered; leave it out, or false")
        return self

    def stops(self) -> list[str]:
        """Stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Asked):
    """OpenAI's fields of a completion. A prompt that is null is the start of a document. What cannot be honoured is
    refused by name: suffix, and stream_options.include_obfuscation.
    """

    prompt: Any
    best_of: int | None = Field(None, ge=1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    max_tokens: int = Field(16, ge=0)
    suffix: str | None = None

    def checked(self) -> CompletionRequest:
        """Self. Raises ValueError where fields do not fit together."""
        super().checked()
        if self.suffix:
            raise ValueError("suffix: this model completes a text at its end alone; leave it out")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: must be at least n, {self.best_of} is less than {self.n}")
        if self.candidates > self.n and self.stream:
            raise ValueError("best_of: which answer is best is known when all have ended; leave out stream")
        return self

    @property
    def candidates(self) -> int:
        """Answers made for each prompt, of which the best `n` are given."""
        return max(self.n, self.best_of or 1)


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine. texts: of the prompts, None where token ids were given."""

    asked: CompletionRequest
    prompts: list[Ids]
    texts: list[str | None]
    params: list[SamplingParams]
