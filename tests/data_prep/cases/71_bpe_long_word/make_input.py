"""Writes a.jsonl: ordinary documents, and one of 300 KB of letters without white space."""

import json
from pathlib import Path

import numpy as np

from data_prep.synthetic import synthetic_documents

letters = np.random.default_rng(0).choice(np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8), 300_000)
texts = [*synthetic_documents(60, seed=5), letters.tobytes().decode()]
Path(__file__).with_name("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
