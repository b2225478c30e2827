"""What may be asked of the server: OpenAI's fields of a completion, their bounds, and errors in OpenAI's form.

A body is taken apart outside the event loop, and whatever can be large is measured before anything else is done with
it: a request that will be refused costs little.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tokenizers import Tokenizer

from model.inference.policy import DepthPolicy
from model.inference.sampling import SamplingParams

Ids = list[int]
LARGE = 1 << 16  # bytes of a body that is counted before it is parsed, which nothing interrupts
_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which a request is refused, and seconds after which a connection is closed.

    body: bytes; fields: names in a body; choices: prompts times n or best_of; stops, stop_length: stop texts and
    characters of each; biases: entries of logit_bias; scores: log-probabilities in one answer; connections: open at
    once; head_seconds, body_seconds, write_seconds: for a request's head, its body, and a client that does not read;
    patience: for what runs when the server stops.
    """

    body: int = 1 << 20
    fields: int = 4096
    choices: int = 64
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


class CompletionRequest(BaseModel):
    """OpenAI's fields of a completion, and those of this server: top_k, depth (a `DepthPolicy`), and what `mor` in the
    answer holds: return_depth (recursions of each token), return_scores (of its gates), return_flops.

    Null means the default everywhere; a prompt that is null is the start of a document. What cannot be honoured is
    refused by name: suffix, and stream_options.include_obfuscation.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Any
    model: str | None = None
    best_of: int | None = Field(None, ge=1)
    echo: bool = False
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    logprobs: int | None = Field(None, ge=0, le=5)
    max_tokens: int = Field(16, ge=0)
    n: int = Field(1, ge=1)
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
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

    @property
    def candidates(self) -> int:
        """Answers made for each prompt, of which the best `n` are given."""
        return max(self.n, self.best_of or 1)

    def stops(self) -> list[str]:
        """Stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine. texts: of the prompts, None where token ids were given."""

    asked: CompletionRequest
    prompts: list[Ids]
    texts: list[str | None]
    params: list[SamplingParams]


class Reader:
    """Turns bodies into requests for one model; from any thread. ends: token sequences that end a text."""

    def __init__(self, tokenizer: Tokenizer, context: int, ends: list[Ids], limits: Limits):
        self.tokenizer, self.context, self.ends, self.limits = tokenizer, context, ends, limits
        # No text of more characters fits into the context.
        self.longest_text = context * max(map(len, tokenizer.get_vocab()), default=1)

    def read(self, body: bytes | bytearray) -> Prepared:
        """Raises ServiceError naming the field that is wrong."""
        try:
            self._counted(body)
            content = json.loads(body)
        except ServiceError:
            raise
        except (ValueError, RecursionError) as error:
            raise ServiceError(400, f"body: no JSON object: {error}") from None
        try:
            return self._prepare(self._checked(content))
        except ValueError as error:
            raise ServiceError(400, str(error)) from None

    def _counted(self, body: bytes | bytearray) -> None:
        """Refuse a large body of more lists or fields than any request has, by their signs outside of texts."""
        if len(body) < LARGE:
            return
        limits = self.limits
        texts = (body.count(b'"') - body.count(b'\\"')) // 2
        most = limits.choices + limits.stops + 2 * limits.fields
        if texts > most:
            raise ServiceError(400, f"body: {texts} texts; a request has at most {most}")
        bare = _TEXTS.sub(b"", body)
        for sign, most, what in (
            (b"[", limits.choices + limits.stops, "lists"),
            (b":", limits.fields, "fields"),
        ):
            if bare.count(sign) > most:
                raise ServiceError(400, f"body: {bare.count(sign)} {what}; a request has at most {most}")

    def _checked(self, content: Any) -> CompletionRequest:
        if not isinstance(content, dict):
            raise ValueError("body: expected a JSON object")
        unknown = [name for name in content if name not in CompletionRequest.model_fields]
        if unknown:
            raise ValueError(f"{unknown[0][:100]}: no field of this server's completions")
        self._bounded(content)
        try:
            asked = CompletionRequest.model_validate(content)
        except ValidationError as error:
            faults = {".".join(map(str, e["loc"][:1])) or "body": e["msg"] for e in error.errors()}
            raise ValueError("; ".join(f"{name}: {text}" for name, text in faults.items())) from None
        if asked.suffix:
            raise ValueError("suffix: this model completes a text at its end alone; leave it out")
        if asked.stream_options and not asked.stream:
            raise ValueError("stream_options: only with stream")
        if asked.stream_options and asked.stream_options.include_obfuscation:
            raise ValueError("stream_options: include_obfuscation is not offered; leave it out, or false")
        if asked.best_of is not None and asked.best_of < asked.n:
            raise ValueError(f"best_of: must be at least n, {asked.best_of} is less than {asked.n}")
        if asked.candidates > asked.n and asked.stream:
            raise ValueError("best_of: which answer is best is known when all have ended; leave out stream")
        return asked

    def _bounded(self, content: dict[str, Any]) -> None:
        """Counts and lengths, before anything looks into what is long."""
        limits, stop, bias = self.limits, content.get("stop"), content.get("logit_bias")
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if len(stops) > limits.stops or any(text == "" for text in stops):
            raise ValueError(f"stop: give at most {limits.stops} texts, none of them empty")
        if any(isinstance(text, str) and len(text) > limits.stop_length for text in stops):
            raise ValueError(f"stop: a text of more than {limits.stop_length} characters")
        if isinstance(bias, dict) and len(bias) > limits.biases:
            raise ValueError(f"logit_bias: more than {limits.biases} tokens")

    def _prepare(self, asked: CompletionRequest) -> Prepared:
        given, limits = self._given(asked.prompt), self.limits
        if not 1 <= len(given) * asked.candidates <= limits.choices:
            raise ValueError(f"prompt: {len(given)} texts times n or best_of must make 1 to {limits.choices} choices")
        texts = [item if isinstance(item, str) else None for item in given]
        written = [text for text in texts if text is not None]
        # A batch, since it is encoded without holding the interpreter's lock.
        encoded = iter(self.tokenizer.encode_batch(written) if written else ())
        prompts = [next(encoded).ids if isinstance(item, str) else item for item in given]
        listed = 0 if asked.logprobs is None else 1 + asked.logprobs
        tokens = sum((len(prompt) if asked.echo else 0) + asked.max_tokens for prompt in prompts)
        if listed * tokens * asked.candidates > limits.scores:
            raise ValueError(f"logprobs: the answer would list more than {limits.scores}; ask for fewer at once")
        return Prepared(asked, prompts, texts, self._params(asked))

    def _given(self, prompt: Any) -> list[str | Ids]:
        """Texts and lists of token ids, each of a length that may fit. Raises ValueError."""
        if prompt is None:
            if not self.ends:
                raise ValueError("prompt: this model has no token that starts a document; give a text")
            return [self.ends[0]]
        if isinstance(prompt, str):
            prompt = [prompt]
        if not isinstance(prompt, list):
            raise ValueError("prompt: expected a text, a list of texts, a list of token ids, or a list of such lists")
        if prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        if len(prompt) > self.limits.choices:
            raise ValueError(
                f"prompt: {len(prompt)} texts times n or best_of must make 1 to {self.limits.choices} choices"
            )
        return [self._one(item) for item in prompt]

    def _one(self, item: Any) -> str | Ids:
        if isinstance(item, str):
            if len(item) > self.longest_text:
                raise ValueError(
                    f"prompt: {len(item)} characters leave no room in the context of {self.context} tokens"
                )
            if any("\ud800" <= letter <= "\udfff" for letter in item):
                raise ValueError("prompt: holds a lone surrogate, which is no character")
            return item
        if not isinstance(item, list):
            raise ValueError("prompt: expected a text, a list of texts, a list of token ids, or a list of such lists")
        if len(item) > self.context:
            raise ValueError(f"prompt: {len(item)} tokens leave no room in the context of {self.context}; shorten it")
        if not all(type(token) is int for token in item):
            raise ValueError("prompt: a list of token ids holds something that is none")
        return item

    def _params(self, asked: CompletionRequest) -> list[SamplingParams]:
        """Of each candidate of one prompt."""
        bias = {}
        for name, value in asked.logit_bias.items():
            if not name.isdecimal() or len(name) > 9:
                raise ValueError(f"logit_bias: {name[:20]!r} is no token id")
            bias[int(name)] = value
        # The best answer is told by its log-probability per token.
        scored = 0 if asked.logprobs is None and asked.candidates > asked.n else asked.logprobs
        common = SamplingParams(
            asked.max_tokens,
            asked.temperature,
            asked.top_k,
            asked.top_p,
            seed=asked.seed,
            stop=self.ends,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=bias,
            logprobs=scored,
            depth=None if asked.depth is None else DepthPolicy.parse(asked.depth),
            gates=asked.return_scores,
            prompt_logprobs=not asked.max_tokens or (asked.echo and asked.logprobs is not None),
        )
        return [replace(common, stream=i) for i in range(asked.candidates)]
