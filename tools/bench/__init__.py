"""Benchmarks behind `quire bench`: a module each, with `add_arguments` and `run`.

Shared parts: report.py (JSON, table, plot), engine_run.py (an engine fed token ids), trace.py,
models.py. Methods are those of data/peers_h200.json, so that figures can stand beside it.
"""
