"""The report of any set of runs; it needs nothing of training.

Reads each run's `run.json` and `metrics.jsonl` and nothing else of it; writes `results.json`, `report.md`,
`report.html` (one self-contained file) and PNG figures, and prints the table. Every number that a table shows is in
`results.json`.

    runs                                   what was trained
    analysis, controls, sweep, checklist   what may be said of it
    summary                                all of it as numbers: results.json
    blocks, figures, fonts, document       as words, tables and pictures
    write                                  as files, in the terminal and in W&B
"""
