"""Generate text from a checkpoint: one prompt, a file of prompts, or a conversation with the terminal.

python -m model.inference.generate --checkpoint DIR --prompt TEXT | --prompts FILE | (neither: interactive)

With --output each answer is written when it ends, as one line of JSON with the number of its prompt's line, so that a
batch that was interrupted goes on with --resume. Colours' legend and throughput go to stderr in pipes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tokenizers import Tokenizer
from transformers.utils.logging import disable_progress_bar

from model.inference.engine import Engine
from model.inference.policy import FORMS, DepthPolicy
from model.inference.sampling import SamplingParams
from model.inference.scheduler import Request
from model.inference.text import TextStream, end_of_text, load_checkpoint, pieces

# From one recursion to many: cold to warm.
COLOURS = ("bright_black", "blue", "cyan", "green", "yellow", "red", "magenta")
FIELDS = ("max_tokens", "temperature", "top_k", "top_p", "seed")
RESULTS = {"line", "text", "tokens", "prompt_depths", "depths", "finished", "error"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.inference.generate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="from_pretrained folder with tokenizer.json")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, or .jsonl with `prompt` in each line, optionally sampling fields and a `depth` of its "
        "own, and others, which the output repeats; - is stdin",
    )
    add("--output", metavar="FILE", help="one line of JSON per prompt as it ends: text, tokens, depths, why it ended")
    add(
        "--resume",
        action="store_true",
        help="go on with an --output that exists: what it holds is not done again",
    )
    add(
        "--too-long",
        choices=("error", "skip", "cut"),
        default="error",
        help="prompts that leave no room in the context: end with their line's number (default), leave them out with a "
        "note in the output, or keep their end, with room for --max-tokens",
    )
    add("--max-tokens", type=int, default=64, help="most tokens to generate (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int, default=0, help="0 keeps every token (default)")
    add("--top-p", type=float, default=1.0, help="1 keeps every token (default)")
    add("--seed", type=int, help="of each prompt's random numbers; left out: drawn")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add(
        "--speculate",
        type=_drafts,
        metavar="EXIT[:TOKENS]",
        help="draft so many tokens (default 4) behind this exit, or this recursion of a model without routing, and "
        "check them at full depth: greedy decoding, token for token, one prompt after another; tells acceptance and "
        "FLOPs",
    )
    add_engine_arguments(parser)
    return parser


def _drafts(text: str) -> tuple[int, int]:
    exit, _, draft = text.partition(":")
    if not (exit.isdecimal() and (draft or "4").isdecimal()):
        raise argparse.ArgumentTypeError(f"expected EXIT or EXIT:TOKENS, as in 1:4, got {text!r}")
    return int(exit), int(draft or 4)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that serves a checkpoint."""
    add = parser.add_argument
    add("--depth", default="adaptive", help=f"recursions per token: {FORMS} (default: adaptive, the router decides)")
    add("--max-batch", type=int, default=32, help="requests that run at once (default %(default)s)")
    add("--kv-tokens", type=int, default=16384, help="tokens that keys and values are held for (default %(default)s)")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, or a folder with one, in place of the checkpoint's")
    kinds = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=kinds, help="auto: as saved; 16 bits as float32 where they are slow")
    add("--device", help="default: an accelerator if there is one")


def load_engine(options: argparse.Namespace, **limits: Any) -> tuple[Engine, Tokenizer]:
    """Engine and tokenizer as the options say. Raises ValueError."""
    policy = DepthPolicy.parse(options.depth)
    model, tokenizer = load_checkpoint(options.checkpoint, options.dtype, options.device, options.tokenizer)
    sizes = {"max_batch": options.max_batch, "kv_tokens": options.kv_tokens}
    return Engine(model, depth=policy, **sizes, **limits), tokenizer


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Prompts of a file, each with `prompt`, its `line`, and perhaps other fields. A line ends with \\n, or \\r\\n.

    Raises ValueError naming file and line.
    """
    try:
        content = sys.stdin.read() if path == "-" else Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(content.removeprefix("\ufeff").split("\n"), 1):
        line = text.removesuffix("\r")
        if not line.strip():
            continue
        row = _record(f"{path}:{number}", line) if path.endswith(".jsonl") else {"prompt": line}
        rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path}: holds no prompts")
    return rows


def _record(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where}: expected an object with a text `prompt`")
    taken = sorted(set(row) & RESULTS)
    if taken:
        raise ValueError(f"{where}: {taken[0]} is a field of the output; give it another name")
    try:
        SamplingParams(**{name: row[name] for name in FIELDS if name in row})
        depth_of(row)
    except (TypeError, ValueError) as error:
        fault = error if isinstance(error, ValueError) else f"sampling fields of the wrong type: {error}"
        raise ValueError(f"{where}: {fault}") from None
    return row


def depth_of(row: dict[str, Any]) -> DepthPolicy | None:
    """The depth policy that a prompt brings along. Raises ValueError."""
    if row.get("depth") is None:
        return None
    if not isinstance(row["depth"], str):
        raise ValueError(f"depth: expected {FORMS}, got {row['depth']!r}")
    return DepthPolicy.parse(row["depth"])


class Results:
    """The output of a batch: a line of JSON for each prompt, written when its answer ends."""

    def __init__(self, path: str, rows: Sequence[dict[str, Any]], resume: bool):
        self.path, self.done = Path(path), set[int]()
        if not self.path.parent.is_dir():
            raise ValueError(f"--output: no folder {self.path.parent}")
        if self.path.exists() and not self.path.is_file() and not self.path.is_char_device():
            raise ValueError(f"--output: {path} is no file")
        if self.path.is_file() and self.path.stat().st_size and not resume:
            raise ValueError(f"--output: {path} exists; add --resume to go on with it, or name another file")
        if resume and self.path.is_file():
            self._take_up(rows)
        try:
            self.file = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ValueError(f"--output: {path} cannot be written: {error}") from None

    def _take_up(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note what is done already; a last line that was cut short is taken off."""
        prompts = {row["line"]: row["prompt"] for row in rows}
        kept = self.path.read_bytes()
        whole = kept[: kept.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                place, prompt = row["line"], row["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"--output: {self.path}:{number} is no result of this command") from None
            if prompts.get(place) != prompt:
                raise ValueError(f"--output: {self.path}:{number} answers another prompt than line {place} has now")
            self.done.add(place)
        if len(whole) < len(kept):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()


class Session:
    """An engine, its tokenizer, and the sampling options of the command line."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: argparse.Namespace):
        self.engine, self.tokenizer, self.stop = engine, tokenizer, options.stop
        self.defaults = {name: getattr(options, name) for name in FIELDS}
        self.ends = end_of_text(engine.model)

    def submit(self, prompt: str, cut: bool = False, **fields: Any) -> tuple[Request, TextStream]:
        """Queue a prompt. cut: keep the end of one that leaves no room for the answer. Raises ValueError."""
        params = SamplingParams(**(self.defaults | fields), stop=self.ends)
        try:
            ids = self.tokenizer.encode(prompt).ids
        except (TypeError, UnicodeEncodeError):
            raise ValueError("prompt: holds a lone surrogate, which is no character") from None
        if cut and len(ids) > self.engine.context:
            ids = ids[-max(1, self.engine.context - params.max_tokens) :]
        return self.engine.submit(ids, params), TextStream(self.tokenizer, self.stop)

    def run(self, live: list[tuple[Request, TextStream]], show=lambda: None, ended=lambda order: None) -> None:
        """Serve the requests to their end; `show` is called after every step, `ended` as each ends."""
        streams = {request.order: stream for request, stream in live}
        while not self.engine.idle:
            for event in self.engine.step():
                stream = streams[event.request.order]
                stream.feed(event.tokens, bool(event.finished))
                if stream.stopped and not event.finished:
                    self.engine.cancel(event.request)
                if stream.stopped or event.finished:
                    ended(event.request.order)
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


def answer_all(
    session: Session, rows: list[dict[str, Any]], results: Results | None, console: Console, too_long: str = "error"
) -> None:
    """Serve all the prompts; print each answer and write it to `results` as it ends."""
    routed = session.engine.method.gates > 0
    aside = console if console.is_terminal else Console(stderr=True, highlight=False, soft_wrap=True)
    live: dict[int, tuple[dict[str, Any], Request, TextStream]] = {}
    for row in rows:
        if results is not None and row["line"] in results.done:
            continue
        fields = {name: row[name] for name in FIELDS if row.get(name) is not None}
        try:
            request, stream = session.submit(row["prompt"], too_long == "cut", depth=depth_of(row), **fields)
        except ValueError as error:
            where = f"line {row['line']}: " if len(rows) > 1 else ""
            if too_long != "skip" or "no room" not in str(error):
                raise ValueError(f"{where}{error}") from None
            aside.print(f"{where}skipped: {error}", markup=False)
            if results is not None:
                results.write(row | {"text": None, "finished": "skipped", "error": str(error)})
            continue
        live[request.order] = row, request, stream
    if routed:
        aside.print(session.legend())

    def ended(order: int) -> None:
        row, request, stream = live[order]
        console.print(session.coloured(request) if routed else Text(row["prompt"] + stream.shown))
        if results is not None:
            results.write(result_of(row, request, stream, routed))

    began = time.perf_counter()
    session.run([(request, stream) for _, request, stream in live.values()], ended=ended)
    seconds = time.perf_counter() - began
    made = sum(len(request.tokens) for _, request, _ in live.values())
    if len(rows) > 1:
        speed = f"{made / seconds:.1f} tokens/s" if live else "all done before"
        aside.print(f"{len(live)} prompts, {made} tokens in {seconds:.1f} s: {speed}", markup=False)


def speculate_all(
    options: argparse.Namespace, rows: list[dict[str, Any]], results: Results | None, console: Console
) -> None:
    """Answer prompts by self-speculation, and tell what it took."""
    refused = [
        (not rows, "--prompt", "none given; --speculate answers prompts, and holds no conversation"),
        (
            options.temperature != 0 or any(row.get("temperature") for row in rows),
            "--temperature",
            "above 0 draws tokens; --speculate is greedy, give 0",
        ),
        (options.depth != "adaptive", "--depth", f"{options.depth} is no full depth, which --speculate checks at"),
        (any(row.get("depth") for row in rows), "depth", "of a prompt is no full depth, which --speculate checks at"),
        (bool(options.stop), "--stop", "ends a text in the middle of a draft; leave it out"),
    ]
    for wrong, name, fault in refused:
        if wrong:
            raise ValueError(f"{name}: {fault}")
    model, tokenizer = load_checkpoint(options.checkpoint, options.dtype, options.device, options.tokenizer)
    from model.inference.speculate import Speculated, Speculator  # brings the model: not for the arguments alone

    speculator = Speculator(model, *options.speculate)
    ends = [token for (token,) in end_of_text(model)]
    total = Speculated()
    for row in rows:
        if results is not None and row["line"] in results.done:
            continue
        found = speculator(tokenizer.encode(row["prompt"]).ids, row.get("max_tokens") or options.max_tokens, ends)
        text = tokenizer.decode(found.tokens)
        console.print(Text(row["prompt"] + text))
        if results is not None:
            results.write(row | {"text": text, "tokens": found.tokens, "finished": found.finished})
        for name in ("rounds", "drafted", "accepted", "flops", "plain"):
            setattr(total, name, getattr(total, name) + getattr(found, name))
    aside = console if console.is_terminal else Console(stderr=True, highlight=False, soft_wrap=True)
    ratio = f", {total.flops / total.plain:.2f} of decoding at full depth" if total.plain else ""
    aside.print(
        f"drafted {total.drafted} tokens in {total.rounds} rounds, {total.acceptance:.1%} accepted; {total.flops:.4g} "
        f"FLOPs (exact){ratio}",
        markup=False,
    )


def result_of(row: dict[str, Any], request: Request, stream: TextStream, routed: bool) -> dict[str, Any]:
    """A line of the output: the prompt's record and what became of it."""
    start = len(request.prompt)
    return row | {
        "text": stream.shown,
        "tokens": request.tokens,
        "prompt_depths": request.depths[:start] if routed else None,
        "depths": request.depths[start:] if routed else None,  # the last token has not been run, so it has none
        "finished": "stop" if stream.stopped else request.finished,
    }


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
        given = [{"prompt": text, "line": i} for i, text in enumerate(options.prompt or (), 1)]
        rows = read_prompts(options.prompts) if options.prompts else given
        SamplingParams(**{name: getattr(options, name) for name in FIELDS})
        if options.output and not rows:
            raise ValueError("--output: needs --prompt or --prompts")
        results = Results(options.output, rows, options.resume) if options.output else None
        if options.speculate:
            speculate_all(options, rows, results, Console(highlight=False, soft_wrap=True))
            return
        engine, tokenizer = load_engine(options)
        session, console = Session(engine, tokenizer, options), Console(highlight=False, soft_wrap=True)
        if rows:
            answer_all(session, rows, results, console, options.too_long)
        else:
            converse(session, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written: what ends Python must not end it otherwise
    except KeyboardInterrupt:
        sys.exit(130)
