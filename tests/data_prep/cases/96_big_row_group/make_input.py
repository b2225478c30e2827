"""Writes a.parquet: 60 MB of text in one row group."""

from pathlib import Path

import pyarrow
from pyarrow import parquet

from data_prep.synthetic import synthetic_documents

base = list(synthetic_documents(500, seed=3))
texts = [f"{number} {base[number % 500]} {base[(number * 7 + 3) % 500]}" for number in range(40_000)]
table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())})
path = Path(__file__).with_name("a.parquet")
parquet.write_table(table, path, row_group_size=10**9, compression="none", use_dictionary=False)
