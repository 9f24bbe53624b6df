"""`python -m benchmarks.run` measures, `python -m benchmarks.report` turns it into tables and figures."""
