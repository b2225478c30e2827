"""Conversations: the fields of OpenAI's chat completions, and the template that turns messages into a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from model.inference.protocol import Asked

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields of OpenAI's chat completions that are not offered -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class ChatRequest(Asked):
    """OpenAI's fields of a chat completion, and this server's own. Those of `NEUTRAL` are refused by name unless they
    ask for nothing; the role `developer` is another name of `system`."""

    messages: Any
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    safety_identifier: str | None = None

    def checked(self) -> ChatRequest:
        """Self. Raises ValueError where fields do not fit together."""
        super().checked()
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: another number than max_completion_tokens; give one of them")
        return self


def without_neutral(content: dict[str, Any]) -> dict[str, Any]:
    """The fields but for those of `NEUTRAL`. Raises ValueError for one of these that asks for something."""
    for name, values in NEUTRAL.items():
        value = content.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            raise ValueError(f"{name}: not offered by this server; leave it out")
    return {name: value for name, value in content.items() if name not in NEUTRAL}


def read_messages(messages: Any, most: int, characters: int) -> list[dict[str, str]]:
    """Messages with a role and a text each. most: of them; characters: of all texts. Raises ValueError."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= most:
        raise ValueError(f"messages: expected a list of 1 to {most} messages")
    read = [_message(i, message) for i, message in enumerate(messages)]
    if sum(len(message["content"]) for message in read) > characters:
        raise ValueError("messages: of more characters than fit into the context; shorten them")
    return read


def _message(i: int, message: Any) -> dict[str, str]:
    where = f"messages: {i}"
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}: role: expected one of {', '.join(ROLES)}")
    extra = [name for name in given if name not in ("role", "content", "name")]
    if extra:
        raise ValueError(f"{where}: {extra[0][:100]}: not offered by this server; leave it out")
    content = given.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise ValueError(f"{where}: content: expected a text, or a list of parts of type text")
    named = {"name": given["name"]} if isinstance(given.get("name"), str) else {}
    if any("\ud800" <= letter <= "\udfff" for letter in content + named.get("name", "")):
        raise ValueError(f"{where}: holds a lone surrogate, which is no character")
    return {"role": ROLES[role], "content": content, **named}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template. special: texts of the tokenizer's special tokens by name, as `eos_token`."""

    source: str
    special: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """That of a tokenizer's folder, in a file of its own or in the tokenizer's description; None without one."""
        described, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        values = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        source = alone.read_text(encoding="utf-8") if alone.is_file() else values.get("chat_template")
        if isinstance(source, list):  # several by name, as earlier versions of transformers write them
            source = {one.get("name"): one.get("template") for one in source}.get("default")
        if not source:
            return None
        special = {}
        for name, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                special[name] = text
        return cls(source, special)

    def prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the model continues with its answer. Raises ValueError where the template refuses."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                [list(messages)], chat_template=self.source, add_generation_prompt=True, **self.special
            )
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from None
        return rendered[0][0]
