"""Bodies of requests to what the engine takes.

A body is taken apart outside the event loop, and whatever can be large is measured before anything else is done with
it: a request that will be refused costs little.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import ValidationError
from tokenizers import Tokenizer

from model.inference.chat import ChatRequest, ChatTemplate, read_messages, without_neutral
from model.inference.policy import DepthPolicy
from model.inference.protocol import Asked, CompletionRequest, Ids, Limits, Prepared, ServiceError
from model.inference.sampling import SamplingParams

LARGE = 1 << 16  # bytes of a body that is counted before it is parsed, which nothing interrupts
_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
AskedT = TypeVar("AskedT", bound=Asked)


class Reader:
    """Turns bodies into requests for one model; from any thread. ends: token sequences that end a text; template: of
    conversations, None where the tokenizer has none."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        ends: list[Ids],
        limits: Limits,
        template: ChatTemplate | None = None,
    ):
        self.tokenizer, self.context, self.ends, self.limits = tokenizer, context, ends, limits
        self.template = template
        # No text of more characters fits into the context.
        self.longest_text = context * max(map(len, tokenizer.get_vocab()), default=1)

    def read(self, body: bytes | bytearray) -> Prepared:
        """A completion's. Raises ServiceError naming the field that is wrong."""
        content = self._content(body)
        try:
            return self._prepare(self._checked(content, CompletionRequest))
        except ValueError as error:
            raise ServiceError(400, str(error)) from None

    def read_chat(self, body: bytes | bytearray) -> Prepared:
        """A chat completion's, as the completion of what the template makes of its messages. Raises ServiceError."""
        if self.template is None:
            raise ServiceError(400, "messages: this model's tokenizer has no chat template; use /v1/completions")
        content = self._content(body)
        try:
            return self._prepare_chat(self.template, content)
        except ValueError as error:
            raise ServiceError(400, str(error)) from None

    def _content(self, body: bytes | bytearray) -> dict[str, Any]:
        try:
            self._counted(body)
            content = json.loads(body)
        except ServiceError:
            raise
        except (ValueError, RecursionError) as error:
            raise ServiceError(400, f"body: no JSON object: {error}") from None
        if not isinstance(content, dict):
            raise ServiceError(400, "body: expected a JSON object")
        return content

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

    def _checked(self, content: dict[str, Any], kind: type[AskedT]) -> AskedT:
        unknown = [name for name in content if name not in kind.model_fields]
        if unknown:
            raise ValueError(f"{unknown[0][:100]}: no field of this server's completions")
        self._bounded(content)
        try:
            asked = kind.model_validate(content)
        except ValidationError as error:
            faults = {".".join(map(str, e["loc"][:1])) or "body": e["msg"] for e in error.errors()}
            raise ValueError("; ".join(f"{name}: {text}" for name, text in faults.items())) from None
        asked.checked()
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

    def _prepare(self, asked: CompletionRequest, turn: Sequence[Ids] = ()) -> Prepared:
        """turn: what ends an answer beside the model's own ends."""
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
        return Prepared(asked, prompts, texts, self._params(asked, [*self.ends, *turn]))

    def _prepare_chat(self, template: ChatTemplate, content: dict[str, Any]) -> Prepared:
        asked = self._checked(without_neutral(content), ChatRequest)
        messages = read_messages(asked.messages, self.limits.messages, self.longest_text)
        text = template.prompt(messages)
        if len(text) > self.longest_text:
            raise ValueError("messages: of more characters than fit into the context; shorten them")
        # The template writes special tokens itself.
        ids = self.tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
        room = self.context - len(ids)
        if room < 1 or not ids:
            raise ValueError(f"messages: {len(ids)} tokens leave no room in the context of {self.context}")
        fields = {name: getattr(asked, name) for name in Asked.model_fields}
        scored = (asked.top_logprobs or 0) if asked.logprobs else None
        most = min(asked.max_completion_tokens or asked.max_tokens or room, room)
        end = self.tokenizer.token_to_id(template.special.get("eos_token", ""))
        turn = [] if end is None or [end] in self.ends else [[end]]
        completion = CompletionRequest.model_construct(prompt=ids, logprobs=scored, max_tokens=most, **fields)
        return self._prepare(completion, turn)

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

    def _params(self, asked: CompletionRequest, ends: list[Ids]) -> list[SamplingParams]:
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
            stop=ends,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=bias,
            logprobs=scored,
            depth=None if asked.depth is None else DepthPolicy.parse(asked.depth),
            gates=asked.return_scores,
            prompt_logprobs=not asked.max_tokens or (asked.echo and asked.logprobs is not None),
        )
        return [replace(common, stream=i) for i in range(asked.candidates)]
