"""Writes a.jsonl: ordinary documents, and one of 100,000 of alternating combining marks."""

import json
from pathlib import Path

from data_prep.synthetic import synthetic_documents

texts = [*synthetic_documents(60, seed=5), "a" + "\u0301\u0323" * 50_000]
Path(__file__).with_name("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
