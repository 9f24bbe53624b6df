"""Benchmarks: `python -m benchmarks.run` measures, `python -m benchmarks.report` turns what it wrote into tables and figures."""
