"""Serve a checkpoint over HTTP as OpenAI's completions, and chat completions where its tokenizer has a template.

python -m model.inference.serve --checkpoint DIR [--host 127.0.0.1] [--port 8000]

`model/inference/app.py` is what answers. It brings a web framework along, which `--help` does not wait for.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from model.inference.generate import add_engine_arguments, load_engine
from model.inference.protocol import Limits

KEY = "MOR_API_KEY"


def model_name(checkpoint: str) -> str:
    """What clients call a checkpoint: its folder's name, its run's for the final model; never a path."""
    path = Path(checkpoint).resolve()
    return path.parent.name if path.name == "final" else path.name


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.inference.serve", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="from_pretrained folder with tokenizer.json")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000)
    add("--allowed-host", action="append", default=[], metavar="NAME", help="a further name that Host may hold")
    add(
        "--api-key",
        metavar="VARIABLE",
        help=f"environment variable with the key that clients must send (default: {KEY}, if it is set)",
    )
    add("--model-name", help="name that clients ask for (default: the run's or folder's name)")
    add("--max-waiting", type=int, default=256, help="requests that may wait before others get status 429")
    add("--max-connections", type=int, default=Limits.connections, help="connections at once (default %(default)s)")
    add_engine_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a user's mistake ends with exit code 2 and one message."""
    options = make_parser().parse_args(arguments)
    import uvicorn

    from model.inference.app import build_app
    from model.inference.chat import ChatTemplate
    from model.inference.connection import guarded, is_loopback

    disable_progress_bar()
    try:
        key = os.environ.get(options.api_key or KEY)
        if options.api_key and not key:
            raise ValueError(f"--api-key: the environment variable {options.api_key} is not set")
        engine, tokenizer = load_engine(options, max_waiting=options.max_waiting)
        described = Path(options.tokenizer or options.checkpoint)
        template = ChatTemplate.of(described if described.is_dir() else described.parent)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    local = is_loopback(options.host)
    if not local:
        guard = "it asks for a key" if key else f"anyone who reaches it can use it; set {KEY}"
        print(
            f"warning: --host {options.host}: not this machine alone, and without encryption; {guard}", file=sys.stderr
        )
    limits = Limits(connections=options.max_connections)
    # Behind another address a name of the network is as good as any, unless names are given.
    hosts = options.allowed_host if local or options.allowed_host else None
    name = options.model_name or model_name(options.checkpoint)
    app = build_app(engine, tokenizer, name, limits, hosts, key or None, template)
    # What stands now stays for good; looked through at every collection it would stop everyone for a second.
    gc.collect()
    gc.freeze()
    # A thread that computes keeps the interpreter's lock for so long where another asks for it: 5 ms unless set, which
    # the event loop would wait at each of its reads and writes.
    sys.setswitchinterval(0.0005)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        http=guarded(limits),
        ws="none",
        timeout_graceful_shutdown=limits.patience,
    )


if __name__ == "__main__":
    main()
