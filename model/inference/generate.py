"""Generate text from a checkpoint: one prompt, a file of prompts, or a conversation with the terminal.

python -m model.inference.generate --checkpoint DIR --prompt TEXT | --prompts FILE | (neither: interactive)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tokenizers import Tokenizer
from transformers.utils.logging import disable_progress_bar

from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from model.inference.scheduler import DepthPolicy, Request
from model.inference.text import TextStream, end_of_text, load_checkpoint, pieces

# From one recursion to many: cold to warm.
COLOURS = ("bright_black", "blue", "cyan", "green", "yellow", "red", "magenta")
FIELDS = ("max_tokens", "temperature", "top_k", "top_p", "seed")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.inference.generate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="from_pretrained folder with tokenizer.json")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, or .jsonl with `prompt` and optionally sampling fields in each line; - is stdin",
    )
    add("--output", metavar="FILE", help="write one JSON object per prompt: text, tokens, depths, why it ended")
    add("--max-tokens", type=int, default=64, help="most tokens to generate (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int, default=0, help="0 keeps every token (default)")
    add("--top-p", type=float, default=1.0, help="1 keeps every token (default)")
    add("--seed", type=int, help="of each prompt's random numbers; left out: drawn")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add_engine_arguments(parser)
    return parser


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that serves a checkpoint."""
    add = parser.add_argument
    add("--depth", default="adaptive", help="adaptive (the router decides), uniform:N or cap:N recursions per token")
    add("--max-batch", type=int, default=32, help="requests that run at once (default %(default)s)")
    add("--kv-tokens", type=int, default=16384, help="tokens that keys and values are held for (default %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", help="default: an accelerator if there is one")


def load_engine(options: argparse.Namespace, **limits: Any) -> tuple[Engine, Tokenizer]:
    """Engine and tokenizer as the options say. Raises ValueError."""
    policy = DepthPolicy.parse(options.depth)
    model, tokenizer = load_checkpoint(options.checkpoint, options.dtype, options.device)
    sizes = {"max_batch": options.max_batch, "kv_tokens": options.kv_tokens}
    return Engine(model, depth=policy, **sizes, **limits), tokenizer


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Prompts of a file, each with `prompt` and perhaps sampling fields. Raises ValueError naming file and line."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            rows.append({"prompt": line})
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{path}:{number}: expected an object with a text `prompt`")
        unknown = sorted(set(row) - {"prompt", *FIELDS})
        if unknown:
            raise ValueError(f"{path}:{number}: unknown field {unknown[0]!r}; known: prompt, {', '.join(FIELDS)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no prompts")
    return rows


class Session:
    """An engine, its tokenizer, and the sampling options of the command line."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: argparse.Namespace):
        self.engine, self.tokenizer, self.stop = engine, tokenizer, options.stop
        self.defaults = {name: getattr(options, name) for name in FIELDS}
        self.ends = end_of_text(engine.model)

    def submit(self, prompt: str, **fields: Any) -> tuple[Request, TextStream]:
        try:
            params = SamplingParams(**(self.defaults | fields), stop=self.ends)
        except TypeError as error:
            raise ValueError(f"sampling fields of the wrong type: {error}") from None
        request = self.engine.submit(self.tokenizer.encode(prompt).ids, params)
        return request, TextStream(self.tokenizer, self.stop)

    def run(self, live: list[tuple[Request, TextStream]], show=lambda: None) -> None:
        """Serve the requests to their end; `show` is called after every step."""
        streams = {request.order: stream for request, stream in live}
        while not self.engine.idle:
            for event in self.engine.step():
                stream = streams[event.request.order]
                stream.feed(event.tokens, bool(event.finished))
                if stream.stopped and not event.finished:
                    self.engine.cancel(event.request)
            show()

    def coloured(self, request: Request, whole: bool = True) -> Text:
        """Prompt and answer, each token in the colour of the recursions that it executed."""
        text = Text()
        ids = request.text if whole else request.text[: request.done]
        depths = request.depths + [None] * (len(ids) - len(request.depths))
        for i, (piece, depth) in enumerate(zip(pieces(self.tokenizer, ids), depths, strict=False)):
            colour = COLOURS[min(depth, len(COLOURS) - 1)] if depth is not None else ""
            text.append(piece, style=f"{colour} underline" if i < len(request.prompt) else colour)
        return text

    def legend(self) -> Text:
        """What the colours mean."""
        text = Text("recursions: ")
        for depth in range(self.engine.method.gates + 1):
            text.append(f" {depth} ", style=COLOURS[min(depth, len(COLOURS) - 1)])
        return text.append("  (prompt underlined)")


def answer_all(session: Session, rows: list[dict[str, Any]], output: str | None, console: Console) -> None:
    """Serve all the prompts, print the answers, write `output`."""
    live = [session.submit(row["prompt"], **{k: v for k, v in row.items() if k != "prompt"}) for row in rows]
    session.run(live)
    routed = session.engine.method.gates > 0
    if routed:
        console.print(session.legend())
    lines = []
    for row, (request, stream) in zip(rows, live, strict=True):
        console.print(session.coloured(request) if routed else Text(row["prompt"] + stream.shown))
        depths = request.depths[len(request.prompt) :] if routed else None
        finished = "stop" if stream.stopped else request.finished
        lines.append(
            {
                "prompt": row["prompt"],
                "text": stream.shown,
                "tokens": request.tokens,
                "prompt_depths": request.depths[: len(request.prompt)] if routed else None,
                "depths": depths,  # the last token has not been run, so it has none
                "finished": finished,
            }
        )
    if output:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(output).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether ctrl-C was pressed, to be asked between steps: an engine interrupted within one could not go on."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def converse(session: Session, console: Console) -> None:
    """Read prompts from the terminal until it ends, and show each answer while it is made."""
    console.print(
        session.legend(), "\nA prompt a line; ctrl-C ends an answer, an empty line or ctrl-D the conversation."
    )
    while True:
        try:
            prompt = console.input("> ")
        except EOFError:
            return
        if not prompt:
            return
        try:
            request, stream = session.submit(prompt)
        except ValueError as error:
            console.print(f"error: {error}", markup=False)
            continue
        with Live(console=console, refresh_per_second=8) as view, interrupts() as interrupted:

            def show(request=request, view=view, interrupted=interrupted) -> None:
                view.update(session.coloured(request, False))
                if interrupted():
                    session.engine.cancel(request)

            session.run([(request, stream)], show)
            view.update(session.coloured(request))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a user's mistake ends with exit code 2 and one message."""
    options = make_parser().parse_args(arguments)
    disable_progress_bar()
    try:
        rows = read_prompts(options.prompts) if options.prompts else [{"prompt": text} for text in options.prompt or ()]
        SamplingParams(**{name: getattr(options, name) for name in FIELDS})
        if options.output and not Path(options.output).parent.is_dir():
            raise ValueError(f"--output: no folder {Path(options.output).parent}")
        engine, tokenizer = load_engine(options)
        session, console = Session(engine, tokenizer, options), Console(highlight=False, soft_wrap=True)
        answer_all(session, rows, options.output, console) if rows else converse(session, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
